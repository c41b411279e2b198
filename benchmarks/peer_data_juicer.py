"""How fast is a run beside Data-Juicer's image_diffusion_mapper, on Data-Juicer's own kind of model?

    python3 -m venv DJ
    DJ/bin/pip install py-data-juicer==1.6.1 aiohttp torch==2.13.0 diffusers transformers accelerate
    python benchmarks/peer_data_juicer.py --data-juicer DJ/bin/python --images 40 --repeats 3 --threads 2

A small Stable Diffusion with random weights (no trained one is at hand, and time does not depend on the
weights), 512x512 images, 50 steps, strength .4, so 20 evaluations, guidance 7.5, DDIM, a caption of its own for
every image. Arms: Data-Juicer in the environment given; its algorithm, one prompt and one image per call of
diffusers' img2img pipeline; the tool with `start: diffusers-strength`. Without --data-juicer that arm is left
out. All arms' outputs must lie as far from their sources. Seconds as in peers.py.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import string
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peer_img2img
import peer_tool
import report
import torch
import webdataset
from PIL import Image

SIDE = peer_img2img.SIDE
STEPS = 50
STRENGTH = 0.4
GUIDANCE = 7.5
PER_SHARD = 20


def save_model(folder: Path) -> None:
    """A Stable Diffusion with small random layers and a byte-level tokenizer, as diffusers saves it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(string.printable.replace(" ", ""))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                block_out_channels=(8, 16, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=SIDE,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=SIDE // 8,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=8,
                attention_head_dim=2,
                cross_attention_dim=32,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


def write_shards(folder: Path, images: int) -> list[str]:
    """Shards of smooth random colours with a caption each."""
    draw = np.random.default_rng(0)
    shards = []
    folder.mkdir(parents=True)
    for first in range(0, images, PER_SHARD):
        path = folder / f"in-{first // PER_SHARD:05d}.tar"
        shards.append(str(path))
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for index in range(first, min(images, first + PER_SHARD)):
                small = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
                fields = {"png": buffer.getvalue(), "txt": f"picture {index}".encode()}
                tar.write({"__key__": f"image{index:06d}", **fields})
    return shards


def recipe_text(job: dict[str, Any]) -> str:
    """The mapper's settings, said in the tool's words."""
    return f"""
name: data-juicer
purpose: augment
seed: 1
model:
  source: {job["model"]}
  prompts: {{field: txt, guidance: {GUIDANCE}}}
t: {{fraction: {STRENGTH}}}
steps: {STEPS}
grid: leading
start: diffusers-strength
sampler: {{eta: 0.0}}
batch_size: {job["batch"]}
"""


def distances(job: dict[str, Any], out: Path) -> dict[str, float]:
    """Mean squared distance of outputs to sources, pixels in [0, 1], and its standard error."""
    sources: dict[str, np.ndarray] = {}
    made: dict[str, np.ndarray] = {path.stem: _pixels(path.read_bytes()) for path in out.glob("image*.png")}
    for shards, into in ((map(Path, job["shards"]), sources), (out.glob("*.tar"), made)):
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in (member for member in tar if member.name.endswith(".png")):
                    into[member.name.partition(".")[0]] = _pixels(tar.extractfile(member).read())
    if len(made) != len(sources):
        raise SystemExit(f"{out}: {len(made)} outputs for {len(sources)} images")
    values = [np.square(pixels - sources[key]).mean() for key, pixels in made.items()]
    return {
        "mean_squared_distance": float(np.mean(values)),
        "standard_error": float(np.std(values)) / math.sqrt(len(values)),
    }


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64) / 255


def measure(arm: str, *, job: dict[str, Any], python: str | None, scratch: Path) -> dict[str, Any]:
    """One arm's process, and the check of its outputs."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        given, out = Path(folder) / "job.json", Path(folder) / "out"
        given.write_text(json.dumps(job))
        script = peer_tool if arm == "tool" else peer_img2img
        runs = python if arm == "data-juicer" else sys.executable
        result = report.run_json(
            [str(runs), str(script.__file__), arm, str(given), str(out)],
            environment={"OMP_NUM_THREADS": str(job["threads"])},
        )
        result |= distances(job, out)
    return result | {"images_per_s": round(result["images"] / result["seconds"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-juicer", metavar="PYTHON", help="of an environment with py-data-juicer")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="slots of the tool's engine")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args()

    arms = ["tool", "img2img-pipeline", *(["data-juicer"] if args.data_juicer else [])]
    with tempfile.TemporaryDirectory(prefix="data-juicer-") as name:
        scratch = Path(name)
        save_model(scratch / "model")
        shards = write_shards(scratch / "in", args.images)
        manifest = scratch / "manifest.yaml"
        manifest.write_text(f"format_version: 1\nname: data-juicer\nshards: {json.dumps(shards)}\n")
        job: dict[str, Any] = {
            "model": str(scratch / "model"),
            "shards": shards,
            "manifest": str(manifest),
            "strength": STRENGTH,
            "guidance": GUIDANCE,
            "batch": args.batch,
            "threads": args.threads,
        }
        job["recipe"] = recipe_text(job)
        found = report.alternate(
            arms, args.repeats, functools.partial(measure, job=job, python=args.data_juicer, scratch=scratch)
        )
    mine, rows = report.median(found["tool"], "seconds"), []
    for arm, results in found.items():
        gap = results[0]["mean_squared_distance"] - found["tool"][0]["mean_squared_distance"]
        gap /= math.hypot(results[0]["standard_error"], found["tool"][0]["standard_error"])
        if abs(gap) > 5:
            raise SystemExit(f"{arm}: outputs lie {gap:.1f} standard errors from the tool's: not the same job")
        low, high = report.spread(results, "images_per_s")
        rate, ratio = report.median(results, "images_per_s"), report.median(results, "seconds") / mine
        rows.append([arm, f"{rate:.3f}", f"{low:.3f} to {high:.3f}", f"{ratio:.2f}", f"{gap:.2f}"])
    header = ["arm", "images/s, median", "range", "tool is faster by", "distance gap, standard errors"]
    text = f"# Beside Data-Juicer's image_diffusion_mapper\n\n{report.table(header, rows)}"
    record = {
        "question": __doc__.splitlines()[0],
        "machine": report.machine(args.threads),
        "images": args.images,
        "batch": args.batch,
        "arms": found,
    }
    report.publish("data_juicer", record, text, folder=args.results)


if __name__ == "__main__":
    main()
