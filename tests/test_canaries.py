"""Marks planted wherever an input can carry one, and an anonymized output searched for every trace of them.

A mark is looked for as text, UTF-16, hex and base64, and as a digest; so are digests of every source file and
field, and of pictures' pixels. It must not be found in OUT, nor in what the run says, which a job's log keeps,
whether the run succeeds, gives up, dies, is killed or goes on. The same search over a run that isn't
anonymized, and over the private dir, must find what it looks for.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from boomerang_batch.cli import main
from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data import images
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.provenance import pixel_digest, read_rows
from boomerang_batch.errors import SampleError
from boomerang_batch.run import driver
from boomerang_batch.run.jobs.request import Wish, job_request
from boomerang_batch.run.log_lines import set_up
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.transform import Transform
from boomerang_batch.run.verify import verify
from tests import broken, tiny_models, worlds
from tests.lanes.file_server import FileServer
from tests.marked_images import METADATA, PNG_TIME, TIMES, foreign_image, marked_image

pytestmark = pytest.mark.slow

FORMATS = ("png", "jpg", "webp")
SHARDS, SAMPLES = 3, 6
SECRET = "5ec7e7ab" * 8
VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip


class Marks:
    """Makes marks, each unlike any other and unlike anything a run could write by itself."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}

    def __call__(self, where: str) -> str:
        return self.made.setdefault(where, "Zq" + hashlib.sha256(where.encode()).hexdigest()[:12] + "Kx")


CREDENTIALS = {name: Marks()(f"credential {name}") for name in VARIABLES}
"""What stands in the environment's variables for credentials during every run here."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A marked input, and what must not be seen again."""

    manifest: Path
    marks: dict[str, str]
    sources: dict[str, bytes]
    """Files and fields, whose digests would tell as much as they."""
    pictures: dict[str, str]
    """Digests of pictures' pixels."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    mark, sources, pictures = Marks(), {}, {}
    for name in VARIABLES:
        mark(f"credential {name}")
    folder = tmp_path_factory.mktemp("in") / mark("folder of the manifest")
    folder.mkdir()
    urls = []
    for shard in range(SHARDS):
        name = f"{mark(f'shard {shard}')}.tar{'.gz' if shard == 0 else ''}"
        members = [member for number in range(SAMPLES) for member in marked_sample(mark, shard, number)]
        members += [(owned(f"{mark('a member without field')}", mark), b"1")]
        sources |= {f"{info.name} in {shard}": data for info, data in members}
        pictures |= {
            f"pixels of {info.name}": told for info, data in members if (told := pixels_told(info, data))
        }
        data = broken.tar(members, format=tarfile.PAX_FORMAT)
        if shard == 0:
            sources["shard 0, unpacked"] = data
            data = compressed(data, mark("name in gzip's header"))
        elif shard == 1:
            data = data[: broken.header_at(data, members[-2][0].name)]  # cut within the last sample
        (folder / name).write_bytes(data)
        sources[f"shard {shard}"] = data
        claims = {"bytes": len(data), "digest": hashlib.sha256(data).hexdigest()}
        urls.append({"url": name, "id": mark(f"stem {shard}"), **claims} if shard == 2 else name)
    urls.append(f"{mark('a shard that is not there')}.tar")
    manifest = folder / f"{mark('the manifest')}.yaml"
    text = {"format_version": 1, "name": mark("name of the dataset"), "shards": urls}
    manifest.write_text(json.dumps(text | {"description": mark("description of the dataset")}))
    sources["the manifest"] = manifest.read_bytes()
    return Planted(manifest=manifest, marks=dict(mark.made), sources=sources, pictures=pictures)


def pixels_told(info: tarfile.TarInfo, data: bytes) -> str | None:
    """The digest of a picture's pixels; None of what can't be decoded."""
    field = info.name.partition(".")[2]
    try:
        picture = images.decode(data, field=field, channels=None, policy=worlds.recipe(Path("m")).images)
    except SampleError:
        return None
    return pixel_digest(picture) if field in FORMATS else None


def compressed(data: bytes, name: str) -> bytes:
    """Gzip that tells the file's name and time."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename=name, mode="wb", fileobj=buffer, mtime=1_234_567_890) as file:
        file.write(data)
    return buffer.getvalue()


def owned(name: str, mark: Marks) -> tarfile.TarInfo:
    """A member of a marked owner, with marks in extended headers."""
    info = tarfile.TarInfo(name)
    info.uname, info.gname, info.mtime, info.uid = mark("owner"), mark("group"), 1_234_567_890, 54_321
    info.pax_headers = {"comment": mark("pax comment"), "SCHILY.xattr.user.note": mark("file attribute")}
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
        "taken": "1987-03-07T04:05:06Z",
        "kept": number,
    }
    fields = {
        field: marked_image(mark, at, field, hash_of(at)),
        "cls": str(number % worlds.CLASSES).encode(),
        "json": json.dumps(facts).encode(),
        "txt": f"a photograph of {mark(f'caption {at}')}".encode(),
        mark("field name").lower(): mark(f"extra field {at}").encode(),
        "mask.png": broken.saved(broken.grey()),
        "gif": foreign_image(mark, at, "gif"),
        "tif": foreign_image(mark, at, "tiff"),
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
    elif at == "0.5":
        fields[field] = foreign_image(mark, at, "gif")
    elif at == "1.1":
        fields[field] = foreign_image(mark, at, "tiff")
    members = [(owned(f"{key}.{name}", mark), data) for name, data in fields.items()]
    if at == "2.0":
        members[0][0].type, members[0][0].linkname = tarfile.SYMTYPE, mark("target of a link")
    return members


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
    for where, digest in planted.pictures.items():
        for encoded in (digest.encode()[:16], bytes.fromhex(digest)):
            found[encoded.lower()] = where
    for text, tells in TIMES.items():
        found[text.encode()] = tells
    found[b"time" + PNG_TIME] = "capture time in PNG"  # behind its chunk's name, in lower case
    assert min(map(len, found)) >= 8
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
            file = pq.ParquetFile(path)
            yield f"{name}, decoded", repr(file.read().to_pylist()).encode()
            yield f"{name}, metadata", repr([file.metadata.to_dict(), file.schema_arrow.metadata]).encode()
            file.close()
        elif ".tar" in path.suffixes:
            whole = gzip.decompress(data) if path.suffix == ".gz" else data
            yield f"{name}, unpacked", whole
            with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=io.BytesIO(whole)) as archive:
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
    by_start: dict[int, list[bytes]] = defaultdict(list)
    for trace in wanted:
        by_start[int.from_bytes(trace[:8], "little")].append(trace)
    starts = np.array(sorted(by_start), "<u8")
    found: dict[str, set[str]] = {}
    for place, data in itertools.chain(contents(root), more):
        lower = data.lower()
        for at, start in beginnings(lower, starts):
            for trace in by_start[start]:
                if lower.startswith(trace, at):
                    found.setdefault(wanted[trace], set()).add(place)
    return found


def beginnings(data: bytes, starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where in `data` eight bytes are one of `starts`, which are ascending; and which."""
    for shift in range(min(8, len(data))):
        words = np.frombuffer(data, "<u8", offset=shift, count=(len(data) - shift) // 8)
        nearest = starts[np.searchsorted(starts, words).clip(max=len(starts) - 1)]
        for index in np.flatnonzero(nearest == words):
            yield shift + 8 * int(index), int(words[index])


@dataclass(frozen=True, kw_only=True)
class Output:
    """A run's OUT, its private dir, and what it said."""

    out: Path
    private: Path
    stdout: str
    stderr: str
    log: str
    exception: BaseException | None

    @property
    def said(self) -> tuple[str, bytes]:
        """What the log of a job would keep of it."""
        return "said", f"{self.stdout}\n{self.stderr}".encode()


def command(
    folder: Path,
    model: Path,
    manifest: Path,
    *overrides: str,
    purpose: str = "anonymize",
    log_format: str = "json",
) -> list[str]:
    """A command line into `folder`, whose secret is known."""
    folder.mkdir(exist_ok=True)
    recipe, private = folder / "recipe.yaml", folder / "private"
    recipe.write_text(worlds.recipe_text(model, purpose=purpose))
    words = ["run", str(recipe), str(manifest), str(folder / "out"), "--device=cpu", "--threads=1"]
    words.append(f"--log-format={log_format}")  # JSON says more than text does
    words += [f"--set={override}" for override in overrides]
    if purpose == "anonymize":
        private.mkdir(mode=0o700)
        (private / "secret").touch(mode=0o600)
        (private / "secret").write_text(SECRET)
        words.append(f"--private-dir={private}")
    return words


def run(
    folder: Path, model: Path, manifest: Path, *overrides: str, exit_code: int = 3, **options: str
) -> Output:
    """A run from the command line, in which something failed."""
    words = command(folder, model, manifest, *overrides, **options)
    said, last_words = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        result = CliRunner().invoke(main, words, env=CREDENTIALS)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            with contextlib.redirect_stderr(last_words):  # as the interpreter does with what nobody caught
                sys.excepthook(*result.exc_info)
    finally:
        logging.getLogger().removeHandler(handler)
        set_up("text")
    assert result.exit_code == exit_code, result.output
    return Output(
        out=folder / "out",
        private=folder / "private",
        stdout=result.stdout,
        stderr=result.stderr + last_words.getvalue(),
        log=said.getvalue(),
        exception=result.exception,
    )


POLICY = ("variants=2", "fields.json_keys.kept=keep", "fields.fields.txt=pseudonymize")


@pytest.fixture(scope="module")
def anonymized(planted: Planted, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Output:
    return run(tmp_path_factory.mktemp("anonymized"), tiny_model, planted.manifest, *POLICY)


def kinds(places: Iterable[str]) -> set[str]:
    """Where marks are, without the numbers of shard and sample."""
    return {re.sub(r" [0-9.]+$", "", place) for place in places}


def test_the_search_finds_every_kind_of_mark_in_the_input(planted: Planted):
    found = found_in(planted.manifest.parent.parent, traces(planted))
    # Of the first only the digest was planted, and the others are in the environment.
    assert kinds(planted.marks) - kinds(found) == {"source", *map("credential {}".format, VARIABLES)}
    assert found.keys() >= {*TIMES.values(), "capture time in PNG"} - {"time of a tar member"}


def test_the_search_finds_what_an_augment_run_carries_over(planted: Planted, tiny_model: Path, tmp_path: Path):
    output = run(tmp_path, tiny_model, planted.manifest, "keep_originals=true", purpose="augment")
    found = found_in(output.out, traces(planted))
    assert kinds(found) >= {"shard", "stem", "folder of keys", "key", *METADATA}
    assert kinds(found) >= {"gif comment", "tiff artist"}
    assert found.keys() >= {"capture time in EXIF", "capture time in IPTC", "capture time in json"}
    assert kinds(found) >= {"json key", "json value", "url", "nested", "caption", "field name", "extra field"}
    assert kinds(found) >= {"a label that is none"}
    assert any(place.startswith("digest of Zq") for place in found)


def test_no_trace_is_in_the_output(planted: Planted, anonymized: Output):
    assert found_in(anonymized.out, traces(planted)) == {}


def test_no_trace_is_said(planted: Planted, anonymized: Output):
    verified = CliRunner().invoke(main, ["verify", str(anonymized.out), "--deep", "--json"])
    said = "\n".join([anonymized.log, verified.output])
    assert found_in(anonymized.out / "logs", traces(planted), ("more", said.encode()), anonymized.said) == {}
    assert f"quarantined: shard {undone(anonymized.out)}" in anonymized.stdout
    assert "left out" in anonymized.stderr
    lines = [json.loads(line) for line in anonymized.stderr.splitlines()]
    keys = {row.key for path in anonymized.out.glob("*.parquet") for row in read_rows(path)}
    told = {one["key"] for one in lines if "key" in one}
    assert told
    assert told <= keys


def test_what_is_said_leads_to_where_all_is_told(planted: Planted, anonymized: Output):
    (place,) = set(re.findall(r"\S+/private/logs/\S+\.log", anonymized.stderr))
    told = Path(place).read_text()
    assert f"shard {undone(anonymized.out)} is {planted.manifest.parent}" in told
    assert planted.marks["a shard that is not there"] in told


def test_no_trace_is_said_in_text_or_in_the_report_either(planted: Planted, tiny_model: Path, tmp_path: Path):
    """Nor by a manifest that is refused, but for its own name, which stands in the command."""
    output = run(tmp_path / "text", tiny_model, planted.manifest, *POLICY, log_format="text")
    assert found_in(output.out, traces(planted), output.said) == {}
    torn = tmp_path / f"{planted.marks['the manifest']}.yaml"
    torn.write_text(planted.manifest.read_text().replace(".tar", ".rar"))
    refused = run(tmp_path / "refused", tiny_model, torn, exit_code=2, log_format="text")
    assert found_in(tmp_path / "nowhere", traces(planted), refused.said).keys() == {"the manifest"}
    assert refused.stderr.count(planted.marks["the manifest"]) == 1
    assert f"error: ManifestError: {torn}: [private]; what is [private] stands in " in refused.stderr
    assert not refused.out.exists()
    (kept,) = (refused.private / "logs").iterdir()
    assert planted.marks["shard 0"] in kept.read_text()
    assert str(kept) in refused.stderr


def test_no_machine_is_named_in_the_output(anonymized: Output):
    names = {socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    wanted = {name.encode().lower(): name for name in names if len(name) >= 8}
    assert wanted
    assert found_in(anonymized.out, wanted) == {}


def test_the_secret_is_not_in_the_output(anonymized: Output):
    secret = bytes.fromhex(SECRET)
    wanted = dict.fromkeys(encodings(SECRET.encode()) | encodings(secret) | digests(secret), "the secret")
    wanted |= dict.fromkeys(digests(SECRET.encode()), "the secret")
    assert found_in(anonymized.out, {trace.lower(): tells for trace, tells in wanted.items()}) == {}


def test_a_secret_of_the_environment_is_not_in_the_output(
    planted: Planted, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = "d0d0cafe" * 8
    monkeypatch.setenv("BOOMERANG_SECRET", other)
    output = run(tmp_path, tiny_model, planted.manifest, *POLICY)
    recorded = json.loads((output.out / "run.json").read_text())["noise_key_id"]
    assert Naming(worlds.recipe(tiny_model), bytes.fromhex(other)).noise_key_id == recorded
    wanted = encodings(other.encode()) | encodings(bytes.fromhex(other)) | digests(bytes.fromhex(other))
    assert found_in(output.out, {trace.lower(): "the secret" for trace in wanted}) == {}


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
        "wrong-extension": 4,
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


def test_no_path_of_this_machine_is_in_the_output(planted: Planted, anonymized: Output, tiny_model: Path):
    places = (planted.manifest.parent.parent, anonymized.out.parent, tiny_model.parent, Path.home() / ".cache")
    wanted = {str(place).encode().lower(): str(place) for place in places}
    assert found_in(anonymized.out, wanted) == {}


def test_no_noise_key_is_in_the_output(anonymized: Output, tiny_model: Path):
    """Who has a noise key draws its noise, and subtracts it."""
    text = worlds.recipe_text(tiny_model)
    naming = Naming(parse_recipe(text, source="test", overrides=POLICY), bytes.fromhex(SECRET))
    recorded = json.loads((anonymized.out / "run.json").read_text())["noise_key_id"]
    assert naming.noise_key_id == recorded  # the very secret
    mark, wanted = Marks(), {}
    for shard, number, variant in itertools.product(range(SHARDS), range(SAMPLES), range(2)):
        key = f"{mark('folder of keys')}/{mark(f'key {shard}.{number}')}"
        noise_key = naming.noise_key(naming.identity(shard="", key=key, image=b""), variant)
        wanted |= {trace.lower(): f"noise key of {key}" for trace in encodings(noise_key)}
    assert found_in(anonymized.out, wanted) == {}


def test_released_sizes_are_those_of_their_buckets(tmp_path: Path, tiny_model: Path):
    """With `restore_size: false` neither tar nor provenance tells what size a source had."""
    sizes = [(8, 8), (7, 11), (23, 9), (40, 31)]
    folder = tmp_path / "in"
    samples = {f"key{n}": {"png": worlds.png(n, size), "cls": b"1"} for n, size in enumerate(sizes)}
    manifest = worlds.save_samples(folder, samples)
    recipe = worlds.recipe(
        tiny_model, "images.resize=stretch", "images.restore_size=false", "images.format=png"
    )
    assert worlds.run(recipe, manifest, tmp_path / "out").exit_code == 0
    rows = worlds.rows(tmp_path / "out")
    assert {(row.width, row.height) for row in rows} == {(8, 8)}
    outputs = worlds.outputs(tmp_path / "out").values()
    assert {worlds.image_of(fields).shape for fields in outputs} == {(8, 8)}
    assert len(outputs) == len(sizes)


# Runs that come to a bad end


def test_no_trace_of_a_run_that_gives_up(planted: Planted, tiny_model: Path, tmp_path: Path):
    given_up = (*POLICY, "run.on_error.max_failed_samples=1")
    output = run(tmp_path, tiny_model, planted.manifest, *given_up, exit_code=1)
    assert "gave up" in output.stdout
    assert found_in(output.out, traces(planted), output.said) == {}


def test_no_trace_of_an_unforeseen_error_in_a_sample(
    planted: Planted, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A library's message may quote whatever it was given."""

    def finish(self: Transform, made: object, **options: object) -> None:
        raise RuntimeError(f"can't do {made.prepared.source.key}, which is {made.prepared.image!r}")

    monkeypatch.setattr(Transform, "finish", finish)
    output = run(tmp_path, tiny_model, planted.manifest, *POLICY)
    assert "internal-error" in {row.reason for path in output.out.glob("*.parquet") for row in read_rows(path)}
    assert found_in(output.out, traces(planted), output.said) == {}
    assert "finish" in output.stderr  # the place in the code
    assert kinds(found_in(output.private, traces(planted))) >= {"key", "exif"}


def test_no_trace_of_an_unforeseen_error_in_the_run(
    planted: Planted, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def publish_sheets(*arguments: object) -> None:
        raise RuntimeError(f"can't do {arguments}")

    monkeypatch.setattr(driver, "publish_sheets", publish_sheets)
    output = run(tmp_path, tiny_model, planted.manifest, *POLICY, exit_code=1)
    assert isinstance(output.exception, RuntimeError)
    assert found_in(output.out, traces(planted), output.said) == {}
    assert "publish_sheets" in output.stderr
    assert "RuntimeError" in output.stderr
    assert kinds(found_in(output.private / "logs", traces(planted))) >= {"shard"}


def begun(words: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "boomerang_batch", *words],
        env={**os.environ, **CREDENTIALS, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str, *, more_than: int) -> None:
    """Wait until a process has made more than so many files."""
    until = time.monotonic() + 120
    while len(list(folder.glob(pattern))) <= more_than:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


def test_no_trace_of_a_run_that_is_killed_stopped_and_resumed(planted: Planted, tmp_path: Path):
    """Killed in a shard, with outputs in its journal; stopped in another; then finished."""
    wanted, out = traces(planted), tmp_path / "out"
    unet = tiny_models.network(in_channels=1, out_channels=1, num_class_embeds=worlds.CLASSES + 1)
    noise = tiny_models.scheduler(num_train_timesteps=400, beta_end=0.02)
    model = tiny_models.save_pipeline(tmp_path / "model", unet=unet, noise=noise)
    words = command(tmp_path, model, planted.manifest, *POLICY, "steps=100", "run.journal_every=1")
    killed = begun(words)
    wait_for(killed, tmp_path / "private", "logs/journal/*/*.parquet", more_than=1)
    killed.kill()
    killed.communicate()
    assert len(list(out.glob("*_stats.json"))) < SHARDS
    assert (out / "run.json").exists()
    assert found_in(out, wanted) == {}

    stopped = begun(words)
    wait_for(stopped, out, "*_stats.json", more_than=0)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate()
    assert stopped.returncode in (75, 3), said
    assert found_in(out, wanted, ("said", said.encode())) == {}

    resumed = CliRunner().invoke(main, words, env=CREDENTIALS)
    set_up("text")
    assert resumed.exit_code == 3, resumed.output
    assert len(list(out.glob("*.tar"))) == SHARDS
    assert found_in(out, wanted, ("said", resumed.output.encode())) == {}
    assert verify(str(out), deep=True).shards == SHARDS


# What is shown of URLs, and of jobs


def presigned(folder: Path, mark: Marks, server: FileServer) -> tuple[Path, dict[str, str]]:
    """A manifest of a shard that a signature opens, and of one that it doesn't; with what must not be seen."""
    members = [member for number in range(2) for member in worlds.sample_members(f"key{number}", number)]
    worlds.write_tar(folder / f"{mark('name of a shard on the web')}.tar", members)
    urls = [
        f"{server.url}/{mark(name)}.tar?{server.query}" for name in ("name of a shard on the web", "another")
    ]
    manifest = folder / "presigned.yaml"
    manifest.write_text(json.dumps({"format_version": 1, "name": "signed", "shards": urls}))
    return manifest, dict(mark.made)


@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_no_signature_of_a_url_is_in_the_output(tmp_path: Path, tiny_model: Path, purpose: str):
    """Nor, under anonymize, is any other part of the URL."""
    mark = Marks()
    query = f"X-Amz-Signature={mark('signature')}&X-Amz-Security-Token={CREDENTIALS['AWS_SESSION_TOKEN']}"
    with FileServer(tmp_path, query=query) as server:
        manifest, marks = presigned(tmp_path, mark, server)
        output = run(tmp_path, tiny_model, manifest, purpose=purpose)
    wanted = {encoded.lower(): where for where, text in marks.items() for encoded in encodings(text.encode())}
    wanted |= {text.encode().lower(): where for where, text in CREDENTIALS.items()}
    paths = {"name of a shard on the web", "another"}
    assert len(list(output.out.glob("*.tar"))) == 1
    assert found_in(output.out, wanted, output.said).keys() <= (set() if purpose == "anonymize" else paths)
    assert found_in(output.out, wanted, ("log", output.log.encode())).keys() <= paths
    if purpose == "anonymize":
        assert found_in(output.private, wanted).keys() == paths


def wish(planted: Planted, recipe: Recipe, folder: Path) -> Wish:
    return Wish(
        pipeline=str(folder / "recipe.yaml"),
        manifest=str(planted.manifest),
        out=str(folder / "out"),
        private_dir=str(folder / "private"),
        limit=None,
        options=["--private-dir", str(folder / "private")],
        recipe=recipe,
        shards=load_manifest(str(planted.manifest)),
    )


def test_what_a_cluster_shows_of_a_job_has_no_trace(
    planted: Planted, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """But for the manifest's own name, which the command line can't do without."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.yaml").write_text(worlds.recipe_text(tiny_model))
    asked = job_request(wish(planted, worlds.recipe(tiny_model), tmp_path), shared=True)
    empty = tmp_path / "empty"
    shown = ("metadata", json.dumps([asked.run_id, dict(asked.metadata)]).encode())
    assert found_in(empty, traces(planted), shown) == {}
    found = found_in(empty, traces(planted), ("command", asked.entrypoint.encode()))
    assert found.keys() == {"folder of the manifest", "the manifest"}
