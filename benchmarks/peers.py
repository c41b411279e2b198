"""How fast is a run beside what users would otherwise write, on the same weights, images and evaluations?

    python benchmarks/peers.py --images 1000 --repeats 5 --threads 2

Arms: the tool; a plain diffusers loop, one image at a time; the same with the best batch; the same inside Ray
Data, tuned by its documentation. Two jobs: t equal for all images (500 of 1000, 10 of 20 steps), and t
different, uniform in (.1, .8) on the steps' grid and stored beside each image, so that every arm does the
same evaluations.

Each arm is a process of its own; all run once before any runs again, every other round backwards. Its seconds
run from the loaded model to the last output shard written: process start and loading are left out, everything
between the first sample read and the last one written is in. Batch sizes are scanned first, for each arm
alike, on a tenth of the images. Before any timing the arms are shown to do one job: with the same noise
injected their outputs agree as floats. Then counts, keys, labels, evaluations and mean distances of all timed
outputs are compared. Data-Juicer can't run this model: peer_data_juicer.py meets it on its own ground.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import peer_jobs
import peer_loops
import peer_ray_data
import peer_tool
import report

JOBS = {
    "equal t": ("tool", "one-by-one", "batched", "tool-ray", "ray-data"),
    "mixed t": (
        "tool",
        "tool-elastic",
        "batched",
        "batched-active",
        "batched-sorted",
        "tool-ray",
        "ray-data-sorted",
    ),
}
BATCHES = (8, 16, 32, 50, 100)
SCANNED_AS = {
    "tool-elastic": "tool",
    "tool-ray": "tool",
    "ray-data": "batched",
    "ray-data-sorted": "batched-sorted",
}
"""Arms that take the batch size found for another one."""
TARGETS = {
    ("equal t", "one-by-one"): 2.0,
    ("equal t", "batched"): 1.0,
    ("equal t", "ray-data"): 1.0,
    ("mixed t", "batched"): 1.5,
    ("mixed t", "batched-sorted"): 1.0,
    ("mixed t", "ray-data-sorted"): 1.0,
}


def measure(arm: str, *, job: dict[str, Any], batches: dict[str, int], scratch: Path) -> dict[str, Any]:
    """Run one arm's process on a job, and check what it wrote."""
    chosen = 1 if arm == "one-by-one" else batches[SCANNED_AS.get(arm, arm)]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        given, out = Path(folder) / "job.json", Path(folder) / "out"
        given.write_text(json.dumps(job | {"batch": chosen}))
        script = next(module for module in (peer_loops, peer_ray_data, peer_tool) if arm in module.ARMS)
        command = [sys.executable, str(script.__file__), arm, str(given), str(out)]
        result = report.run_json(command, environment={"OMP_NUM_THREADS": str(job["threads"])})
        if (result["images"], result["evaluations"]) != (job["images"], job["evaluations"]):
            raise SystemExit(f"{arm} did another job: {result}, not {job['images']}, {job['evaluations']}")
        result |= peer_jobs.compare_outputs(job, out)
    return result | {"batch": chosen, "images_per_s": round(result["images"] / result["seconds"], 3)}


def scan(arms: tuple[str, ...], sizes: list[int], *, job: dict[str, Any], scratch: Path) -> dict[str, int]:
    """The fastest batch size of each arm that has one, tried in both directions."""
    best = {}
    for arm in dict.fromkeys(SCANNED_AS.get(arm, arm) for arm in arms if arm != "one-by-one"):
        found = report.alternate(
            [str(size) for size in sizes],
            2,
            lambda size, arm=arm: measure(arm, job=job, batches={arm: int(size)}, scratch=scratch),
        )
        rates = {int(size): report.median(results, "images_per_s") for size, results in found.items()}
        best[arm] = max(rates, key=lambda size: rates[size])
        print(f"{arm}: batch {best[arm]} of {rates}", file=sys.stderr, flush=True)
    return best


def distances_agree(found: dict[str, list[dict[str, Any]]]) -> float:
    """The largest gap between two arms' mean distances, in standard errors; SystemExit above 5."""
    firsts = [results[0] for results in found.values()]
    gaps = [
        abs(first["mean_squared_distance"] - second["mean_squared_distance"])
        / math.hypot(first["standard_error"], second["standard_error"])
        for first in firsts
        for second in firsts
    ]
    if max(gaps) > 5:
        raise SystemExit(f"the arms' outputs lie at different distances from their sources: {firsts}")
    return round(max(gaps), 2)


def summarize(name: str, found: dict[str, list[dict[str, Any]]]) -> list[list[object]]:
    """A table's rows: each arm's rate and how many times faster its counterpart of the tool is."""
    rows = []
    for arm, results in found.items():
        mine = found["tool-ray" if arm.startswith("ray-data") and "tool-ray" in found else "tool"]
        ratio = report.median(results, "seconds") / report.median(mine, "seconds")
        low, high = report.spread(results, "images_per_s")
        target = TARGETS.get((name, arm))
        rows.append(
            [
                arm,
                results[0]["batch"],
                f"{report.median(results, 'images_per_s'):.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{ratio:.2f}",
                f"{target:.1f}, {'reached' if ratio >= target else 'missed'}" if target else "",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", nargs="+", choices=sorted(JOBS), default=sorted(JOBS))
    parser.add_argument("--arms", nargs="+", help="only these, and the tool")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="one size: no scan")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args()

    facts = {"question": __doc__.splitlines()[0], "machine": report.machine(args.threads)}
    facts["float_difference_given_the_same_noise"] = peer_jobs.same_mathematics(args.threads)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        scratch = Path(folder)
        for name in args.jobs:
            arms = tuple(arm for arm in JOBS[name] if not args.arms or arm == "tool" or arm in args.arms)
            job = peer_jobs.write_job(scratch / name, name, images=args.images, threads=args.threads)
            tenth = max(2 * max(args.batches), args.images // 10)
            small = peer_jobs.write_job(scratch / f"{name}, less", name, images=tenth, threads=args.threads)
            sizes = args.batches
            batches = dict.fromkeys((SCANNED_AS.get(arm, arm) for arm in arms), sizes[0])
            if len(sizes) > 1:
                batches = scan(arms, sizes, job=small, scratch=scratch)
            found = report.alternate(
                arms, args.repeats, functools.partial(measure, job=job, batches=batches, scratch=scratch)
            )
            publish(name, found, job=job, facts=facts, folder=args.results)


def publish(
    name: str,
    found: dict[str, list[dict[str, Any]]],
    *,
    job: dict[str, Any],
    facts: dict[str, Any],
    folder: Path,
) -> None:
    """Write one job's results."""
    counts = {"images": job["images"], "evaluations": job["evaluations"]}
    gap = distances_agree(found)
    record = facts | {"job": name, **counts, "largest_gap_of_distances_in_standard_errors": gap, "arms": found}
    header = ["arm", "batch", "images/s, median", "range", "tool is faster by", "target"]
    text = [
        f"# Beside what users would otherwise write: {name}",
        "",
        f"{counts['images']} images, {counts['evaluations']} evaluations.",
        "",
        report.table(header, summarize(name, found)),
        "",
        "Ray Data is compared with the tool in a local Ray too, the others with the tool inline.",
    ]
    threads = facts["machine"]["threads"]
    file = f"peers_{name.replace(' ', '_')}_{threads}_{'thread' if threads == 1 else 'threads'}"
    report.publish(file, record, "\n".join(text), folder=folder)


if __name__ == "__main__":
    main()
