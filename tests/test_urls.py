"""storage/urls.py: names are joined and shown, and where a store is travels with a URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch import storage
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.errors import ManifestError, StorageError
from boomerang_batch.storage.remote import _options
from boomerang_batch.storage.urls import at_endpoint, lying_in, split_endpoint, without_secrets

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
ENDPOINT = {"endpoint_url": "https://s3.example.org:8333", "region": "eu-1"}


@given(name=TEXT, endpoint=st.dictionaries(st.sampled_from(storage.ENDPOINT), TEXT))
def test_an_endpoint_travels_with_a_url_whatever_the_name(name, endpoint):
    url = f"s3://bucket/{name}"
    assert split_endpoint(at_endpoint(url, endpoint)) == (url, endpoint)


def test_a_name_with_a_hash_is_no_endpoint_and_a_local_path_has_none():
    assert split_endpoint("s3://bucket/a#b=c.tar") == ("s3://bucket/a#b=c.tar", {})
    assert at_endpoint("/data/a.tar", ENDPOINT) == "/data/a.tar"


def test_a_manifest_tells_where_its_own_shards_are(tmp_path):
    path = tmp_path / "manifest.yaml"
    head = "format_version: 1\nname: far\n"
    path.write_text(
        head + "shards: ['s3://b/x-{0..1}.tar', near.tar]\nstorage: {endpoint_url: 'https://h', region: r}\n"
    )
    far, again, near = sorted(load_manifest(str(path)).shards, key=lambda entry: entry.url, reverse=True)
    assert split_endpoint(far.url) == ("s3://b/x-1.tar", {"endpoint_url": "https://h", "region": "r"})
    assert (far.stem, far.written, again.stem) == ("x-1", "s3://b/x-1.tar", "x-0")
    assert near.url == str(tmp_path / "near.tar")
    for bad, words in (
        ("storage: {key: x}", "unknown key key"),
        ("storage: {region: 3}", "storage is a mapping"),
        ("storage: here", "storage is a mapping"),
    ):
        path.write_text(f"{head}shards: [near.tar]\n{bad}\n")
        with pytest.raises(ManifestError, match=words):
            load_manifest(str(path))


def test_a_signed_url_is_one_shard_and_no_pattern(tmp_path):
    path = tmp_path / "manifest.yaml"
    url = "https://host/a.tar?X-Signature=abc[1]"
    path.write_text(f"format_version: 1\nname: web\nshards: ['{url}']\n")
    (entry,) = load_manifest(str(path)).shards
    assert (entry.url, entry.stem) == (url, "a")


def test_a_client_is_told_the_endpoint_and_bounded():
    options = _options("s3", ENDPOINT)
    assert options["endpoint_url"] == ENDPOINT["endpoint_url"]
    assert options["client_kwargs"] == {"region_name": "eu-1"}
    assert options["config_kwargs"]["read_timeout"] == 60
    with pytest.raises(ValueError, match="az takes no endpoint_url"):
        _options("az", ENDPOINT)
    with pytest.raises(StorageError, match="memory takes no endpoint_url"):
        storage.read_bytes(at_endpoint("memory://b/a", ENDPOINT))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("can't read https://h/a.tar?X-Sig=canary (403)", "can't read https://h/a.tar?... (403)"),
        (
            "url='https://h/a?b=canary', twice https://h/c?d=canary",
            "url='https://h/a?...', twice https://h/c?...",
        ),
        ("s3://key:canary@bucket/a", "s3://bucket/a"),
        ("https://canary@h/a", "https://h/a"),
        ("s3://bucket/who@home.tar", "s3://bucket/who@home.tar"),
        ("abfs://container@account.dfs.example/a", "abfs://container@account.dfs.example/a"),
        ("/data/what?.tar", "/data/what?.tar"),
    ],
)
def test_what_is_shown_holds_no_secret(text, shown):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("AZURE_STORAGE_CONNECTION_STRING", True),
        ("BOOMERANG_SECRET", True),
        ("RAY_AUTH_TOKEN", True),
        ("HOME_SWEET_HOME", False),
    ],
)
def test_what_stands_in_a_variable_for_secrets_is_hidden(monkeypatch, name, hidden):
    monkeypatch.setenv(name, "canary-canary")
    assert without_secrets("it says canary-canary") == (
        f"it says <{name}>" if hidden else "it says canary-canary"
    )


def test_what_lies_in_a_folder_by_name_or_by_link(tmp_path: Path):
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out / "deep", other):
        folder.mkdir(parents=True)
    (out / "real.tar").touch()
    (other / "link.tar").symlink_to(out / "real.tar")
    (tmp_path / "linked").symlink_to(out)
    (out / "away.tar").symlink_to(other / "away.tar")
    (tmp_path / "output").mkdir()
    inside = [
        f"{out}/real.tar", f"{out}/deep/a.tar", f"file://{out}/b.tar", f"{other}/link.tar",
        f"{tmp_path}/linked/c.tar", f"{other}/../out/d.tar", f"{out}/away.tar",
    ]  # fmt: skip
    outside = [f"{other}/a.tar", f"{tmp_path}/output/a.tar", f"{out}/../other/b.tar", "s3://bucket/out/a.tar"]
    for folder in (str(out), f"file://{out}", f"{tmp_path}/linked"):
        assert list(lying_in(folder, [*inside, *outside])) == inside
    assert list(lying_in("s3://b/out", ["s3://b/out/a", "s3://b/output/a", "/b/out/a"])) == ["s3://b/out/a"]
