"""What the model gets to see of a picture, and the picture that is made of what comes back.

Composed of data/'s geometry in one order: the picture is enlarged where the recipe says so, its region is read,
and it is placed at the size of its bucket or cut into tiles; then all of that is undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import buckets, geometry, images, regions, tiles, upscale
from boomerang_batch.data.images import Picture, Pixels
from boomerang_batch.data.regions import Mask
from boomerang_batch.data.tiles import Tiling
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.engine import Region, Window
from boomerang_batch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One image for the model."""

    image: Tensor
    """(C, h, w) float32 in the model's value range."""
    window: Window | None = None
    """Where a tile's noise lies in its image's."""
    tile: int = 0
    """Its number where the image is cut into tiles."""
    region: Region | None = None


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A picture laid out for the model."""

    source: Picture
    """As it came, or enlarged."""
    placement: geometry.Placement
    pieces: tuple[Piece, ...]
    """Those of which anything changes: none for an empty region, and no tile wholly outside the region."""
    tiling: Tiling | None = None
    mask: Mask | None = None
    """(H, W) of `source`: the region that changes; None: all of it."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a piece, in pixels."""
        return self.tiling.tile if self.tiling else self.placement.model


def check_fit(recipe: Recipe, model: DenoiserSpec) -> None:
    """Raise ConfigError where the recipe asks of the model, or of itself, what can't be laid out."""
    policy, trained = recipe.images, (model.height, model.width)
    buckets.check_sizes(policy.sizes, multiple=model.size_multiple, trained=trained)
    if policy.tiles is not None:
        tiles.check_overlap(policy.tiles.overlap, trained, model.state_factor)
    # What comes back shows all of what came, at its place and size, and can be compared with it.
    whole = policy.tiles is not None or (policy.restore_size and policy.resize != "cover")
    if recipe.upscale is not None and recipe.upscale.consistent and not whole:
        raise ConfigError(
            "upscale.consistent compares each output with the whole of its input: leave images.restore_size "
            "true, and set images.resize to contain, stretch or pad"
        )


class Layout:
    """Lays out every picture of a run whose recipe and model passed `check_fit`."""

    def __init__(self, recipe: Recipe, model: DenoiserSpec) -> None:
        self._recipe = recipe
        self._model = model

    def lay_out(self, picture: Picture, fields: Mapping[str, bytes]) -> Canvas:
        """The canvas of one decoded picture; `fields` are its sample's. Raises SampleError."""
        recipe, policy = self._recipe, self._recipe.images
        source = self._enlarged(picture)
        mask = None
        if recipe.region is not None:
            size = (source.pixels.shape[0], source.pixels.shape[1])
            mask = regions.read_region(fields, recipe.region, size=size, max_pixels=policy.max_pixels)
        pixels, placement = self._placed(source.pixels)
        canvas = Canvas(source=source, placement=placement, pieces=(), mask=mask)
        if mask is not None and not mask.any():
            return canvas
        image, region = self._values(pixels), self._region(source.pixels, mask, placement)
        if policy.tiles is None:
            return dataclasses.replace(canvas, pieces=(Piece(image=image, region=region),))
        tiling = tiles.plan(
            placement.model,
            tile=(self._model.height, self._model.width),
            overlap=policy.tiles.overlap,
            multiple=self._model.state_factor,
        )
        pieces = tuple(_pieces(image, region, tiling, factor=self._model.state_factor))
        return dataclasses.replace(canvas, pieces=pieces, tiling=tiling)

    def take_back(self, canvas: Canvas, drawn: Sequence[Tensor], picture: Picture) -> Picture:
        """The output, from what was drawn for each piece, in order, of `picture`."""
        recipe, policy = self._recipe, self._recipe.images
        if not drawn:  # an empty region
            return canvas.source
        values = drawn[0].numpy() if canvas.tiling is None else _mosaic(canvas, canvas.tiling, drawn)
        pixels = images.to_pixels(values, self._model.value_range)
        if canvas.mask is not None and recipe.region is not None:
            restored = geometry.restore_onto(canvas.source.pixels, pixels, canvas.placement)
            pixels = regions.composite(
                canvas.source.pixels, restored, canvas.mask, feather=recipe.region.feather
            )
            return dataclasses.replace(canvas.source, pixels=pixels)
        if policy.restore_size or canvas.tiling is not None:
            pixels = geometry.restore(pixels, canvas.placement)
            if recipe.upscale is not None and recipe.upscale.consistent:
                pixels = upscale.consistent(pixels, picture.pixels, recipe.upscale.factor)
            return dataclasses.replace(canvas.source, pixels=pixels)
        alpha = canvas.source.alpha
        if alpha is not None:
            alpha = self._placed(alpha[..., np.newaxis])[0][..., 0]
        return dataclasses.replace(canvas.source, pixels=pixels, alpha=alpha)

    def refuse_moved_places(self, canvas: Canvas, travelling: Mapping[str, bytes]) -> None:
        """Refuse a sample whose travelling fields tell places that are elsewhere in the output."""
        if self._recipe.upscale is not None:
            geometry.refuse_scaled_places(travelling, factor=self._recipe.upscale.factor)
        placement = canvas.placement
        resized = not self._recipe.images.restore_size and placement.source != placement.model
        if canvas.mask is None and canvas.tiling is None and (placement.crops or resized):
            geometry.refuse_moved_places(travelling)

    def _enlarged(self, picture: Picture) -> Picture:
        options = self._recipe.upscale
        if options is None:
            return picture
        size = (picture.pixels.shape[0], picture.pixels.shape[1])
        upscale.target_size(size, options.factor, max_pixels=self._recipe.images.max_pixels)
        pixels, alpha = upscale.enlarge(picture.pixels, options.factor, options.filter), picture.alpha
        if alpha is not None:
            alpha = upscale.enlarge(alpha[..., np.newaxis], options.factor, options.filter)[..., 0]
        return dataclasses.replace(picture, pixels=pixels, alpha=alpha)

    def _placed(self, pixels: Pixels) -> tuple[Pixels, geometry.Placement]:
        policy = self._recipe.images
        size = (self._model.height, self._model.width)
        if policy.tiles is not None:
            return tiles.place_on_canvas(pixels, tile=size, multiple=self._model.state_factor)
        if policy.sizes:
            size = buckets.choose_bucket((pixels.shape[0], pixels.shape[1]), policy.sizes)
        return geometry.place(pixels, size=size, policy=policy.resize)

    def _region(self, pixels: Pixels, mask: Mask | None, placement: geometry.Placement) -> Region | None:
        """The region on the state's grid: all that may show in the output, the feather with it."""
        if mask is None or self._recipe.region is None:
            return None
        inside = regions.model_mask(mask, placement, feather=self._recipe.region.feather)
        return Region(
            mask=torch.from_numpy(regions.state_mask(inside, self._model.state_factor))[None],
            outside=self._values(self._placed(regions.blank(pixels, mask))[0]),
        )

    def _values(self, pixels: Pixels) -> Tensor:
        return torch.from_numpy(images.to_model_values(pixels, self._model.value_range))


def _pieces(image: Tensor, region: Region | None, tiling: Tiling, *, factor: int) -> Iterator[Piece]:
    """The tiles of an image (C, H, W) and of its region, each with its window of the one noise field."""
    states = tiling.in_states(factor)
    for index, corner in enumerate(states.corners):
        part = None
        if region is not None:
            mask = _cut(region.mask, states, index)
            if not mask.any():
                continue
            part = Region(mask=mask, outside=_cut(region.outside, tiling, index))
        window = Window(corner=corner, field=states.size)
        yield Piece(image=_cut(image, tiling, index), window=window, tile=index, region=part)


def _cut(values: Tensor, tiling: Tiling, index: int) -> Tensor:
    return torch.from_numpy(tiles.cut(values.numpy(), tiling, index))


def _mosaic(canvas: Canvas, tiling: Tiling, drawn: Sequence[Tensor]) -> NDArray[np.float32]:
    """The image (C, H, W) of the canvas's tiles. Where no tile was drawn, nothing of it will show."""
    known = {piece.tile: tile.numpy() for piece, tile in zip(canvas.pieces, drawn, strict=True)}
    nothing = np.zeros_like(known[canvas.pieces[0].tile])
    mosaic = tiles.Mosaic(tiling, channels=len(nothing))
    for index in range(len(tiling)):
        mosaic.add(index, known.get(index, nothing))
    return mosaic.image()
