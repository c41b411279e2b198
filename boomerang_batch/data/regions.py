"""Runs that change only a region of each image: which pixels, where they lie in the model, how the rest stays.

A region is a mask over the upright picture. The model draws at least all of it: on every coarser grid a cell
belongs to the region if any part of it does. What comes out replaces the region's pixels; all others are the
source's own, but for a ring of `feather` pixels around the region, over which the one blends into the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.config.pipeline import ImagePolicy, Region
from boomerang_batch.data.formats import EXTENSIONS, sniff
from boomerang_batch.data.geometry import Placement
from boomerang_batch.data.images import Pixels, decode
from boomerang_batch.errors import SampleError

Mask = NDArray[np.bool_]

_WHITE = 128
_SLIVER = 1e-9
"""Of a pixel; overlaps thinner than this are rounding."""


def read_region(fields: Mapping[str, bytes], region: Region, *, size: tuple[int, int], max_pixels: int) -> Mask:
    """The region of a sample, (H, W), True where the picture may change. `size` is the upright picture's.

    The field holds a mask image of the picture's size, in shades of grey, 128 and brighter meaning change and
    transparent parts not; or json: boxes [left, top, right, bottom] in pixels, from 0 at the left and upper
    edge, as a list of their own or under `json_key` of an object. Boxes grow to whole pixels and are clipped
    to the picture. An empty list is an empty region.

    Raises SampleError `missing-region` where the field or its key isn't there, and `bad-region` for what can't
    be read or can't be meant: rather a sample that fails than a face that stays because a mask was of 0 and 1.
    """
    field = region.field.lower()
    data = fields.get(field)
    if data is None:
        there = ", ".join(fields)
        raise SampleError("missing-region", f"there is no field {field}, the region.field, only {there}")
    is_image = sniff(data) is not None or field.rpartition(".")[2] in EXTENSIONS
    if is_image and region.json_key is None:
        return _from_image(data, field, size, max_pixels)
    return _from_boxes(_boxes(data, field, region.json_key), field, size)


def dilate(mask: Mask, radius: int) -> Mask:
    """All pixels within `radius` (Euclidean, between pixel centres) of the mask (H, W)."""
    grown = mask.copy()
    if radius and mask.any():
        near = _near(mask, radius)
        grown[near] = _squared_distance(mask[near], radius) <= radius**2
    return grown


def model_mask(mask: Mask, placement: Placement, *, feather: int = 0) -> Mask:
    """Where the model must draw, (h, w) of the placed image, for the region `mask` (H, W) grown by `feather`.

    A model pixel belongs if any part of the source it stands for does; bars never do. The feather may reach
    over a crop's edge, the region may not: raises SampleError `region-outside-crop`.
    """
    if mask.shape != placement.source:
        raise ValueError(f"the mask is {mask.shape}, the picture {placement.source}")
    top, left, bottom, right = placement.kept
    if placement.crops and np.count_nonzero(mask) != np.count_nonzero(mask[top:bottom, left:right]):
        detail = f"part of the region lies outside columns {left} to {right} and rows {top} to {bottom}"
        fix = "which images.resize: cover crops to; use contain"
        raise SampleError("region-outside-crop", f"{detail}, {fix}")
    grown = dilate(mask, feather)
    box_left, box_top, box_right, box_bottom = placement.box
    inner_top, inner_left, height, width = placement.inner
    rows = _any_along_rows(grown, box_top, box_bottom, height)
    inside = _any_along_rows(rows.T, box_left, box_right, width).T
    result = np.zeros(placement.model, bool)
    result[inner_top : inner_top + height, inner_left : inner_left + width] = inside
    return result


def state_mask(mask: Mask, factor: int) -> Mask:
    """A model mask (h, w) on a latent grid (h / factor, w / factor): True where any pixel of the cell is."""
    height, width = mask.shape
    if height % factor or width % factor:
        raise ValueError(f"a mask of {mask.shape} has no grid of {factor} pixels a cell")
    grid = mask.reshape(height // factor, factor, width // factor, factor)
    cells: Mask = np.logical_or.reduce(grid, axis=(1, 3))
    return cells


def blank(pixels: Pixels, mask: Mask) -> Pixels:
    """The picture (H, W, C) without what the region shows: there the mean colour of the rest, or mid-grey.

    The picture that the outside is noised from again at each level. Taken from the whole picture it would
    tell of the region: an autoencoder's latents see far around them, and a resampling filter does a little.
    """
    result = pixels.copy()
    rest = mask.size - np.count_nonzero(mask)
    total = pixels.sum(axis=(0, 1), dtype=np.int64) - pixels[mask].sum(axis=0, dtype=np.int64)
    result[mask] = np.rint(total / rest) if rest else 128
    return result


def composite(source: Pixels, drawn: Pixels, mask: Mask, *, feather: int = 0) -> Pixels:
    """`drawn` inside the region, `source` outside, (H, W, C) each; exact but in the feather.

    Pixels at distance d from the region (Euclidean, between centres) with 0 < d <= feather are blended, the
    weight of `drawn` being (1 + cos(pi d / (feather + 1))) / 2. All others are bit-equal to one or the other.
    """
    if source.shape != drawn.shape or source.shape[:2] != mask.shape:
        raise ValueError(f"source {source.shape}, drawn {drawn.shape} and mask {mask.shape} don't match")
    result = source.copy()
    result[mask] = drawn[mask]
    if not feather or not mask.any():
        return result
    near = _near(mask, feather)
    squared = _squared_distance(mask[near], feather)
    ring = (squared > 0) & (squared <= feather**2)
    distance = np.sqrt(squared[ring, None], dtype=np.float32)
    weight = (1 + np.cos(np.float32(np.pi) * distance / np.float32(feather + 1))) / 2
    outer, inner = source[near][ring].astype(np.float32), drawn[near][ring].astype(np.float32)
    result[near][ring] = np.rint(outer + weight * (inner - outer)).astype(np.uint8)
    return result


def _from_image(data: bytes, field: str, size: tuple[int, int], max_pixels: int) -> Mask:
    try:
        policy = ImagePolicy(alpha="black", max_pixels=max_pixels)
        levels = decode(data, field=field, channels=1, policy=policy).pixels[..., 0]
    except SampleError as error:
        if error.reason == "colour-image":
            raise _bad(
                field, "is a mask in colour; make it grey, white where the picture may change"
            ) from error
        raise _bad(field, f"is no mask ({error.reason}: {error.detail})") from error
    if levels.shape != size:
        detail = f"is a mask of {levels.shape[1]}x{levels.shape[0]}, the upright picture is {size[1]}x{size[0]}"
        raise _bad(field, f"{detail}; make them equal")
    mask: Mask = levels >= _WHITE
    brightest = int(levels.max())
    if 0 < brightest < _WHITE:
        detail = f"is a mask whose brightest shade is {brightest} of 255"
        raise _bad(field, f"{detail}; use white, 128 at least, where the picture may change")
    if brightest == 0 and data[12:16] == b"IHDR" and data[24] == 16:
        # Made of 0 and 1, or of 0 and 255, it would be black as well after scaling to 8 bits.
        raise _bad(field, "is a mask of 16 bits that is black once scaled to 8 bits; save it with 8 bits")
    return mask


def _boxes(data: bytes, field: str, json_key: str | None) -> Any:
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _bad(field, f"is neither a mask image nor json ({error})") from error
    if json_key is None:
        if isinstance(value, dict):
            raise _bad(field, "holds a json object; name the boxes' key: region.json_key")
        return value
    if not isinstance(value, dict):
        raise _bad(field, f"holds no json object in which region.json_key {json_key} could be")
    if json_key not in value:
        raise SampleError("missing-region", f"field {field} has no key {json_key}, the region.json_key")
    return value[json_key]


def _from_boxes(boxes: Any, field: str, size: tuple[int, int]) -> Mask:
    if not isinstance(boxes, list):
        raise _bad(field, "holds no list of boxes; give [[left, top, right, bottom], ...], or [] for none")
    mask = np.zeros(size, bool)
    for number, box in enumerate(boxes):
        left, top, right, bottom = _numbers(box, number, field)
        shown = f"box {number} is {json.dumps(box)}"
        if not (left < right and top < bottom):
            raise _bad(field, f"{shown}, which has no area; give [left, top, right, bottom], not sizes")
        if right <= 1 and bottom <= 1 and max(size) > 1:
            raise _bad(field, f"{shown}; give pixels, not fractions of the picture")
        if right <= 0 or bottom <= 0 or left >= size[1] or top >= size[0]:
            detail = f"{shown}, wholly outside the upright picture of {size[1]}x{size[0]}"
            raise _bad(field, f"{detail}; leave such boxes out, or give pixels of this picture")
        rows = slice(max(0, math.floor(top)), math.ceil(bottom))
        mask[rows, max(0, math.floor(left)) : math.ceil(right)] = True
    return mask


def _numbers(box: Any, number: int, field: str) -> tuple[float, ...]:
    try:
        if isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box):
            sides = tuple(float(side) for side in box)
            if all(map(math.isfinite, sides)):
                return sides
    except OverflowError:
        pass
    raise _bad(field, f"box {number} is not four numbers: [left, top, right, bottom]")


def _bad(field: str, problem: str) -> SampleError:
    return SampleError("bad-region", f"field {field} {problem}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values


def _any_along_rows(mask: Mask, first: float, last: float, count: int) -> Mask:
    """Axis 0, from `first` to `last`, divided into `count` equal spans: True where a span touches a True."""
    edges = first + (last - first) * np.arange(count + 1) / count
    start = np.clip(np.floor(edges[:-1] + _SLIVER).astype(np.int64), 0, len(mask) - 1)
    stop = np.clip(np.ceil(edges[1:] - _SLIVER).astype(np.int64), start + 1, len(mask))
    counts = np.zeros((len(mask) + 1, mask.shape[1]), np.int32)
    np.cumsum(mask, axis=0, out=counts[1:])
    touched: Mask = counts[stop] > counts[start]
    return touched


def _near(mask: Mask, reach: int) -> tuple[slice, slice]:
    """The mask's bounding box, grown by `reach`; there must be one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    first_row, first_column = max(0, int(rows[0]) - reach), max(0, int(columns[0]) - reach)
    return slice(first_row, int(rows[-1]) + reach + 1), slice(first_column, int(columns[-1]) + reach + 1)


def _squared_distance(mask: Mask, reach: int) -> NDArray[np.int32]:
    """The squared distance of each pixel to the mask, exact up to reach**2 and larger than that beyond."""
    far = reach + 1
    column = np.arange(mask.shape[1], dtype=np.int32)
    before = np.maximum.accumulate(np.where(mask, column, -far), axis=1)
    after = np.minimum.accumulate(np.where(mask, column, mask.shape[1] + far)[:, ::-1], axis=1)[:, ::-1]
    along = np.minimum(np.minimum(column - before, after - column), far).astype(np.int32) ** 2
    result = along.copy()
    for step in range(1, min(reach, len(mask) - 1) + 1):
        np.minimum(result[step:], along[:-step] + step**2, out=result[step:])
        np.minimum(result[:-step], along[step:] + step**2, out=result[:-step])
    return result
