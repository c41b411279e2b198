"""Does a plan come true? `plan` on the demo's recipe, then the run it speaks of, for two sizes of data.

    python benchmarks/plan_accuracy.py

The smaller dataset is the demo's first shards, the larger all of them several times over. Plan and run take
turns, each in a process of its own, so that both see the same machine. Compared are wall time, evaluations
(exactly) and bytes of output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

from boomerang_batch import shipped

NAMES = ("small", "large")


def command(*words: str) -> str:
    """What a command of the tool prints; ends this process where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "boomerang_batch", *words], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def manifests(folder: Path, small: int, copies: int) -> dict[str, Path]:
    """Manifests of `small` shards, and of all of them `copies` times."""
    shards = sorted(Path(shipped.resolve("shipped:demo/shards")).glob("*.tar"))
    items = {
        "small": [{"url": str(path)} for path in shards[:small]],
        "large": [
            {"url": str(link(folder / f"copy-{copy}", path)), "id": f"{path.stem}-{copy}"}
            for copy in range(copies)
            for path in shards
        ],
    }
    for name in NAMES:
        lines = "".join(json.dumps(item) + "\n" for item in items[name])
        (folder / f"{name}.jsonl").write_text(lines)
    return {name: folder / f"{name}.jsonl" for name in NAMES}


def link(folder: Path, path: Path) -> Path:
    """The same shard under another path, for a manifest lists none twice."""
    folder.mkdir(exist_ok=True)
    (folder / path.name).symlink_to(path)
    return folder / path.name


def measure(manifest: Path, threads: int) -> dict[str, Any]:
    """One plan and its run."""
    with tempfile.TemporaryDirectory() as folder:
        # Copies of one shard hold the same keys.
        words = ("--threads", str(threads), "--device", "cpu", "--set", "identity=shard+key")
        planned = json.loads(command("plan", "demo-anonymize", str(manifest), "--json", *words))
        began = time.monotonic()
        command(
            "run",
            "demo-anonymize",
            str(manifest),
            f"{folder}/out",
            "--private-dir",
            f"{folder}/private",
            *words,
        )
        took_s = time.monotonic() - began
        output_bytes = sum(
            path.stat().st_size
            for suffix in ("tar", "parquet")
            for path in Path(folder, "out").glob(f"*.{suffix}")
        )
    return {
        "samples": planned["samples"],
        "planned_s": round(planned["wall_s"], 1),
        "took_s": round(took_s, 1),
        "time_ratio": round(planned["wall_s"] / took_s, 3),
        "bytes_ratio": round(planned["output_bytes"] / output_bytes, 3),
    }


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=5, help="shards of the smaller dataset")
    parser.add_argument("--copies", type=int, default=2, help="copies of all shards in the larger one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = manifests(Path(folder), options.small, options.copies)
        found = report.alternate(NAMES, options.repeats, lambda name: measure(paths[name], options.threads))
    rows = []
    for name in NAMES:
        low, high = report.spread(found[name], "time_ratio")
        rows.append(
            [
                found[name][0]["samples"],
                *(f"{report.median(found[name], field):.1f}" for field in ("planned_s", "took_s")),
                f"**{report.median(found[name], 'time_ratio'):.2f}** ({low:.2f} to {high:.2f})",
                f"{report.median(found[name], 'bytes_ratio'):.2f}",
            ]
        )
    header = ["samples", "planned, s", "took, s", "planned by taken", "bytes, planned by written"]
    markdown = f"# What `plan` said and what the run took\n\n{report.table(header, rows)}"
    report.publish("plan_accuracy", {"machine": report.machine(options.threads), "runs": found}, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
