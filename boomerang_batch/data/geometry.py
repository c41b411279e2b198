"""Between an image's size and the model's: placing, and giving back exactly the size that came in.

`place` and `restore` are inverse in size always, in pixels wherever nothing was scaled. What a policy does to
the picture:
  cover    scale until it covers the model's size, crop the centre; restoring stretches the crop to full size
  contain  scale until it fits, black bars around; restoring cuts the bars and scales back
  stretch  scale both axes; restoring scales back
  pad      never scale, black bars around; restoring is exact; larger images are refused
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from boomerang_batch.data.formats import EXTENSIONS
from boomerang_batch.data.images import Pixels, resize
from boomerang_batch.errors import SampleError

ResizePolicy = Literal["cover", "contain", "stretch", "pad"]

_GEOMETRY_WORD = re.compile(
    r"(^|[^a-z])(bbox|bboxe|boxe|box|boundingbox|bounding_box|mask|seg|segmentation|keypoint|landmark|polygon|rle)s?"
    r"($|[^a-z])"
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an image of size `source` lies in the model's `model`; sizes are (height, width) in pixels.

    `inner` is the part of the model's image that holds picture, as (top, left, height, width). `box` is the
    part of the source that went in, as (left, top, right, bottom), in pixels and fractions.
    """

    source: tuple[int, int]
    model: tuple[int, int]
    inner: tuple[int, int, int, int]
    box: tuple[float, float, float, float]

    @property
    def crops(self) -> bool:
        """Whether part of the source was left out, so that what comes back shows things in other places."""
        height, width = self.source
        return self.box != (0.0, 0.0, float(width), float(height))

    @property
    def kept(self) -> tuple[int, int, int, int]:
        """The whole pixels of the source that went in, as (top, left, bottom, right); may be none."""
        left, top, right, bottom = self.box
        first_row, first_column = math.ceil(top), math.ceil(left)
        return first_row, first_column, max(first_row, int(bottom)), max(first_column, int(right))


def place(pixels: Pixels, *, size: tuple[int, int], policy: ResizePolicy) -> tuple[Pixels, Placement]:
    """Bring (H, W, C) to `size` (height, width) of the model; the identity when it has it already.

    Raises SampleError `larger-than-model` where policy `pad` would have to scale.
    """
    source = (pixels.shape[0], pixels.shape[1])
    if source == size:
        policy = "stretch"
    box = _cover_box(source, size) if policy == "cover" else (0.0, 0.0, float(source[1]), float(source[0]))
    inner = _inner(source, size, policy)
    placement = Placement(source=source, model=size, inner=inner, box=box)
    top, left, height, width = inner
    scaled = resize(pixels, (height, width), box=box if placement.crops else None)
    if (height, width) == size:
        return scaled, placement
    canvas = np.zeros((*size, pixels.shape[2]), np.uint8)
    canvas[top : top + height, left : left + width] = scaled
    return canvas, placement


def restore(pixels: Pixels, placement: Placement) -> Pixels:
    """Give the model's image (H, W, C) exactly the source's height and width, bars removed."""
    if pixels.shape[:2] != placement.model:
        raise ValueError(f"the image is {pixels.shape[:2]}, it was placed as {placement.model}")
    top, left, height, width = placement.inner
    return resize(np.ascontiguousarray(pixels[top : top + height, left : left + width]), placement.source)


def restore_onto(source: Pixels, pixels: Pixels, placement: Placement) -> Pixels:
    """The source (H, W, C) with the part that went in replaced by what came out, each thing in its own place.

    Equals `restore` where nothing was cropped; where something was, `restore` would stretch the crop.
    """
    if source.shape[:2] != placement.source:
        raise ValueError(f"the source is {source.shape[:2]}, it was placed as {placement.source}")
    if pixels.shape[:2] != placement.model:
        raise ValueError(f"the image is {pixels.shape[:2]}, it was placed as {placement.model}")
    if not placement.crops:
        return restore(pixels, placement)
    result = source.copy()
    top, left, bottom, right = placement.kept
    if bottom > top and right > left:
        # The crop's edges may cut through pixels; what comes back are the whole ones within.
        box_left, box_top, box_right, box_bottom = placement.box
        height, width = placement.model
        down, across = height / (box_bottom - box_top), width / (box_right - box_left)
        part = (
            max(0.0, (left - box_left) * across),
            max(0.0, (top - box_top) * down),
            min(float(width), (right - box_left) * across),
            min(float(height), (bottom - box_top) * down),
        )
        result[top:bottom, left:right] = resize(pixels, (bottom - top, right - left), box=part)
    return result


def refuse_moved_places(fields: Mapping[str, bytes]) -> None:
    """Refuse a sample whose travelling fields hold places in a picture that is cropped or changes its size.

    Such are all further images (masks, depth maps), fields and json keys at any depth named after boxes,
    masks, segmentations, keypoints, landmarks or polygons. Raises SampleError `boxes-would-move`.
    """
    places = _places(fields)
    if places is not None:
        detail = f"{places} tells places in the picture, which resizing would move"
        fix = "use images.resize contain, stretch or pad with restore_size: true, or drop the field"
        raise SampleError("boxes-would-move", f"{detail}; {fix}")


def refuse_scaled_places(fields: Mapping[str, bytes], *, factor: int) -> None:
    """Refuse, like `refuse_moved_places`, a sample whose picture comes back `factor` times as large."""
    places = _places(fields)
    if places is not None:
        detail = f"{places} tells places in the picture, which comes back {factor} times as large"
        raise SampleError("boxes-would-move", f"{detail}; drop the field, or scale its numbers beforehand")


def _cover_box(source: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred part of the source with the model's proportions, as (left, top, right, bottom)."""
    (height, width), (model_height, model_width) = source, size
    # In integers, so that equal proportions give exactly the whole and no rounding.
    if height * model_width == width * model_height:
        return 0.0, 0.0, float(width), float(height)
    if height * model_width > width * model_height:
        kept = width * model_height / model_width
        return 0.0, (height - kept) / 2, float(width), (height + kept) / 2
    kept = height * model_width / model_height
    return (width - kept) / 2, 0.0, (width + kept) / 2, float(height)


def _inner(source: tuple[int, int], size: tuple[int, int], policy: ResizePolicy) -> tuple[int, int, int, int]:
    (height, width), (model_height, model_width) = source, size
    if policy == "pad":
        if height > model_height or width > model_width:
            detail = f"the image is {width}x{height}, the model's size {model_width}x{model_height}"
            raise SampleError("larger-than-model", f"{detail}; images.resize: pad never scales, use contain")
        inner_height, inner_width = height, width
    elif policy == "contain":
        scale = min(model_height / height, model_width / width)
        inner_height = min(model_height, max(1, round(height * scale)))
        inner_width = min(model_width, max(1, round(width * scale)))
    else:
        inner_height, inner_width = size
    return (model_height - inner_height) // 2, (model_width - inner_width) // 2, inner_height, inner_width


def _places(fields: Mapping[str, bytes]) -> str | None:
    """The first field, or `field: key` of a json field, that tells places in a picture."""
    for field, data in fields.items():
        if field.rpartition(".")[2] in EXTENSIONS or _names_geometry(field):
            return field
        if field.rpartition(".")[2] in ("json", "jsonl"):
            key = next((key for key in _json_keys(data) if _names_geometry(key)), None)
            if key is not None:
                return f"{field}: {key}"
    return None


def _names_geometry(name: str) -> bool:
    # camelCase and snake_case alike: headBox, head_box, head.box
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return _GEOMETRY_WORD.search(separated) is not None


def _json_keys(data: bytes) -> Iterator[str]:
    """Every key at any depth; none where the bytes are no JSON, which then can't be read as places either."""
    try:
        waiting = [json.loads(data)]
    except (ValueError, RecursionError):
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
