"""Rows and markers: nothing lost, the same bytes every time, and nothing damaged taken for done."""

import dataclasses
import hashlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.data.images import Picture
from boomerang_batch.data.provenance import (
    ROW_GROUP_ROWS,
    SCHEMA,
    WITH_TRIALS,
    Marker,
    Row,
    pixel_digest,
    read_rows,
    write_rows,
)
from boomerang_batch.errors import ShardError, VerificationError

CONSTANTS = {"model_digest": "m", "recipe_digest": "r", "versions": "v 1"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MAYBE_TEXT = st.none() | TEXT
MAYBE_INT = st.none() | st.integers(-(2**63), 2**63 - 1)
MAYBE_FLOAT = st.none() | st.floats(allow_nan=False)


def ok(key="k", variant=0, **more):
    return Row(key=key, variant=variant, status="ok", output_digest="o", **CONSTANTS, **more)


def bad(key="k", variant=0, status="failed", **more):
    return Row(key=key, variant=variant, status=status, reason="undecodable", **CONSTANTS, **more)


GOOD_ROWS = st.builds(
    Row,
    key=TEXT,
    variant=st.integers(0, 5),
    status=st.sampled_from(["ok", "original"]),
    reason=st.none(),
    detail=MAYBE_TEXT,
    offset=MAYBE_INT,
    source_digest=MAYBE_TEXT,
    output_digest=TEXT,
    pixel_digest=MAYBE_TEXT,
    t=MAYBE_TEXT,
    node=MAYBE_INT,
    tau=MAYBE_FLOAT,
    sigma=MAYBE_FLOAT,
    evaluations=MAYBE_INT,
    sampler=MAYBE_TEXT,
    eta=MAYBE_FLOAT,
    noise_key_id=MAYBE_TEXT,
    label=MAYBE_INT,
    width=MAYBE_INT,
    height=MAYBE_INT,
    model_digest=TEXT,
    recipe_digest=TEXT,
    versions=TEXT,
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(GOOD_ROWS, max_size=8, unique_by=lambda row: (row.key, row.variant)))
def test_rows_come_back_as_they_went(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "x.parquet"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert read_rows(io.BytesIO(path.read_bytes())) == rows


def test_every_column_is_a_field_and_the_required_ones_are_required():
    assert WITH_TRIALS.names == [column.name for column in dataclasses.fields(Row)]
    assert [*SCHEMA.names, "trial"] == WITH_TRIALS.names
    assert [field.name for field in SCHEMA if not field.nullable] == ["variant", "status", *CONSTANTS]
    assert SCHEMA.field("label").type == pa.int64()
    assert SCHEMA.field("sigma").type == pa.float64()


def test_bytes_depend_on_the_rows_alone(tmp_path):
    rows = [ok(f"key-{index}", label=index) for index in range(ROW_GROUP_ROWS * 2 + 5)]
    write_rows(tmp_path / "list.parquet", rows)
    write_rows(tmp_path / "stream.parquet", iter(rows))
    assert (tmp_path / "list.parquet").read_bytes() == (tmp_path / "stream.parquet").read_bytes()
    metadata = pq.read_metadata(tmp_path / "list.parquet")
    assert [metadata.row_group(index).num_rows for index in range(3)] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 5]
    assert b"pandas" not in (metadata.metadata or {})
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    write_rows(tmp_path / "other.parquet", [dataclasses.replace(rows[0], label=9), *rows[1:]])
    assert (tmp_path / "other.parquet").read_bytes() != (tmp_path / "list.parquet").read_bytes()


def test_no_rows_are_a_file_too(tmp_path):
    write_rows(tmp_path / "x.parquet", [])
    assert read_rows(tmp_path / "x.parquet") == []


def test_a_key_and_variant_have_one_row(tmp_path):
    write_rows(tmp_path / "x.parquet", [ok(variant=0), ok(variant=1), bad(None, status="unreadable")] * 1)
    nameless = [bad(None, status="unreadable", offset=offset) for offset in (0, 512)]
    write_rows(tmp_path / "x.parquet", nameless)
    rows = [ok(f"k{index}") for index in range(ROW_GROUP_ROWS)]
    with pytest.raises(ShardError, match="k3, variant 0"):
        write_rows(tmp_path / "x.parquet", [*rows, bad("k3")])


@pytest.mark.parametrize(
    "values",
    [
        {"status": "ok"},
        {"status": "ok", "output_digest": "o", "reason": "r"},
        {"status": "failed"},
        {"status": "failed", "reason": "r", "output_digest": "o"},
        {"status": "fine", "output_digest": "o"},
        {"status": "failed", "reason": "r", "key": None},
    ],
)
def test_a_row_that_contradicts_itself_is_neither_written_nor_read(values, tmp_path):
    values = {"key": "k", "variant": 0} | values | CONSTANTS
    with pytest.raises(ValueError, match="status"):
        write_rows(tmp_path / "x.parquet", [Row(**values)])
    pq.write_table(pa.Table.from_pylist([values], schema=SCHEMA), tmp_path / "x.parquet")
    with pytest.raises(VerificationError, match=r"x\.parquet.*status"):
        read_rows(tmp_path / "x.parquet")


def test_what_is_no_provenance_file_is_told(tmp_path):
    path = tmp_path / "x.parquet"
    write_rows(path, [ok()])
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:-20], whole[:50]):
        path.write_bytes(data)
        with pytest.raises(VerificationError, match=r"x\.parquet"):
            read_rows(path)
    pq.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(VerificationError, match="no format_version"):
        read_rows(path)
    pq.write_table(pa.table({"key": ["a"]}, metadata={"format_version": "1"}), path)
    with pytest.raises(VerificationError, match="columns"):
        read_rows(path)
    pq.write_table(pa.table({"key": ["a"]}, metadata={"format_version": "2"}), path)
    with pytest.raises(VerificationError, match="2 format_version"):
        read_rows(path)


def test_pixel_digests_tell_pixels_shape_and_alpha_apart():
    pixels = np.arange(24, dtype=np.uint8)
    shapes = [(2, 4, 3), (4, 2, 3), (4, 6, 1), (6, 4, 1)]
    pictures = [Picture(pixels=pixels.reshape(shape), alpha=None, format="png") for shape in shapes]
    alpha = np.zeros((2, 4), np.uint8)
    pictures += [
        dataclasses.replace(pictures[0], alpha=alpha),
        dataclasses.replace(pictures[0], alpha=alpha + 1),
    ]
    assert len({pixel_digest(picture) for picture in pictures}) == len(pictures)
    turned = np.ascontiguousarray(pixels.reshape(2, 4, 3).transpose(1, 0, 2)).transpose(1, 0, 2)
    assert pixel_digest(dataclasses.replace(pictures[0], pixels=turned)) == pixel_digest(pictures[0])
    assert pixel_digest(dataclasses.replace(pictures[0], format="webp")) == pixel_digest(pictures[0])
    known = hashlib.sha256(b"uint8 2x4x3\n" + bytes(range(24))).hexdigest()
    assert pixel_digest(pictures[0]) == known


MARKER = Marker(
    stem="s-000",
    counts={"ok": 3, "failed": 1},
    tar_sha256="a" * 64,
    tar_bytes=10,
    parquet_sha256="b" * 64,
    parquet_bytes=20,
    recipe_digest="c" * 64,
)


def test_a_marker_comes_back_and_its_bytes_are_sorted():
    data = MARKER.to_bytes()
    assert Marker.from_bytes(data) == MARKER
    assert data.endswith(b"}\n")
    assert list(json.loads(data)) == sorted(json.loads(data))
    assert dataclasses.replace(MARKER, counts={"failed": 1, "ok": 3}).to_bytes() == data


def test_no_part_of_a_marker_is_one():
    data = MARKER.to_bytes()
    for cut in range(len(data) - 2):
        assert Marker.from_bytes(data[:cut]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tar_bytes", "10"),
        ("tar_bytes", True),
        ("tar_bytes", -1),
        ("tar_bytes", 1.0),
        ("stem", None),
        ("counts", []),
        ("counts", {"ok": "3"}),
        ("counts", {"fine": 3}),
        ("unknown", 1),
        ("format_version", 2),
    ],
)
def test_what_is_not_quite_a_marker_is_none(name, value):
    assert Marker.from_bytes(json.dumps(json.loads(MARKER.to_bytes()) | {name: value}).encode()) is None
    values = json.loads(MARKER.to_bytes())
    values.pop("tar_sha256")
    assert Marker.from_bytes(json.dumps(values).encode()) is None
    assert Marker.from_bytes(b"[" * 100_000) is None
