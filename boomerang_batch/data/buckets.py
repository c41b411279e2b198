"""Resolution buckets: the few sizes at which a run draws, and which of them an image goes to.

Sizes are [width, height] in the recipe, as people write them, and (height, width) everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from boomerang_batch.errors import ConfigError


def choose_bucket(source: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of the bucket that suits an image of `source` (height, width) best.

    `sizes` are the recipe's, (width, height). Closest proportions first, then closest area, both told by
    quotients in exact fractions (2:1 is as far from 1:1 as 1:2 is); then the one listed first. Raises
    ValueError without sizes.
    """
    height, width = source

    def misfit(bucket: tuple[int, int]) -> tuple[Fraction, Fraction]:
        bucket_width, bucket_height = bucket
        return (
            _quotient(height * bucket_width, width * bucket_height),
            _quotient(height * width, bucket_height * bucket_width),
        )

    best_width, best_height = min(sizes, key=misfit)
    return best_height, best_width


def check_sizes(sizes: Sequence[tuple[int, int]], *, multiple: int | None, trained: tuple[int, int]) -> None:
    """Refuse buckets that the model can't draw at; an empty list is fine.

    `multiple` and `trained` (height, width) are the model's: sides must be multiples, and None means the
    trained size only. Raises ConfigError naming `images.sizes`, the bucket and the fix.
    """
    height, width = trained
    for bucket in sizes:
        shown = f"images.sizes: {bucket[0]}x{bucket[1]}"
        if multiple is None and bucket != (width, height):
            raise ConfigError(
                f"{shown} is not the one size of this model; leave sizes out or give [[{width}, {height}]]"
            )
        if multiple is not None and any(side % multiple for side in bucket):
            near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in bucket)
            raise ConfigError(
                f"{shown}: this model draws at widths and heights that are multiples of {multiple}; use {near}"
            )


def _quotient(a: int, b: int) -> Fraction:
    return Fraction(max(a, b), min(a, b))
