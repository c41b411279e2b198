"""The shard reader against webdataset's own, against every cut and many damages, and the writer's bytes."""

import gzip
import hashlib
import io
import random
import string
import tarfile
import time

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.data.shards import Sample, Unreadable, check_name, read_samples, split_name, write_shard
from boomerang_batch.errors import SampleError

NAMES = st.text(string.ascii_lowercase + string.digits + "-_é/", min_size=1, max_size=40).filter(
    lambda name: not name.startswith(("/", "__")) and not name.endswith("/") and "//" not in name
)
FIELDS = st.text(string.ascii_lowercase + ".", min_size=1, max_size=8).filter(lambda name: "__" not in name)
SAMPLES = st.dictionaries(
    NAMES, st.dictionaries(FIELDS, st.binary(max_size=2000), min_size=1, max_size=4), max_size=6
)


def tar_bytes(members, *, format=tarfile.PAX_FORMAT, closed=True):
    """A tar of (name or TarInfo, data) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = buffer.tell()
    return buffer.getvalue() if closed else buffer.getvalue()[:end]


def special(name, type):
    info = tarfile.TarInfo(name)
    info.type = type
    info.linkname = "elsewhere"
    return info


def read(data, **options):
    return list(read_samples(io.BytesIO(data), shard="x.tar", **options))


def outcomes(data, **options):
    """(key, fields) for samples, (key, reason) for the rest."""
    return [
        (found.key, dict(found.fields) if isinstance(found, Sample) else found.reason)
        for found in read(data, **options)
    ]


def webdataset_reads(path):
    with path.open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        return [
            (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
            for sample in webdataset.tariterators.group_by_keys(files)
        ]


WHOLE = tar_bytes([("a.png", b"A" * 700), ("a.cls", b"0"), ("b.png", b"B" * 10), ("b.cls", b"1")])


# Agreement with webdataset


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES)
def test_what_is_written_is_read_back_by_us_and_by_webdataset(samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "x.tar"
    write_shard(path, samples.items())
    assert outcomes(path.read_bytes()) == list(samples.items())
    assert webdataset_reads(path) == list(samples.items())


@settings(max_examples=300)
@given(name=st.text(string.ascii_letters + "../_-", max_size=12))
def test_names_split_as_webdataset_splits_them(name):
    expected = webdataset.tariterators.base_plus_ext(name)
    if name.rpartition("/")[2].startswith("."):
        assert split_name(name) is None  # hidden files: the one deliberate difference
    elif expected == (None, None):
        assert split_name(name) is None
    else:
        assert split_name(name) == (expected[0], expected[1].lower())


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_dialects_and_layouts_read_as_webdataset_reads_them(format, tmp_path):
    float_mtime = tarfile.TarInfo("nested/folder/one.JPG")
    float_mtime.mtime = 1234567890.5 if format == tarfile.PAX_FORMAT else 5
    long = "y" * 150 if format != tarfile.USTAR_FORMAT else "y" * 20
    members = [
        (special("nested", tarfile.DIRTYPE), b""),
        ("__meta__/index.json", b"{}"),
        ("__info__", b"{}"),
        (float_mtime, b"1"),
        ("nested/folder/one.seg.png", b"2"),
        ("README", b"no extension"),
        ("nested/folder/one.cls", b"3"),
        (f"{long}.txt", b"long"),
        ("empty.bin", b""),
    ]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members, format=format))
    expected = [
        ("nested/folder/one", {"jpg": b"1", "seg.png": b"2", "cls": b"3"}),
        (long, {"txt": b"long"}),
        ("empty", {"bin": b""}),
    ]
    assert webdataset_reads(path) == expected
    assert outcomes(path.read_bytes()) == expected


def test_hidden_files_do_not_tear_samples_apart(caplog):
    data = tar_bytes([("d/a.png", b"1"), ("d/.DS_Store", b"x"), ("d/._a.png", b"x"), ("d/a.cls", b"2")])
    assert outcomes(data) == [("d/a", {"png": b"1", "cls": b"2"})]
    assert "2 member(s)" in caplog.text
    assert "DS_Store" not in caplog.text


# Ends and damages


@pytest.mark.parametrize("data", [b"", b"x", b"hello" * 1000, b"\x89PNG\r\n\x1a\n" + b"\0" * 2000, WHOLE[:300]])
def test_what_is_no_tar_is_told(data):
    (found,) = read(data)
    assert (found.key, found.reason, found.offset) == (None, "not-a-tar", 0)
    assert "x.tar" in found.detail


def test_an_empty_archive_is_no_error():
    assert read(tar_bytes([])) == []


@pytest.mark.slow
def test_every_cut_gives_the_whole_samples_before_it_and_one_report():
    whole = outcomes(WHOLE)
    second = read(WHOLE)[1].offset
    end_mark = len(
        tar_bytes([("a.png", b"A" * 700), ("a.cls", b"0"), ("b.png", b"B"), ("b.cls", b"1")], closed=False)
    )
    for cut in range(512, len(WHOLE), 7):
        found = read(WHOLE[:cut])
        if cut >= end_mark + 512:  # the mark is there, so nothing is missing
            assert [item.key for item in found] == ["a", "b"], cut
            continue
        assert [(item.key, dict(item.fields)) for item in found[:-1]] == whole[
            : 1 if cut >= second + 512 else 0
        ], cut
        assert isinstance(found[-1], Unreadable)
        assert found[-1].reason == "truncated-tar", cut
        assert found[-1].key == ("b" if cut >= second + 512 else "a"), cut
        assert second * (cut > second) <= found[-1].offset <= cut


def test_a_member_cut_at_its_border_is_not_taken_for_the_end():
    data = tar_bytes([("a.png", b"1"), ("a.cls", b"2")], closed=False)
    assert outcomes(data) == [("a", "truncated-tar")]


@pytest.mark.parametrize("position", [3, 100, 148, 150])
def test_a_damaged_header_in_the_middle_is_no_end(position):
    offset = read(WHOLE)[1].offset + 1024  # the header of b.cls
    data = bytearray(WHOLE)
    data[offset + position] ^= 0x55
    found = read(bytes(data))
    assert [(item.key, getattr(item, "reason", None)) for item in found] == [
        ("a", None),
        ("b", "broken-header"),
    ]
    assert found[-1].offset == offset


def test_a_zeroed_header_is_no_end():
    offset = read(WHOLE)[1].offset + 1024
    data = WHOLE[:offset] + bytes(512) + WHOLE[offset + 512 :]
    assert outcomes(data)[1:] == [("b", "data-after-end")]


def test_two_tars_in_one_file_are_told():
    found = read(WHOLE + WHOLE)
    assert [(item.key, getattr(item, "reason", None)) for item in found] == [
        ("a", None),
        ("b", "data-after-end"),
    ]
    assert found[-1].offset == len(WHOLE)


def test_a_size_beyond_all_bounds_ends_at_once():
    header = bytearray(tar_bytes([("a.png", b"1")])[:512])
    for size in (b"\x80" + (2**62).to_bytes(11, "big"), b"\xff" * 12, b"77777777777\0"):
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        started = time.perf_counter()
        found = read(bytes(header) + bytes(4096))
        assert time.perf_counter() - started < 5
        assert isinstance(found[-1], Unreadable)
        assert not any(isinstance(item, Sample) for item in found)


def test_an_extended_header_that_claims_gigabytes_is_refused_before_it_is_read():
    data = tar_bytes([(special("x", tarfile.XHDTYPE), b"")], format=tarfile.USTAR_FORMAT)
    header = bytearray(data[:512])
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)

    class Endless(io.RawIOBase):
        served = 0

        def read(self, size=-1):
            self.served += size
            return bytes(header) + bytes(size - 512) if self.served == size else bytes(size)

    stream = Endless()
    (found,) = read_samples(stream, shard="x.tar")
    assert found.reason == "not-a-tar"
    assert stream.served < 2**22


@pytest.mark.parametrize("seed", range(8))
def test_no_damage_makes_the_reader_crash_hang_or_return_a_half_sample(seed):
    chance = random.Random(seed)
    info = tarfile.TarInfo("c.png")
    info.pax_headers = {"comment": "x", "mtime": "1.5"}
    members = [
        ("a.png", b"A" * 700),
        ("a.cls", b"0"),
        ("é" * 80 + ".txt", b"t"),
        (info, b"B" * 900),
        ("c.cls", b"1"),
    ]
    original = tar_bytes(members)
    full = dict(outcomes(original))
    for _ in range(250):
        data = bytearray(original)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(7000)] = chance.choice(
                (0, 32, 47, 48, 55, 76, 120, 128, 255, chance.randrange(256))
            )
        for found in read(bytes(data)):
            if isinstance(found, Sample) and found.key in full:
                # Data isn't protected by tar; that the members are all there is what is promised.
                assert found.fields.keys() == full[found.key].keys()


def test_an_error_of_the_stream_is_not_blamed_on_the_shard():
    class Failing(io.RawIOBase):
        def read(self, size=-1):
            raise OSError("connection reset")

    class FailsLater(io.BytesIO):
        def read(self, size=-1):
            data = super().read(512)
            if not data:
                raise OSError("connection reset")
            return data

    for stream in (Failing(), FailsLater(WHOLE[:1536])):
        with pytest.raises(OSError, match="connection reset"):
            list(read_samples(stream, shard="x.tar"))


# gzip


def test_gzip_reads_like_the_plain_tar_even_in_several_members():
    assert read(gzip.compress(WHOLE)) == read(WHOLE)
    assert read(gzip.compress(WHOLE[:1000]) + gzip.compress(WHOLE[1000:]) + bytes(700)) == read(WHOLE)


def test_a_cut_gzip_is_told_wherever_it_is_cut():
    data = gzip.compress(tar_bytes([("a.png", random.Random(1).randbytes(5000)), ("b.png", b"x")]))
    for cut in range(3, len(data), 97):
        assert read(data[:cut])[-1].reason == "truncated-tar", cut
    assert read(data[:-1])[-1].reason == "truncated-tar"  # only the checksum's last byte is missing


def test_damaged_gzip_is_told():
    data = bytearray(gzip.compress(WHOLE))
    data[-6] ^= 1  # the checksum
    assert outcomes(bytes(data)) == [(None, "broken-gzip")]
    large = tar_bytes([(f"{index}.bin", random.Random(index).randbytes(50_000)) for index in range(9)])
    data = bytearray(gzip.compress(large))
    data[-6] ^= 1
    found = outcomes(bytes(data))
    assert found[-1][1] == "broken-gzip"
    assert 1 < len(found) <= 9


@pytest.mark.parametrize(("magic", "word"), [(b"BZh9", "bzip2"), (b"<html>", "HTML"), (b"PK\x03\x04", "zip")])
def test_what_it_is_instead_is_told(magic, word):
    (found,) = read(magic + b"x" * 2000)
    assert word in found.detail


# Members that spoil their sample


@pytest.mark.parametrize(
    ("member", "reason", "key"),
    [
        ("/b.png", "unsafe-name", "/b"),
        ("../b.png", "unsafe-name", "../b"),
        ("x/../b.png", "unsafe-name", "x/../b"),
        ("b.pn\ng", "unsafe-name", "b"),
        ("b.__key__", "unsafe-name", "b"),
        (special("b.png", tarfile.SYMTYPE), "link-member", "b"),
        (special("b.png", tarfile.LNKTYPE), "link-member", "b"),
        (special("b.png", tarfile.CHRTYPE), "special-member", "b"),
        (special("b.png", tarfile.BLKTYPE), "special-member", "b"),
        (special("b.png", tarfile.FIFOTYPE), "special-member", "b"),
        (special("noname", tarfile.FIFOTYPE), "special-member", None),
    ],
)
def test_a_bad_member_spoils_its_sample_and_no_other(member, reason, key):
    rest = (key or "b") + ".cls"
    data = tar_bytes([("a.png", b"1"), (member, b""), (rest, b"2"), ("c.png", b"3")], format=tarfile.GNU_FORMAT)
    found = outcomes(data)
    assert ("a", {"png": b"1"}) in found
    assert found[-1] == ("c", {"png": b"3"})
    assert (key, reason) in found
    assert len(found) == (3 if key else 4)


def test_a_bad_member_after_good_ones_spoils_the_whole_sample():
    data = tar_bytes([("b.png", b"1"), (special("b.cls", tarfile.SYMTYPE), b""), ("c.png", b"3")])
    assert outcomes(data) == [("b", "link-member"), ("c", {"png": b"3"})]


def test_names_that_are_not_utf8_are_shown_escaped():
    data = tar_bytes([("a\udce9.png", b"1"), ("b.png", b"2")], format=tarfile.GNU_FORMAT)
    found = read(data)
    assert (found[0].reason, found[0].key) == ("unsafe-name", "a\\udce9")
    found[0].detail.encode("utf-8")


def test_sizes_over_the_limit():
    data = tar_bytes(
        [("a.png", b"x" * 1001), ("b.png", b"x" * 1000), ("c.png", b"x" * 600), ("c.txt", b"x" * 600)]
    )
    found = outcomes(data, max_member_bytes=1000)
    assert found == [("a", "member-too-large"), ("b", {"png": b"x" * 1000}), ("c", "sample-too-large")]


def test_sparse_members_are_refused():
    info = tarfile.TarInfo("a.bin")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40), "GNU.sparse.name": "a.bin"}
    assert outcomes(tar_bytes([(info, b"x"), ("b.txt", b"1")])) == [
        ("a", "special-member"),
        ("b", {"txt": b"1"}),
    ]


def test_a_key_that_comes_again_is_told():
    interleaved = tar_bytes([("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"3"), ("b.cls", b"4")])
    assert outcomes(interleaved) == [
        ("a", {"png": b"1"}),
        ("b", {"png": b"2"}),
        ("a", "key-repeated"),
        ("b", "key-repeated"),
    ]


@pytest.mark.parametrize("second", ["a.png", "a.PNG"])
def test_a_field_that_comes_twice_spoils_the_sample(second):
    assert outcomes(tar_bytes([("a.png", b"1"), (second, b"2")])) == [("a", "field-repeated")]


def test_a_spoilt_sample_at_a_cut_keeps_its_own_reason_and_the_cut_is_told_too():
    data = tar_bytes([("a.png", b"1"), ("a.png", b"2")], closed=False)
    assert outcomes(data) == [("a", "field-repeated"), (None, "truncated-tar")]


def test_the_reader_never_asks_for_more_than_it_needs_to_begin():
    class Counting(io.BytesIO):
        served = 0

        def read(self, size=-1):
            data = super().read(size)
            self.served += len(data)
            return data

        def seek(self, *args):
            raise AssertionError("seeked")

    stream = Counting(tar_bytes([(f"{index:03}.bin", b"x" * 100_000) for index in range(40)]))
    first = next(read_samples(stream, shard="x.tar"))
    assert first.key == "000"
    assert stream.served < 400_000


# Writing


def test_written_bytes_are_the_same_every_time_and_known(tmp_path):
    samples = [("a/b", {"png": b"x", "cls": b"0"}), ("é", {"json": b"{}"})]
    write_shard(tmp_path / "1.tar", samples)
    time.sleep(0.01)
    write_shard(tmp_path / "2.tar", iter(samples))
    data = (tmp_path / "1.tar").read_bytes()
    assert data == (tmp_path / "2.tar").read_bytes()
    assert (
        hashlib.sha256(data).hexdigest() == "aa8be7c734074ae965ab8fc45bf6a9a9ae00348c121918a170aa81be09828734"
    )
    with tarfile.open(tmp_path / "1.tar") as archive:
        for info in archive:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
            assert (info.mode, info.isreg(), info.pax_headers) == (0o644, True, {})


@pytest.mark.parametrize(
    ("key", "field", "reason"),
    [
        ("x" * 97, "png", "name-too-long"),
        ("x" * 200 + "/" + "y" * 10, "png", "name-too-long"),
        ("é" * 49, "png", "name-too-long"),
        ("a.b", "png", "unsafe-name"),
        ("a", "PNG", "unsafe-name"),
        ("", "png", "unsafe-name"),
        ("a/", "png", "unsafe-name"),
        ("/a", "png", "unsafe-name"),
        ("../a", "png", "unsafe-name"),
        ("a", "x/y", "unsafe-name"),
        ("__m__/a", "png", "unsafe-name"),
        ("a", "__key__", "unsafe-name"),
        ("a\0b", "png", "unsafe-name"),
        ("a\udce9", "png", "unsafe-name"),
    ],
)
def test_names_that_would_not_come_back_are_refused(key, field, reason, tmp_path):
    with pytest.raises(SampleError) as refused:
        check_name(key, field)
    assert refused.value.reason == reason
    with pytest.raises(SampleError):
        write_shard(tmp_path / "x.tar", [(key, {field: b""})])


def test_the_longest_names_come_back(tmp_path):
    keys = ["x" * 96, "d" * 155 + "/" + "y" * 96]
    write_shard(tmp_path / "x.tar", [(key, {"png": b"1"}) for key in keys])
    assert [key for key, _ in outcomes((tmp_path / "x.tar").read_bytes())] == keys


def test_a_key_given_twice_or_without_fields_is_refused(tmp_path):
    with pytest.raises(SampleError, match="key-repeated"):
        write_shard(tmp_path / "x.tar", [("a", {"png": b"1"}), ("a", {"cls": b"1"})])
    with pytest.raises(SampleError, match="no-fields"):
        write_shard(tmp_path / "x.tar", [("a", {})])
