"""Credentials planted as canaries, and everything a run leaves or says searched for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.lanes.commands import Place, Said, files_below, run_words, spellings
from tests.lanes.fault_proxy import FaultProxy
from tests.lanes.faults import FORBIDDEN, INTERNAL_ERROR, SLOW_DOWN, Cut, Rule
from tests.lanes.seaweedfs import SeaweedFS

pytestmark = [pytest.mark.lane, pytest.mark.timeout(600)]

ACCESS_KEY = "ZQCANARYACCESSKEYKX1"
SECRET_KEY = "Zq+canary/secret=key0123456789abcdefghKx"
TOKEN = "Zq//canary+session=token0123456789" * 3
SIGNATURE = "Zqcanarysignature0123456789abcdefKx"


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[SeaweedFS]:
    """A server whose credentials are canaries, with the inputs in its bucket."""
    folder = tmp_path_factory.mktemp("canary")
    with SeaweedFS(folder, access_key=ACCESS_KEY, secret_key=SECRET_KEY) as server:
        server.make_bucket("kept")
        for path in tiny_inputs.iterdir():
            server.put("kept", f"in/{path.name}", path.read_bytes())
        yield server


def found(secrets: Iterable[str], *places: Iterable[tuple[str, bytes]]) -> list[str]:
    """Where any of `secrets` stands, in any spelling."""
    wanted = {spelling for secret in secrets for spelling in spellings(secret)}
    return [
        name for place in places for name, data in place if any(each in name.encode() + data for each in wanted)
    ]


def told(said: Said) -> list[tuple[str, bytes]]:
    return [("stdout", said.stdout.encode()), ("stderr", said.stderr.encode())]


def words_to(out: str, place: Place) -> tuple[str, ...]:
    return run_words("s3://kept/in/recipe.yaml", "s3://kept/in/manifest.yaml", out, place)


def test_the_search_finds_what_it_looks_for():
    told = [("a", b"x" + spelling + b"y") for secret in (SECRET_KEY, TOKEN) for spelling in spellings(secret)]
    assert found([SECRET_KEY, TOKEN], told) == ["a"] * len(told)
    assert found([SECRET_KEY], [(SECRET_KEY, b"")]) == [SECRET_KEY]
    assert found([ACCESS_KEY], [("a", b"something else")]) == []


@pytest.mark.parametrize("address", ["inline", "local"])
def test_no_credential_is_in_anything_a_run_leaves(
    canary: SeaweedFS, tmp_path: Path, short_folder: Path, address: str
):
    """In OUT, its logs, the private dir, scratch disk, what is said, and Ray's own session folder."""
    with FaultProxy(canary.url, [Rule(fault=INTERNAL_ERROR, share=0.2), Rule(fault=Cut(), share=0.1)]) as proxy:
        environment = canary.environment_at(proxy.url, RAY_TMPDIR=str(short_folder))
        place = Place(work=tmp_path / "work", environment=environment)
        said = place.call(*words_to(f"s3://kept/out-{address}", place), "--address", address).expect(0)
        assert proxy.seen(faults=True)
    assert (address == "local") == any(short_folder.rglob("*.log"))
    left = canary.tree("kept", f"out-{address}")
    assert any(name.startswith("logs/") for name in left)
    assert found([ACCESS_KEY, SECRET_KEY], told(said), left.items()) == []
    assert found([ACCESS_KEY, SECRET_KEY], files_below(tmp_path), files_below(short_folder)) == []


@pytest.mark.parametrize("fault", [FORBIDDEN, SLOW_DOWN], ids=["refused", "away"])
def test_no_credential_is_told_by_a_run_that_fails(canary: SeaweedFS, tmp_path: Path, fault: object):
    """The session token goes with every request, and the proxy refuses them all."""
    with FaultProxy(canary.url, [Rule(fault=fault)]) as proxy:
        environment = canary.environment_at(proxy.url, AWS_SESSION_TOKEN=TOKEN)
        place = Place(work=tmp_path / "work", environment=environment)
        said = place.call(*words_to("s3://kept/never", place)).expect(1)
        assert said.stderr.splitlines()[-1].startswith("error: can't ")
        assert proxy.seen(faults=True)
        assert found([ACCESS_KEY, SECRET_KEY, TOKEN], told(said), files_below(tmp_path)) == []


def test_a_session_token_goes_with_the_request_and_nowhere_else(canary: SeaweedFS, tmp_path: Path):
    """This server has no sessions and refuses the token; the refusal must not quote it."""
    environment = canary.environment_at(canary.url, AWS_SESSION_TOKEN=TOKEN)
    place = Place(work=tmp_path / "work", environment=environment)
    said = place.call(*words_to("s3://kept/never", place)).expect(1)
    assert "error: can't " in said.stderr
    assert found([ACCESS_KEY, SECRET_KEY, TOKEN], told(said), files_below(tmp_path)) == []


def test_credentials_in_a_url_are_refused_and_not_repeated(canary: SeaweedFS, tmp_path: Path):
    place = Place(work=tmp_path / "work", environment=canary.environment)
    said = place.call("manifest", "show", f"s3://{ACCESS_KEY}:{SIGNATURE}@kept/in/manifest.yaml")
    assert said.code in (1, 2)
    assert "error: " in said.stderr
    assert found([ACCESS_KEY, SIGNATURE], told(said)) == []


@pytest.fixture
def presigned(canary: SeaweedFS, tiny_inputs: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A local manifest of presigned URLs, and what of them must not be seen."""
    client, urls = canary.client(), []
    for path in sorted(tiny_inputs.glob("s-*.tar"))[:3]:
        place = {"Bucket": "kept", "Key": f"in/{path.name}"}
        urls.append(client.generate_presigned_url("get_object", Params=place, ExpiresIn=3600))
    manifest = tmp_path / "presigned.jsonl"
    manifest.write_text("".join(f'{{"url": "{url}"}}\n' for url in urls))
    queries = [url.partition("?")[2] for url in urls]
    signatures = [
        part.partition("=")[2] for query in queries for part in query.split("&") if "ignature=" in part
    ]
    assert len(signatures) == 3
    return manifest, [*queries, *signatures, ACCESS_KEY]


@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_the_query_of_a_presigned_url_is_kept_to_oneself(
    canary: SeaweedFS,
    presigned: tuple[Path, list[str]],
    tiny_inputs: Path,
    tmp_path: Path,
    purpose: str,
):
    """Not in OUT, run.json, provenance, logs, nor even in the private dir's table of links."""
    manifest, secrets = presigned
    place = Place(work=tmp_path / "work", environment=canary.environment)
    more = () if purpose == "anonymize" else ("--set", "purpose=augment", "--set", "seed=7")
    words = run_words(str(tiny_inputs / "recipe.yaml"), str(manifest), f"s3://kept/presigned-{purpose}", place)
    said = place.call(*words, *more).expect(0)
    left = canary.tree("kept", f"presigned-{purpose}")
    assert sum(name.endswith("_stats.json") for name in left) == 3
    assert found(secrets, told(said), left.items(), files_below(place.work)) == []


def test_a_presigned_url_that_fails_is_told_without_its_query(
    canary: SeaweedFS, presigned: tuple[Path, list[str]], tiny_inputs: Path, tmp_path: Path
):
    manifest, secrets = presigned
    manifest.write_text(manifest.read_text().replace("in/s-001.tar", "in/s-901.tar"))
    place = Place(work=tmp_path / "work", environment=canary.environment)
    words = run_words(str(tiny_inputs / "recipe.yaml"), str(manifest), "s3://kept/refused", place)
    said = place.call(*words, "--set", "purpose=augment", "--set", "seed=7").expect(3)
    assert "s-901.tar" in said.stdout
    checked = place.call("manifest", "check", str(manifest)).expect(1)
    assert "s-901.tar" in checked.stdout
    secrets = [secret for secret in secrets if secret]
    left: Mapping[str, bytes] = canary.tree("kept", "refused")
    assert found(secrets, told(said), told(checked), left.items(), files_below(place.work)) == []
