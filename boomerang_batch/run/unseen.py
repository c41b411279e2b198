"""Unseen images: new latents of a domain, by a fit of the latents of all its images (arXiv 2310.09213).

Three phases, each with an artefact that is kept beside the codes. `latents`, of each shard: its latents, and
what they add to the fit. `fit`, once: all of that put together, in the order of the shards' names, so that the
bytes are the same whoever did what. `outputs`, of each shard: for every sample new latents, drawn and accepted
by the fit, mixed with the sample's own and decoded.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe, Unseen
from boomerang_batch.data.provenance import Marker
from boomerang_batch.data.shards import Sample
from boomerang_batch.diffusion.latents import Fit, Moments, Standing, fit, merged, moments, slerp, standing
from boomerang_batch.diffusion.noise import Purpose, key_words, normal
from boomerang_batch.errors import SampleError, ShardError, StorageError, VerificationError
from boomerang_batch.run import artefacts
from boomerang_batch.run.commit import MARKER_SUFFIX, read_marker
from boomerang_batch.run.kept_codes import Codes
from boomerang_batch.run.mixing import Latents, Mixing, rows_of_codes
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.stages import Mixture, Prepared

MOMENTS_SUFFIX = "_moments"
FIT = "fit"
SAMPLE = 128
"""Latents by which a fit knows what is usual: those of all shards whose keyed ranks are least."""


class Fitting:
    """What the shards of one run add to its fit, and the fit, kept in `home`."""

    def __init__(self, home: str, recipe: Recipe, naming: Naming, holding: Callable[[], None]) -> None:
        """`holding` is called before anything is published, and raises when the run is no longer ours."""
        self._home = home
        self._recipe = recipe
        self._naming = naming
        self._holding = holding

    def add(self, name: str, latents: Latents) -> None:
        """Keep what the latents of a shard add, unless that is there."""
        made_of = self._digest_of_codes(name)
        if artefacts.is_there(
            self._home, name + MOMENTS_SUFFIX, made_of=made_of, recipe_digest=self._recipe.digest
        ):
            return
        found = moments(latents.read(row_key) for row_key in latents.rows)
        ranked = heapq.nsmallest(SAMPLE, ((self._rank(name, row_key), row_key) for row_key in latents.rows))
        tensors = {} if found is None else _tensors_of_moments(found)
        tensors["ranked"] = torch.frombuffer(bytearray(json.dumps(ranked).encode()), dtype=torch.uint8)
        self._publish(name + MOMENTS_SUFFIX, tensors, made_of, {"count": 0 if found is None else found.count})

    def reduce(self, names: Sequence[str], scratch: Path) -> None:
        """Make the fit of all shards, and keep it. Raises ShardError where their latents have none."""
        of_all: Moments | None = None
        ranked: list[tuple[str, str, str]] = []
        for name in names:
            made_of = self._digest_of_codes(name)
            tensors = artefacts.read(
                self._home, name + MOMENTS_SUFFIX, made_of=made_of, recipe_digest=self._recipe.digest
            )
            listed = json.loads(tensors.pop("ranked").numpy().tobytes())
            ranked = heapq.nsmallest(SAMPLE, [*ranked, *((rank, name, row_key) for rank, row_key in listed)])
            if tensors:
                found = _moments_of(tensors)
                of_all = found if of_all is None else merged(of_all, found)
        block = self._recipe.unseen or Unseen()
        try:
            if of_all is None:
                raise ValueError("there are no latents")
            made = fit(of_all, self._sampled(ranked, scratch), references=block.references)
        except ValueError as error:
            raise ShardError(
                f"no fit can be made of {0 if of_all is None else of_all.count} latents: {error}; give more "
                "samples, or set unseen.references"
            ) from error
        told = {
            "count": made.moments.count + len(made.references),
            "variance": made.moments.variance,
            "norm": made.norm,
            "pair_distance": made.pair_distance,
            "usual": vars(made.usual),
            "spread": vars(made.spread),
        }
        self._publish(FIT, _tensors_of_fit(made), digest_of_names(names), told)

    def read(self) -> Fit:
        """The fit. Raises StorageError where it is not there or harmed."""
        return _fit_of(artefacts.read(self._home, FIT, made_of=None, recipe_digest=self._recipe.digest))

    def _publish(self, name: str, tensors: dict[str, Tensor], made_of: str, told: dict[str, Any]) -> None:
        artefacts.publish(
            self._home,
            name,
            tensors,
            made_of=made_of,
            recipe_digest=self._recipe.digest,
            told=told,
            holding=self._holding,
        )

    def _sampled(self, ranked: Sequence[tuple[str, str, str]], scratch: Path) -> list[Tensor]:
        """The latents of these (rank, shard, row key), in their order; each shard is read once."""
        of_shard: dict[str, list[str]] = defaultdict(list)
        for _, name, row_key in ranked:
            of_shard[name].append(row_key)
        found: dict[tuple[str, str], Tensor] = {}
        for name, row_keys in of_shard.items():
            folder = scratch / name
            latents = Latents(self._recipe, [self._codes(name, folder)], rows_of_codes(self._home, name))
            found |= {(name, row_key): latents.read(row_key) for row_key in row_keys}
            shutil.rmtree(folder)
        return [found[name, row_key] for _, name, row_key in ranked]

    def _codes(self, name: str, folder: Path) -> Codes:
        """The codes of a shard. Raises StorageError where they are harmed, and has them drawn again then."""
        try:
            return Codes(self._home, self._marker(name), folder)
        except VerificationError as error:
            self._holding()
            storage.delete(storage.join(self._home, name + MARKER_SUFFIX))
            raise StorageError(
                f"{error}; run the same command again, and these codes are drawn again"
            ) from error

    def _digest_of_codes(self, name: str) -> str:
        return self._marker(name).tar_sha256

    def _marker(self, name: str) -> Marker:
        marker = read_marker(self._home, name)
        if marker is None:
            place = storage.join(self._home, name + MARKER_SUFFIX)
            raise StorageError(f"{place} is gone; run the same command again, and its codes are drawn again")
        return marker

    def _rank(self, name: str, row_key: str) -> str:
        """Which latents are the sample, nobody knows but seed or secret.

        With the shard's name, for where keys are numbers that begin anew in each shard a key alone would choose
        the same places of all.
        """
        return self._naming.pseudonym(f"{name}/{row_key}".encode())


class Generating(Mixing):
    """Makes outputs of new latents, each in the place of a sample."""

    def __init__(self, *arguments: Any, latents: Latents, fit: Fit, **options: Any) -> None:
        super().__init__(*arguments, latents=latents, **options)
        self._block = self._recipe.unseen or Unseen()
        self._fit = fit

    def _mixtures(self, sample: Sample, prepared: Prepared, own: Tensor) -> Iterator[Mixture]:
        for noise_key in prepared.noise_keys:
            yield self._accepted(own, noise_key)

    def _accepted(self, own: Tensor, noise_key: bytes) -> Mixture:
        """The first new latent that will do. Raises SampleError `not-accepted` where none does."""
        words, block = key_words([noise_key]), self._block
        nearest, least = self._fit.usual, math.inf
        for tries in range(1, block.max_tries + 1):
            z = normal(words, own.shape, purpose=Purpose.NEW_LATENT, node=torch.tensor([tries]))[0]
            latent = slerp(own.double(), self._fit.candidate(z), block.weight).float()
            self._check_apart(latent, own)
            found = standing(latent, self._fit.references)
            if self._fit.accepts(found, tolerance=block.tolerance):
                return Mixture(latent=latent, told=f"tries={tries} {_words(found)}")
            if (off := self._fit.strangeness(found)) < least:
                nearest, least = found, off
        usual, spread = _words(self._fit.usual), _words(self._fit.spread)
        raise SampleError(
            "not-accepted",
            f"none of {block.max_tries} new latents is usual: the nearest, {_words(nearest)}, is {least:.3g} "
            f"standard deviations off; usual is {usual}, and one deviation {spread}; widen unseen.tolerance, "
            "or take another unseen.weight",
        )


def digest_of_names(names: Sequence[str]) -> str:
    """What a fit of these shards is known by."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def _words(found: Standing) -> str:
    return f"distance={found.distance:.6g} angle={found.angle:.6g} pair_angle={found.pair_angle:.6g}"


def _tensors_of_moments(found: Moments) -> dict[str, Tensor]:
    return {
        "count": torch.tensor(found.count),
        "mean": found.mean,
        "squares": torch.tensor(found.squares, dtype=torch.float64),
    }


def _moments_of(tensors: dict[str, Tensor]) -> Moments:
    return Moments(count=int(tensors["count"]), mean=tensors["mean"], squares=float(tensors["squares"]))


def _tensors_of_fit(made: Fit) -> dict[str, Tensor]:
    figures = [*made.usual.figures, *made.spread.figures, *made.norm, *made.pair_distance]
    return {
        **_tensors_of_moments(made.moments),
        "references": made.references,
        "figures": torch.tensor(figures, dtype=torch.float64),
    }


def _fit_of(tensors: dict[str, Tensor]) -> Fit:
    figures = tensors["figures"].tolist()
    usual, spread = (
        Standing(distance=distance, angle=angle, pair_angle=pair_angle)
        for distance, angle, pair_angle in (figures[:3], figures[3:6])
    )
    return Fit(
        moments=_moments_of(tensors),
        references=tensors["references"],
        usual=usual,
        spread=spread,
        norm=(figures[6], figures[7]),
        pair_distance=(figures[8], figures[9]),
    )
