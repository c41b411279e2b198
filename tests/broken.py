"""Builders of bad input, shared by the tests that meet it: odd images, hostile tar members, harmed shards."""

from __future__ import annotations

import io
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Members = Sequence[tuple[str | tarfile.TarInfo, bytes]]


def saved(image: Image.Image, format: str = "png", **options: object) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey(size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A smooth ramp in mode L; size is (width, height)."""
    width, height = size
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 5) % 256
    return Image.fromarray(ramp.astype(np.uint8))


def colour(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Channels that differ."""
    bands = [grey(size).point(lambda level, k=k: (level * k + 40 * k) % 256) for k in range(1, len(mode) + 1)]
    return Image.merge(mode, bands)


def palette_with_alpha() -> bytes:
    """A palette PNG whose first colour is transparent."""
    return saved(grey().quantize(8), "png", transparency=0)


def animation(format: str) -> bytes:
    """Two frames."""
    return saved(grey(), format, save_all=True, append_images=[grey().rotate(90)])


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header over an image that isn't there."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def harmed(data: bytes, at: float = 0.6, *, by: bytes = b"\xa5" * 16) -> bytes:
    """`data` with some bytes in it overwritten."""
    place = int(len(data) * at)
    return data[:place] + by + data[place + len(by) :]


def rotated(image: Image.Image) -> bytes:
    """A JPEG that EXIF says to turn by 90 degrees."""
    found = Image.Exif()
    found[0x0112] = 6
    return saved(image, "jpeg", exif=found.tobytes())


def deep() -> Image.Image:
    """16 bits of grey."""
    return Image.fromarray(np.asarray(grey()).astype(np.uint16) * 257)


def link(name: str, kind: bytes = tarfile.SYMTYPE, target: str = "good-0.png") -> tarfile.TarInfo:
    """A member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar(members: Members, *, format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name or TarInfo, data) pairs. Surrogates in names become the bytes they stand for."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header_at(data: bytes, name: str) -> int:
    """Offset of a member's header in a tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmember(name).offset


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder`, or a skip where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a disk of a few kilobytes needs the mount command")
    if mounted.returncode:
        pytest.skip(f"a disk of a few kilobytes needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
