"""How long does an audit take, and how much memory? 10,000 outputs of a run, their sources and two embedders.

    python benchmarks/audit_speed.py --data FOLDER

FOLDER holds Fashion-MNIST's gzip'd IDX files, whose test split is the dataset. Its outputs are made by the
demo's recipe in two steps, which is soon done: what is timed is the audit alone. That is reading both sides,
every measure by label and over all, and the findings; not the embedders (timed too, and taken off), and nothing
is drawn anew. It has a process of its own, whose peak is told.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import classifier
import report

EMBEDDERS = ("pixels", "pca")


def make_output(data: Path, folder: Path, count: int) -> list[str]:
    """OUT, private dir and manifest of `count` test images, a thousand to a shard."""
    from boomerang_batch.data.shards import write_shard
    from boomerang_batch.demo.make_shards import samples

    images, labels = classifier.split(data, "t10k")
    for shard, first in enumerate(range(0, count, 1000)):
        indices = list(range(first, min(first + 1000, count)))
        write_shard(folder / f"s-{shard:03d}.tar", samples(images, labels, indices))
    manifest = folder / "manifest.yaml"
    manifest.write_text(f"format_version: 1\nname: test\nshards: ['s-{{000..{shard:03d}}}.tar']\n")
    places = [str(folder / "out"), str(folder / "private")]
    words = ["run", "demo-anonymize", str(manifest), places[0], "--private-dir", places[1]]
    words += ["--set", "steps=4", "--set", "t.fraction=0.5"]
    subprocess.run([sys.executable, "-m", "boomerang_batch", *words], check=True, capture_output=True)
    return [*places, str(manifest)]


def measure(out: str, private_dir: str, manifest: str, samples: int) -> dict[str, Any]:
    """One audit."""
    from boomerang_batch.audit.audit import AuditRequest, audit
    from boomerang_batch.config.blocks import Gates
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.measures.embedders.contract import CheckedEmbedder

    embedding_s = 0.0
    real = CheckedEmbedder.embed

    def timed(embedder: CheckedEmbedder, images: Any) -> Any:
        nonlocal embedding_s
        began = time.monotonic()
        features = real(embedder, images)
        embedding_s += time.monotonic() - began
        return features

    CheckedEmbedder.embed = timed  # type: ignore[method-assign]
    began = time.monotonic()
    found = audit(
        AuditRequest(
            out=out,
            manifest=load_manifest(manifest),
            private_dir=private_dir,
            embedders=EMBEDDERS,
            samples=samples,
            redraws=0,
            gates=Gates(),
        )
    )
    took_s = time.monotonic() - began
    return {
        "audited": found.audited,
        "readings": len(found.readings),
        "seconds": round(took_s - embedding_s, 1),
        "embedding_s": round(embedding_s, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(*options.arm, options.samples)))
        return 0
    if options.data is None:
        parser.error("--data is missing: the folder with t10k-images-idx3-ubyte.gz")

    with tempfile.TemporaryDirectory() as scratch:
        arm = make_output(options.data, Path(scratch), options.samples)
        found = report.alternate(
            ["audit"],
            options.repeats,
            lambda name: report.run_json(
                [sys.executable, __file__, "--samples", str(options.samples), "--arm", *arm]
            ),
        )["audit"]
    row = [
        found[0]["audited"],
        found[0]["readings"],
        f"**{report.median(found, 'seconds'):.0f}**",
        f"{report.median(found, 'embedding_s'):.0f}",
        f"{report.median(found, 'peak_mb'):.0f}",
    ]
    header = ["outputs", "readings", "audit, s", "embedding, s", "peak, MB"]
    markdown = (
        f"# An audit in the features of {' and '.join(EMBEDDERS)}\n\n{report.table(header, [row])}\n\n"
        f"Medians of {options.repeats}."
    )
    report.publish(
        "audit_speed", {"machine": report.machine(2), "runs": found}, markdown, folder=options.results
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
