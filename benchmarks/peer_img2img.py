"""Data-Juicer's image_diffusion_mapper, and the same algorithm through diffusers. Arms of peer_data_juicer.py.

    PYTHON benchmarks/peer_img2img.py data-juicer|img2img-pipeline JOB.json OUT

PYTHON is, for data-juicer, that of an environment which holds py-data-juicer, diffusers, transformers and
accelerate; nothing here imports this project's package. One prompt and one image per call of diffusers' img2img
pipeline, the image brought to 512x512 and back. The seconds run from the first image to the last, the model
loaded and warm; Data-Juicer is given unpacked files and writes unpacked files, which is in its favour.
"""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import Any

import peer_arm
import torch
from PIL import Image

ARMS = ("data-juicer", "img2img-pipeline")
SIDE = 512


def unpack(shards: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Each sample's image file and caption by key."""
    folder.mkdir(parents=True)
    found: dict[str, dict[str, Any]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, field = member.name.partition(".")
                data = tar.extractfile(member).read()
                if field == "txt":
                    found.setdefault(key, {})["caption"] = data.decode()
                elif field == "png":
                    (folder / member.name).write_bytes(data)
                    found.setdefault(key, {})["image"] = str(folder / member.name)
    return found


def warm_up(pipeline: Any) -> None:
    """A few untimed steps: the first calls cost more than the later ones."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline(image=Image.new("RGB", (SIDE, SIDE)), prompt=[""], strength=0.1, num_inference_steps=20)


def data_juicer(job: dict[str, Any], out: Path) -> float:
    """Seconds that Data-Juicer's operator takes for all samples, its model warm."""
    from data_juicer.ops.mapper.image_diffusion_mapper import ImageDiffusionMapper
    from data_juicer.utils.model_utils import get_model

    samples = unpack(job["shards"], out.parent / "unpacked")
    mapper = ImageDiffusionMapper(
        hf_diffusion=job["model"],
        strength=job["strength"],
        guidance_scale=job["guidance"],
        aug_num=1,
        keep_original_sample=False,
        caption_key="caption",
        save_dir=str(out),
    )
    warm_up(get_model(mapper.model_key, use_cuda=False))
    batch = {
        "text": [""] * len(samples),
        "images": [[sample["image"]] for sample in samples.values()],
        "caption": [sample["caption"] for sample in samples.values()],
    }
    since = time.monotonic()
    results = mapper.process_batched(batch)
    seconds = time.monotonic() - since
    for key, (written,) in zip(samples, results["images"], strict=True):
        Path(written).rename(out / f"{key}.png")
    return seconds


def img2img_pipeline(job: dict[str, Any], out: Path) -> float:
    """The same algorithm without Data-Juicer: tars in, tars out."""
    from diffusers import AutoPipelineForImage2Image

    pipeline = AutoPipelineForImage2Image.from_pretrained(job["model"], low_cpu_mem_usage=False)
    warm_up(pipeline)
    out.mkdir(parents=True)
    since = time.monotonic()
    for shard in job["shards"]:
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, field = member.name.partition(".")
                samples.setdefault(key, {})[field] = tar.extractfile(member).read()
        for key, fields in samples.items():
            image = Image.open(io.BytesIO(fields["png"])).convert("RGB")
            (made,) = pipeline(
                image=image.resize((SIDE, SIDE), Image.Resampling.BILINEAR),
                prompt=[fields["txt"].decode()],
                strength=job["strength"],
                guidance_scale=job["guidance"],
            ).images
            made.resize(image.size, Image.Resampling.BILINEAR).save(out / f"{key}.png")
    return time.monotonic() - since


def run(arm: str, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Do the job and say how long it took."""
    torch.set_num_threads(job["threads"])
    seconds = (data_juicer if arm == "data-juicer" else img2img_pipeline)(job, out)
    return {"images": len(list(out.glob("*.png"))), "seconds": round(seconds, 3)}


if __name__ == "__main__":
    peer_arm.main(__doc__, ARMS, run)
