"""Marks planted wherever an input can carry one, and an anonymized output searched for every trace of them.

A mark is looked for as text, UTF-16, hex and base64, and as a digest; so are digests of every source file and
field. The same search over a run that isn't anonymized, and over the private dir, must find what it looks for.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import itertools
import json
import logging
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image, ImageCms, PngImagePlugin

from boomerang_batch.cli import main
from boomerang_batch.data.provenance import read_rows
from boomerang_batch.run.log_lines import set_up
from boomerang_batch.run.verify import verify
from tests import broken, worlds

pytestmark = pytest.mark.slow

FORMATS = ("png", "jpg", "webp")
METADATA = ("exif", "gps", "thumbnail", "xmp", "icc", "comment", "text")
SHARDS, SAMPLES = 3, 6
SECRET = "5ec7e7ab" * 8


class Marks:
    """Makes marks, each unlike any other and unlike anything a run could write by itself."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}

    def __call__(self, where: str) -> str:
        return self.made.setdefault(where, "Zq" + hashlib.sha256(where.encode()).hexdigest()[:12] + "Kx")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A marked input, and what must not be seen again."""

    manifest: Path
    marks: dict[str, str]
    sources: dict[str, bytes]
    """Files and fields, whose digests would tell as much as they."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    mark, sources = Marks(), {}
    folder = tmp_path_factory.mktemp("in") / mark("folder of the manifest")
    folder.mkdir()
    urls = []
    for shard in range(SHARDS):
        name = f"{mark(f'shard {shard}')}.tar"
        members = [member for number in range(SAMPLES) for member in marked_sample(mark, shard, number)]
        members += [(owned(f"{mark('a member without field')}", mark), b"1")]
        data = broken.tar(members)
        if shard == 1:
            data = data[: broken.header_at(data, members[-2][0].name)]  # cut within the last sample
        (folder / name).write_bytes(data)
        urls.append({"url": name, "id": mark(f"stem {shard}")} if shard == 2 else name)
        sources |= {f"shard {shard}": data} | {f"{info.name} in {shard}": data for info, data in members}
    urls.append(f"{mark('a shard that is not there')}.tar")
    manifest = folder / f"{mark('the manifest')}.yaml"
    text = {"format_version": 1, "name": mark("name of the dataset"), "shards": urls}
    manifest.write_text(json.dumps(text | {"description": mark("description of the dataset")}))
    sources["the manifest"] = manifest.read_bytes()
    return Planted(manifest=manifest, marks=dict(mark.made), sources=sources)


def owned(name: str, mark: Marks) -> tarfile.TarInfo:
    """A member of a marked owner."""
    info = tarfile.TarInfo(name)
    info.uname, info.gname, info.mtime, info.uid = mark("owner"), mark("group"), 1_234_567_890, 54_321
    return info


def marked_sample(mark: Marks, shard: int, number: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    """One sample, marked all over; some of them fail."""
    at = f"{shard}.{number}"
    key = f"{mark('folder of keys')}/{mark(f'key {at}')}"
    field = FORMATS[number % len(FORMATS)]
    facts = {
        mark("json key"): 1,
        "caption": mark(f"json value {at}"),
        "url": f"https://example.org/{mark(f'url {at}')}.jpg",
        "sha256": hashlib.sha256(mark(f"source {at}").encode()).hexdigest(),
        "nested": {"list": [mark(f"nested {at}")]},
        "kept": number,
    }
    fields = {
        field: marked_image(mark, at, field),
        "cls": str(number % worlds.CLASSES).encode(),
        "json": json.dumps(facts).encode(),
        "txt": f"a photograph of {mark(f'caption {at}')}".encode(),
        mark("field name").lower(): mark(f"extra field {at}").encode(),
        "mask.png": broken.saved(broken.grey()),
    }
    # Failures, so that reasons and sentences are written too.
    if at == "0.1":
        fields["cls"] = mark("a label that is none").encode()
    elif at == "0.2":
        fields[field] = mark("an image that is none").encode()
    elif at == "0.3":
        fields["json"] = b'{"caption": "' + mark("broken json").encode()
    elif at == "0.4":
        fields["png" if field != "png" else "jpg"] = fields[field]
    members = [(owned(f"{key}.{name}", mark), data) for name, data in fields.items()]
    if at == "2.0":
        members[0][0].type, members[0][0].linkname = tarfile.SYMTYPE, mark("target of a link")
    return members


def marked_image(mark: Marks, at: str, field: str) -> bytes:
    """An image with every kind of metadata its format has."""
    image = Image.open(io.BytesIO(worlds.png(hash_of(at))))
    text = {kind: mark(f"{kind} {at}") for kind in METADATA}
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x8298] = text["exif"], text["exif"], text["exif"]
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + text["exif"].encode()
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0), 29: text["gps"]})
    block = exif.tobytes() + b"\xff\xd8\xff" + text["thumbnail"].encode()
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{text['xmp']}</x:xmpmeta>".encode()
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile += text["icc"].encode()
    profile[:4] = struct.pack(">I", len(profile))
    options: dict[str, object] = {"exif": block, "icc_profile": bytes(profile)}
    if field == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("Title", text["text"])
        info.add_text("Comment", text["comment"], zip=True)
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return broken.saved(image, "png", pnginfo=info, **options)
    if field == "webp":
        return broken.saved(image, "webp", xmp=xmp, lossless=True, **options)
    return broken.saved(image, "jpeg", xmp=xmp, comment=text["comment"], **options)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


# The search


def traces(planted: Planted) -> dict[bytes, str]:
    """Everything that must not be found, in lower case, and what it would tell of."""
    found: dict[bytes, str] = {}
    for where, text in planted.marks.items():
        wide = {text.encode(codec) for codec in ("utf-16-le", "utf-16-be", "utf-32-le")}
        for encoded in encodings(text.encode()) | wide:
            found[encoded.lower()] = where
        for encoded in digests(text.encode()):
            found[encoded.lower()] = f"digest of the mark in {where}"
    for where, data in planted.sources.items():
        if len(data) > 8:  # the digest of a label is no secret
            for encoded in digests(data):
                found[encoded.lower()] = f"digest of {where}"
    return found


def encodings(data: bytes) -> set[bytes]:
    """`data`, its hex, and its base64 at each of the three places it may have in a longer text."""
    shifted = {base64.b64encode(bytes(shift) + data)[4 * shift : -4] for shift in range(3)}
    shifted |= {base64.urlsafe_b64encode(data)[:-4]}
    return {data, data[::-1], data.hex().encode(), *shifted}


def digests(data: bytes) -> set[bytes]:
    """Digests of `data` by every usual algorithm, as bytes, hex and base64, and their first 16 hex digits."""
    names = ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b", "blake2s")
    raw = {hashlib.new(name, data).digest() for name in names}
    raw |= {hashlib.blake2b(data, digest_size=size).digest() for size in (8, 12, 16, 32)}
    return raw | {one.hex().encode()[:16] for one in raw} | {base64.b64encode(one)[:16] for one in raw}


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Everything that can be seen below a folder: names, bytes, and what stands in Parquet, tars and images."""
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        yield f"the name {name}", name.encode()
        if path.is_dir():
            continue
        data = path.read_bytes()
        yield name, data
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield f"{name}, decoded", repr(table.to_pylist()).encode() + repr(table.schema.metadata).encode()
        elif path.suffix == ".tar":
            with tarfile.open(path) as archive:
                for member in filter(tarfile.TarInfo.isreg, archive):
                    yield from seen_in(f"{name}: {member.name}", archive.extractfile(member).read())
        else:
            yield from seen_in(name, data)


def seen_in(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Bytes, and if they are an image, what is told with it."""
    yield name, data
    with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as image:
        image.load()
        told = {**image.info, **dict(image.getexif()), "text": getattr(image, "text", {})}
        yield f"{name}, metadata", repr(told).encode()


def found_in(root: Path, wanted: dict[bytes, str], *more: tuple[str, bytes]) -> dict[str, set[str]]:
    """What was found, and where."""
    found: dict[str, set[str]] = {}
    for place, data in itertools.chain(contents(root), more):
        lower = data.lower()
        for trace, tells in wanted.items():
            if trace in lower:
                found.setdefault(tells, set()).add(place)
    return found


@dataclass(frozen=True, kw_only=True)
class Output:
    """A run's OUT, its private dir, and what it said."""

    out: Path
    private: Path
    stdout: str
    stderr: str
    log: str


def run(folder: Path, model: Path, manifest: Path, *overrides: str, purpose: str = "anonymize") -> Output:
    """A run from the command line, in which something failed."""
    recipe, out, private = folder / "recipe.yaml", folder / "out", folder / "private"
    recipe.write_text(worlds.recipe_text(model, purpose=purpose))
    command = ["run", str(recipe), str(manifest), str(out), "--device=cpu", "--threads=1"]
    command.append("--log-format=json")  # which says more than text does
    command += [f"--set={override}" for override in overrides]
    if purpose == "anonymize":
        private.mkdir(mode=0o700)
        (private / "secret").touch(mode=0o600)
        (private / "secret").write_text(SECRET)
        command.append(f"--private-dir={private}")
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        result = CliRunner().invoke(main, command)
    finally:
        logging.getLogger().removeHandler(handler)
        set_up("text")
    assert result.exit_code == 3, result.output
    return Output(out=out, private=private, stdout=result.stdout, stderr=result.stderr, log=said.getvalue())


@pytest.fixture(scope="module")
def anonymized(planted: Planted, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Output:
    overrides = ("variants=2", "fields.json_keys.kept=keep", "fields.fields.txt=pseudonymize")
    return run(tmp_path_factory.mktemp("anonymized"), tiny_model, planted.manifest, *overrides)


def kinds(places: Iterable[str]) -> set[str]:
    """Where marks are, without the numbers of shard and sample."""
    return {re.sub(r" [0-9.]+$", "", place) for place in places}


def test_the_search_finds_every_kind_of_mark_in_the_input(planted: Planted):
    found = found_in(planted.manifest.parent.parent, traces(planted))
    # Of these only the digest was planted.
    assert kinds(planted.marks) - kinds(found) == {"source"}


def test_the_search_finds_what_an_augment_run_carries_over(planted: Planted, tiny_model: Path, tmp_path: Path):
    output = run(tmp_path, tiny_model, planted.manifest, "keep_originals=true", purpose="augment")
    found = found_in(output.out, traces(planted))
    assert kinds(found) >= {"shard", "stem", "folder of keys", "key", *METADATA}
    assert kinds(found) >= {"json key", "json value", "url", "nested", "caption", "field name", "extra field"}
    assert kinds(found) >= {"a label that is none"}
    assert any(place.startswith("digest of Zq") for place in found)


def test_no_trace_is_in_the_output(planted: Planted, anonymized: Output):
    assert found_in(anonymized.out, traces(planted)) == {}


def test_no_trace_is_said(planted: Planted, anonymized: Output):
    told = [line for line in anonymized.stdout.splitlines() if not line.startswith("quarantined: ")]
    verified = CliRunner().invoke(main, ["verify", str(anonymized.out), "--deep", "--json"])
    said = "\n".join([*told, anonymized.stderr, anonymized.log, verified.output])
    assert "left out" in said
    assert found_in(anonymized.out / "logs", traces(planted), ("said", said.encode())) == {}
    lines = [json.loads(line) for line in anonymized.stderr.splitlines()]
    keys = {row.key for path in anonymized.out.glob("*.parquet") for row in read_rows(path)}
    told = {one["key"] for one in lines if "key" in one}
    assert told
    assert told <= keys


def test_the_secret_is_not_in_the_output(anonymized: Output):
    secret = bytes.fromhex(SECRET)
    wanted = dict.fromkeys(encodings(SECRET.encode()) | encodings(secret) | digests(secret), "the secret")
    wanted |= dict.fromkeys(digests(SECRET.encode()), "the secret")
    assert found_in(anonymized.out, {trace.lower(): tells for trace, tells in wanted.items()}) == {}


def test_the_private_dir_leads_back(planted: Planted, anonymized: Output):
    found = found_in(anonymized.private, traces(planted)).keys()
    whole = {f"{shard}.{number}" for shard in range(SHARDS) for number in range(SAMPLES)}
    assert {f"key {at}" for at in whole} <= found
    assert {f"shard {shard}" for shard in range(SHARDS)} <= found
    assert "a label that is none" in found  # quoted in the sentence that says why


def test_what_went_wrong_is_told_without_details(anonymized: Output):
    rows = [row for path in anonymized.out.glob("*.parquet") for row in read_rows(path)]
    reasons = Counter(row.reason for row in rows if row.reason)
    assert reasons == {
        "bad-label": 2,
        "undecodable": 2,
        "bad-json": 2,
        "ambiguous-image": 2,
        "link-member": 1,
        "truncated-tar": 1,
    }
    assert {row.detail for row in rows} | {row.offset for row in rows} == {None}
    assert verify(str(anonymized.out), deep=True).problems == (
        f"shard {undone(anonymized.out)} is not done; run the same command to finish",
    )


def undone(out: Path) -> str:
    """The pseudonym of the shard that was not there."""
    stems = json.loads((out / "run.json").read_text())["shards"]
    (stem,) = set(stems) - {path.stem for path in out.glob("*.tar")}
    return stem


def test_what_travels_is_what_the_recipe_lists(anonymized: Output):
    for path in anonymized.out.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                data = archive.extractfile(member).read()
                field = member.name.partition(".")[2]
                assert field in {*FORMATS, "cls", "json", "txt"}
                assert field != "json" or json.loads(data).keys() == {"kept"}
                assert field != "txt" or re.fullmatch(rb"[0-9a-f]{32}", data)
                fixed = tarfile.TarInfo(member.name)
                fixed.size = member.size
                assert member.get_info() == fixed.get_info() | {"chksum": member.chksum}


def test_names_are_pseudonyms_and_sorted(anonymized: Output):
    stems = json.loads((anonymized.out / "run.json").read_text())["shards"]
    assert stems == sorted(stems)
    assert all(re.fullmatch("[0-9a-f]{16}", stem) for stem in stems)
    for path in anonymized.out.glob("*.tar"):
        assert path.stem in stems
        with tarfile.open(path) as archive:
            keys = list(dict.fromkeys(name.partition(".")[0] for name in archive.getnames()))
        assert keys == sorted(keys)
        assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
        rows = [row.key for row in read_rows(path.with_suffix(".parquet"))]
        assert rows == sorted(rows)


def test_the_order_of_the_input_changes_no_byte(tmp_path: Path, tiny_model: Path):
    samples = [worlds.sample_members(f"key{number}", number) for number in range(6)]
    samples[2][0] = ("key2.png", b"")
    outputs = []
    for name, order in (("there", samples), ("back", samples[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        worlds.write_tar(folder / "shard.tar", [member for members in order for member in members])
        (folder / "manifest.yaml").write_text("format_version: 1\nname: x\nshards: [shard.tar]\n")
        outputs.append(worlds.tree(run(folder, tiny_model, folder / "manifest.yaml").out))
    assert outputs[0] == outputs[1]
