"""Make the demo's input: twenty WebDataset shards of Fashion-MNIST test images.

    python -m boomerang_batch.demo.make_shards --data FOLDER_WITH_IDX_GZ --out FOLDER

FOLDER_WITH_IDX_GZ holds the dataset's four gzip'd IDX files (Debian ships them as the package
dataset-fashion-mnist). The first 100 test images of each class are dealt to the shards, five of a class to
each, so every shard alone is balanced. The demo's model was trained on the training split and never saw them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from boomerang_batch.config.pipeline import ImagePolicy
from boomerang_batch.data.images import Picture, encode
from boomerang_batch.data.shards import write_shard
from boomerang_batch.demo.train import read_idx

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

SHARDS = 20
PER_CLASS = 5
"""Images of each class in one shard."""
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def choose(labels: NDArray[np.uint8]) -> list[list[int]]:
    """The test-split indices of each shard, ascending. labels (N,): the class of every test image."""
    by_class = [np.flatnonzero(labels == label)[: SHARDS * PER_CLASS] for label in range(len(CLASS_NAMES))]
    dealt = np.stack(by_class).reshape(len(CLASS_NAMES), SHARDS, PER_CLASS)
    return [sorted(dealt[:, shard].ravel().tolist()) for shard in range(SHARDS)]


def samples(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], indices: list[int]
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """(key, fields) of the test images `indices`: png (28x28 grey), cls, json."""
    for index in indices:
        label = int(labels[index])
        picture = Picture(pixels=images[index, :, :, None], alpha=None, format="png")
        png, _ = encode(picture, policy=ImagePolicy())
        about = {"class_name": CLASS_NAMES[label], "index": index, "split": "test"}
        fields = {"png": png, "cls": str(label).encode(), "json": json.dumps(about).encode()}
        yield f"fmnist-test-{index:05d}", fields


def make_shards(data: Path, out: Path) -> None:
    """Write `demo-000000.tar` to `demo-000019.tar` into `out`; the same bytes every time."""
    images = read_idx(data / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(data / "t10k-labels-idx1-ubyte.gz")
    out.mkdir(parents=True, exist_ok=True)
    for shard, indices in enumerate(choose(labels)):
        write_shard(out / f"demo-{shard:06d}.tar", samples(images, labels, indices))


def main() -> None:
    """Read the command line and write the shards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the twenty tar files")
    args = parser.parse_args()
    make_shards(args.data, args.out)


if __name__ == "__main__":
    main()
