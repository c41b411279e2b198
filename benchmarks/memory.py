"""Does a worker's memory grow with its shard? Its peak on a shard of 20 MB beside that on one of 2 GB.

    python benchmarks/memory.py --small 20 --large 2000

256x256 JPEG, one step, and the identity for a denoiser, so that nothing but the shard's own path takes memory:
slots, noise, guards and what they remember, spool and ledger. Each size has a process of its own: it runs
several small shards to warm up, until queues are full and the heap has the size it keeps, then the shard in
question, and makes the kernel forget its peak (Linux) when that run has loaded its model and begins to work.
Driver and worker are one process here, so the peak is an upper bound of the worker's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import identity_world
import report

LARGEST_GROWTH = 0.10


def status_mb(field: str) -> float:
    """A line of this process's /proc status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def forget_peak(record: Path) -> None:
    """Make what is resident the peak, as soon as a run's record is there: it is written when work begins."""
    while not record.is_file():
        time.sleep(0.01)
    Path("/proc/self/clear_refs").write_text("5")


def run_arm(folder: Path, shard: Path, out: Path) -> dict[str, Any]:
    """The peak of this process while it does `shard`, after the warm-up."""
    for step, shards in (("warm", sorted(folder.glob("warm-*.tar"))), ("job", [shard])):
        manifest = identity_world.write_manifest(out / f"{step}.yaml", shards)
        watch = threading.Thread(target=forget_peak, args=(out / step / "run.json",), daemon=True)
        watch.start()
        images = identity_world.run_identity(folder / "model", manifest, out / step, timestep=1)
        watch.join(timeout=1)
    return {
        "shard_mb": round(shard.stat().st_size / 1e6, 1),
        "images": images,
        "peak_mb": round(status_mb("VmHWM"), 1),
        "resident_after_mb": round(status_mb("VmRSS"), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=float, default=20, metavar="MB")
    parser.add_argument("--large", type=float, default=2000, metavar="MB")
    parser.add_argument("--warm-up", type=int, default=10, metavar="SHARDS", help="of the small size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grain", type=float, default=1.0, help="of the pictures, and so their size")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--arm", nargs=3, metavar=("FOLDER", "SHARD", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(*map(Path, args.arm))))
        return 0

    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        identity_world.save_model(folder / "model")
        pictures = identity_world.jpegs(grain=args.grain)
        each_mb = sum(map(len, pictures)) / len(pictures) / 1e6
        for size, megabytes in (("small", args.small), ("large", args.large)):
            identity_world.write_shard(folder / f"{size}.tar", pictures, round(megabytes / each_mb))
        count = round(args.small / each_mb)
        for index in range(args.warm_up):
            identity_world.write_shard(folder / f"warm-{index}.tar", pictures, count, first=index * count)

        def measure(size: str) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                command = [sys.executable, __file__, "--arm", str(folder), str(folder / f"{size}.tar"), out]
                return report.run_json(command, environment={"OMP_NUM_THREADS": "1"})

        found = report.alternate(("small", "large"), args.repeats, measure)

    peaks = {size: report.median(results, "peak_mb") for size, results in found.items()}
    low, high = report.spread(found["small"], "peak_mb")
    growth = peaks["large"] / peaks["small"] - 1
    rows = [
        [f"{found[size][0]['shard_mb']:.0f} MB", found[size][0]["images"], f"{peaks[size]:.0f} MB"]
        for size in found
    ]
    text = [
        "# A worker's memory beside its shard's size",
        "",
        f"Medians of {args.repeats} after {args.warm_up} small shards; the small one's spread "
        f"{low:.0f} to {high:.0f} MB.",
        "",
        report.table(["shard", "images", "peak resident memory"], rows),
        "",
        f"Growth {growth:.1%}; target: less than {LARGEST_GROWTH:.0%}.",
    ]
    record = {
        "question": __doc__.splitlines()[0],
        "machine": report.machine(1),
        "growth": round(growth, 4),
        "arms": found,
    }
    report.publish("memory", record, "\n".join(text), folder=args.results)
    return 0 if growth < LARGEST_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
