"""Images between bytes and arrays: what may come in, how it meets the model's channels, what goes out.

The only importer of Pillow. Decoding is strict (png, jpeg and webp, told by the bytes, refused from the header
when too large) and ends in upright sRGB uint8. Encoding writes pixels and nothing else: no EXIF, no ICC, no
text, no thumbnail. One bad image is a SampleError whose reason is named in `decode`.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import (
    Image,
    ImageCms,
    ImageDraw,
    ImageFont,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
    features,
)

from boomerang_batch.config.pipeline import ImagePolicy
from boomerang_batch.data.formats import Format, format_of, is_lossless_webp, webp_size
from boomerang_batch.errors import SampleError

Pixels = NDArray[np.uint8]

Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error)
_EXIF_ORIENTATION = 0x0112
_LUMA_MODES = ("1", "L", "LA")
_FILTERS: dict[Filter, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_HEAD = 24
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")

# `warnings.catch_warnings` swaps process-wide state, so only one thread at a time may be inside.
_warnings_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A decoded image, and what is needed to write its successor the same way.

    `pixels` (H, W, C) uint8 sRGB, C being 1 or 3 as asked for; `alpha` (H, W) uint8 where it is carried over.
    `format`, `grey` and `lossless` (webp only) tell what the file was and its successor will be; `grey` None
    means: as `pixels` are. Put other pixels in with `dataclasses.replace`.
    """

    pixels: Pixels
    alpha: Pixels | None
    format: Format
    grey: bool | None = None
    lossless: bool = False


def decode(data: bytes, *, field: str, channels: int | None, policy: ImagePolicy) -> Picture:
    """Decode one image for a model of `channels` (1 or 3) channels; None leaves it as the file has it.

    EXIF orientation is applied. A valid ICC profile that isn't sRGB is converted to sRGB; a broken one is
    ignored, as browsers do. 16 bits are scaled to 8, palettes expanded, CMYK converted. Grey goes into an RGB
    model replicated; colour goes into a grey model only if every pixel is neutral, because dropping the colour
    of an image silently is nothing anyone asked for. A wholly opaque alpha channel is no transparency.

    Raises SampleError: `undecodable` (empty, text, truncated, corrupt), `wrong-extension` (the bytes aren't
    what the field's name says), `too-many-pixels` (told by the header, before decoding), `animated`,
    `unsupported-mode`, `has-transparency` and `alpha-in-jpeg` (by the alpha policy), `colour-image`.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    format = format_of(data, field)
    try:
        image = _open(data, format, policy.max_pixels, field)
        image.load()
        orientation = _orientation(image)
        pixels, alpha = _plain(image, field)
    except Image.DecompressionBombError as error:
        raise SampleError("too-many-pixels", f"field {field}: {error}") from error
    except _DECODE_ERRORS as error:
        detail = f"field {field}: the {format} data can't be decoded ({_one_line(error)})"
        raise SampleError("undecodable", detail) from error

    pixels = _upright(pixels, orientation)
    alpha = None if alpha is None else _upright(alpha, orientation)
    grey = pixels.shape[2] == 1
    pixels, alpha = _apply_alpha_policy(pixels, alpha, policy, policy_format(format, policy), field)
    return Picture(
        pixels=_to_channels(pixels, channels, field),
        alpha=alpha,
        format=format,
        grey=grey,
        lossless=format == "webp" and is_lossless_webp(data),
    )


def encode(picture: Picture, *, policy: ImagePolicy) -> tuple[bytes, Format]:
    """Encode a picture in the policy's format, with no metadata whatsoever. Returns the bytes and the format.

    A grey file stays grey (luma, ITU-R 601), an RGB file stays RGB. jpeg is baseline 4:4:4; webp stays lossless
    if the input was and the policy says `input`. Raises SampleError `unencodable`.
    """
    format = policy_format(picture.format, policy)
    image = Image.fromarray(_file_array(picture))
    options: dict[str, Any] = {
        "png": {"compress_level": 6},
        "jpeg": {"quality": policy.quality, "subsampling": 0},
        "webp": {"quality": policy.quality, "method": 4},
    }[format]
    if format == "webp" and policy.format == "input" and picture.lossless:
        options["lossless"] = True
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=format.upper(), **options)
    except (OSError, ValueError) as error:
        size = f"{image.width}x{image.height}"
        raise SampleError("unencodable", f"{size} can't be written as {format} ({_one_line(error)})") from error
    return buffer.getvalue(), format


def policy_format(format: Format, policy: ImagePolicy) -> Format:
    """The format an input of `format` is written in."""
    return format if policy.format == "input" else policy.format


def codec_versions() -> dict[str, str]:
    """Versions of the libraries that decode and encode: other ones may give other bytes."""
    found = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib", "webp", "littlecms2")}
    return {name: version for name, version in found.items() if version}


def to_model_values(pixels: Pixels, value_range: tuple[float, float]) -> NDArray[np.float32]:
    """uint8 (H, W, C) to float32 (C, H, W), 0..255 onto `value_range`."""
    low, high = value_range
    # Turned while it is small, and calculated in place: a new float image costs more than the arithmetic.
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    values /= np.float32(255)
    values *= np.float32(high - low)
    values += np.float32(low)
    return values


def to_pixels(values: NDArray[np.float32], value_range: tuple[float, float]) -> Pixels:
    """float32 (C, H, W) to uint8 (H, W, C), clamped to `value_range`; undoes `to_model_values` exactly.

    Raises SampleError `non-finite-output`: a NaN would otherwise turn into some shade of grey.
    """
    if not np.isfinite(values).all():
        raise SampleError("non-finite-output", "the model gave NaN or infinity; try dtype float32")
    low, high = value_range
    levels = values - np.float32(low)
    levels *= np.float32(255 / (high - low))
    np.rint(levels, out=levels)
    np.maximum(levels, 0, out=levels)
    np.minimum(levels, 255, out=levels)
    pixels = np.empty((*levels.shape[1:], len(levels)), np.uint8)
    for channel, plane in enumerate(levels):
        pixels[..., channel] = plane
    return pixels


def resize(
    pixels: Pixels,
    size: tuple[int, int],
    *,
    box: tuple[float, float, float, float] | None = None,
    filter: Filter = "lanczos",
) -> Pixels:
    """Resample (H, W, C) to `size` (height, width), antialiased; the identity at equal size.

    `box` (left, top, right, bottom) picks the part of the source to stretch, in pixels and fractions.
    """
    height, width = size
    if pixels.shape[:2] == size and box is None:
        return pixels
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    image = Image.fromarray(flat).resize((width, height), _FILTERS[filter], box=box)
    return np.asarray(image).reshape(height, width, pixels.shape[2])


def contact_sheet(
    rows: Sequence[Sequence[Pixels]], *, heads: Sequence[str] = (), cell: int = 96, gap: int = 4
) -> bytes:
    """Rows of (H, W, C) images as one PNG: each fitted into a square of `cell` pixels, on white.

    `heads` stand above the columns.
    """
    columns = max((len(row) for row in rows), default=0)
    pitch, above = cell + gap, _HEAD if heads else 0
    height, width = max(len(rows), 1) * pitch + gap + above, max(columns, len(heads), 1) * pitch + gap
    sheet = np.full((height, width, 3), 255, np.uint8)
    for index, row in enumerate(rows):
        for column, pixels in enumerate(row):
            shown = fitted(pixels, cell=cell)
            height, width = shown.shape[:2]
            top = above + gap + index * pitch + (cell - height) // 2
            left = gap + column * pitch + (cell - width) // 2
            sheet[top : top + height, left : left + width] = shown
    image, buffer = Image.fromarray(sheet), io.BytesIO()
    pen = ImageDraw.Draw(image)
    for column, head in enumerate(heads):
        middle = (gap + column * pitch + cell // 2, (above + gap) // 2)
        pen.text(middle, head, fill=(0, 0, 0), font=ImageFont.load_default(15), anchor="mm")
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def fitted(pixels: Pixels, *, cell: int = 96) -> Pixels:
    """(H, W, C) with its longer side at `cell` pixels, as `contact_sheet` shows it; again changes nothing."""
    scale = cell / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    # Whole steps keep small images crisp; shrinking needs a filter.
    return _enlarge(pixels, height, width) if scale >= 1 else resize(pixels, (height, width))


def _enlarge(pixels: Pixels, height: int, width: int) -> Pixels:
    rows = np.arange(height) * pixels.shape[0] // height
    columns = np.arange(width) * pixels.shape[1] // width
    return pixels[rows][:, columns]


def _open(data: bytes, format: Format, max_pixels: int | None, field: str) -> Image.Image:
    """Parse the header, not the pixels, and refuse what can't be one picture of fair size.

    Pillow's format classes are used directly: `Image.open` would warn about sizes by a process-wide limit.
    """
    if format == "webp" and max_pixels is not None:
        _check_size(*webp_size(data), max_pixels, field)  # Pillow allocates the canvas on opening
    reader: Any = {
        "png": PngImagePlugin.PngImageFile,
        "jpeg": JpegImagePlugin.JpegImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
    }[format]
    with _no_warnings():
        image: Image.Image = reader(io.BytesIO(data))
    if max_pixels is not None:
        _check_size(image.width, image.height, max_pixels, field)
    if getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 0)
        raise SampleError("animated", f"field {field} has {frames} frames; a sample is one picture")
    return image


def _check_size(width: int, height: int, max_pixels: int, field: str) -> None:
    if width * height > max_pixels:
        detail = f"field {field} is {width}x{height} pixels; the limit images.max_pixels is {max_pixels:,}"
        raise SampleError("too-many-pixels", detail)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 when there is none or it can't be read."""
    try:
        with _no_warnings():
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (*_DECODE_ERRORS, RuntimeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(array: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation of (H, W, ...)."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _plain(image: Image.Image, field: str) -> tuple[Pixels, Pixels | None]:
    """Any mode as sRGB or grey (H, W, 1 or 3), and alpha (H, W) if the file has one."""
    mode = image.mode
    if mode in _DEEP_MODES:
        return _from_16_bits(image)
    profile = image.info.get("icc_profile")
    if mode == "CMYK":
        return _array(_in_mode(_to_srgb(image, profile), "RGB")), None
    if mode not in (*_LUMA_MODES, "P", "PA", "RGB", "RGBA", "YCbCr"):
        raise SampleError("unsupported-mode", f"field {field} has pixel mode {mode}; convert it to RGB or grey")
    has_alpha = mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    whole = _in_mode(image, "RGBA" if has_alpha else "L" if mode in _LUMA_MODES else "RGB")
    colour = whole
    if has_alpha:
        colour = whole.getchannel("R") if mode in _LUMA_MODES else whole.convert("RGB")
    pixels = _array(_in_mode(_to_srgb(colour, profile), colour.mode))
    return pixels, np.asarray(whole.getchannel("A")) if has_alpha else None


def _from_16_bits(image: Image.Image) -> tuple[Pixels, Pixels | None]:
    deep = np.asarray(image).astype(np.int64)
    if deep.min() < 0 or deep.max() > 65535:
        raise ValueError("grey values outside 16 bits")
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(deep == transparent, 0, 255).astype(np.uint8)
    return ((deep * 255 + 32767) // 65535).astype(np.uint8)[..., None], alpha


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _array(image: Image.Image) -> Pixels:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`image` (L, RGB or CMYK) through its ICC profile, as RGB; unchanged without one that fits."""
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # A profile that calls itself sRGB is taken at its word: a transform would only add rounding.
        if image.mode == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted or image


def _apply_alpha_policy(
    pixels: Pixels, alpha: Pixels | None, policy: ImagePolicy, format: Format, field: str
) -> tuple[Pixels, Pixels | None]:
    if alpha is None:
        return pixels, None
    opaque = bool(alpha.min() == 255)
    if policy.alpha == "keep" and format != "jpeg":
        return pixels, alpha
    if opaque:
        return pixels, None
    if policy.alpha == "keep":
        detail = f"field {field} is transparent and jpeg can't be; set images.format or images.alpha"
        raise SampleError("alpha-in-jpeg", detail)
    if policy.alpha == "refuse":
        detail = f"field {field} is transparent; set images.alpha to keep, black or white"
        raise SampleError("has-transparency", detail)
    weight = alpha[..., None].astype(np.uint32)
    ground = 255 if policy.alpha == "white" else 0
    return ((pixels * weight + ground * (255 - weight) + 127) // 255).astype(np.uint8), None


def _to_channels(pixels: Pixels, channels: int | None, field: str) -> Pixels:
    if channels in (None, pixels.shape[2]):
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if (pixels != pixels[..., :1]).any():
        detail = f"field {field} is in colour and the model is grey; use an RGB model or convert the images"
        raise SampleError("colour-image", detail)
    return np.ascontiguousarray(pixels[..., :1])


def _file_array(picture: Picture) -> Pixels:
    """The array to encode, (H, W) or (H, W, 2..4), with the file's own channels."""
    pixels = picture.pixels
    if pixels.shape[2] == 3 and picture.grey:
        pixels = _array(Image.fromarray(pixels).convert("L"))
    elif pixels.shape[2] == 1 and picture.grey is False:
        pixels = np.repeat(pixels, 3, axis=2)
    if picture.alpha is not None:
        pixels = np.dstack([pixels, picture.alpha])
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata from becoming warnings of the whole process."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
