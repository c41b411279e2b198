"""What image bytes are, told by their first bytes and never by decoding; and what a field's name claims."""

from __future__ import annotations

import struct
from typing import Literal

from boomerang_batch.errors import SampleError

Format = Literal["png", "jpeg", "webp"]

EXTENSIONS: dict[str, Format] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}

_FOREIGN_MAGIC = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"%PDF", "PDF"),
)


def sniff(data: bytes) -> Format | None:
    """The format of image bytes by their first bytes, or None for anything but png, jpeg and webp."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def describe(data: bytes) -> str:
    """What bytes are that `sniff` doesn't know, in words for a message."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":
        return "AVIF or HEIC" if data[8:12] in (b"avif", b"heic", b"heix", b"mif1") else "video"
    return next((name for magic, name in _FOREIGN_MAGIC if data.startswith(magic)), "no image")


def looks_like_image(data: bytes) -> bool:
    """Whether bytes begin as those of an image do, of a video or of a page, whatever their field is called."""
    if data.startswith(b"BM"):
        return data[6:10] == bytes(4)  # so may a text begin; in a BMP these are reserved
    return sniff(data) is not None or describe(data) not in ("empty", "no image")


def format_of(data: bytes, field: str) -> Format:
    """The bytes' format, which must be what the field's extension claims, if it claims one."""
    format = sniff(data)
    claimed = EXTENSIONS.get(field.rpartition(".")[2])
    if format is None:
        found = describe(data)
        known = found not in ("empty", "no image")
        reason = "wrong-extension" if known and claimed else "undecodable"
        raise SampleError(reason, f"field {field} holds {found} data; png, jpeg and webp are read")
    if claimed not in (None, format):
        detail = f"field {field} holds {format} data; rename it to .{output_field(field, format)}"
        raise SampleError("wrong-extension", detail)
    return format


def output_field(field: str, format: Format) -> str:
    """The field an output of `format` goes to: the input's, its extension changed where that would lie."""
    folder, dot, extension = field.rpartition(".")
    if EXTENSIONS.get(extension, format) == format:
        return field
    return folder + dot + {"png": "png", "jpeg": "jpg", "webp": "webp"}[format]


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649)."""
    chunk, header = data[12:16], data[20:30]
    if chunk == b"VP8X" and len(header) == 10:
        return int.from_bytes(header[4:7], "little") + 1, int.from_bytes(header[7:10], "little") + 1
    if chunk == b"VP8L" and len(header) >= 5:
        bits = int.from_bytes(header[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(header) == 10:
        width, height = struct.unpack("<HH", header[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no WebP header")


def is_lossless_webp(data: bytes) -> bool:
    """Whether the picture itself is a VP8L chunk; a VP8X container may hold either kind."""
    position = 12
    while position + 8 <= len(data):
        chunk, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        if chunk in (b"VP8L", b"VP8 "):
            return chunk == b"VP8L"
        position += 8 + size + size % 2
    return False
