"""What a run will take, told before it is spent: a few samples are run for good, and the rest is arithmetic.

The probe is the run itself, on samples from shards all over the manifest, into a folder that is thrown away; so
reading, the network, guards, encoding and publishing are all in the measured rate, and loading is not.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import Manifest, ShardEntry
from boomerang_batch.data.provenance import BAD, read_rows
from boomerang_batch.data.shards import write_shard
from boomerang_batch.data.spread import Unread, evenly, spread_samples
from boomerang_batch.errors import ConfigError, ManifestError
from boomerang_batch.run.commit import PROVENANCE_SUFFIX, TAR_SUFFIX
from boomerang_batch.run.private import prepare_private_dir
from boomerang_batch.run.tasks import DEPTH, RunReport, RunSpec, Task

FORMAT_VERSION = 1
_log = logging.getLogger(__name__)
_SHARDS_WEIGHED = 64
_LEAST_PROBE = 64


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a few samples took on one device."""

    samples: int
    outputs: int
    failed: int
    evaluations: int
    """Network calls that samples took part in."""
    load_s: float
    """To import what computes and to load the model."""
    seconds: float
    input_bytes: int
    output_bytes: int
    """Tar and provenance."""
    batch_size: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of a whole manifest is expected to take."""

    shards: int
    samples: int
    estimated: bool
    """Whether the number of samples is a guess by size, for the manifest does not tell it."""
    probe: Probe
    workers: int
    price_per_hour: float | None

    @property
    def images_per_s(self) -> float:
        """Outputs a second of one worker."""
        return self.probe.outputs / self.probe.seconds

    @property
    def outputs(self) -> int:
        """Outputs of all samples."""
        return round(self.samples * self.probe.outputs / self.probe.samples)

    @property
    def evaluations(self) -> int:
        """Network calls that samples take part in, all together."""
        return round(self.samples * self.probe.evaluations / self.probe.samples)

    @property
    def wall_s(self) -> float:
        """From start to end, the model's loading included. A shard is one worker's, so some do one more."""
        share = math.ceil(self.shards / self.workers) / self.shards
        return self.probe.load_s + share * self.outputs / self.images_per_s

    @property
    def worker_hours(self) -> float:
        """Hours of all workers together: GPU hours where a worker has a GPU."""
        return min(self.workers, self.shards) * self.wall_s / 3600

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.price_per_hour is None else self.worker_hours * self.price_per_hour

    @property
    def output_bytes(self) -> int:
        """Of all shards."""
        return round(self.samples * self.probe.output_bytes / self.probe.samples)

    @property
    def spool_bytes(self) -> int:
        """Room on each worker's scratch disk: two shards in work, each as spool, as tar, and as journal."""
        return 3 * DEPTH * math.ceil(self.output_bytes / self.shards)

    def compared_with(self, report: RunReport) -> str:
        """How the plan did, in a sentence, once the run it was for is over."""
        made, earlier = report.shards.get("done", 0), report.shards.get("there", 0)
        if earlier or made != self.shards:
            return f"plan: it was for all {self.shards} shards in one go; this run made {made}"
        rows = report.rows.get("ok", 0)
        return (
            f"plan: {self.wall_s:.0f} s and {self.outputs} outputs were planned; it took "
            f"{report.seconds:.0f} s ({report.seconds / self.wall_s - 1:+.0%}) and made {rows} "
            f"({rows / self.outputs - 1:+.0%})"
        )

    def facts(self) -> dict[str, object]:
        """Everything, as JSON has it."""
        names = ("images_per_s", "outputs", "evaluations", "wall_s", "worker_hours", "cost", "output_bytes")
        derived = {name: getattr(self, name) for name in (*names, "spool_bytes")}
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self), **derived}


def load_plan(url: str) -> Plan:
    """A plan that was saved as its facts. Raises ConfigError when there is none at `url`."""
    try:
        facts = json.loads(storage.read_bytes(url))
        if facts["format_version"] != FORMAT_VERSION:
            raise ConfigError(f"{url} has format_version {facts['format_version']}; make the plan anew")
        names = {field.name for field in dataclasses.fields(Plan)}
        values = {name: value for name, value in facts.items() if name in names}
        return Plan(**values | {"probe": Probe(**facts["probe"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{url} is not a plan, as `plan --save` writes it") from error


def make_plan(
    recipe: Recipe,
    manifest: Manifest,
    *,
    samples: int | None,
    workers: int,
    price_per_hour: float | None,
    device: str,
    threads: int,
) -> Plan:
    """Run some samples (`samples`, or as many as make two full batches) and tell what all would take.

    Raises BoomerangError where the recipe's model or the manifest's shards can't be read.
    """
    if recipe.method != "boomerang":
        raise ConfigError(f"method {recipe.method}: plan counts no codes yet, and knows boomerang alone")
    with tempfile.TemporaryDirectory(prefix="boomerang-") as folder:
        probe = _probe(recipe, manifest, Path(folder), samples=samples, device=device, threads=threads)
    count, estimated = _count_samples(manifest.shards, probe)
    return Plan(
        shards=len(manifest.shards),
        samples=count,
        estimated=estimated,
        probe=probe,
        workers=workers,
        price_per_hour=price_per_hour,
    )


def _probe(
    recipe: Recipe, manifest: Manifest, folder: Path, *, samples: int | None, device: str, threads: int
) -> Probe:
    out, private_dir, shard = folder / "out", folder / "private", folder / "probe.tar"
    out.mkdir()
    prepare_private_dir(str(private_dir), out=str(out))  # with a secret of its own, thrown away too
    spec = RunSpec(
        recipe=recipe, out=str(out), private_dir=str(private_dir), device=device, threads=threads, epoch=0
    )
    started = time.monotonic()
    # Here, so that it counts: a run imports what computes too, which takes seconds.
    from boomerang_batch.run.runner import Runner

    runner = Runner(spec)
    load_s = time.monotonic() - started
    try:
        batch_size = int(runner.facts.stack["batch_size"])
        wanted = samples or max(2 * batch_size, _LEAST_PROBE)
        # Whole batches, lest the last one's empty slots count as work that every sample makes.
        outputs = math.ceil(wanted * recipe.outputs / batch_size) * batch_size
        taken = _write_probe(
            shard, manifest, math.ceil(outputs / recipe.outputs), named=recipe.purpose != "anonymize"
        )
        started = time.monotonic()
        report = runner.run(
            Task(name="probe", url=str(shard), source_stem="probe"),
            stopped=lambda: False,
            progress=lambda finished: None,
        )
        seconds = time.monotonic() - started
    finally:
        runner.close()
    if report.status != "done":
        raise ManifestError(f"manifest {manifest.name}: the probe failed: {report.reason}")
    rows = read_rows(out / f"probe{PROVENANCE_SUFFIX}")
    done = sum(row.status == "ok" for row in rows)
    if not done:
        reasons = sorted({row.reason for row in rows if row.reason})
        raise ManifestError(f"manifest {manifest.name}: no sample of the probe worked: {', '.join(reasons)}")
    return Probe(
        samples=taken,
        outputs=done,
        failed=sum(row.status in BAD for row in rows),
        evaluations=sum(row.evaluations or 0 for row in rows),
        load_s=load_s,
        seconds=seconds,
        input_bytes=shard.stat().st_size,
        output_bytes=sum((out / f"probe{suffix}").stat().st_size for suffix in (TAR_SUFFIX, PROVENANCE_SUFFIX)),
        batch_size=batch_size,
        device=str(runner.facts.stack["device"]),
    )


def _write_probe(path: Path, manifest: Manifest, wanted: int, *, named: bool) -> int:
    """Write a shard of samples from all over the manifest; how many. `named`: whether shards may be."""
    taken, unread = 0, Unread()

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        nonlocal taken
        for _, sample in spread_samples(manifest.shards, wanted, unread):
            yield f"{taken:08d}", sample.fields
            taken += 1

    write_shard(path, samples())
    damaged = unread.told(manifest, named=named)
    if not taken:
        why = f": {damaged}" if damaged else ""
        raise ManifestError(f"manifest {manifest.name}: its shards hold no sample that can be read{why}")
    if damaged:
        _log.warning("the probe leaves out what can't be read in %s", damaged)
    return taken


def _count_samples(shards: Sequence[ShardEntry], probe: Probe) -> tuple[int, bool]:
    """How many samples there are, and whether that had to be guessed by size."""
    told = sum(entry.samples or 0 for entry in shards)
    silent = [entry for entry in shards if entry.samples is None]
    if not silent:
        return told, False
    weighed = evenly(silent, _SHARDS_WEIGHED)
    sizes = [storage.size(one.url) if one.size_bytes is None else one.size_bytes for one in weighed]
    per_shard = sum(sizes) / len(sizes) / (probe.input_bytes / probe.samples)
    return told + round(per_shard * len(silent)), True
