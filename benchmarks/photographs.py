"""Photographs with a free licence, from packages, reduced until their pixels hold detail. None is committed.

    apt-get install plasma-workspace-wallpapers mate-backgrounds lomiri-wallpapers-16.04 \\
        lomiri-wallpapers-20.04 palapeli-data puzzle-jigsaw
    python -m pip install --no-deps --target FOLDER scikit-image scikit-learn
    python benchmarks/photographs.py .cache/photographs --root / --root FOLDER

Writes PNG files into OUT/train and OUT/test: the longer side 1024 pixels at most, reduced by averaging areas,
which takes away the softness of large files and most of JPEG's traces. The test photographs are whole ones
that no model of these benchmarks is trained on. Packages that are not there are named and left out. Licences,
by the packages' own copyright files: GPL-2+ (plasma, mate), CC BY, CC BY-SA and CC0 (lomiri, jigsaw), public
domain and GFDL (palapeli), public domain, CC0 and CC BY (scikit-image, scikit-learn).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from PIL import Image

LONGER_SIDE = 1024
FEWEST = 20

PLASMA = "plasma-workspace-wallpapers"
MATE = "mate-backgrounds"
LOMIRI_16 = "lomiri-wallpapers-16.04"
LOMIRI_20 = "lomiri-wallpapers-20.04"


def _plasma(name: str, size: str = "2560x1600") -> tuple[str, str]:
    return PLASMA, f"usr/share/wallpapers/{name}/contents/images/{size}.jpg"


def _mate(name: str) -> tuple[str, str]:
    return MATE, f"usr/share/backgrounds/mate/nature/{name}.jpg"


def _lomiri(name: str, package: str = LOMIRI_16) -> tuple[str, str]:
    return package, f"usr/share/backgrounds/{name}.jpg"


def _palapeli(name: str) -> tuple[str, str]:
    return "palapeli-data", f"usr/share/palapeli/collection/{name}.jpg"


TRAIN = (
    *(
        _plasma(name)
        for name in (
            "BytheWater",
            "ColdRipple",
            "ColorfulCups",
            "FallenLeaf",
            "Grey",
            "Kite",
            "OneStandsOut",
            "Path",
            "summer_1am",
        )
    ),
    _plasma("Volna", "5120x2880"),
    *(
        _mate(name)
        for name in (
            "Aqua",
            "Blinds",
            "Dune",
            "FreshFlower",
            "Garden",
            "GreenMeadow",
            "RainDrops",
            "Storm",
            "TwoWings",
            "Wood",
            "YellowFlower",
        )
    ),
    *(
        _lomiri(name)
        for name in (
            "Bridge_by_Sander_Klootwijk",
            "Dragonfly_by_Bolly",
            "Picture_0B_by_freespace",
            "Picture_1A_by_freespace",
            "Wine_by_Jakkub_Mede",
            "aitzgorri_by_Aitzol_Berasategi",
            "free_by_Peter_Nerlich",
            "friends_by_Aitzol_Berasategi",
            "greentock_by_Peter_Nerlich",
            "picosdeeuropa_by_Aitzol_Berasategi",
            "seeding_by_Clements_Engelhardt",
            "sunset_by_Aitzol_Berasategi",
        )
    ),
    *(_palapeli(name) for name in ("cincinnati-bridge", "citrus-fruits", "panther-chameleon-female")),
    ("puzzle-jigsaw", "usr/share/puzzle-jigsaw/samples/cat-animal-cat-portrait-mackerel.jpg"),
    ("scikit-image", "skimage/data/grass.png"),
    ("scikit-image", "skimage/data/gravel.png"),
)

TEST = (
    ("scikit-image", "skimage/data/astronaut.png"),
    ("scikit-image", "skimage/data/chelsea.png"),
    ("scikit-image", "skimage/data/coffee.png"),
    ("scikit-image", "skimage/data/motorcycle_left.png"),
    ("scikit-image", "skimage/data/rocket.jpg"),
    ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    _palapeli("castle-maintenon"),
    _palapeli("european-honey-bee"),
    _lomiri("life_by_Aitzol_Berasategi"),
    _lomiri("Kleiber_by_Lukas_Baubkus", LOMIRI_20),
    _mate("LadyBird"),
    _plasma("EveningGlow"),
)


def reduced(path: Path) -> Image.Image:
    """The photograph as RGB, its longer side at most `LONGER_SIDE`; whole areas are averaged."""
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    scale = min(1.0, LONGER_SIDE / max(pixels.size))
    size = (math.floor(pixels.width * scale), math.floor(pixels.height * scale))
    return pixels if size == pixels.size else pixels.resize(size, Image.Resampling.BOX)


def short_name(path: str) -> str:
    """A file name for one photograph: its own, or its folder's where files are named by size."""
    parts = Path(path).parts
    return parts[-4] if "contents" in parts else Path(path).stem


def collect(roots: list[Path], out: Path) -> list[str]:
    """Write the photographs found under `roots`; returns the packages of those that were not found."""
    missing = set()
    for split, wanted in (("train", TRAIN), ("test", TEST)):
        (out / split).mkdir(parents=True, exist_ok=True)
        for package, path in wanted:
            found = next((root / path for root in roots if (root / path).is_file()), None)
            if found is None:
                missing.add(package)
                continue
            reduced(found).save(out / split / f"{short_name(path)}.png")
    return sorted(missing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, action="append", dest="roots", help="default: / alone")
    args = parser.parse_args()
    missing = collect(args.roots or [Path("/")], args.out)
    for package in missing:
        print(f"not found, some or all of its photographs: {package}", file=sys.stderr)
    counts = {split: len(list((args.out / split).glob("*.png"))) for split in ("train", "test")}
    print(f"{counts['train']} photographs to train on, {counts['test']} to test on", file=sys.stderr)
    return 0 if counts["train"] >= FEWEST and counts["test"] else 1


if __name__ == "__main__":
    sys.exit(main())
