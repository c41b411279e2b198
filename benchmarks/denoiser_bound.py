"""Does the device ever wait? A run's time over that of its network calls alone, in a loop, on the same cores.

    python benchmarks/denoiser_bound.py --repeats 5
    python benchmarks/denoiser_bound.py --repeats 5 --case latent

demo: the shipped recipe demo-anonymize on its 1,000 images (target 1.05). latent: 256x256 JPEG in and out, a
small random latent model (AutoencoderKL and UNet2DModel), t drawn for each image (target 1.10). The run is
timed from the loaded model to the last shard's commit. The loop makes the same calls in the same order on the
same model, for the latent case the autoencoder's among them; it draws no noise, takes no steps, reads and
writes nothing. Each arm is a process of its own; they alternate. CPU seconds, which other work on the machine
disturbs less, stand beside the seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import identity_world
import peer_tool
import report
import torch

from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.diffusion.parity import synthetic_images
from boomerang_batch.diffusion.threads import use_threads
from boomerang_batch.models import load_denoiser
from boomerang_batch.run import loading, runner
from boomerang_batch.run.driver import execute
from boomerang_batch.run.request import RunRequest
from boomerang_batch.shipped import named

TARGETS = {"demo": 1.05, "latent": 1.10}
LATENT_IMAGES, LATENT_SHARDS = 128, 4


def save_latent_model(folder: Path) -> None:
    """A diffusers LDMPipeline folder of random weights for 256x256 RGB: latents of 4x32x32."""
    from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 32),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=256,
        )
        unet = UNet2DModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(64, 128, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    LDMPipeline(vqvae=autoencoder, unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)


class Counting:
    """A denoiser that notes its calls; what it adds to one is a Python call."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def denoise(self, *arguments: Any) -> Any:
        self.calls.append("denoise")
        return self._denoiser.denoise(*arguments)

    def encode(self, images: Any) -> Any:
        self.calls.append("encode")
        return self._denoiser.encode(images)

    def decode(self, x_0: Any) -> Any:
        self.calls.append("decode")
        return self._denoiser.decode(x_0)


def prepare(case: str, work: Path) -> dict[str, Any]:
    """The job of a case: a recipe's text and a manifest."""
    if case == "demo":
        shipped = named("pipelines", "demo-anonymize").read_text()
        manifest = str(named("manifests", "demo"))
        return {
            "recipe": shipped.replace("purpose: anonymize", "purpose: augment\nseed: 1"),
            "manifest": manifest,
        }
    save_latent_model(work / "model")
    pictures = identity_world.jpegs(grain=0.12)
    shards = [work / f"in-{number}.tar" for number in range(LATENT_SHARDS)]
    count = LATENT_IMAGES // LATENT_SHARDS
    for number, shard in enumerate(shards):
        identity_world.write_shard(shard, pictures, count, first=number * count)
    recipe = f"""
name: latent
purpose: augment
seed: 1
model: {{source: {work / "model"}, autoencoder: {{batch_size: 4}}}}
t: {{fraction: {{uniform: [0.1, 0.8]}}}}
steps: 12
grid: trailing
images: {{format: jpeg}}
batch_size: 16
"""
    return {"recipe": recipe, "manifest": str(identity_world.write_manifest(work / "in.yaml", shards))}


def run(job: dict[str, Any], threads: int) -> dict[str, Any]:
    """The tool's own run, its seconds from the loaded model to the last commit, and its calls."""
    made: list[Counting] = []
    begun: list[float] = []
    load = runner.load

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(Counting(load_denoiser(*arguments, **options)))
        return made[-1]

    def loaded(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        made[0].calls.clear()  # those that try the model out are not timed
        begun.append(time.process_time())
        return found

    loading.load_denoiser = counted  # type: ignore[assignment]
    runner.load = loaded  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        request = RunRequest(
            recipe=_recipe(job),
            manifest=load_manifest(job["manifest"]),
            out=str(out),
            device="cpu",
            threads=threads,
            quiet=True,
        )
        report_of_run = execute(request, stop=threading.Event())
        if report_of_run.exit_code:
            sys.exit(f"the run ended with {report_of_run.exit_code}")
        seconds, rows = peer_tool.last_commit_s(out), peer_tool.rows(out)
    return {
        "images": report_of_run.rows["ok"],
        "seconds": seconds,
        "cpu_seconds": time.process_time() - begun[0],
        "evaluations": sum(row["evaluations"] for row in rows),
        "calls": made[0].calls,
    }


def loop(job: dict[str, Any], threads: int) -> dict[str, Any]:
    """The run's calls, of the same shapes in the same order, and nothing else."""
    recipe = _recipe(job)
    denoiser = load_denoiser(recipe.model, device="cpu", threads=threads)
    use_threads(threads)
    size = recipe.batch_size
    conditions = [0 if denoiser.spec.conditioning == "label" else None] * size
    with torch.inference_mode():
        images = synthetic_images(denoiser.spec, recipe.model.autoencoder.batch_size)
        states = denoiser.encode(images)
        x_t = states[:1].expand(size, -1, -1, -1).contiguous()
        tau = torch.full((size,), float(denoiser.spec.levels.tau[500]), dtype=torch.float64)
        calls = {
            "encode": lambda: denoiser.encode(images),
            "denoise": lambda: denoiser.denoise(x_t, tau, conditions),
            "decode": lambda: denoiser.decode(states),
        }
        calls["denoise"]()  # the run's first call is warm, too
        started, begun = time.monotonic(), time.process_time()
        for name in job["calls"]:
            calls[name]()
    return {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - begun}


def _recipe(job: dict[str, Any]) -> Recipe:
    return parse_recipe(job["recipe"], source="denoiser_bound", overrides=job["overrides"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=TARGETS, default="demo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--arm", choices=("run", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        job = json.loads(args.job)
        if args.arm == "run":
            print(json.dumps(run(job, args.threads)))
        else:
            # In a thread of its own, as a run's calls are: the main thread's heap is another, and slower.
            with ThreadPoolExecutor(1) as thread:
                print(json.dumps(thread.submit(loop, job, args.threads).result()))
        return

    with tempfile.TemporaryDirectory() as folder:
        job = prepare(args.case, Path(folder)) | {"overrides": args.overrides}

        def measure(arm: str) -> dict[str, Any]:
            command = [sys.executable, __file__, "--arm", arm, "--threads", str(args.threads)]
            done = report.run_json([*command, "--job", json.dumps(job)])
            if arm == "run":
                job["calls"] = done.pop("calls")
            return done

        measure("run")  # tells how many calls there are, and warms the disk's cache
        found = report.alternate(("run", "loop"), args.repeats, measure)
    ratios = sorted(
        one["seconds"] / other["seconds"] for one, other in zip(found["run"], found["loop"], strict=True)
    )
    cpu = report.median(found["run"], "cpu_seconds") / report.median(found["loop"], "cpu_seconds")
    first, calls = found["run"][0], Counter(job["calls"])
    batch = _recipe(job).batch_size
    record = {
        "machine": report.machine(args.threads),
        "case": args.case,
        "ratio": round(report.median(found["run"], "seconds") / report.median(found["loop"], "seconds"), 3),
        "cpu_ratio": round(cpu, 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "target": TARGETS[args.case],
        "slots_in_use": round(first["evaluations"] / (calls["denoise"] * batch), 3),
        "calls": calls,
        "arms": found,
    }
    rows = [
        (
            arm,
            f"{report.median(results, 'seconds'):.1f}",
            *(f"{x:.1f}" for x in report.spread(results, "seconds")),
        )
        for arm, results in found.items()
    ]
    text = f"""# Denoiser-bound: {args.case}

{first["images"]} images, {first["evaluations"]} evaluations in {calls["denoise"]} calls of {batch} slots
({record["slots_in_use"]:.1%} of the slots in use), {calls["encode"]} encodes and {calls["decode"]} decodes.
Ratio of medians **{record["ratio"]}**, target {record["target"]}; by pairs {record["ratios"]};
of CPU seconds {record["cpu_ratio"]}.

{report.table(("arm", "median s", "least", "most"), rows)}
"""
    report.publish(f"denoiser_bound_{args.case}", record, text)


if __name__ == "__main__":
    main()
