"""Is anything lost, doubled or changed when machines, workers, drivers and the store keep dying?

    python benchmarks/soak.py --minutes 30 --seed 7

A head and three nodes with a fake GPU each, all of them network namespaces, run jobs from a SeaweedFS server to
the same server. A seeded dice kills, freezes, cuts off and drains; what is gone is replaced some seconds later,
and a driver that died is asked for again by the same `submit`. When a run is done its tree in the store is
compared, byte by byte, with that of an undisturbed run on local disk. If that was before the time is over, a
smaller run follows, with another secret. Each network call is made to take long, and is counted; so what was
computed in vain is known exactly. Needs root, iproute2, and what `make test-s3` installs.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report

from tests import worlds
from tests.lanes import counted_model
from tests.lanes.chronicle import Chronicle
from tests.lanes.cluster import NodesOfRay
from tests.lanes.commands import Place, ended, without_logs
from tests.lanes.disasters import Disasters
from tests.lanes.seaweedfs import SeaweedFS

NODES = 3
SAMPLES, STEPS = 4, 20
SHARDS_OF_A_LATER_RUN = 60
GIVE_UP_AFTER = 3
"""Times the minutes asked for, and half an hour: no run takes that long which comes to its end at all."""
OUTCOMES = {0: "finished", 1: "failed", 2: "refused", 3: "finished with failures", 75: "stopped"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One OUT, and the undisturbed run that it is compared with."""

    bucket: str
    submit: tuple[str, ...]
    shards: int
    calm: subprocess.Popen[str]
    calm_out: Path


def begin(
    number: int, args: argparse.Namespace, folder: Path, cluster: NodesOfRay, store: SeaweedFS
) -> tuple[Run, Place]:
    """Put the next run's inputs into the store, and begin its undisturbed twin, with a secret of its own."""
    shards = args.shards if number == 1 else min(args.shards, SHARDS_OF_A_LATER_RUN)
    bucket, home, inputs = f"soak-{number}", folder / f"run-{number}", folder / "inputs"
    bucket_url = store.make_bucket(bucket)
    client = store.client()
    for path in inputs.iterdir():
        client.put_object(Bucket=bucket, Key=f"in/{path.name}", Body=path.read_bytes())
    secret = secrets.token_hex(32)
    calm = Place(work=home / "calm", environment=counted_model.environment(folder / "site", home / "counts"))
    place = Place(work=home / "wild", environment=store.environment)
    for each in (calm, place):
        each.environment.pop("BOOMERANG_SECRET", None)
        each.private.mkdir(mode=0o700)
        (each.private / "secret").write_text(secret)
        (each.private / "secret").chmod(0o600)
    options = ("--threads", "1", "--limit", str(shards), "--set", "run.journal_every=2")
    recipe, out = str(inputs / "recipe.yaml"), home / "calm-out"
    words = (
        "run",
        recipe,
        str(inputs / "manifest.yaml"),
        str(out),
        "--private-dir",
        str(calm.private),
        *options,
    )
    submit = (
        "submit", recipe, f"{bucket_url}/in/manifest.yaml", f"{bucket_url}/out", "--private-dir",
        str(place.private), *options, "--address", cluster.url, "--shared-files", "--wait",
    )  # fmt: skip
    run = Run(bucket=bucket, submit=submit, shards=shards, calm=calm.begin(*words), calm_out=out)
    return run, place


def to_the_end(
    run: Run,
    place: Place,
    disasters: Disasters,
    chronicle: Chronicle,
    dice: random.Random,
    args: argparse.Namespace,
) -> None:
    """Submit until the run is done, with disasters all the while."""
    chronicle.note("submitted", run.bucket)
    job, due = place.begin(*run.submit), chronicle.seconds + args.every
    while True:
        if job.poll() is not None:
            said = ended(job)
            last = (said.stderr.strip().splitlines() or [""])[-1]
            chronicle.note(f"job {OUTCOMES.get(said.code, said.code)}", last)
            if said.code == 0:
                return
            if said.code == 2 or chronicle.seconds > GIVE_UP_AFTER * 60 * args.minutes + 1800:
                raise SystemExit(f"the run does not come to its end:\n{said.stderr}")
            time.sleep(2)
            chronicle.note("submitted", run.bucket)
            job = place.begin(*run.submit)
        if chronicle.seconds >= due:
            disasters.strike()
            due = chronicle.seconds + dice.uniform(0.4, 1.6) * args.every
        time.sleep(0.2)


def compare(run: Run, place: Place, store: SeaweedFS) -> dict[str, Any]:
    """What is in the store against what should be."""
    ended(run.calm, timeout_s=3600).expect(0)
    right, found = worlds.tree(run.calm_out), without_logs(store.tree(run.bucket, "out"))
    markers = [name for name in found if name.endswith("_stats.json")]
    verified = place.call("verify", f"s3://{run.bucket}/out", "--deep", timeout_s=1800)
    return {
        "shards": run.shards,
        "done": len(markers),
        "lost": len(right.keys() - found.keys()),
        "too_many": len(found.keys() - right.keys()),
        "different": sum(found[name] != right[name] for name in found.keys() & right.keys()),
        "verified": verified.code == 0,
        "verify": verified.stdout.strip().splitlines()[-1:],
        "needed": sum(row.evaluations or 0 for row in worlds.rows(run.calm_out)),
    }


def soak(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs; what happened and what came of it."""
    counted_model.install(folder / "site")
    counted_model.save_shards(folder / "inputs", shards=args.shards, samples=SAMPLES)
    model = worlds.save_model(folder / "model")
    (folder / "inputs" / "recipe.yaml").write_text(counted_model.recipe_text(model, steps=STEPS))
    counts, dice, chronicle = folder / "counts", random.Random(args.seed), Chronicle(args.chronicle)
    print(f"seed {args.seed}; chronicle: {chronicle.path}", file=sys.stderr, flush=True)
    runs = []
    cluster = NodesOfRay(folder)
    store = SeaweedFS(folder / "store", host=cluster.gateway)
    model_here = counted_model.environment(folder / "site", counts, seconds_a_call=args.call)
    cluster.environment |= {**model_here, **store.environment, "TMPDIR": str(folder)}
    with cluster, store:
        for _ in range(NODES):
            cluster.add()
        disasters, began = Disasters(cluster, store, counts, chronicle, dice), chronicle.seconds
        while not runs or chronicle.seconds - began < args.minutes * 60:
            run, place = begin(len(runs) + 1, args, folder, cluster, store)
            try:
                to_the_end(run, place, disasters, chronicle, dice, args)
                runs.append(compare(run, place, store))
            finally:
                run.calm.kill()
            chronicle.note("compared", str(runs[-1]))
        disasters.over()
        seconds = round(chronicle.seconds - began)
        logs = "".join(
            path.read_text(errors="replace") for path in folder.glob("ray/session_latest/logs/job-driver-*.log")
        )
    lost = [int(number) for number in re.findall(r"a worker is lost with (\d+) task", logs)]
    evaluated, needed = counted_model.evaluations_of(counts), sum(run["needed"] for run in runs)
    return {
        "seed": args.seed,
        "seconds": seconds,
        "events": dict(sorted(chronicle.counts.items())),
        "runs": runs,
        "workers": len(evaluated),
        "losses_noticed": len(lost),
        "tasks_in_flight_at_losses": sum(lost),
        "evaluations": sum(evaluated.values()),
        "needed": needed,
        "wasted": sum(evaluated.values()) - needed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--shards", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--every", type=float, default=30, metavar="S", help="mean seconds between disasters")
    parser.add_argument("--call", type=float, default=0.8, metavar="S", help="what a network call takes longer")
    parser.add_argument(
        "--chronicle", type=Path, default=Path(tempfile.gettempdir(), f"soak-{os.getpid()}.txt")
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by SIGTERM"))  # and clear up
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))  # sockets lie in it: its name must be short
    try:
        found = soak(args, folder)
    except BaseException:
        print(f"logs and what the drivers said are in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    clean = all(
        run["verified"]
        and run["done"] == run["shards"]
        and not run["lost"] + run["too_many"] + run["different"]
        for run in found["runs"]
    )
    record = {"question": __doc__.splitlines()[0], "machine": report.machine(1), "clean": clean, **found}
    report.publish("soak", record, _text(found, args), folder=args.results)
    return 0 if clean else 1


def _text(found: Mapping[str, Any], args: argparse.Namespace) -> str:
    rows = [
        [number, run["shards"], run["done"], run["lost"], run["too_many"], run["different"], *run["verify"]]
        for number, run in enumerate(found["runs"], 1)
    ]
    share = found["wasted"] / found["needed"]
    return "\n".join(
        [
            "# Half an hour of disasters",
            "",
            f"{found['seconds'] / 60:.0f} minutes, seed {found['seed']}, {NODES} nodes, a disaster every "
            f"{args.every:g} s on average.",
            "",
            report.table(["what happened", "times"], list(found["events"].items())),
            "",
            "Each run's files in the store against those of an undisturbed run on local disk:",
            "",
            report.table(["run", "shards", "done", "lost", "too many", "different", "verify --deep"], rows),
            "",
            f"{found['workers']} workers began to work; drivers noticed the loss of {found['losses_noticed']}, "
            f"with {found['tasks_in_flight_at_losses']} shards in flight. {found['evaluations']} evaluations "
            f"where {found['needed']} are needed: {found['wasted']} in vain, **{share:.1%}**, the checks of "
            "workers that had loaded included.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
