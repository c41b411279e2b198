"""What guides samples by an energy: differentiable classifiers and embedders, `load(spec, device)`.

Towards a class: the energy is the cross-entropy of a classifier's logits. Away from the source: the cosine of
the angle between an embedder's features of the image and of its source, 1 where both look the same to it. One
embedder comes with the tool; installed packages bring others through the entry point group
`boomerang_batch.energies`, called as factory(options, device). docs/energies.md says what they return.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from boomerang_batch import installed
from boomerang_batch.config.blocks import ENTRY_POINT
from boomerang_batch.config.energy import EnergySpec
from boomerang_batch.diffusion.batch_size import is_out_of_memory
from boomerang_batch.diffusion.energy import Energy
from boomerang_batch.errors import BoomerangError, ConfigError, ModelError
from boomerang_batch.measures.embedders import efficientnet
from boomerang_batch.measures.given import introduced

GROUP = "boomerang_batch.energies"
_PAGE = "docs/energies.md"


@dataclass(frozen=True, kw_only=True, eq=False)
class TowardsClass:
    """The cross-entropy of each sample's class, by a classifier; implements `Energy`."""

    made: Any
    name: str
    digest: str
    classes: int

    def reference(self, about: int | Tensor) -> Tensor:
        """The class."""
        return torch.as_tensor(about)

    def of(self, images: Tensor, references: Tensor) -> Tensor:
        """See Energy. Raises ModelError for logits that are none."""
        logits = _asked(self.made.logits, images, who=f"energy {self.name}: logits")
        _check(logits, (len(images), self.classes), who=f"energy {self.name}: logits")
        return functional.cross_entropy(logits, references, reduction="none")


@dataclass(frozen=True, kw_only=True, eq=False)
class AwayFromSource:
    """How much an embedder sees each sample's source in it, -1 to 1; implements `Energy`."""

    made: Any
    name: str
    digest: str
    classes: int | None = None

    def reference(self, about: int | Tensor) -> Tensor:
        """The source's features."""
        return self._features(torch.as_tensor(about)[None])[0]

    def of(self, images: Tensor, references: Tensor) -> Tensor:
        """See Energy. Raises ModelError for features that are none."""
        return functional.cosine_similarity(self._features(images), references)

    def _features(self, images: Tensor) -> Tensor:
        features = _asked(self.made.embed, images, who=f"energy {self.name}: embed")
        _check(features, (len(images), None), who=f"energy {self.name}: embed")
        return torch.as_tensor(features)


@dataclass(frozen=True, kw_only=True, eq=False)
class EfficientNetLite0:
    """The embedder of that name, differentiable: means of the last feature maps.

    Images are resized by matrices, whose gradient is the same each time on any device; torch's own is not.
    """

    network: Any
    name: str = efficientnet.NAME
    digest: str = hashlib.sha256(f"{efficientnet.DIGEST}, resized by matrices".encode()).hexdigest()
    licence: str = "Apache-2.0"

    def embed(self, images: Tensor) -> Tensor:
        """The features (B, 1280) of images (B, 1 or 3, H, W) in 0..1."""
        shape = images.shape[2:]
        rows, columns = (
            _resizing(old, new).to(images.device)
            for old, new in zip(shape, efficientnet.shown_size(*shape), strict=True)
        )
        pixels = 255 * (rows @ images.expand(-1, 3, -1, -1) @ columns.mT)
        means: Tensor = self.network.extract_features((pixels - 127) / 128).mean((2, 3))
        return means


def efficientnet_lite0(options: Mapping[str, object], device: str) -> EfficientNetLite0:
    """The tool's own. Raises ConfigError where its packages are missing."""
    network = efficientnet.load_network(f"energy.source {efficientnet.NAME}")
    return EfficientNetLite0(network=network.requires_grad_(False).to(device))


BUILT_IN = {efficientnet.NAME: efficientnet_lite0}
"""The tool's own, called as installed ones are."""


def load(spec: EnergySpec, *, device: torch.device) -> Energy:
    """The energy that a recipe names, on `device`.

    Raises ConfigError where there is none of that name, where it is not what the recipe needs or can't be led
    to the recipe's class, ModelError where its factory fails.
    """
    where = f"energy.source {spec.source}"
    entry: EntryPoint | None = None
    if spec.source.startswith(ENTRY_POINT):
        entry = installed.find(GROUP, spec.source.removeprefix(ENTRY_POINT), where=where, error=ConfigError)
        made = installed.make(entry, dict(spec.options), device.type, where=where, error=ModelError)
    elif spec.source in BUILT_IN:
        made = BUILT_IN[spec.source]({}, device.type)
    else:
        raise ConfigError(
            f"{where}: there is none; there are {', '.join(BUILT_IN)} and {ENTRY_POINT}NAME of one that is "
            "installed"
        )
    method = "embed" if spec.toward is None else "logits"
    name, digest, _ = introduced(made, "energy", method=method, entry=entry, page=_PAGE)
    if spec.toward is None:
        return AwayFromSource(made=made, name=name, digest=digest)
    classes = getattr(made, "classes", None)
    if type(classes) is not int or classes < 2:
        raise ConfigError(
            f"{where}: its classes is {classes!r}; it must be how many classes it tells apart, see {_PAGE}"
        )
    if spec.toward.label is not None and spec.toward.label >= classes:
        raise ConfigError(
            f"energy.toward.label {spec.toward.label} is none of the {classes} classes of {where}"
        )
    return TowardsClass(made=made, name=name, digest=digest, classes=classes)


def _asked(call: Callable[[Tensor], Any], images: Tensor, *, who: str) -> Any:
    """What someone else's network says of images. Raises ModelError where it fails.

    That memory runs out is no fault of its own: whoever can take a smaller batch must hear of it.
    """
    try:
        return call(images)
    except Exception as error:  # an installed package's own code, which may raise anything
        if is_out_of_memory(error) or isinstance(error, BoomerangError):
            raise
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{who} failed on images {tuple(images.shape)}: {type(error).__name__}: {reason}; of an image that "
            f"it can't take it must say NaN, see {_PAGE}"
        ) from error


def _check(answer: object, shape: tuple[int, int | None], *, who: str) -> None:
    """Raise ModelError where an answer is not float32 of this shape, None being any width."""
    wanted = f"({shape[0]}, {'d' if shape[1] is None else shape[1]})"
    if not isinstance(answer, Tensor):
        raise ModelError(f"{who} gave {type(answer).__name__}; it must give a torch tensor {wanted}")
    fits = answer.ndim == 2 and len(answer) == shape[0] and shape[1] in (None, answer.shape[1])
    if not fits or answer.dtype != torch.float32:
        raise ModelError(f"{who} gave {answer.dtype} {tuple(answer.shape)}; it must give float32 {wanted}")


def _resizing(old: int, new: int) -> Tensor:
    """The matrix (new, old) of a bilinear, antialiased resize along one side."""
    lines = torch.eye(old)[None, None]
    return functional.interpolate(lines, size=(new, old), mode="bilinear", antialias=True)[0, 0]
