"""Training on originals and their Boomerang copies: a keyed coin decides which of them each epoch shows.

`Augment` is a stage of a webdataset pipeline; `AugmentedDataset` wraps a map-style dataset, and `Copies` are an
OUT's images for it, by key. docs/augmentation.md shows both at work.
"""

from boomerang_batch.loader.coin import Counts
from boomerang_batch.loader.dataset import AugmentedDataset, Copies
from boomerang_batch.loader.stage import Augment

__all__ = ["Augment", "AugmentedDataset", "Copies", "Counts"]
