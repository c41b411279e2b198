"""Manifests in all their forms: the same shards whatever the order, and no shard lost, doubled or misread."""

import hashlib
import io
import json
import re
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.manifest_build import build_manifest, check_manifest
from boomerang_batch.data.shards import write_shard
from boomerang_batch.errors import ManifestError, StorageError

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def folder(tmp_path):
    """Three shards of two samples each."""
    (tmp_path / "in").mkdir()
    for shard in range(3):
        samples = [(f"k{shard}{index}", {"png": b"x" * shard, "cls": b"0"}) for index in range(2)]
        write_shard(tmp_path / "in" / f"s-{shard:03}.tar", samples)
    return tmp_path


def written(folder, shards, name="m.yaml", **more):
    path = folder / name
    path.write_text(json.dumps({"format_version": 1, "name": "test", "shards": shards} | more))
    return str(path)


def stems(manifest):
    return [entry.stem for entry in manifest.shards]


# Loading


@pytest.mark.parametrize(
    "shards",
    [
        ["in/s-{000..002}.tar"],
        ["in/s-*.tar"],
        ["in/s-002.tar", "in/s-000.tar", "in/s-001.tar"],
        ["in/s-{001,000}.tar", {"url": "in/s-002.tar"}],
        ["in/s-{000..001}.tar", "in/s-00[2-9]*.tar"],
    ],
)
def test_all_ways_to_name_shards_give_one_manifest(folder, shards):
    manifest = load_manifest(written(folder, shards))
    assert manifest.name == "test"
    assert stems(manifest) == ["s-000", "s-001", "s-002"]
    assert [entry.url for entry in manifest.shards] == [str(folder / "in" / f"s-{n:03}.tar") for n in range(3)]
    assert [entry.written for entry in manifest.shards] == [f"in/s-{n:03}.tar" for n in range(3)]
    assert manifest.digest == load_manifest(written(folder, ["in/s-{000..002}.tar"])).digest


def test_the_digest_knows_the_shards_and_not_the_folder(folder, tmp_path_factory):
    shards = [{"url": "a.tar", "digest": DIGEST}, "b.tar"]
    digest = load_manifest(written(folder, shards)).digest
    assert load_manifest(written(tmp_path_factory.mktemp("x"), shards[::-1])).digest == digest
    for other in (
        [shards[0]],
        ["a.tar", "b.tar"],
        [shards[0], "x/b.tar"],
        [shards[0], {"url": "b.tar", "id": "c"}],
    ):
        assert load_manifest(written(folder, other)).digest != digest


@given(st.permutations(["a.tar", "b/c.tar", "s3://x/y.tar", "z.tgz", "/abs/q.tar.gz"]))
def test_order_never_matters(order):
    text = json.dumps({"format_version": 1, "name": "n", "shards": order})
    with fsspec.filesystem("memory").open("/order/m.yaml", "w") as stream:
        stream.write(text)
    manifest = load_manifest("memory://order/m.yaml")
    assert stems(manifest) == ["a", "c", "q", "y", "z"]
    assert [entry.url for entry in manifest.shards][2:4] == ["/abs/q.tar.gz", "s3://x/y.tar"]
    assert manifest.shards[0].url == "memory://order/a.tar"


def test_urls_of_other_stores_list_through_fsspec():
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/store/{name}.tar", b"")
    memory.pipe("/store/m.yaml", b"{format_version: 1, name: n, shards: ['*.tar']}")
    manifest = load_manifest("memory://store/m.yaml")
    assert stems(manifest) == ["a", "b"]
    assert check_manifest(manifest)[0].startswith(manifest.shards[0].url)


def test_a_folder_that_looks_like_a_pattern_is_none(tmp_path):
    folder = tmp_path / "a[b]*"
    folder.mkdir()
    write_shard(folder / "x.tar", [])
    assert stems(load_manifest(written(folder, ["*.tar"]))) == ["x"]


def test_claims_and_ids_are_kept(folder):
    entry = {"url": "in/s-000.tar", "id": "first", "bytes": 7, "samples": 2, "digest": DIGEST}
    (found,) = load_manifest(written(folder, [entry])).shards
    assert (found.stem, found.size_bytes, found.samples, found.digest) == ("first", 7, 2, DIGEST)


def test_paths_are_relative_to_the_manifest_even_from_another_folder(folder, monkeypatch):
    monkeypatch.chdir(folder / "in")
    written(folder, ["in/s-000.tar"])
    (found,) = load_manifest("../m.yaml").shards
    assert found.url == str(folder / "in" / "s-000.tar")


def test_shipped_manifests_have_names():
    assert load_manifest("demo").digest == load_manifest("demo").digest
    assert len(load_manifest("demo").shards) == 20


def test_jsonl_and_parquet_say_the_same(folder):
    rows = [{"url": f"in/s-{n:03}.tar", "bytes": n, "digest": DIGEST} for n in range(3)]
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    pq.write_table(pa.Table.from_pylist(rows), folder / "m.parquet")
    jsonl, parquet = (load_manifest(str(folder / name)) for name in ("m.jsonl", "m.parquet"))
    assert jsonl == parquet
    assert jsonl.name == "m"
    assert [entry.size_bytes for entry in jsonl.shards] == [0, 1, 2]


# Refusing


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ([], "at least one"),
        ("in/s-000.tar", "must be a list"),
        ([7], "shards[0]: expected a path"),
        ([""], "url must be text"),
        ([{"id": "x"}], "url is missing"),
        ([{"url": "a.tar", "sampels": 3}], "unknown key sampels; did you mean samples?"),
        ([{"url": "a.tar", "bytes": "3"}], "bytes must be a number"),
        ([{"url": "a.tar", "bytes": True}], "bytes must be a number"),
        ([{"url": "a.tar", "samples": -1}], "samples must be a number"),
        ([{"url": "a.tar", "digest": "abc"}], "digest must be a SHA-256"),
        ([{"url": "a.tar", "id": "../x"}], "can't name a shard"),
        ([{"url": "a.tar", "id": ".x"}], "can't name a shard"),
        ([{"url": "a.tar", "id": "x~1"}], "can't name a shard"),
        ([{"url": "in/s-{000..002}.tar", "id": "x"}], "stands for 3 shards, so it can't have id"),
        ([{"url": "in/*.tar", "samples": 2}], "can't have samples"),
        (["in/x-*.tar"], "in/x-*.tar matches nothing"),
        (["in/s-{000..002.tar"], "write a range as"),
        (["data"], "data is not named .tar"),
        (["a/x.tar", "b/x.tar"], "a/x.tar and b/x.tar have one stem, x; give one of them another with id:"),
        (["in/s-*.tar", "in/s-001.tar"], "in/s-001.tar is listed twice"),
        (["x.tar", "x.tar.gz"], "have one stem"),
    ],
)
def test_what_cannot_be_meant_is_refused_naming_place_and_fix(folder, shards, says):
    with pytest.raises(ManifestError, match=re.escape(says)) as refused:
        load_manifest(written(folder, shards))
    assert "m.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a.tar]", "a manifest is a mapping"),
        (
            "{format_version: 1, name: n, shards: [a.tar], shard: [b.tar]}",
            "unknown key shard; did you mean shards?",
        ),
        ("{format_version: 1, name: n, shards: [a.tar], shards: [b.tar]}", "given twice"),
        ("{format_version: 2, name: n, shards: [a.tar]}", "format_version is 2"),
        ("{format_version: true, name: n, shards: [a.tar]}", "format_version is True"),
        ("{name: n, shards: [a.tar]}", "format_version is missing"),
        ("{format_version: 1, shards: [a.tar]}", "name is missing"),
        ("{format_version: 1, name: n", "not valid YAML"),
        ("{format_version: 1, name: n, shards: [!!python/object:os.system x]}", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, says):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ManifestError, match=re.escape(says)) as refused:
        load_manifest(str(tmp_path / "m.yaml"))
    assert "m.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("m.jsonl", b"{}\nnot json\n", "line 1: url is missing|line 2: not valid JSON"),
        ("m.jsonl", b"", "lists no shards"),
        ("m.jsonl", b'"a.tar"\n', "line 1: expected a path or a mapping"),
        ("m.yaml", b"\xff\xfe\x00", "not UTF-8"),
        ("m.parquet", b"PAR1", "not a Parquet file"),
        ("m.csv", b"", "a manifest is a .yaml.*shipped names: .*demo"),
    ],
)
def test_bad_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError, match=says):
        load_manifest(str(tmp_path / name))


def test_a_manifest_that_is_not_there(tmp_path):
    for name in ("m.yaml", "m.parquet"):
        with pytest.raises(StorageError, match=re.escape(name)):
            load_manifest(str(tmp_path / name))


# Building and checking


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "in/m.parquet"])
def test_what_is_built_checks_and_travels_with_its_folder(folder, name, tmp_path_factory):
    built = build_manifest([str(folder / "in" / "s-{002..000}.tar")], str(folder / name))
    assert built == load_manifest(str(folder / name))
    assert stems(built) == ["s-000", "s-001", "s-002"]
    data = (folder / "in" / "s-001.tar").read_bytes()
    entry = built.shards[1]
    assert (entry.size_bytes, entry.samples, entry.digest) == (len(data), 2, hashlib.sha256(data).hexdigest())
    assert check_manifest(built) == []
    moved = tmp_path_factory.mktemp("moved") / "here"
    folder.rename(moved)
    again = load_manifest(str(moved / name))
    assert again.digest == built.digest
    assert check_manifest(again) == []


def test_building_needs_a_form_that_can_hold_it_and_shards(folder):
    with pytest.raises(ManifestError, match=r"is \.parquet or \.jsonl"):
        build_manifest([str(folder / "in" / "*.tar")], str(folder / "m.yaml"))
    with pytest.raises(ManifestError, match="matches nothing"):
        build_manifest([str(folder / "*.tar")], str(folder / "m.parquet"))
    with pytest.raises(StorageError, match=r"absent\.tar"):
        build_manifest([str(folder / "absent.tar")], str(folder / "m.parquet"))


def test_building_over_a_broken_shard_says_so_and_counts_whole_samples(folder, caplog):
    path = folder / "in" / "s-001.tar"
    path.write_bytes(path.read_bytes()[:2600])
    built = build_manifest([str(folder / "in" / "*.tar")], str(folder / "m.parquet"))
    assert "truncated-tar" in caplog.text
    assert built.shards[1].samples == 1
    assert built.shards[1].digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert built.shards[1].size_bytes == 2600
    (problem,) = check_manifest(built)
    assert "s-001.tar" in problem
    assert "truncated-tar" in problem


def test_checking_finds_every_kind_of_lie(folder):
    built = build_manifest([str(folder / "in" / "*.tar")], str(folder / "m.parquet"))
    (folder / "in" / "s-000.tar").unlink()
    write_shard(
        folder / "in" / "s-001.tar", [("k21", {"png": b"1"}), ("a", {"png": b"1"}), ("b", {"png": b"1"})]
    )
    problems = "\n".join(check_manifest(built))
    for says in (
        "s-000.tar: there is nothing",
        "samples is 3, the manifest says 2",
        "digest is",
        "k21 is also in shard s-001",
    ):
        assert says in problems, says


def test_a_doubled_key_within_a_shard_is_found(folder):
    with tarfile.open(folder / "d.tar", "w") as archive:
        for name in ("a.png", "b.png", "a.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    (problem,) = check_manifest(load_manifest(written(folder, [{"url": "d.tar", "samples": 1}])))
    assert "key-repeated" in problem
