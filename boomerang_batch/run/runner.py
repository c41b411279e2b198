"""One task, start to end, without Ray: read a shard, draw its twin, commit it.

The model is loaded once per runner and serves all its tasks. Two threads may run two tasks at the same time:
one reads or encodes while the other's batch is on the device. A stop is honoured between batches.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from boomerang_batch import storage
from boomerang_batch.data.provenance import Marker, write_rows
from boomerang_batch.data.shards import Sample, Unreadable, read_samples, write_shard
from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.errors import SampleError, ShardError, StoppedError, StorageError
from boomerang_batch.run.commit import commit, digest_file, read_marker
from boomerang_batch.run.ledger import Ledger
from boomerang_batch.run.links import write_links
from boomerang_batch.run.loading import load_engine
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.private import load_secret
from boomerang_batch.run.stack import fingerprint, short_versions
from boomerang_batch.run.tasks import RunSpec, ShardReport, Task, WorkerFacts
from boomerang_batch.run.transform import Transform

_log = logging.getLogger(__name__)


class Runner:
    """A loaded model and everything a run does with it. Raises ModelError and its kin when made."""

    def __init__(self, spec: RunSpec) -> None:
        recipe = spec.recipe
        self._spec = spec
        self._private_dir = spec.private_dir if recipe.purpose == "anonymize" else None
        secret = load_secret(spec.private_dir) if recipe.purpose == "anonymize" else None
        naming = Naming(recipe, secret)
        self._engine = load_engine(recipe, device=spec.device, threads=spec.threads)
        model = self._engine.denoiser.spec
        stack = fingerprint(
            device=self._engine.device,
            dtype=recipe.model.dtype,
            batch_size=recipe.batch_size,
            threads=spec.threads,
        )
        self._transform = Transform(recipe, model, self._engine.schedule, naming, short_versions(stack))
        self.facts = WorkerFacts(model_digest=model.digest, stack=stack)

    def run(self, task: Task, *, stop: threading.Event, progress: Callable[[int], None]) -> ShardReport:
        """Do one task, unless its marker says that it is done.

        `progress` is called with the number of variants finished so far. Raises StoppedError when `stop` was
        set, ShardError or StorageError when the shard can't be read or written; nothing is committed then.
        """
        started = time.monotonic()
        there = read_marker(self._spec.out, task.name)
        if there is not None:
            return ShardReport(name=task.name, status="there", counts=there.counts)
        # OpenMP keeps the thread count per calling thread, and Ray starts actors with one.
        torch.set_num_threads(self._spec.threads)
        try:
            with tempfile.TemporaryDirectory(prefix="boomerang-") as folder:
                counts = self._run(task, Path(folder), stop, progress)
        except OSError as error:
            # Neither the shard (a ShardError) nor OUT (a StorageError): what is left is the scratch disk.
            raise StorageError(
                f"can't build shard {task.name} in {tempfile.gettempdir()}: {error.strerror or error}; "
                "set TMPDIR to a folder with room for it"
            ) from error
        return ShardReport(
            name=task.name, status="done", counts=counts, seconds=round(time.monotonic() - started, 3)
        )

    def _run(
        self, task: Task, scratch: Path, stop: threading.Event, progress: Callable[[int], None]
    ) -> dict[str, int]:
        """Draw everything into a ledger, then commit it."""
        by_pseudonym = self._spec.recipe.purpose == "anonymize"
        finished = 0
        with Ledger(scratch / "spool", by_pseudonym=by_pseudonym) as ledger:
            for draw, x_0 in self._engine.run(self._draws(ledger, task, stop)):
                prepared, variant = draw.tag
                try:
                    with _sample_boundary():
                        output = self._transform.finish(prepared, variant, x_0)
                except SampleError as error:
                    ledger.refuse(*self._transform.failed_variant(prepared, variant, error))
                else:
                    ledger.add(prepared.source, output.row, output.member_key, output.fields)
                finished += 1
                progress(finished)
            return self._commit(ledger, task, scratch)

    def _draws(self, ledger: Ledger, task: Task, stop: threading.Event) -> Iterator[Draw]:
        """Read and prepare samples as the engine asks for them; what can't be prepared goes to the ledger."""
        shard = task.source_stem
        # The reader's messages reach logs, which others may read: under anonymize they name the output.
        for item in _read(task.url, name=task.url if self._private_dir is None else task.name):
            if stop.is_set():
                raise StoppedError(f"stopped within shard {task.name}; run the same command to resume")
            if isinstance(item, Unreadable):
                ledger.withdraw(*self._transform.unreadable(item, shard=shard))
                continue
            try:
                with _sample_boundary():
                    prepared = self._transform.prepare(item, shard=shard)
                    original = self._transform.original(prepared) if self._spec.recipe.keep_originals else None
            except SampleError as error:
                for source, row in self._transform.failed(item, error, shard=shard):
                    ledger.refuse(source, row)
                continue
            if original is not None:
                ledger.add(prepared.source, original.row, original.member_key, original.fields)
            for draw in self._transform.draws(prepared):
                if stop.is_set():  # variants of one sample may fill many batches
                    raise StoppedError(f"stopped within shard {task.name}; run the same command to resume")
                yield draw

    def _commit(self, ledger: Ledger, task: Task, scratch: Path) -> dict[str, int]:
        rows = ledger.rows()
        tar, provenance = scratch / "shard.tar", scratch / "provenance.parquet"
        write_shard(tar, ledger.samples())
        write_rows(provenance, [row for _, row in rows])
        if self._private_dir is not None:
            write_links(self._private_dir, task, rows)
        counts: dict[str, int] = dict(sorted(Counter(str(row.status) for _, row in rows).items()))
        tar_digest, provenance_digest = digest_file(tar), digest_file(provenance)
        marker = Marker(
            stem=task.name,
            counts=counts,
            tar_sha256=tar_digest.sha256,
            tar_bytes=tar_digest.size_bytes,
            parquet_sha256=provenance_digest.sha256,
            parquet_bytes=provenance_digest.size_bytes,
            recipe_digest=self._spec.recipe.digest,
        )
        commit(self._spec.out, marker, tar=tar, provenance=provenance)
        return counts


def _read(url: str, *, name: str) -> Iterator[Sample | Unreadable]:
    """A shard's samples. Whatever goes wrong with reading is this shard's misfortune, not the run's."""
    try:
        with storage.open_read(url) as stream:
            yield from read_samples(stream, shard=name)
    except StorageError as error:
        raise ShardError(str(error)) from error
    except OSError as error:
        raise ShardError(f"{url}: reading broke off: {error.strerror or error}") from error


@contextlib.contextmanager
def _sample_boundary() -> Iterator[None]:
    """Nothing that happens inside can cost more than one sample: an unforeseen error becomes a row too."""
    try:
        yield
    except (SampleError, MemoryError):
        raise
    except Exception as error:
        _log.exception("unforeseen error in one sample; please report it")
        raise SampleError("internal-error", f"{type(error).__name__}: {error}") from error
