"""Can people be recognized in faces that Boomerang redrew, and from which t on can they not?

    python benchmarks/olivetti.py .cache/olivetti
    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/face_model.py train --minutes 60
    python benchmarks/faces.py

200 photographs of 20 people whom the model has never seen (it was trained on 200 of 20 others), redrawn at a
range of t by the tool's engine and attacked in the features of several embedders: is the very photograph
found among the 200, are other photographs of the person found where that one is not in the gallery, and does
an attacker find more who has learned from pairs of other people. Beside them the control rows (the source
itself, t = 0, another person's photograph, t = T), and for the very photograph the noise ceiling: what the
jump of noise alone leaves to find, whatever the denoiser does after it. Nothing says that linkability must
fall with t: the greatest rise from one t to the next is reported. Memorized swaps are counted too, outputs
nearer to a training face than 95 % of strangers' photographs and than to their source; of 200 training faces
some will be learned by heart, and each shows a real person, whom nobody asked. The contact sheet stays in
`--cache`: the photographs are not ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import face_attacks
import face_report
import numpy as np
import olivetti
import report
import torch
from redraws import Redrawer, Redrawn

from boomerang_batch.config.pipeline import parse_recipe
from boomerang_batch.data.images import contact_sheet
from boomerang_batch.errors import ConfigError
from boomerang_batch.measures import embedders
from boomerang_batch.measures.attackers import training_half
from boomerang_batch.measures.ceiling import noise_ceiling
from boomerang_batch.measures.intervals import Rate

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
STEPS = 25
EMBEDDERS = ("pixels", "efficientnet-lite0", "dlib-cropped", "dlib")
SHOWN = 10
CEILING_DRAWS = 5

RECIPE = """
name: faces
purpose: augment
seed: 20221016
model: {{source: {model}, patch_size: 4, channels_last: true}}
t: {{fraction: 1.0}}
steps: {steps}
grid: trailing
sampler: {{eta: 1.0}}
batch_size: 50
"""


class Features:
    """One embedder, and what it made of images before."""

    def __init__(self, name: str, fit_on: np.ndarray, cache: Path) -> None:
        self._embedder = embedders.load(name, fit_on=fit_on)
        self._cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def of(self, images: np.ndarray) -> np.ndarray:
        """(N, d) float32 of uint8 images (N, H, W, C)."""
        name = hashlib.sha256(self._embedder.digest.encode() + images.tobytes()).hexdigest()[:24]
        kept = self._cache / f"{self._embedder.name}-{name}.npy"
        if not kept.is_file():
            scratch = kept.with_suffix(".tmp.npy")
            np.save(scratch, self._embedder.embed(images))
            scratch.replace(kept)
        return np.load(kept)


def another_person(people: np.ndarray) -> np.ndarray:
    """For every photograph the number of one of the next person: the unrelated image of the control row."""
    everyone = np.unique(people)
    following = dict(zip(everyone, np.roll(everyone, -1), strict=True))
    return np.array(
        [
            np.flatnonzero(people == following[person])[np.flatnonzero(people == person).tolist().index(index)]
            for index, person in enumerate(people)
        ]
    )


def told(rate: Rate) -> dict[str, float]:
    """A rate as numbers."""
    return {"value": rate.value, "low": rate.low, "high": rate.high, "trials": rate.trials}


def measure(
    outputs: np.ndarray, sources: np.ndarray, people: np.ndarray, training: np.ndarray
) -> dict[str, Any]:
    """Every attack on one row's outputs, in the features of one embedder."""
    same = face_attacks.same_photo(outputs, sources)
    others = face_attacks.other_photos(outputs, sources, people)
    learned_same, learned_other = face_attacks.learned(outputs, sources, people)
    near = face_attacks.memorized(outputs, sources, people, training)
    return {
        "misses": same.misses,
        "same_photo": {
            "rank1": told(same.rank[1]),
            "rank5": told(same.rank[5]),
            "auc": same.auc.value,
            "tar": told(same.tar[face_attacks.FAR].rate),
            "one_to_one": told(same.one_to_one),
            "chance": same.chance[1],
        },
        "other_photos": {
            "rank1": told(face_attacks.pooled(others)),
            "auc": float(np.mean([part.auc.value for part in others])),
            "chance": others[0].chance[1],
        },
        "learned_same_photo": {"rank1": told(face_attacks.pooled(learned_same))},
        "learned_other_photos": {"rank1": told(face_attacks.pooled(learned_other))},
        "memorized": {name: told(rate) for name, rate in near.items()},
    }


def show(sources: np.ndarray, people: np.ndarray, drawn: Sequence[Redrawn], path: Path) -> None:
    """One photograph of each of some people, and what became of it at each t."""
    firsts = [int(np.flatnonzero(people == person)[0]) for person in np.unique(people)[:SHOWN]]
    rows = [[sources[index], *(made.images[index] for made in drawn)] for index in firsts]
    coloured = [[np.repeat(pixels, 3, axis=2) for pixels in row] for row in rows]
    path.write_bytes(contact_sheet(coloured, cell=96))
    print(f"{path}: a source in each row, then its outputs by t. Not to be published.", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=Path(".cache/olivetti"))
    parser.add_argument("--model", type=Path, default=Path(".cache/face-model/model"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/faces"))
    parser.add_argument("--embedders", nargs="+", default=list(EMBEDDERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--quick", action="store_true", help="pixels, 3 t and 10 steps, results into the cache")
    args = parser.parse_args()
    fractions, steps, names = FRACTIONS, STEPS, args.embedders
    if args.quick:
        fractions, steps, names = (0.2, 0.6, 1.0), 10, ["pixels"]
        args.results = args.cache / "quick"
    torch.set_num_threads(args.threads)

    seen, unseen = olivetti.trained_and_held_out(olivetti.read(args.faces))
    sources, people = unseen.images, unseen.people
    recipe = parse_recipe(RECIPE.format(model=args.model.resolve(), steps=steps), source="faces")
    redrawer = Redrawer(recipe, args.cache / "redrawn", threads=args.threads)
    drawn = []
    for fraction in (0.0, *fractions):
        drawn.append(redrawer.redraw(sources, fraction))
        print(f"t = {fraction:g} T: {drawn[-1].cpu_s:.0f} CPU seconds", file=sys.stderr, flush=True)
    redrawer.close()
    args.results.mkdir(parents=True, exist_ok=True)
    show(sources, people, drawn, args.cache / "sheet.png")

    rows: list[tuple[str, np.ndarray, Redrawn | None]] = [("the source itself", sources, None)]
    rows += [("another person's photograph", sources[another_person(people)], None)]
    rows += [(f"t = {made.fraction:g} T", made.images, made) for made in drawn]
    lines: list[dict[str, Any]] = []
    halves = training_half(people).astype(np.int64)
    flat = sources.reshape(len(sources), -1).astype(np.float32) / 127.5 - 1
    for name, _, made in rows:
        line: dict[str, Any] = {"row": name, "embedders": {}}
        if made is not None:
            line |= {"fraction": made.fraction, "sigma": made.sigma, "evaluations": made.evaluations}
            sigmas = np.full(len(flat), made.sigma)
            for label, groups in (("ceiling", np.zeros(len(flat), np.int64)), ("ceiling_halves", halves)):
                limit = noise_ceiling(flat, sigmas, groups=groups, draws=CEILING_DRAWS)
                line[label] = told(limit.rank[1])
                line[f"{label}_one_to_one"] = told(limit.one_to_one)
        lines.append(line)

    used, left_out = [], {}
    mirrored = np.concatenate([seen.images, seen.images[:, :, ::-1]])
    for name in names:
        try:
            features = Features(name, sources, args.cache / "features")
        except ConfigError as error:
            left_out[name] = str(error)
            print(f"left out: {error}", file=sys.stderr)
            continue
        used.append(name)
        own = features.of(sources)
        training = features.of(mirrored)
        for (row, outputs, _), line in zip(rows, lines, strict=True):
            line["embedders"][name] = measure(features.of(outputs), own, people, training)
            print(f"{name}, {row}: {json.dumps(line['embedders'][name])}", file=sys.stderr, flush=True)

    trained = json.loads((args.model / "training.json").read_text())
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": report.machine(args.threads),
        "training": {name: trained[name] for name in ("steps", "batch", "seconds")},
        "model": redrawer.digest,
        "steps": steps,
        "left_out": left_out,
        "rows": lines,
    }
    face_report.publish(record, used, args.results)


if __name__ == "__main__":
    main()
