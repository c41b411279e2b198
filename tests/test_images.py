"""Decoding against Pillow as the oracle, refusals with real files, and output that carries no metadata."""

import io
import random
import re
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin, WebPImagePlugin

from boomerang_batch.config.pipeline import ImagePolicy
from boomerang_batch.data import images
from boomerang_batch.data.formats import output_field
from boomerang_batch.errors import SampleError

POLICY = ImagePolicy()
RNG = np.random.default_rng(7)
COLOUR = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (13, 17), dtype=np.uint8)


def saved(image, format, **options):
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def decode(data, field="png", channels=None, **policy):
    return images.decode(data, field=field, channels=channels, policy=ImagePolicy(**policy))


def reason(data, field="png", channels=None, **policy):
    with pytest.raises(SampleError) as refused:
        decode(data, field, channels, **policy)
    assert f"field {field}" in refused.value.detail
    return refused.value.reason


# What comes in


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_grey_files(format, channels):
    data = saved(GREY, format)
    picture = decode(data, format, channels)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert picture.pixels.shape == (13, 17, channels or 1)
    assert (picture.pixels == expected[..., None]).all()
    assert (picture.alpha, picture.format, picture.grey) == (None, format, True)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_colour_files(format):
    data = saved(COLOUR, format)
    picture = decode(data, format, 3)
    assert (picture.pixels == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert (picture.format, picture.grey, picture.lossless) == (format, False, False)


def test_colour_does_not_silently_become_grey():
    assert reason(saved(COLOUR, "png"), channels=1) == "colour-image"
    almost = np.dstack([GREY] * 3)
    assert (decode(saved(almost, "png"), channels=1).pixels[..., 0] == GREY).all()
    almost[5, 5, 1] ^= 1
    assert reason(saved(almost, "png"), channels=1) == "colour-image"


def test_one_bit_and_palette_and_cmyk():
    bits = Image.fromarray(GREY > 128)
    assert (decode(saved(bits, "png")).pixels[..., 0] == (GREY > 128) * 255).all()
    palette = Image.fromarray(COLOUR).quantize(16)
    assert (decode(saved(palette, "png")).pixels == np.asarray(palette.convert("RGB"))).all()
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    data = saved(cmyk, "jpeg", quality=100, subsampling=0)
    found = decode(data, "jpg").pixels
    assert (found == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert np.abs(found.astype(int) - COLOUR).mean() < 12


def test_sixteen_bits_are_scaled_not_cut():
    deep = np.linspace(0, 65535, 13 * 17).reshape(13, 17).round().astype(np.uint16)
    found = decode(saved(deep, "png")).pixels[..., 0]
    assert (found == np.rint(deep / 65535 * 255)).all()
    assert (found.min(), found.max()) == (0, 255)


def test_modes_no_file_reaches_us_with_are_refused_or_handled():
    with pytest.raises(SampleError, match="unsupported-mode"):
        images._plain(Image.new("F", (2, 2)), "png")
    pixels, alpha = images._plain(Image.fromarray(COLOUR).quantize(8).convert("PA"), "png")
    assert pixels.shape == (13, 17, 3)
    assert (alpha == 255).all()
    with pytest.raises(ValueError, match="16 bits"):
        images._plain(Image.fromarray(np.full((2, 2), 70000, np.int32)), "png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_exif_orientation_is_applied_as_pillow_applies_it(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(np.dstack([COLOUR, ALPHA]) if format == "png" else COLOUR, format, exif=exif)
    picture = decode(data, format, alpha="keep")
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert (picture.pixels == expected[..., :3]).all()
    assert picture.pixels.shape[:2] == ((17, 13) if orientation >= 5 else (13, 17))
    if format == "png":
        assert (picture.alpha == expected[..., 3]).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40])
def test_broken_exif_neither_fails_nor_warns(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(COLOUR, "jpeg", exif=exif), "jpg").pixels.shape == (13, 17, 3)


def test_icc_profiles_are_converted_and_broken_ones_ignored():
    data = saved(COLOUR, "png")
    plain = decode(data).pixels
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decode(saved(COLOUR, "png", icc_profile=lab)).pixels == plain).all()
    assert (decode(saved(COLOUR, "png", icc_profile=b"no profile at all")).pixels == plain).all()
    assert (decode(saved(GREY, "png", icc_profile=lab)).pixels[..., 0] == GREY).all()  # one that doesn't fit


def swapped_profile():
    """sRGB with its red and blue primaries exchanged, and another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.parametrize("with_alpha", [False, True])
def test_a_profile_that_is_not_srgb_moves_the_colours(with_alpha):
    array = np.dstack([COLOUR, ALPHA]) if with_alpha else COLOUR
    picture = decode(saved(array, "png", icc_profile=swapped_profile()), alpha="keep")
    off = np.abs(picture.pixels.astype(int) - COLOUR[..., ::-1])
    assert off.max() <= 2
    assert picture.alpha is None or (picture.alpha == ALPHA).all()


# Transparency

TRANSPARENT = {
    "RGBA": (np.dstack([COLOUR, ALPHA]), {}),
    "LA": (np.dstack([GREY, ALPHA]), {}),
    "RGB+key": (COLOUR, {"transparency": tuple(int(v) for v in COLOUR[3, 4])}),
    "L+key": (GREY, {"transparency": int(GREY[3, 4])}),
    "P+alpha": (Image.fromarray(COLOUR).quantize(8), {"transparency": bytes([0, 100, 255])}),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_is_refused_kept_or_flattened(mode):
    image, options = TRANSPARENT[mode]
    data = saved(image, "png", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert reason(data) == "has-transparency"

    kept = decode(data, channels=3, alpha="keep")
    assert (kept.pixels == expected[..., :3]).all()
    assert (kept.alpha == expected[..., 3]).all()
    assert kept.grey == (mode[0] == "L")
    again = np.asarray(
        Image.open(io.BytesIO(images.encode(kept, policy=ImagePolicy(alpha="keep"))[0])).convert("RGBA")
    )
    assert (again == expected).all()

    weight = expected[..., 3:] / 255
    for alpha, ground in (("black", 0), ("white", 255)):
        flat = decode(data, channels=3, alpha=alpha)
        assert flat.alpha is None
        assert (flat.pixels == np.rint(expected[..., :3] * weight + ground * (1 - weight))).all()


def test_an_opaque_alpha_channel_is_no_transparency():
    data = saved(np.dstack([COLOUR, np.full_like(ALPHA, 255)]), "png")
    assert decode(data).alpha is None
    assert decode(data, alpha="keep").alpha is not None
    assert decode(data, alpha="keep", format="jpeg").alpha is None


def test_sixteen_bit_grey_with_a_transparent_value():
    deep = GREY.astype(np.uint16) * 257
    data = saved(deep, "png", transparency=int(deep[2, 2]))
    assert (decode(data, alpha="keep").alpha == np.where(deep == deep[2, 2], 0, 255)).all()


def test_kept_transparency_needs_a_format_that_has_it():
    assert reason(saved(np.dstack([COLOUR, ALPHA]), "png"), alpha="keep", format="jpeg") == "alpha-in-jpeg"


# Refusals


@pytest.mark.parametrize(
    "data",
    [b"", b"hello, I am text\n" * 20, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBPVP8 "],
)
def test_what_is_no_image_is_undecodable(data):
    assert reason(data, field="image") == "undecodable"


@pytest.mark.parametrize(
    ("format", "field"),
    [("png", "jpg"), ("jpeg", "png"), ("webp", "jpeg"), ("gif", "png"), ("tiff", "webp"), ("bmp", "jpg")],
)
def test_bytes_that_are_not_what_the_name_says(format, field):
    assert reason(saved(COLOUR, format), field) == "wrong-extension"


@pytest.mark.parametrize("field", ["jpg", "jpeg", "input.jpg", "picture"])
def test_names_that_agree_or_claim_nothing(field):
    assert decode(saved(COLOUR, "jpeg"), field).format == "jpeg"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_every_cut_is_undecodable_or_lost_nothing(format):
    noise = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = saved(noise, format)
    whole = decode(data, format).pixels
    refused = []
    for cut in range(1, len(data), 23):
        try:
            assert (decode(data[:cut], format).pixels == whole).all(), cut
        except SampleError as error:
            refused.append(error.reason)
    assert set(refused) == {"undecodable"}
    assert len(refused) >= len(data) // 23 - 3


@pytest.mark.parametrize("format", ["png", "webp"])
def test_animations(format):
    frames = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1].copy())]
    assert reason(saved(frames[0], format, save_all=True, append_images=frames[1:]), format) == "animated"


def png_claiming(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp_claiming(width, height):
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    data = saved(COLOUR, "webp")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + data[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_claiming(width, height):
    data = bytearray(saved(COLOUR, "jpeg"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "field"), [(png_claiming, "png"), (webp_claiming, "webp"), (jpeg_claiming, "jpg")]
)
def test_bombs_are_refused_from_the_header_alone(make, field, monkeypatch):
    data = make(16000, 12000)
    for opened in (ImageFile.ImageFile, WebPImagePlugin.WebPImageFile):
        monkeypatch.setattr(opened, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(data, field) == "too-many-pixels"


def test_the_pixel_limit_is_exact_and_the_policys_own():
    assert decode(saved(COLOUR, "png"), max_pixels=13 * 17).pixels.shape == (13, 17, 3)
    assert reason(saved(COLOUR, "png"), max_pixels=13 * 17 - 1) == "too-many-pixels"
    assert reason(saved(COLOUR, "webp"), "webp", max_pixels=13 * 17 - 1) == "too-many-pixels"


def test_more_pixels_than_pillow_likes_are_fine_when_the_policy_says_so(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(COLOUR, "png")).pixels.shape == (13, 17, 3)


@pytest.mark.parametrize("seed", range(4))
def test_damage_gives_an_image_or_a_sample_error_and_nothing_else(seed):
    chance = random.Random(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [
        ("png", saved(np.dstack([COLOUR, ALPHA]), "png", exif=exif, icc_profile=swapped_profile())),
        ("jpg", saved(COLOUR, "jpeg", exif=exif, icc_profile=swapped_profile())),
        ("webp", saved(COLOUR, "webp", exif=exif, icc_profile=swapped_profile())),
        ("png", saved(Image.fromarray(COLOUR).quantize(8), "png", transparency=bytes([0, 9]))),
    ]
    for _ in range(100):
        field, original = chance.choice(originals)
        data = bytearray(original)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(8, len(data))] = chance.randrange(256)
        try:
            picture = decode(bytes(data), field, max_pixels=10**6, alpha="keep")
        except SampleError:
            continue
        assert picture.pixels.dtype == np.uint8


def test_threads_leave_the_warning_filters_as_they_were():
    before = list(warnings.filters)
    data = saved(COLOUR, "jpeg")
    threads = [threading.Thread(target=lambda: [decode(data, "jpg") for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# What goes out


def chunks(data):
    """The chunk or segment names of an encoded image."""
    if data.startswith(b"\x89PNG"):
        return [
            name.decode()
            for name in re.findall(rb"IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf|iCCP|tIME|pHYs|gAMA", data)
        ]
    if data.startswith(b"RIFF"):
        return [name.decode() for name in re.findall(rb"VP8[ LX]|ALPH|EXIF|XMP |ICCP", data)]
    names, position = [], 2
    while data[position + 1] != 0xDA:
        names.append(f"{data[position + 1]:02x}")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return names


@pytest.mark.parametrize("target", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("source", ["png", "jpeg", "webp"])
def test_nothing_but_pixels_goes_out(source, target):
    exif = Image.Exif()
    exif[0x010E] = "MARK-EXIF"
    options = {"exif": exif, "icc_profile": swapped_profile(), "xmp": b"MARK-XMP"}
    if source == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", "MARK-TEXT")
        options = {"exif": exif, "icc_profile": swapped_profile(), "pnginfo": text}
    if source == "jpeg":
        options["comment"] = b"MARK-COMMENT"
    marked = saved(COLOUR, source, **options)
    assert b"MARK" in marked
    data, format = images.encode(decode(marked, source), policy=ImagePolicy(format=target))
    assert format == target
    assert b"MARK" not in data
    assert b"test" not in data
    names = chunks(data)
    allowed = {"png": {"IHDR", "IDAT", "IEND"}, "webp": {"VP8 "}, "jpeg": {"e0", "db", "c0", "c4"}}[target]
    assert set(names) <= allowed
    with Image.open(io.BytesIO(data)) as image:
        assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background"}
        assert image.getexif() == {}


def test_png_and_lossless_webp_give_the_pixels_back():
    for array, options in ((COLOUR, {}), (GREY, {}), (np.dstack([COLOUR, ALPHA]), {})):
        picture = decode(saved(array, "png", **options), alpha="keep")
        again = decode(images.encode(picture, policy=POLICY)[0], alpha="keep")
        assert (again.pixels == picture.pixels).all()
        assert again.grey == picture.grey
    data = saved(COLOUR, "webp", lossless=True)
    picture = decode(data, "webp")
    assert picture.lossless
    assert (decode(images.encode(picture, policy=POLICY)[0], "webp").pixels == COLOUR).all()
    lossy, _ = images.encode(picture, policy=ImagePolicy(format="webp"))
    assert not decode(lossy, "webp").lossless
    exif = Image.Exif()
    exif[0x0112] = 1
    assert decode(saved(COLOUR, "webp", lossless=True, exif=exif), "webp").lossless  # in a VP8X container


def test_jpeg_keeps_full_colour_resolution_and_the_quality_asked_for():
    picture = decode(saved(COLOUR, "png"))
    sizes = {}
    for quality in (30, 95):
        data, _ = images.encode(picture, policy=ImagePolicy(format="jpeg", quality=quality))
        sizes[quality] = len(data)
        start = data.index(b"\xff\xc0")
        sampling = [data[start + 11 + 3 * index] for index in range(3)]
        assert sampling == [0x11, 0x11, 0x11]
    assert sizes[30] < sizes[95]


def test_a_file_keeps_its_own_channels_whatever_the_model_has():
    grey = decode(saved(GREY, "png"), channels=3)
    with Image.open(io.BytesIO(images.encode(grey, policy=POLICY)[0])) as image:
        assert image.mode == "L"
        assert (np.asarray(image) == GREY).all()
    neutral = decode(saved(np.dstack([GREY] * 3), "png"), channels=1)
    with Image.open(io.BytesIO(images.encode(neutral, policy=POLICY)[0])) as image:
        assert image.mode == "RGB"
    new = images.Picture(pixels=GREY[..., None], alpha=None, format="png")
    with Image.open(io.BytesIO(images.encode(new, policy=POLICY)[0])) as image:
        assert image.mode == "L"


def test_what_a_format_cannot_hold_is_told():
    wide = images.Picture(pixels=np.zeros((1, 20000, 1), np.uint8), alpha=None, format="webp")
    with pytest.raises(SampleError, match="unencodable"):
        images.encode(wide, policy=POLICY)


@pytest.mark.parametrize(
    ("field", "format", "expected"),
    [
        ("jpg", "jpeg", "jpg"),
        ("jpeg", "jpeg", "jpeg"),
        ("png", "jpeg", "jpg"),
        ("in.png", "webp", "in.webp"),
        ("image", "png", "image"),
    ],
)
def test_output_field(field, format, expected):
    assert output_field(field, format) == expected


# Numbers


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_every_level_survives_the_model_range(value_range):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    values = images.to_model_values(levels, value_range)
    assert (values.dtype, values.shape) == (np.float32, (3, 16, 16))
    assert (values.min(), values.max()) == value_range
    assert (images.to_pixels(values, value_range) == levels).all()


def test_layout_clamping_and_nan():
    values = images.to_model_values(COLOUR, (-1.0, 1.0))
    assert values[2, 3, 4] == pytest.approx(COLOUR[3, 4, 2] / 127.5 - 1, abs=1e-6)
    assert images.to_pixels(np.full((1, 1, 1), 7.5, np.float32), (-1, 1)).item() == 255
    assert images.to_pixels(np.full((1, 1, 1), -7.5, np.float32), (-1, 1)).item() == 0
    for bad in (np.nan, np.inf):
        with pytest.raises(SampleError, match="non-finite-output"):
            images.to_pixels(np.array([[[0.0, bad]]], np.float32), (-1, 1))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    channels=st.sampled_from([1, 3]),
    level=st.integers(0, 255),
)
def test_resize_keeps_flat_images_flat(height, width, channels, level):
    flat = np.full((9, 11, channels), level, np.uint8)
    found = images.resize(flat, (height, width))
    assert found.shape == (height, width, channels)
    assert (found == level).all()
    assert images.resize(flat, (9, 11)) is flat


def test_contact_sheets_show_every_picture_and_are_the_same_every_time():
    tall = np.zeros((40, 10, 1), np.uint8)
    rows = [[COLOUR, tall], [np.zeros((300, 300, 3), np.uint8)]]
    data = images.contact_sheet(rows)
    assert data == images.contact_sheet(rows)
    with Image.open(io.BytesIO(data)) as sheet:
        assert sheet.size == (204, 204)
        array = np.asarray(sheet)
    assert (array[:4] == 255).all()
    assert (array[104:200, 4:100] == 0).all()
    assert (array[104:200, 104:200] == 255).all()
    assert (array[52, 128:152] == 0).any()
    assert images.contact_sheet([])


def test_heads_stand_above_the_columns_of_a_contact_sheet():
    plain, headed, other = (
        np.asarray(Image.open(io.BytesIO(images.contact_sheet([[COLOUR, COLOUR]], heads=heads))))
        for heads in ((), ("source", "t 0.4"), ("source", "t 0.5"))
    )
    above = len(headed) - len(plain)
    assert (headed[above:] == plain).all()
    assert all((headed[:above, half] < 128).any() for half in (slice(0, 102), slice(102, 204)))
    assert (headed[:, :102] == other[:, :102]).all()
    assert (headed[:above, 102:] != other[:above, 102:]).any()


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (96, 50), (97, 96), (300, 7), (640, 480)])
def test_a_picture_fitted_before_gives_the_same_sheet(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    small = images.fitted(pixels)
    assert max(small.shape[:2]) == 96
    assert images.contact_sheet([[small]]) == images.contact_sheet([[pixels]])
