"""What is measured, by name, in an audit and at each t: the one place that says in words what each number is.

Nothing is imported here, so that whoever shows numbers, on a page, in a table or a plot, can ask at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure."""

    says: str
    """What it is, of an output or of all of them, for readers who do not know its name."""
    brief: str
    """The head of a narrow column, or of a plot."""
    share: bool = False
    """Whether it is a share, 0 to 1."""
    less_is_worse: bool = False
    of_features: bool = False
    """Whether it has the scale of its features, so that those of two embedders don't compare."""
    detail: bool = False
    """Whether it is left to those who read on."""


LINKED: Mapping[str, Measure] = {
    "rank-1": Measure(says="its own source is the first guess", brief="rank-1", share=True),
    "rank-5": Measure(
        says="its own source is among the first 5 guesses", brief="rank-5", share=True, detail=True
    ),
    "rank-10": Measure(says="its own source is among the first 10 guesses", brief="rank-10", share=True),
    "one-to-one": Measure(
        says="matched to its own source, all being matched at once", brief="one-to-one", share=True
    ),
    "auc": Measure(says="its own source comes before another's", brief="AUC", share=True),
    "tar@far=0.01": Measure(
        says="taken for its source where 1 % of strangers are", brief="TAR at FAR .01", share=True
    ),
    "tar@far=0.001": Measure(
        says="taken for its source where 0.1 % of strangers are",
        brief="TAR at FAR .001",
        share=True,
        detail=True,
    ),
    "misses": Measure(says="nothing found to compare", brief="misses", share=True),
}
"""Who is led back to a source."""

PROVEN: Mapping[str, Measure] = {
    "certified@least": Measure(
        says="right about the two most alike sources, at most", brief="certified, least", share=True
    ),
    "certified@median": Measure(
        says="right about two sources at the median distance, at most", brief="certified, median", share=True
    ),
    "certified@largest": Measure(
        says="right about any two pictures, at most", brief="certified, largest", share=True
    ),
}
"""What the bound promises of a t; of a finished output an audit tells it apart, with all that it supposes."""

COPIES: Mapping[str, Measure] = {
    "own-is-closest": Measure(says="of all sources its own is nearest", brief="own is closest", share=True),
    "copies": Measure(says="nearer to a source than 95 % of other pictures are", brief="copies", share=True),
    "near-duplicates": Measure(says="nearly the same as another output", brief="near duplicates", share=True),
    "exact-duplicates": Measure(says="the same as another output", brief="exact duplicates", share=True),
    "training-copies": Measure(
        says="nearer to a picture the model was trained on than 95 % of other pictures are",
        brief="training copies",
        share=True,
    ),
    "training-swaps": Measure(
        says="so near to a picture the model was trained on, and nearer than to its own source",
        brief="training swaps",
        share=True,
    ),
    "median-dcr": Measure(
        says="distance to the nearest source, median", brief="DCR", less_is_worse=True, of_features=True
    ),
    "median-nndr": Measure(says="nearest source by second nearest, median", brief="NNDR", less_is_worse=True),
    "median-own-by-nearest-other": Measure(
        says="own source by nearest other, median", brief="own by other", less_is_worse=True, detail=True
    ),
    "median-dcr-to-training": Measure(
        says="distance to the nearest training picture, median",
        brief="DCR to training",
        less_is_worse=True,
        of_features=True,
    ),
}
"""What is a copy: of a source, of another output, of what the model was trained on."""

USE: Mapping[str, Measure] = {
    "label-agreement": Measure(says="keeps its label", brief="labels kept", share=True, less_is_worse=True),
    "fd": Measure(says="Frechet distance to the sources together", brief="FD", of_features=True),
    "kd": Measure(says="kernel distance to the sources together", brief="KD", of_features=True),
    "precision": Measure(
        says="precision: outputs that look like some source", brief="precision", share=True, less_is_worse=True
    ),
    "recall": Measure(
        says="recall: sources that some output looks like", brief="recall", share=True, less_is_worse=True
    ),
    "density": Measure(says="density", brief="density", less_is_worse=True, detail=True),
    "coverage": Measure(says="coverage", brief="coverage", share=True, less_is_worse=True),
    "median-psnr-db": Measure(
        says="PSNR to its own source, median, in dB", brief="PSNR, dB", less_is_worse=True
    ),
    "median-ssim": Measure(says="SSIM to its own source, median", brief="SSIM", less_is_worse=True),
    "median-distance": Measure(
        says="RMS difference to its own source's pixels, 0 to 1, median", brief="distance", detail=True
    ),
    "median-fine-detail-db": Measure(
        says="fine detail against its own source, median, in dB",
        brief="fine detail, dB",
        less_is_worse=True,
        detail=True,
    ),
}
"""What of the sources' use is left."""
