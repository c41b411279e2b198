"""What turns images into features, so that they can be compared: `load(name, fit_on=images)`.

Four come with the tool, and an installed package may bring more through the entry point group
`boomerang_batch.embedders`; docs/embedders.md says what each is, and how to write one. What they need is
imported when one is loaded, and not before.
"""

from __future__ import annotations

from collections.abc import Callable

from boomerang_batch import installed
from boomerang_batch.errors import ConfigError
from boomerang_batch.measures.embedders import efficientnet, faces, pixels
from boomerang_batch.measures.embedders.contract import CheckedEmbedder, Embedder, Features
from boomerang_batch.measures.images import Images, check_images

__all__ = ["BUILT_IN", "GROUP", "Embedder", "Features", "Images", "load", "names"]

GROUP = "boomerang_batch.embedders"
"""Of the entry points that installed packages bring more through, called as factory(fit_on)."""

BUILT_IN: dict[str, Callable[[Images], Embedder]] = {
    "pixels": pixels.of_pixels,
    "pca": pixels.fitted_pca,
    "efficientnet-lite0": efficientnet.efficientnet_lite0,
    "dlib": faces.detected,
    "dlib-cropped": faces.cropped,
}
"""The tool's own, each made from the images that it may be fitted on."""


def load(name: str, *, fit_on: Images) -> Embedder:
    """The embedder of this name, ready, checked on the first of the images that it may be fitted on.

    `fit_on` (N, H, W, C) uint8 are the sources of an audit. Whatever the embedder gives later is checked too,
    and comes in batches of bounded memory. Raises ConfigError where there is none of this name, where a package
    is missing that it needs and where an installed one is none; MeasureError where its features are none.
    """
    check_images(fit_on)
    if name in BUILT_IN:
        checked = CheckedEmbedder(BUILT_IN[name](fit_on))
    elif name in installed.names(GROUP):
        where = f"--embedder {name}"
        entry = installed.find(GROUP, name, where=where, error=ConfigError)
        checked = CheckedEmbedder(installed.make(entry, fit_on, where=where, error=ConfigError), entry=entry)
    else:
        raise ConfigError(
            f"--embedder {name}: there is none; there are {', '.join(names())}. One of your own joins in "
            f"through the entry point group {GROUP}: install its package into this environment"
        )
    checked.embed(fit_on[:1])
    return checked


def names() -> list[str]:
    """What `load` knows: the tool's own, and then those installed."""
    return [*BUILT_IN, *(name for name in installed.names(GROUP) if name not in BUILT_IN)]
