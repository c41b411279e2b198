"""Bad input through the whole tool: a clear message or a row with its reason, the right exit code, every good
sample written, and an output that verifies.

One table. Every case is a whole run from the command line, of the good `World` with one thing spoilt.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import UNet2DModel
from fsspec.registry import known_implementations
from PIL import Image
from safetensors.torch import load, save

from boomerang_batch.cli import main
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.run.runner import Runner
from boomerang_batch.run.tasks import ShardReport, Task
from boomerang_batch.run.verify import verify
from tests import broken, tiny_models, worlds

pytestmark = pytest.mark.slow

GREY = broken.grey()
PNG = broken.saved(GREY)
JPEG = broken.saved(GREY, "jpeg")
COLOUR = broken.saved(broken.colour())
LABELS = {"good-0": b"0", "good-1": b"1", "good-2": b"2", "good-3": b"0"}
"""What the good samples must come out with: two in shard s-000, around a bad one; two in s-001."""

Content = dict[str, bytes] | broken.Members


@dataclass(kw_only=True)
class World:
    """Files on disk and a command to be typed; a case spoils one of them."""

    folder: Path
    model: Path
    monkeypatch: pytest.MonkeyPatch
    cleanup: contextlib.ExitStack
    purpose: str = "augment"
    options: list[str] = field(default_factory=list)
    recipe: str = ""
    recipe_edits: list[tuple[str, str]] = field(default_factory=list)
    out: str = ""

    def __post_init__(self) -> None:
        self.out = self.out or str(self.folder / "out")
        self.shard([])
        self.write("s-001.tar", broken.tar([*good("good-2"), *good("good-3")]))
        self.shards("'s-{000..001}.tar'")

    def write(self, name: str, data: bytes | str) -> None:
        """A file in the world's folder."""
        (self.folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    def shard(self, members: broken.Members, **options: int) -> None:
        """The first shard, with members between its good ones."""
        self.write("s-000.tar", broken.tar([*good("good-0"), *members, *good("good-1")], **options))

    def shards(self, *items: str) -> None:
        """A manifest of these entries (YAML)."""
        self.write("manifest.yaml", f"format_version: 1\nname: broken\nshards: [{', '.join(items)}]\n")

    def mount(self, name: str, options: str) -> Path:
        """A disk of its own."""
        return self.cleanup.enter_context(broken.small_disk(self.folder / name, options))

    @property
    def command(self) -> list[str]:
        """The arguments of boomerang-batch."""
        text = worlds.recipe_text(self.model, purpose=self.purpose)
        for old, new in self.recipe_edits:
            assert old in text
            text = text.replace(old, new)
        self.write("recipe.yaml", text)
        recipe, manifest = self.recipe or str(self.folder / "recipe.yaml"), str(self.folder / "manifest.yaml")
        return ["run", recipe, manifest, self.out, "--device=cpu", "--threads=1", *self.options]

    def run(self) -> Result:
        """Type the command."""
        return CliRunner().invoke(main, self.command)

    def done(self) -> list[str]:
        """Stems that have a marker."""
        names = [path.name for path in Path(self.out).iterdir()] if Path(self.out).is_dir() else []
        return sorted(name.removesuffix("_stats.json") for name in names if name.endswith("_stats.json"))

    def rows(self) -> list[Row]:
        """The provenance of the shards that are done."""
        return [row for stem in self.done() for row in read_rows(Path(self.out) / f"{stem}.parquet")]

    def samples(self) -> dict[str, dict[str, bytes]]:
        """The output samples of the shards that are done, as the standard library reads them."""
        found: dict[str, dict[str, bytes]] = {}
        for stem in self.done():
            with tarfile.open(Path(self.out) / f"{stem}.tar") as archive:
                for member in archive:
                    folder, slash, name = member.name.rpartition("/")
                    key, _, last = name.partition(".")
                    found.setdefault(folder + slash + key, {})[last] = archive.extractfile(member).read()
        return found


Spoil = Callable[[World], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to spoil, and what must come of it."""

    id: str
    build: Spoil
    exit: int
    words: Sequence[str] = ()
    """What must be said, on the terminal or in a row's detail."""
    reasons: Mapping[str | None, str] = field(default_factory=dict)
    """Why which key failed."""
    lost: Sequence[str] = ()
    """Good samples that can't be had: the file ends before them, or may end in them."""
    fine: Sequence[str] = ()
    """Further samples that must come out, with label 3."""
    size: tuple[int, int] | None = None
    """Width and height of those."""
    committed: int = 2
    """Shards that are done in the end."""


# Sorts of cases


def bad(
    id: str,
    reason: str,
    what: Content,
    *words: str,
    key: str = "bad",
    fine: Sequence[str] = (),
    sets: Sequence[str] = (),
    format: int = tarfile.GNU_FORMAT,
    also: Spoil | None = None,
) -> Case:
    """One bad sample between good ones: its row says why, exit 3."""

    def build(world: World) -> None:
        world.shard(content("bad", what), format=format)
        world.options += [word for override in sets for word in ("--set", override)]
        if also:
            also(world)

    return Case(id=id, build=build, exit=3, words=words, reasons={key: reason}, fine=fine)


def fine(id: str, what: Content, *, key: str = "odd", size: tuple[int, int] = (8, 8)) -> Case:
    """Odd, but right: it comes out like the others, exit 0."""
    build: Spoil = lambda world: world.shard(content("odd", what))  # noqa: E731
    return Case(id=id, build=build, exit=0, fine=[key], size=size)


def torn(id: str, reason: str, change: Callable[[bytes], bytes], *words: str, lost: Sequence[str]) -> Case:
    """The first shard's file is harmed: what lies before comes out, a row tells of the rest, exit 3."""
    build = first_shard(change(broken.tar([*good("good-0"), *good("good-1")])))
    key = None if reason in ("not-a-tar", "broken-gzip") else lost[0]
    return Case(id=id, build=build, exit=3, words=words, reasons={key: reason}, lost=lost)


def quarantined(id: str, build: Spoil, *words: str) -> Case:
    """The first shard can't be had at all; the other is done, exit 3."""
    return Case(id=id, build=build, exit=3, words=words, committed=1, lost=["good-0", "good-1"])


def refused(id: str, exit: int, build: Spoil, *words: str) -> Case:
    """Nothing can be done: one clear line and the exit code."""
    return Case(id=id, build=build, exit=exit, words=words, committed=0, lost=list(LABELS))


# What goes into shards


def sample(key: str, **fields: bytes) -> list[tuple[str, bytes]]:
    """A sample's members."""
    return [(f"{key}.{name}", data) for name, data in fields.items()]


def good(key: str) -> list[tuple[str, bytes]]:
    """A good sample's members."""
    return sample(key, png=worlds.png(int(key[-1])), cls=LABELS[key], json=b'{"n": 1}')


def content(key: str, what: Content) -> broken.Members:
    """Members given as such, or as one sample's fields, its label 3 if nothing else is said."""
    return sample(key, **({"cls": b"3"} | what)) if isinstance(what, dict) else what


def first_shard(data: bytes | None) -> Spoil:
    """The first shard's file, or none at all."""
    if data is None:
        return gone("s-000.tar")
    return lambda world: world.write("s-000.tar", data)


def folder_for_a_shard(world: World) -> None:
    (world.folder / "s-000.tar").unlink()
    (world.folder / "s-000.tar").mkdir()


def cut_at(name: str, beyond: int = 0) -> Callable[[bytes], bytes]:
    """End the file `beyond` bytes after a member's header begins."""
    return lambda data: data[: broken.header_at(data, name) + beyond]


def damaged_header(data: bytes) -> bytes:
    place = broken.header_at(data, "good-1.png") + 148
    return data[:place] + b"#" + data[place + 1 :]


def huge_member(world: World) -> None:
    """A member of 257 MiB in a gzipped first shard."""
    whole = broken.tar([*good("good-0"), ("bad.png", b""), *good("good-1")])
    place = broken.header_at(whole, "bad.png")
    info = tarfile.TarInfo("bad.png")
    info.size = 257 << 20
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as zipped:
        zipped.write(whole[:place] + info.tobuf())
        for _ in range(257):
            zipped.write(bytes(1 << 20))
        zipped.write(whole[place + 512 :])
    world.write("s-000.tar", buffer.getvalue())


# What goes into files beside them


def gone(name: str) -> Spoil:
    return lambda world: (world.folder / name).unlink()


def written(name: str, data: bytes) -> Spoil:
    return lambda world: world.write(name, data)


def manifest(text: str) -> Spoil:
    return written("manifest.yaml", text.encode())


def shards(*items: str) -> Spoil:
    return lambda world: world.shards(*items)


def recipe_file(data: bytes | None) -> Spoil:
    """Another recipe file, or the name of none."""

    def build(world: World) -> None:
        world.recipe = str(world.folder / "other.yaml")
        if data is not None:
            world.write("other.yaml", data)

    return build


def recipe(old: str, new: str) -> Spoil:
    return lambda world: world.recipe_edits.append((old, new))


def flags(*options: str) -> Spoil:
    return lambda world: world.options.extend(options)


def sets(override: str) -> Spoil:
    return flags("--set", override)


def no_client(world: World) -> None:
    """The first shard's URL needs a library that isn't there."""
    implementation = {"class": "some_client.FileSystem", "err": "pip install some-client"}
    world.monkeypatch.setitem(known_implementations, "bucket", implementation)
    world.shards("bucket://some/s-000.tar", "s-001.tar")


def served(status: int) -> Spoil:
    """The first shard is at a web server, which answers with this status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *words: object) -> None:
            pass

    def build(world: World) -> None:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        world.cleanup.callback(server.server_close)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        world.cleanup.callback(thread.join)
        world.cleanup.callback(server.shutdown)
        world.shards(f"'http://127.0.0.1:{server.server_port}/s-000.tar'", "s-001.tar")

    return build


# Models


def model(name: str, change: Callable[[bytes], bytes | None]) -> Spoil:
    """One of the network's files changed, or removed where None comes back."""

    def build(world: World) -> None:
        world.model = Path(shutil.copytree(world.model, world.folder / "model"))
        path = world.model / "unet" / name
        data = change(path.read_bytes())
        path.unlink()
        if data is not None:
            path.write_bytes(data)

    return build


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """The network's weights changed."""

    def changed(data: bytes) -> bytes:
        found = load(data)
        change(found)
        return save(found, metadata={"format": "pt"})

    return model(WEIGHTS, changed)


def other_model(**network: object) -> Spoil:
    def build(world: World) -> None:
        options = {"in_channels": 1, "out_channels": 1, "num_class_embeds": worlds.CLASSES + 1} | network
        unet = tiny_models.network(**options)
        world.model = tiny_models.save_pipeline(world.folder / "model", unet=unet)

    return build


def pickled_model(world: World) -> None:
    weights = UNet2DModel.from_pretrained(world.model / "unet").state_dict()
    model(WEIGHTS, lambda _: None)(world)
    torch.save(weights, world.model / "unet" / "diffusion_pytorch_model.bin")


def offline_hub(world: World) -> None:
    world.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe(f"source: {world.model}", f"source: owner/model, revision: {'ab' * 20}")(world)


def nan_for_label_3(found: dict[str, torch.Tensor]) -> None:
    found["class_embedding.weight"][3] = float("nan")


# Where things are written


def out(path: str) -> Spoil:
    """OUT relative to the folder of the input."""
    return lambda world: setattr(world, "out", str(world.folder / path))


def full_disk(world: World) -> None:
    world.out = str(world.mount("small", "size=16k") / "out")


def read_only_disk(world: World) -> None:
    world.out = str(world.mount("sealed", "size=64k,ro") / "out")


def full_scratch(world: World) -> None:
    world.monkeypatch.setattr(tempfile, "tempdir", str(world.mount("scratch", "size=4k")))


def no_scratch(world: World) -> None:
    world.monkeypatch.setattr(tempfile, "tempdir", str(world.folder / "nowhere"))


def finished(world: World) -> Path:
    """OUT of a run that went well."""
    assert world.run().exit_code == 0
    return Path(world.out)


def begun(world: World) -> Path:
    """OUT of a run that was ended before its first commit."""
    for path in finished(world).glob("s-*"):
        path.unlink()
    return Path(world.out)


def other_run(world: World) -> None:
    world.options.append("--set=steps=7")
    begun(world)
    world.options.remove("--set=steps=7")


def run_json(content: bytes) -> Spoil:
    def build(world: World) -> None:
        Path(world.out).mkdir()
        (Path(world.out) / "run.json").write_bytes(content)

    return build


def run_record(**changes: object) -> Spoil:
    """A real run.json with facts of other kinds than they should be."""

    def build(world: World) -> None:
        path = begun(world) / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return build


def marker(content: bytes) -> Spoil:
    return lambda world: (finished(world) / "s-000_stats.json").write_bytes(content)


# Private dirs


def anonymize(world: World) -> None:
    world.purpose = "anonymize"


def private(prepare: Callable[[Path], object]) -> Spoil:
    """An anonymize run whose private dir was prepared like this."""

    def build(world: World) -> None:
        anonymize(world)
        prepare(world.folder / "private")
        world.options.append(f"--private-dir={world.folder / 'private'}")

    return build


def secret(content: bytes, mode: int = 0o600) -> Spoil:
    def prepare(folder: Path) -> None:
        folder.mkdir(mode=0o700)
        (folder / "secret").write_bytes(content)
        (folder / "secret").chmod(mode)

    return private(prepare)


def secret_variable(value: str) -> Spoil:
    def build(world: World) -> None:
        world.monkeypatch.setenv("BOOMERANG_SECRET", value)
        private(lambda folder: folder.mkdir(mode=0o700))(world)

    return build


BOX = b'{"objects": [{"bbox": [1, 2, 3, 4]}]}'
LONG, LONGER = "x" * 120, "y" * 300
WEIGHTS = "diffusion_pytorch_model.safetensors"
NEUTRAL = Image.merge("CMYK", [Image.new("L", (8, 8))] * 3 + [GREY])
BAD, ODD = sample("bad", png=PNG, cls=b"3"), sample("odd", png=PNG, cls=b"3")
WIDE = broken.saved(broken.grey((16, 8)))

CASES = [
    # Images that are none, or not what the name says
    bad("zero-byte image", "undecodable", {"png": b""}, "field png holds empty data"),
    bad("text named .png", "undecodable", {"png": b"hello"}, "png, jpeg and webp are read"),
    bad("error page named .jpg", "undecodable", {"jpg": b"<html>404</html>"}, "holds no image data"),
    bad("truncated png", "undecodable", {"png": PNG[:-25]}, "can't be decoded"),
    bad("truncated jpeg", "undecodable", {"jpg": JPEG[:300]}, "the jpeg data can't be decoded"),
    bad("damaged png", "undecodable", {"png": broken.harmed(PNG)}, "can't be decoded"),
    bad("jpeg named .png", "wrong-extension", {"png": JPEG}, "rename it to .jpg"),
    bad("gif named .png", "wrong-extension", {"png": broken.saved(GREY, "gif")}, "holds GIF data"),
    bad("tiff named .jpg", "wrong-extension", {"jpg": broken.saved(GREY, "tiff")}, "holds TIFF data"),
    bad("animated png", "animated", {"png": broken.animation("png")}, "2 frames"),
    bad("animated webp", "animated", {"webp": broken.animation("webp")}, "2 frames"),
    bad("100-megapixel bomb", "too-many-pixels", {"png": broken.png_claiming(10**4, 10**4)}, "10000x10000"),
    # Images that recipe or model can't take
    bad("palette with alpha", "has-transparency", {"png": broken.palette_with_alpha()}, "images.alpha"),
    bad("rgba", "has-transparency", {"png": broken.saved(broken.colour("RGBA"))}, "images.alpha"),
    bad(
        "transparency into jpeg",
        "alpha-in-jpeg",
        {"png": broken.palette_with_alpha()},
        "images.format",
        sets=["images.alpha=keep", "images.format=jpeg"],
    ),
    bad("colour into a grey model", "colour-image", {"png": COLOUR}, "the model is grey"),
    bad("coloured cmyk", "colour-image", {"jpg": broken.saved(broken.colour("CMYK"), "jpeg")}, "is grey"),
    bad("larger than the model, to be padded", "larger-than-model", {"png": WIDE}, "images.resize"),
    bad(
        "mask under cover",
        "boxes-would-move",
        {"png": WIDE, "mask.png": PNG},
        "mask.png",
        "images.resize",
        sets=["images.resize=cover"],
    ),
    bad(
        "boxes under cover",
        "boxes-would-move",
        {"png": WIDE, "json": BOX},
        "json: bbox",
        sets=["images.resize=cover"],
    ),
    bad(
        "too long for the output's format",
        "unencodable",
        {"png": broken.saved(broken.grey((1, 70_000)))},
        "1x70000",
        sets=["images.resize=stretch", "images.format=jpeg"],
    ),
    # Fields
    bad("no image", "missing-image", [("bad.cls", b"3")], "only cls"),
    bad("two images", "ambiguous-image", {"png": PNG, "jpg": JPEG}, "images.field"),
    bad("dots in the key", "missing-image", {"01.png": PNG}, "take the dots out of the keys"),
    bad("no label", "missing-label", [("bad.png", PNG)], "no field cls"),
    bad("label a word", "bad-label", {"png": PNG, "cls": b"cat"}, "'cat'"),
    bad("label empty", "bad-label", {"png": PNG, "cls": b""}, "not a class number"),
    bad("label negative", "bad-label", {"png": PNG, "cls": b"-1"}, "'-1'"),
    bad("label a fraction", "bad-label", {"png": PNG, "cls": b"1.5"}, "'1.5'"),
    bad("label without end", "bad-label", {"png": PNG, "cls": b"1" * 5000}, "not a class number"),
    bad("label of no class", "label-out-of-range", {"png": PNG, "cls": b"7"}, "holds 7"),
    bad("label that means none", "label-out-of-range", {"png": PNG, "cls": b"4"}, "holds 4"),
    bad(
        "json that is none, to be filtered",
        "bad-json",
        {"png": PNG, "json": b'{"n": '},
        "can't be filtered",
        sets=["fields.json_keys.n=drop"],
    ),
    bad(
        "json with a key twice, to be filtered",
        "bad-json",
        {"png": PNG, "json": b'{"n": 1, "n": 2}'},
        "a key is given twice",
        sets=["fields.json_keys.n=drop"],
    ),
    bad(
        "a field where the output goes",
        "field-collision",
        {"png": PNG, "jpg": JPEG},
        "images.format: input",
        sets=["images.field=png", "images.format=jpeg"],
    ),
    # Members and their names
    bad("absolute name", "unsafe-name", sample("/bad", png=PNG), "outside the archive", key="/bad"),
    bad("name with ..", "unsafe-name", sample("a/../../b", png=PNG), "outside", key="a/../../b"),
    bad("control characters", "unsafe-name", sample("b\x1bd", png=PNG), "control", key="b\\x1bd"),
    bad("not utf-8", "unsafe-name", sample("b\udce9d", png=PNG), "not valid UTF-8", key="b\\udce9d"),
    bad("symlink", "link-member", [(broken.link("bad.png"), b""), ("bad.cls", b"3")], "--dereference"),
    bad("hard link", "link-member", [(broken.link("bad.png", tarfile.LNKTYPE), b"")], "is a link"),
    bad("fifo", "special-member", [(broken.link("bad.png", tarfile.FIFOTYPE), b"")], "no regular file"),
    bad("device", "special-member", [(broken.link("bad.png", tarfile.CHRTYPE), b"")], "no regular file"),
    bad("over-long name", "name-too-long", sample(LONG, png=PNG, cls=b"3"), "shorten the key", key=LONG),
    bad(
        "over-long name in pax",
        "name-too-long",
        sample(LONGER, png=PNG, cls=b"3"),
        "255 where a slash cuts it well",
        key=LONGER,
        format=tarfile.PAX_FORMAT,
    ),
    bad("field twice", "field-repeated", [*BAD, ("bad.PNG", PNG)], "comes twice"),
    bad("key twice", "key-repeated", [*BAD, *ODD, ("bad.txt", b"")], "members together", fine=["odd"]),
    bad("member of 257 MiB", "member-too-large", {}, "over the limit of 268,435,456", also=huge_member),
    bad(
        "key that a variant would get",
        "reserved-key",
        sample("bad-v1", png=PNG, cls=b"3"),
        "keep_originals",
        sets=["variants=2", "keep_originals=true"],
        key="bad-v1",
    ),
    bad(
        "model with nan for one class", "non-finite-output", {"png": PNG}, "NaN", also=tensors(nan_for_label_3)
    ),
    # Odd, but right
    fine("cmyk without colour", {"jpg": broken.saved(NEUTRAL, "jpeg")}),
    fine("16-bit", {"png": broken.saved(broken.deep())}),
    fine("one-bit", {"png": broken.saved(GREY.convert("1"))}),
    fine("opaque palette", {"png": broken.saved(GREY.convert("P"))}),
    fine("exif-rotated", {"jpg": broken.rotated(broken.grey((4, 8)))}, size=(8, 4)),
    fine("exif that is garbage", {"jpg": broken.saved(GREY, "jpeg", exif=b"Exif\0\0garbage")}),
    fine("icc that is garbage", {"png": broken.saved(GREY, icc_profile=b"garbage" * 40)}),
    fine("bytes after the jpeg", {"jpg": JPEG + b"garbage" * 99}),
    fine("a single pixel", {"png": broken.saved(broken.grey((1, 1)))}, size=(1, 1)),
    fine("capitals in the extension", [("odd.PNG", PNG), ("odd.CLS", b"3")]),
    fine("label with zeros and a newline", {"png": PNG, "cls": b"003\r\n"}),
    fine("json that is none, passed on", {"png": PNG, "json": b"\xff{"}),
    fine("key ending in ~", sample("odd~", png=PNG, cls=b"3"), key="odd~"),
    fine("key ending in -v0", sample("odd-v0", png=PNG, cls=b"3"), key="odd-v0"),
    fine("folders in the key", sample("a/b/odd", png=PNG, cls=b"3"), key="a/b/odd"),
    fine("long name that a slash cuts", sample("d" * 90 + "/odd", png=PNG, cls=b"3"), key="d" * 90 + "/odd"),
    fine("folders and metadata between", [(broken.link("d", tarfile.DIRTYPE), b""), ("__m__", b""), *ODD]),
    # Shards
    torn("cut in a member", "truncated-tar", cut_at("good-1.png", 520), "was read", lost=["good-1"]),
    torn("cut in a header", "truncated-tar", cut_at("good-1.cls", 99), "was read", lost=["good-1"]),
    torn("half a sample", "truncated-tar", cut_at("good-1.cls"), "end-of-archive", lost=["good-1"]),
    torn("cut between samples", "truncated-tar", cut_at("good-1.png"), "end-of", lost=["good-0", "good-1"]),
    torn("damaged header", "broken-header", damaged_header, "damaged", lost=["good-0", "good-1"]),
    torn("two tars in one", "data-after-end", lambda data: data * 2, "after the end", lost=["good-1"]),
    torn("gzip cut", "truncated-tar", lambda data: gzip.compress(data)[:-20], "too soon", lost=["good-1"]),
    torn(
        "gzip damaged",
        "broken-gzip",
        lambda data: gzip.compress(data)[:-8] + bytes(8),
        lost=["good-0", "good-1"],
    ),
    torn("no bytes", "not-a-tar", lambda _: b"", "the file is empty", lost=["good-0", "good-1"]),
    torn("an error page", "not-a-tar", lambda _: b"<html>" * 200, "error page", lost=["good-0", "good-1"]),
    torn("a zip file", "not-a-tar", lambda _: b"PK\3\4" * 200, "a zip file", lost=["good-0", "good-1"]),
    Case(id="an empty tar", build=first_shard(broken.tar([])), exit=0, lost=["good-0", "good-1"]),
    quarantined("a folder for a shard", folder_for_a_shard, "s-000.tar", "Is a directory"),
    quarantined("a shard that is not there", first_shard(None), "s-000.tar", "nothing at that path"),
    quarantined(
        "a disk that fails on reading",
        shards("{url: /proc/self/mem, id: s-000}", "s-001.tar"),
        "Input/output error",
    ),
    quarantined(
        "a url without its client",
        no_client,
        "bucket://some/s-000.tar",
        "pip install some-client",
    ),
    quarantined("a url of no protocol", shards("nothing://some/s-000.tar", "s-001.tar"), "Protocol not known"),
    quarantined("http 404", served(404), "/s-000.tar", "nothing at that path"),
    quarantined("http 500", served(500), "/s-000.tar", "500"),
    # Manifests
    refused("manifest: no yaml", 2, manifest("shards: [\n"), "manifest.yaml: not valid YAML"),
    refused("manifest: unknown key", 2, manifest("shard: [s-000.tar]\n"), "did you mean shards?"),
    refused("manifest: later version", 2, manifest("format_version: 2\nname: x\n"), "format_version is 2"),
    refused("manifest: no shards", 2, shards(), "a list of at least one"),
    refused("manifest: glob without match", 2, shards("t-*.tar"), "t-*.tar matches nothing"),
    refused("manifest: one stem twice", 2, shards("s-000.tar", "other/s-000.tar"), "one stem, s-000", "id:"),
    refused("manifest: no tar", 2, shards("s-000.zip"), "s-000.zip is not named .tar"),
    refused("manifest: open range", 2, shards("'s-{0..1.tar'"), "write a range as"),
    refused("manifest: not there", 1, gone("manifest.yaml"), "manifest.yaml: there is nothing at that path"),
    # Recipes and the command line
    refused("recipe: unknown key", 2, sets("stepz=6"), "unknown key stepz; did you mean steps?"),
    refused("recipe: unknown key deep down", 2, sets("images.resise=pad"), "did you mean resize?"),
    refused("recipe: t out of range", 2, sets("t.fraction=1.5"), "t.fraction", "given: 1.5"),
    refused("recipe: t beyond the model's chain", 2, sets("t.timestep=21"), "timestep", "20"),
    refused("recipe: t without unit", 2, recipe("{fraction: 0.5}", "0.5"), "t needs its unit"),
    refused("recipe: t with two", 2, recipe("{fraction: 0.5}", "{fraction: 0.5, snr: 1.0}"), "one unit"),
    refused("recipe: key twice", 2, recipe("steps: 6", "steps: 6\nsteps: 7"), "steps is given twice"),
    refused("recipe: code in it", 2, recipe("steps: 6", "steps: !!python/name:os.abort"), "not valid YAML"),
    refused("recipe: no steps", 2, recipe("steps: 6", ""), "steps is missing"),
    refused("recipe: no seed", 2, recipe("seed: 7", ""), "needs a seed"),
    refused("recipe: no text", 2, recipe_file(b"\xff\xfe\0"), "not a text file"),
    refused("recipe: not there", 2, recipe_file(None), "no such pipeline file", "demo-anonymize"),
    refused("--set without =", 2, sets("steps"), "write it as key=value"),
    refused("--set into a value", 2, sets("steps.more=1"), "steps is a value, not a block"),
    refused("--set of the wrong kind", 2, sets("steps=many"), "steps", "'many'"),
    refused("--threads 0", 2, flags("--threads", "0"), "--threads"),
    refused("unknown option", 2, flags("--treads", "2"), "--threads"),
    # Models
    refused("model: no folder", 2, sets("model.source=/nowhere/at/all"), "no such folder"),
    refused("model: pickle weights", 2, pickled_model, "pickle weights are refused"),
    refused("model: hub id without network", 2, offline_hub, "the hub can't be reached"),
    refused("model: hub id without revision", 2, sets("model.source=owner/model"), "model.revision"),
    refused("model: weights cut", 2, model(WEIGHTS, lambda data: data[: len(data) // 2]), "weights don't load"),
    refused("model: weights garbage", 2, model(WEIGHTS, lambda _: b"garbage!" * 9), "weights don't load"),
    refused("model: no weights", 2, model(WEIGHTS, lambda _: None), WEIGHTS),
    refused("model: tensor missing", 2, tensors(lambda found: found.pop("conv_in.bias")), "conv_in.bias"),
    refused("model: tensor too many", 2, tensors(lambda found: found.update(x=torch.ones(1))), "unexpected"),
    refused("model: config no json", 2, model("config.json", lambda _: b"{"), "config.json: not readable"),
    refused("model: wrong channel count", 2, other_model(in_channels=4, out_channels=4), "images have 1 or 3"),
    refused("model: unconditional", 2, other_model(num_class_embeds=None), "remove model.class_labels"),
    refused("model: null label too high", 2, other_model(num_class_embeds=3), "null_label 4"),
    # Where the output goes
    refused("out: a file is there", 1, written("out", b""), "/out", "File exists"),
    refused("out: where the input is", 2, out("."), "s-000.tar lies in OUT", "choose another OUT"),
    refused("out: above the input", 2, out(".."), "s-000.tar lies in OUT"),
    refused("out: in /proc", 1, out("/proc/boomerang-out"), "/proc/boomerang-out"),
    refused("out: read-only", 1, read_only_disk, "Read-only file system"),
    refused("out: disk full", 1, full_disk, "No space left on device"),
    refused("scratch: disk full", 1, full_scratch, "No space left on device", "TMPDIR"),
    refused("scratch: no folder", 1, no_scratch, "TMPDIR"),
    refused("out: another run", 2, other_run, "holds another run", "steps (7 there, 6 now)"),
    refused("run.json: no json", 2, run_json(b"{"), "run.json is not a run record"),
    refused("run.json: a list", 2, run_json(b"[1]"), "run.json is not a run record"),
    refused("run.json: a number", 2, run_json(b"7"), "run.json is not a run record"),
    refused("run.json: not utf-8", 2, run_json(b"\xff"), "run.json is not a run record"),
    refused("run.json: later version", 2, run_record(format_version=9), "format_version 9"),
    refused("run.json: recipe no mapping", 2, run_record(recipe=[]), "run.json is not a run record"),
    refused("run.json: stack no mapping", 2, run_record(stack=7), "run.json is not a run record"),
    refused("run.json: shards a number", 2, run_record(shards=7), "run.json is not a run record"),
    refused("run.json: another stack", 2, run_record(stack={"torch": "1.0"}), "stack", "torch (1.0 there"),
    Case(id="marker cut", build=marker(b'{"format'), exit=0),
    Case(id="marker of another kind", build=marker(b"[]"), exit=0),
    # The private dir
    refused("private: none", 2, anonymize, "--private-dir"),
    refused("private: a file is there", 2, private(lambda path: path.write_text("")), "File exists"),
    refused("private: secret too short", 2, secret(b"00" * 15), "120 bits", "128"),
    refused("private: secret too long", 2, secret(b"00" * 65), "520 bits"),
    refused("private: secret empty", 2, secret(b""), "0 bits"),
    refused("private: secret no hex", 2, secret(b"correct horse"), "not hold a secret in hex"),
    refused("private: secret not utf-8", 2, secret(b"\xff\xfe"), "not hold a secret in hex"),
    refused("private: secret for all to read", 2, secret(b"00" * 32, 0o644), "chmod 600"),
    refused(
        "private: secret a folder", 2, private(lambda path: (path / "secret").mkdir(0o700, True)), "secret"
    ),
    refused("private: variable too short", 2, secret_variable("00"), "BOOMERANG_SECRET holds 8 bits"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_broken_input(case: Case, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    with contextlib.ExitStack() as cleanup:
        world = World(folder=tmp_path, model=tiny_model, monkeypatch=monkeypatch, cleanup=cleanup)
        case.build(world)
        result = world.run()

        # The exit code is true, and an error is one line.
        assert result.exit_code == case.exit, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
        assert len(errors) == (case.exit in (1, 2)), result.stderr
        assert "Traceback" not in result.output

        # Every bad sample has a row with its reason, every other one came out with the right label.
        assert len(world.done()) == case.committed
        rows = world.rows()
        assert {row.key: row.reason for row in rows if row.reason} == case.reasons
        labels = {key: label for key, label in LABELS.items() if key not in case.lost}
        labels |= dict.fromkeys(case.fine, b"3")
        variants = "variants=2" in world.options
        found = {
            re.sub(r"-v\d$", "", key) if variants else key: fields["cls"].strip().lstrip(b"0") or b"0"
            for key, fields in world.samples().items()
        }
        assert found == labels
        good = [row for row in rows if row.status == "ok"]
        assert {row.key: row.label for row in good} == {key: int(label) for key, label in labels.items()}
        if case.size:
            assert {(row.width, row.height) for row in good if row.key in case.fine} == {case.size}

        # It is said what is wrong, and where.
        said = "\n".join([result.output, *(row.detail or "" for row in rows)])
        for word in case.words:
            assert word in said

        # What was written is what the records say.
        if case.committed == 2:
            assert verify(world.out, deep=True).problems == ()
        elif case.committed == 1:
            assert verify(world.out, deep=True).problems == (
                "shard s-000 is not done; run the same command to finish",
            )


# Bad luck on the way


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    with contextlib.ExitStack() as cleanup:
        yield World(folder=tmp_path, model=tiny_model, monkeypatch=monkeypatch, cleanup=cleanup)


def test_a_signal_ends_with_75_and_the_same_command_finishes(world: World):
    real = Runner.run

    def interrupted(self: Runner, task: Task, **options: Any) -> ShardReport:
        if task.name == "s-001":
            while world.done() != ["s-000"]:  # the pool begins both at once
                time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
            while not options["stopped"]():  # the main thread handles it when it next wakes
                time.sleep(0.01)
        return real(self, task, **options)

    world.monkeypatch.setattr(Runner, "run", interrupted)
    result = world.run()
    assert result.exit_code == 75, result.output
    assert "run the same command to resume" in result.stdout
    assert world.done() == ["s-000"]
    world.monkeypatch.setattr(Runner, "run", real)
    assert world.run().exit_code == 0
    assert world.done() == ["s-000", "s-001"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_disk_that_was_full_takes_the_rest_later(world: World):
    full_disk(world)
    assert world.run().exit_code == 1
    assert world.done() == []
    subprocess.run(["mount", "-o", "remount,size=1m", str(Path(world.out).parent)], check=True)
    assert world.run().exit_code == 0
    there = worlds.tree(Path(world.out))
    world.out = str(world.folder / "undisturbed")
    assert there == worlds.tree(finished(world))


def test_a_shard_that_came_back_is_done_by_the_next_call(world: World):
    shard = world.folder / "s-000.tar"
    shard.rename(world.folder / "elsewhere")
    first = world.run()
    assert (first.exit_code, world.done()) == (3, ["s-001"])
    assert "quarantined: can't read" in first.stdout
    (world.folder / "elsewhere").rename(shard)
    assert world.run().exit_code == 0
    assert verify(world.out, deep=True).problems == ()


@pytest.mark.slow
def test_the_exit_codes_of_a_real_process(world: World):
    world.shard(sample("bad", png=b"", cls=b"3"))
    command = [sys.executable, "-m", "boomerang_batch", *world.command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 3, done.stderr
    assert "samples 1 failed, 4 ok" in done.stdout
    assert "Traceback" not in done.stderr
