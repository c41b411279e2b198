"""How soon does a run of many shards go on? From the command's manifest to the first shard handed out.

    python benchmarks/resume.py --shards 1000 10000 100000 --store file s3

OUT holds tar, provenance and marker of all shards but the last, a few bytes each; no network is loaded. Timed
are a run whose index of markers was lost, so that it must read every one (up to `--read-up-to` shards, for it
takes long), a run that finds it, and what any run needs at least: the manifest read and OUT listed once.
`--store s3` does it on a SeaweedFS of its own (the lanes' extra), on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import figures
import report
from driver_scaling import RECIPE

STORES = {"file": "local disk", "s3": "SeaweedFS"}
ARMS = ("without the index", "with the index", "listing alone")


@contextlib.contextmanager
def place(store: str, recipe: Any, names: list[str]) -> Iterator[str]:
    """An OUT with what a run would have left of these shards."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        fill(out, recipe, names)
        if store == "file":
            yield str(out)
            return
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from tests.lanes.seaweedfs import SeaweedFS

        with SeaweedFS(Path(folder) / "weed") as server:
            os.environ.update(server.environment)
            bucket = server.make_bucket("resume")
            server.put_folder("resume", out)
            yield f"{bucket}/out"


def fill(out: Path, recipe: Any, names: list[str]) -> None:
    """Markers and their index as they are; of the other files their names are what matters."""
    from boomerang_batch.data.provenance import Marker
    from boomerang_batch.run.markers import Markers, Told

    index = Markers(str(out))
    for name in names:
        marker = Marker(
            stem=name, counts={"ok": 990, "failed": 10}, tar_sha256="0" * 64, tar_bytes=1,
            parquet_sha256="0" * 64, parquet_bytes=1, recipe_digest=recipe.digest,
        )  # fmt: skip
        for suffix, data in ((".tar", b"t"), (".parquet", b"p"), ("_stats.json", marker.to_bytes())):
            (out / f"{name}{suffix}").write_bytes(data)
        index.remember(name, Told(recipe.digest, marker.counts, len(marker.to_bytes())))
    index.save()


class HandedOut(Exception):  # noqa: N818 (no error)
    """The first shard was handed out."""


class Pool:
    """No workers; what it is given to do is the end of the measurement."""

    def start(self, *, stop: threading.Event) -> Any:
        """As if a worker had loaded."""
        from boomerang_batch.run.tasks import WorkerFacts

        return WorkerFacts(model_digest="none", stack={})

    def run(self, tasks: Any, **options: Any) -> Any:
        """The moment that counts."""
        if len(tasks) != 1:
            sys.exit(f"{len(tasks)} shards were left, not one")
        raise HandedOut

    def close(self) -> None:
        """Nothing to close."""


def resumed_s(manifest: Path, recipe: Any, out: str) -> float:
    """Seconds until a run hands out its first shard."""
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run import driver
    from boomerang_batch.run.request import RunRequest

    driver._pool = lambda spec, request: Pool()
    began = time.monotonic()
    request = RunRequest(
        recipe=recipe, manifest=load_manifest(str(manifest)), out=out, device="cpu", quiet=True
    )
    try:
        driver.execute(request, stop=threading.Event())
    except HandedOut:
        return time.monotonic() - began
    sys.exit("the run handed nothing out")


def measure(shards: int, store: str, repeats: int, *, read_up_to: int) -> dict[str, Any]:
    """All arms on one OUT; the first on one of up to `read_up_to` shards."""
    from boomerang_batch import storage
    from boomerang_batch.config.pipeline import parse_recipe
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.markers import INDEX_NAME

    recipe = parse_recipe(RECIPE, source="benchmark", overrides=())
    names = [f"s-{number:07d}" for number in range(shards - 1)]
    began = time.monotonic()
    with place(store, recipe, names) as out, tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.yaml"
        manifest.write_text(f"format_version: 1\nname: n\nshards: ['s-{{0000000..{shards - 1:07d}}}.tar']\n")
        print(
            f"{shards} shards on {store}: filled in {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(repeats):
            if shards <= read_up_to:
                storage.delete(storage.join(out, "logs", INDEX_NAME))
                seconds[ARMS[0]].append(resumed_s(manifest, recipe, out))
            seconds[ARMS[1]].append(resumed_s(manifest, recipe, out))
            began = time.monotonic()
            load_manifest(str(manifest))
            storage.list_names(out)
            seconds[ARMS[2]].append(time.monotonic() - began)
            print(
                json.dumps({arm: round(took[-1], 2) for arm, took in seconds.items() if took}),
                file=sys.stderr,
                flush=True,
            )
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"shards": shards, "store": store, "seconds": seconds, "peak_mb": round(peak_mb)}


def panels(record: dict[str, Any]) -> list[figures.Panel]:
    """Medians over the number of shards, with the least and the greatest."""

    def line(store: str, arm: str) -> figures.Line:
        runs = [one for one in record["runs"] if one["store"] == store and one["seconds"][arm]]
        return figures.Line(
            points=[(one["shards"], median(one["seconds"][arm])) for one in runs],
            around=[(min(one["seconds"][arm]), max(one["seconds"][arm])) for one in runs],
        )

    lines = {f"{name}, {arm}": line(store, arm) for store, name in STORES.items() for arm in ARMS}
    return [
        figures.Panel(
            title="Until the first shard is handed out",
            x="shards",
            y="seconds",
            lines=lines,
            band="least to greatest of all runs",
            log="xy",
        )
    ]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--store", choices=tuple(STORES), nargs="+", default=["file"])
    parser.add_argument("--read-up-to", type=int, default=10_000, metavar="SHARDS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        [shards] = options.shards
        found = measure(shards, options.arm, options.repeats, read_up_to=options.read_up_to)
        print(json.dumps(found))
        return 0

    found = [
        report.run_json(
            [
                sys.executable,
                __file__,
                "--arm",
                store,
                "--shards",
                str(shards),
                "--repeats",
                str(options.repeats),
                "--read-up-to",
                str(options.read_up_to),
            ]
        )
        for store in options.store
        for shards in options.shards
    ]
    rows = [
        [
            STORES[one["store"]],
            f"{one['shards']:,}",
            *(f"{median(one['seconds'][arm]):.2f}" if one["seconds"][arm] else "" for arm in ARMS),
            one["peak_mb"],
        ]
        for one in found
    ]
    header = ["OUT on", "shards", *(f"{arm}, s" for arm in ARMS), "peak, MB"]
    markdown = (
        "# From the command to the first shard handed out, all but one shard done\n\n"
        f"{report.table(header, rows)}\n\nMedians of {options.repeats}."
    )
    record = {"machine": report.machine(2), "runs": found}
    report.publish("resume", record, markdown, folder=options.results)
    figures.draw(panels(record), options.results / "resume.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
