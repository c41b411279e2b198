"""Images with a mark in every place where a format can tell of its origin."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image, ImageCms, PngImagePlugin

from tests import broken, worlds

Mark = Callable[[str], str]

METADATA = (
    "exif", "exif thumbnail", "gps", "xmp", "iptc", "icc description", "icc copyright", "comment", "text",
    "thumbnail", "private part", "trailing data",
)  # fmt: skip
"""What is marked in some format or other."""

TAKEN = "1987:03:07 04:05:06"
"""When every picture was taken."""

TIMES = {
    "1987:03:07": "capture time in EXIF",
    "19870307": "capture time in IPTC",
    "1987-03-07": "capture time in json",
    "1234567890": "time of a tar member",
    f"{1234567890:o}": "time of a tar member, in octal",
}
PNG_TIME = struct.pack(">H5B", 1987, 3, 7, 4, 5, 6)


def marked_image(mark: Mark, at: str, field: str, seed: int) -> bytes:
    """A png, jpg or webp that carries every mark its format can."""
    image = Image.open(io.BytesIO(worlds.png(seed)))
    text = {kind: mark(f"{kind} {at}") for kind in METADATA}
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{text['xmp']}</x:xmpmeta>".encode()
    profile = _profile(text["icc description"], text["icc copyright"])
    options: dict[str, object] = {"exif": _exif(text), "icc_profile": profile}
    trailing = text["trailing data"].encode()
    if field == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("Title", text["text"])
        info.add_text("Comment", text["comment"], zip=True)
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        info.add_itxt("Caption", text["text"], zip=True)
        info.add_text("Raw profile type iptc", f"\niptc\n{len(_iptc(text))}\n{_iptc(text).hex()}")
        data = broken.saved(image, "png", pnginfo=info, **options)
        parts = _chunk(b"tIME", PNG_TIME) + _chunk(b"prVt", text["private part"].encode())
        return data[:-12] + parts + data[-12:] + trailing
    if field == "webp":
        data = broken.saved(image, "webp", xmp=xmp, lossless=True, **options)
        part = text["private part"].encode()
        data += b"prVt" + struct.pack("<I", len(part)) + part
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:] + trailing
    data = broken.saved(image, "jpeg", xmp=xmp, comment=text["comment"], **options)
    small = broken.saved(image.resize((4, 4)), "jpeg", comment=text["thumbnail"])
    resources = _resource(0x0404, _iptc(text)) + _resource(0x040C, bytes(28) + small)
    parts = _segment(0xE0, b"JFXX\0\x10" + small)
    parts += _segment(0xED, b"Photoshop 3.0\0" + resources)
    parts += _segment(0xEB, text["private part"].encode())
    return data[:2] + parts + data[2:] + trailing


def foreign_image(mark: Mark, at: str, format: str) -> bytes:
    """A GIF or a TIFF that tells of its origin."""
    image = Image.open(io.BytesIO(worlds.png(1)))
    if format == "gif":
        return broken.saved(image, "gif", comment=mark(f"gif comment {at}").encode())
    told = {270: mark(f"tiff description {at}"), 315: mark(f"tiff artist {at}"), 306: TAKEN}
    return broken.saved(image, "tiff", tiffinfo=told)


def _exif(text: dict[str, str]) -> bytes:
    """EXIF with capture times, GPS, a comment and a thumbnail."""
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = exif[0x8298] = text["exif"]
    exif[0x0132] = TAKEN
    exif.get_ifd(0x8769).update({0x9003: TAKEN, 0x9286: b"ASCII\0\0\0" + text["exif"].encode()})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0), 28: text["gps"], 29: text["gps"]})
    return exif.tobytes() + b"\xff\xd8\xff" + text["exif thumbnail"].encode()


def _iptc(text: dict[str, str]) -> bytes:
    """IPTC-IIM: by-line, keyword, caption and date."""
    told = {80: text["iptc"], 25: text["iptc"], 120: text["iptc"], 55: "19870307"}
    return b"".join(
        struct.pack(">BBBH", 0x1C, 2, kind, len(said)) + said.encode() for kind, said in told.items()
    )


def _profile(description: str, copyright: str) -> bytes:
    """An sRGB profile that says so in words of its own."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, said in ((b"desc", description), (b"cprt", copyright)):
        words = said.encode("utf-16-be")
        value = b"mluc" + struct.pack(">III", 0, 1, 12) + b"enUS" + struct.pack(">II", len(words), 28) + words
        entry = next(at for at in range(132, len(profile), 12) if profile[at : at + 4] == tag)
        profile[entry + 4 : entry + 12] = struct.pack(">II", len(profile), len(value))
        profile += value
    profile[:4] = struct.pack(">I", len(profile))
    return bytes(profile)


def _resource(kind: int, data: bytes) -> bytes:
    """One of Photoshop's image resources."""
    return b"8BIM" + struct.pack(">HHI", kind, 0, len(data)) + data + bytes(len(data) % 2)


def _segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
