"""Jobs without a cluster: what is asked for, what is refused, and what an answer means."""

from __future__ import annotations

import dataclasses
import http.server
import json
import re
import shlex
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.cli import main
from boomerang_batch.cli.inputs import RunFlags, load_recipe
from boomerang_batch.cli.jobs import ending, state_of, submit
from boomerang_batch.cli.run import run
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.errors import BoomerangError, ConfigError, PrivateDirError
from boomerang_batch.run.jobs import access
from boomerang_batch.run.jobs.access import auth_headers, overruling_environment
from boomerang_batch.run.jobs.job import Job, is_id, newest, next_number, nth_id
from boomerang_batch.run.jobs.request import JobRequest, Wish, job_request
from tests import worlds

REMOTE = "s3://bucket/shards/s-{000..003}.tar"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BOOMERANG_SECRET", "RAY_JOB_HEADERS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def job(state: str = "RUNNING", code: int | None = None, **more) -> Job:
    return Job(**{"id": "bb-0123456789ab", "state": state, "metadata": {}, "driver_exit_code": code} | more)


def flags(**more) -> RunFlags:
    """The options of `run` where only `more` was given."""
    typed = parsed(["p", "m", "o"])
    return RunFlags(**{field.name: typed[field.name] for field in dataclasses.fields(RunFlags)} | more)


def wish(pipeline="demo-augment", manifest="demo", out="s3://bucket/out", **more) -> Wish:
    given_flags = flags(**more)
    return Wish(
        pipeline=str(pipeline), manifest=str(manifest), out=str(out), private_dir=given_flags.private_dir,
        limit=given_flags.limit, options=given_flags.words(),
        recipe=load_recipe(str(pipeline), given_flags.overrides), shards=load_manifest(str(manifest)),
    )  # fmt: skip


def request(*, shared: bool = False, done: int | None = None, **more) -> JobRequest:
    return job_request(wish(**more), shared=shared, done=done)


def words(asked: JobRequest) -> list[str]:
    """The arguments of `run` that the cluster's shell will see."""
    split = shlex.split(asked.entrypoint)
    assert split[:5] == ["exec", "python", "-m", "boomerang_batch", "run"]
    return split[5:]


def parsed(arguments: list[str]) -> dict:
    """What `run` makes of its arguments."""
    return run.make_context("run", list(arguments)).params


def manifest_of(folder: Path, *shards: str) -> Path:
    path = folder / "manifest.yaml"
    path.write_text(f"format_version: 1\nname: m\nshards: {json.dumps(shards)}\n")
    return path


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        worlds.recipe_text(Path("/models/tiny"), purpose="augment").replace(
            "/models/tiny", "shipped:demo/model"
        )
    )
    return path


@pytest.mark.parametrize(
    ("state", "code", "means"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("SUCCEEDED", None, 0),
        *(("FAILED", code, code) for code in (1, 2, 3, 4, 75)),
        ("STOPPED", None, 75),
        ("STOPPED", 0, 75),
        ("FAILED", -signal.SIGTERM, 75),
        ("FAILED", 128 + signal.SIGTERM, 75),
        ("FAILED", -signal.SIGKILL, 1),
        ("FAILED", 128 + signal.SIGKILL, 1),
        ("FAILED", 127, 1),
        ("FAILED", None, 1),
    ],
)
def test_a_job_ends_as_its_driver_did(state, code, means):
    assert job(state, code).exit_code == means
    assert job(state, code).ended == (means is not None)


def test_every_ending_is_told_apart():
    told = {ending(job("FAILED", code)) for code in (1, 2, 3, 75)} | {ending(job("SUCCEEDED", 0))}
    assert len(told) == 5
    assert state_of(job("RUNNING")) == "running"
    assert state_of(job("FAILED", 3)) == "failed, exit code 3"


@pytest.mark.parametrize("text", ["bb-0123456789ab", "bb-0123456789ab-2", "bb-0123456789ab-117"])
def test_ids_are_ids(text):
    assert is_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "out",
        "./bb-0123456789ab",
        "s3://bb-0123456789ab",
        "bb-0123",
        "bb-0123456789ab-0",
        "bb-0123456789ab-02",
        "bb-0123456789ab/out",
    ],
)
def test_paths_and_urls_are_no_ids(text):
    assert not is_id(text)


@given(st.sets(st.integers(1, 40)))
def test_the_next_job_has_a_number_of_its_own(numbers):
    mine, other = "bb-0123456789ab", "bb-ba9876543210"
    jobs = [job(id=nth_id(mine, number)) for number in numbers] + [
        job(id=nth_id(other, 99)),
        job(id="raysubmit_x"),
    ]
    assert next_number(mine, jobs) == max(numbers, default=0) + 1
    assert all(is_id(nth_id(mine, number)) for number in numbers)


def test_the_newest_job_began_last():
    jobs = [job(id="a", began_s=2.0), job(id="b", began_s=3.0), job(id="c")]
    assert newest(jobs).id == "b"
    assert newest([]) is None


@given(
    st.builds(
        flags,
        private_dir=st.none() | st.just("/private"),
        workers=st.none() | st.integers(1, 9),
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        threads=st.none() | st.integers(1, 9),
        overrides=st.lists(st.sampled_from(["t.fraction=0.5", "name=a b", 'model.source="it\'s"'])).map(tuple),
        limit=st.none() | st.integers(1, 9),
        extend=st.booleans(),
        accept_stack=st.booleans(),
        only_failed=st.booleans(),
        if_held=st.sampled_from(["stop", "wait"]),
        log_format=st.sampled_from(["text", "json"]),
    )
)
def test_options_mean_the_same_to_run_in_the_job(given_flags):
    got = parsed(shlex.split(shlex.join(["p", "m", "o", *given_flags.words()])))
    assert {name: got[name] for name in vars(given_flags)} == vars(given_flags)


def test_submit_has_every_option_of_run_that_makes_sense_there():
    def options(command):
        return {option for parameter in command.params for option in parameter.opts if option.startswith("-")}

    # These two are about what the command itself prints in the end.
    assert options(run) - options(submit) == {"--json", "--plan"}


def test_a_job_runs_what_was_asked_on_the_jobs_own_cluster():
    asked = request(workers=3, overrides=("t.fraction=0.5",), limit=2, done=7)
    got = parsed(words(asked))
    expected = {"pipeline": "demo-augment", "manifest": "demo", "out": "s3://bucket/out", "address": "auto"}
    assert {name: got[name] for name in expected} == expected
    assert (got["workers"], got["limit"], got["overrides"]) == (3, 2, ("t.fraction=0.5",))
    assert asked.files == {}
    assert asked.metadata["done"] == "7"
    assert asked.metadata["out"] == "s3://bucket/out"
    assert asked.metadata["run"] == asked.run_id
    assert is_id(asked.run_id)
    assert all(isinstance(value, str) for value in asked.metadata.values())


def test_asking_twice_is_asking_once(pipeline: Path, tmp_path: Path):
    first = request()
    assert request(workers=9, device="cpu", extend=True).run_id == first.run_id
    others = [
        request(out="s3://bucket/other"), request(limit=1), request(pipeline="demo-spread"),
        request(overrides=("steps=9",)), request(manifest=manifest_of(tmp_path, REMOTE)),
    ]  # fmt: skip
    assert len({first.run_id, *(other.run_id for other in others)}) == 6


def test_recipe_and_manifest_of_this_machine_travel_as_text(pipeline: Path, tmp_path: Path):
    manifest = manifest_of(tmp_path, REMOTE, "shipped:demo/shards/demo-000000.tar")
    asked = request(pipeline=pipeline, manifest=manifest)
    got = parsed(words(asked))
    assert asked.files == {"pipeline.yaml": pipeline.read_bytes(), "manifest.yaml": manifest.read_bytes()}
    assert (got["pipeline"], got["manifest"]) == ("pipeline.yaml", "manifest.yaml")
    assert str(tmp_path) not in json.dumps([asked.entrypoint, dict(asked.metadata)])
    for name, data in asked.files.items():
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes(data)
    there = tmp_path / "there"
    assert load_recipe(str(there / "pipeline.yaml")).digest == load_recipe(str(pipeline)).digest
    assert load_manifest(str(there / "manifest.yaml")).digest == load_manifest(str(manifest)).digest


def test_a_manifest_of_relative_paths_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest_of(tmp_path, "s-0.tar", REMOTE)
    monkeypatch.chdir(tmp_path)
    asked = request(manifest="manifest.yaml", out="out", private_dir="private", shared=True)
    got = parsed(words(asked))
    assert got["manifest"] == str(tmp_path / "manifest.yaml")
    assert got["out"] == asked.metadata["out"] == str(tmp_path / "out")
    assert got["private_dir"] == str(tmp_path / "private")
    assert asked.files == {}


def test_a_manifest_of_absolute_paths_travels_and_keeps_its_digest(tmp_path: Path):
    asked = request(manifest=manifest_of(tmp_path, "/data/s-0.tar"), shared=True)
    assert asked.files.keys() == {"manifest.yaml"}


def test_a_model_in_this_folder_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(worlds.recipe_text(Path("models/it's mine"), purpose="augment"))
    decoded = ["method=edit-friendly", "target.model.source=models/dogs"]
    for overrides in ((), tuple(decoded)):
        asked = request(pipeline="mine.yaml", shared=True, overrides=overrides)
        there = load_recipe("mine.yaml", parsed(words(asked))["overrides"])
        assert there.model.source == str(tmp_path / "models" / "it's mine")
        assert there.digest == load_recipe("mine.yaml", overrides).digest
    assert there.target.model.source == str(tmp_path / "models" / "dogs")
    with pytest.raises(ConfigError, match=r"target\.model\.source in .* is the path models/dogs"):
        request(overrides=tuple(decoded))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ({"out": "/data/out"}, "OUT is the path /data/out"),
        ({"private_dir": "/private"}, "--private-dir is the path /private"),
        ({"overrides": ("model.source=/models/m",)}, "model.source in demo-augment is the path /models/m"),
    ],
)
def test_local_paths_are_refused_unless_they_are_shared(what, named):
    with pytest.raises(ConfigError, match="--shared-files") as refused:
        request(**what)
    assert named in str(refused.value)
    assert request(**what, shared=True).run_id


def test_local_shards_are_refused_unless_they_are_shared(tmp_path: Path):
    manifest = manifest_of(tmp_path, "s-0.tar")
    with pytest.raises(ConfigError, match=str(tmp_path / "s-0.tar")):
        request(manifest=manifest)


@pytest.mark.parametrize("source", ["shipped:demo/model", "entry-point:mine", "gs://bucket/model"])
def test_models_that_a_cluster_finds_by_itself_are_no_local_paths(source):
    overrides = [
        f"model.source={source}",
        *(
            ["model.patch_size=1", "model.class_labels=null", "model.channels_last=false"]
            if "entry" in source
            else []
        ),
    ]
    assert request(overrides=tuple(overrides)).run_id


@pytest.mark.parametrize("url", ["https://h/x.tar?X-Amz-Signature=5ec7e7", "https://u:5ec7e7@h/x.tar"])
def test_urls_with_credentials_are_refused_and_not_repeated(tmp_path: Path, url: str):
    model = {"overrides": (f"model.source={url}",)}
    for asked in ({"out": url}, {"manifest": manifest_of(tmp_path, url)}, model):
        with pytest.raises(ConfigError, match="credentials") as refused:
            request(**asked)
        assert "5ec7e7" not in str(refused.value)


@pytest.mark.parametrize("out", ["abfs://container@account.dfs.core.windows.net/out", "s3://bucket/what?"])
def test_plain_urls_are_taken(out):
    assert parsed(words(request(out=out)))["out"] == out


def test_a_secret_is_never_sent(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PrivateDirError, match="--private-dir"):
        request(pipeline="demo-anonymize")
    monkeypatch.setenv("BOOMERANG_SECRET", worlds.SECRET)
    with pytest.raises(PrivateDirError, match="of the cluster's own machines") as refused:
        request(pipeline="demo-anonymize", private_dir="/private", shared=True)
    assert worlds.SECRET not in str(refused.value)
    assert request().run_id  # no secret is needed, so none would be sent


def test_the_private_dirs_content_stays_there(tmp_path: Path):
    (tmp_path / "secret").write_text(worlds.SECRET)
    asked = request(pipeline="demo-anonymize", private_dir=str(tmp_path), shared=True)
    assert worlds.SECRET not in repr(asked)


def test_headers_come_from_token_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    token = tmp_path / "token"
    token.write_text("from-file\n")
    assert auth_headers(None) == {}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert auth_headers(None) == {"Authorization": "Bearer from-file"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    assert auth_headers(None) == {"Authorization": "Bearer from-variable"}
    assert auth_headers(str(token)) == {"Authorization": "Bearer from-file"}
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"Cookie": "c", "authorization": "Bearer mine"}')
    assert auth_headers(str(token)) == {"Cookie": "c", "authorization": "Bearer mine"}


@pytest.mark.parametrize("headers", ["no json", "[]", '{"a": 1}'])
def test_headers_that_are_none_are_refused_without_their_text(monkeypatch: pytest.MonkeyPatch, headers: str):
    monkeypatch.setenv("RAY_JOB_HEADERS", headers)
    with pytest.raises(ConfigError, match="RAY_JOB_HEADERS") as refused:
        auth_headers(None)
    assert headers not in str(refused.value)


def test_a_token_file_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "empty").write_text(" \n")
    for name in ("empty", "nowhere"):
        with pytest.raises(ConfigError, match=name):
            auth_headers(str(tmp_path / name))


def test_an_address_that_was_given_overrules_the_environment(monkeypatch: pytest.MonkeyPatch):
    variable = access._ADDRESS_VARIABLE
    monkeypatch.setenv(variable, "http://elsewhere")
    with overruling_environment("http://here"):
        assert access.os.environ[variable] == "http://here"
    assert access.os.environ[variable] == "http://elsewhere"
    with overruling_environment(None):
        assert access.os.environ[variable] == "http://elsewhere"
    monkeypatch.delenv(variable)
    with pytest.raises(KeyError), overruling_environment("http://here"):
        raise KeyError
    assert variable not in access.os.environ


def test_an_out_that_is_not_there_is_no_status(tmp_path: Path):
    from click.testing import CliRunner

    result = CliRunner().invoke(main, ["status", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "no such folder" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"{}"])
def test_a_server_that_is_no_ray_is_told_by_its_address(answer: bytes):
    from boomerang_batch.run.jobs.cluster import Cluster

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(BoomerangError, match="can't reach the cluster at " + re.escape(address)):
            Cluster(address)
        server.shutdown()


def test_a_cluster_that_is_not_there_is_told_by_its_address():
    from boomerang_batch.run.jobs.cluster import Cluster

    with pytest.raises(BoomerangError, match=r"can't reach the cluster at http://127\.0\.0\.1:9"):
        Cluster("http://127.0.0.1:9")
