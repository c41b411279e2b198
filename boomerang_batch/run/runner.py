"""One task, start to end, without Ray: read a shard, draw its twin, commit it.

The model is loaded once per runner and serves all its tasks. Several threads may run a task each: while one
reads or encodes, the others' draws keep the device busy. A stop is honoured between samples.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from boomerang_batch import storage
from boomerang_batch.config.mixing import MIXING
from boomerang_batch.data.provenance import BAD, SCHEMA, WITH_TRIALS, Marker, write_rows
from boomerang_batch.data.shards import write_shard
from boomerang_batch.diffusion.threads import use_threads
from boomerang_batch.errors import ShardError, StoppedError, StorageError, VerificationError
from boomerang_batch.run import journal, lease, log_lines
from boomerang_batch.run.chained import Drawer
from boomerang_batch.run.coding import Decoding, Encoding, check_target
from boomerang_batch.run.commit import MARKER_SUFFIX, commit, digest_file, read_marker
from boomerang_batch.run.decoder import load_decoder
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.drawing import Drawing
from boomerang_batch.run.kept_codes import FOLDER, Codes, codes_home
from boomerang_batch.run.ledger import Ledger
from boomerang_batch.run.links import write_links
from boomerang_batch.run.loading import flags_of, load, stack_of, warnings
from boomerang_batch.run.mixing import (
    Interpolating,
    Inverting,
    Latents,
    inverting,
    latents_before,
    rows_of_codes,
)
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.private import load_secret
from boomerang_batch.run.scratch import scratch_folder, sweep_scratch
from boomerang_batch.run.shard_drawing import ShardDrawing
from boomerang_batch.run.tasks import RunSpec, ShardReport, Task, WorkerFacts
from boomerang_batch.run.transform import Transform
from boomerang_batch.run.unseen import Fitting, Generating
from boomerang_batch.storage.retries import retry_count

_log = logging.getLogger(__name__)


class Runner:
    """A loaded model and everything a run does with it. Raises ModelError and its kin when made."""

    def __init__(self, spec: RunSpec) -> None:
        sweep_scratch()
        storage.count_on(spec.reached)
        recipe = spec.recipe
        self._spec = spec
        self._private_dir = spec.private_dir if recipe.purpose == "anonymize" else None
        self._journals = journal.home(recipe.purpose, spec.out, spec.private_dir)
        secret = load_secret(spec.private_dir) if recipe.purpose == "anonymize" else None
        naming = Naming(recipe, secret)
        engine, walks = load(recipe, device=spec.device, threads=spec.threads, batch_size=spec.batch_size)
        model = engine.denoiser.spec
        stack = stack_of(engine, recipe, threads=spec.threads)
        self._drawing = self._decoding = Drawing(engine, dtype=recipe.model.dtype)
        self._codes_home = None
        if recipe.method != "boomerang":
            decoding, decoder = load_decoder(recipe, engine, device=spec.device, threads=spec.threads)
            check_target(recipe, decoder.model)
            model = dataclasses.replace(model, digest=decoder.digest(model))
            if decoding is not engine:
                self._decoding = Drawing(decoding, dtype=decoder.asked.dtype)
            self._decoder = decoder
            self._codes_home = codes_home(recipe, spec.out, spec.private_dir)
            storage.make_folder(self._codes_home)
            storage.sweep(self._codes_home)
        self._fitting = None
        if recipe.method == "unseen" and self._codes_home is not None:
            self._fitting = Fitting(self._codes_home, recipe, naming, self._holding)
        self._made_with = (recipe, model, walks, naming, stack)
        self._flags = flags_of(engine, recipe)
        names = ("outputs_total", "output_bytes_total", "shards_done_total", "shards_failed_total", "tasks")
        self._totals = dict.fromkeys(names, 0.0)
        self._counting = threading.Lock()
        self.facts = WorkerFacts(model_digest=model.digest, stack=stack, warnings=warnings(recipe, model))

    def run(
        self,
        task: Task,
        *,
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
        coded: Callable[[int], None] = lambda count: None,
    ) -> ShardReport:
        """Do one task, unless its marker says that it is done.

        `progress` is called with the number of outputs finished so far, `coded` with that of codes. Of a shard
        that can't be read, or of a stop, the report tells; nothing is committed then. Raises StorageError when
        OUT or the scratch disk fails, and what the engine raises.
        """
        started = time.monotonic()
        there = read_marker(self._spec.out, task.name) if task.phase == "outputs" else None
        if there is not None:
            return ShardReport(name=task.name, status="there", counts=there.counts)
        use_threads(1)  # lest this thread contend with the engine's
        self._count("tasks")
        try:
            with log_lines.about(**self._about(task)), scratch_folder() as scratch:
                if task.phase != "outputs":
                    self._prepare(task, scratch, stopped, coded)
                    return ShardReport(name=task.name, status="done")
                marker = self._run(task, scratch, stopped, progress, coded)
        except StoppedError as error:
            return ShardReport(name=task.name, status="stopped", reason=str(error))
        except ShardError as error:
            self._count("shards_failed_total")
            if self._about(task):
                _log.info("%s", error, extra=self._about(task))
            # Only the private dir gets this under anonymize, and there the pseudonym alone says nothing.
            plain = self._about(task) or task.phase == "fit"
            which = "" if plain else f"shard {task.name} is {storage.without_secrets(task.url)}: "
            return ShardReport(name=task.name, status="quarantined", reason=f"{which}{error}")
        except OSError as error:
            # Neither the shard (a ShardError) nor OUT (a StorageError): what is left is the scratch disk.
            raise StorageError(
                f"can't build shard {task.name} in {tempfile.gettempdir()}: {error.strerror or error}; "
                "set TMPDIR to a folder with room for it"
            ) from error
        finally:
            self._count("tasks", -1)
        return ShardReport(
            name=task.name,
            status="done",
            counts=marker.counts,
            marker_bytes=len(marker.to_bytes()),
            seconds=round(time.monotonic() - started, 3),
        )

    @property
    def stalled_s(self) -> float:
        """How long the device has been at the step it is at; 0 between steps."""
        return max(self._drawing.stalled_s, self._decoding.stalled_s)

    @property
    def totals(self) -> dict[str, float]:
        """What it has done since it was made, by the names in `metrics`."""
        drawn = self._drawing.totals
        if self._decoding is not self._drawing:
            more = self._decoding.totals
            drawn = {name: value + more[name] for name, value in drawn.items()}
        return {**self._totals, **drawn, "storage_retries_total": retry_count()}

    def close(self) -> None:
        """Let the device go."""
        self._drawing.close()
        self._decoding.close()

    def _run(
        self,
        task: Task,
        scratch: Path,
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
        coded: Callable[[int], None],
    ) -> Marker:
        """Make the outputs and commit them; first the shard's codes, where the method goes by codes."""
        every = self._spec.recipe.run.journal_every * self._spec.recipe.outputs
        transform = self._transform(task, scratch, stopped, coded)
        with (
            self._ledger(task, scratch) as ledger,
            journal.opened(self._journals, task.name, scratch=scratch, every=every) as kept,
        ):
            self._draw(task, ledger, transform, kept=kept, stopped=stopped, progress=progress)
            if self._private_dir is not None:
                write_links(self._private_dir, task, ledger.rows())
            marker = self._commit(ledger, task, scratch, out=self._spec.out)
            journal.remove(self._journals, task.name)
            self._count("shards_done_total")
            self._count("output_bytes_total", marker.tar_bytes + marker.parquet_bytes)
            self._count("outputs_total", sum(marker.counts.values()))
            if BAD & marker.counts.keys():
                _log_failures(task, ledger)
            return marker

    def _prepare(
        self, task: Task, scratch: Path, stopped: Callable[[], bool], coded: Callable[[int], None]
    ) -> None:
        """Do a task of a phase that comes before outputs."""
        if self._fitting is None or self._codes_home is None:
            raise RuntimeError(f"method {self._spec.recipe.method} has no phase {task.phase}")
        if task.phase == "fit":
            self._fitting.reduce(task.of, scratch)
        else:
            self._fitting.add(task.name, self._latents(self._codes_home, task, scratch, stopped, coded))

    def _transform(
        self, task: Task, scratch: Path, stopped: Callable[[], bool], coded: Callable[[int], None]
    ) -> Transform:
        """What makes a task's outputs, by the recipe's method."""
        home, made_with = self._codes_home, self._made_with
        if home is None:
            return Transform(*made_with, flags=self._flags)
        if self._spec.recipe.method in MIXING:
            latents = self._latents(home, task, scratch, stopped, coded)
            if self._fitting is None:
                return Interpolating(*made_with, flags=self._flags, latents=latents)
            return Generating(*made_with, flags=self._flags, latents=latents, fit=self._fitting.read())
        codes = self._codes(home, task, scratch, stopped, coded, drawn_by=Encoding)
        return Decoding(*made_with, flags=self._flags, decoder=self._decoder, codes=codes, wants=task.wants)

    def _latents(
        self,
        home: str,
        task: Task,
        scratch: Path,
        stopped: Callable[[], bool],
        coded: Callable[[int], None],
    ) -> Latents:
        """The latents of a task's shard, which are other samples' partners too; and its own, of an appendix."""
        tasks = [*latents_before(home, task), inverting(task)]
        codes = [self._codes(home, one, scratch, stopped, coded, drawn_by=Inverting) for one in tasks]
        rows = [row for one in tasks for row in rows_of_codes(home, one.name)]
        return Latents(self._spec.recipe, codes, rows)

    def _codes(
        self,
        home: str,
        task: Task,
        scratch: Path,
        stopped: Callable[[], bool],
        coded: Callable[[int], None],
        *,
        drawn_by: type[Encoding],
    ) -> Codes:
        """The codes of a task, drawn and committed now unless they are there, whole."""
        marker, place = read_marker(home, task.name), scratch / f"{FOLDER}-{task.name}"
        if marker is not None:
            try:
                return Codes(home, marker, place)
            except VerificationError as error:
                if task.only is not None and not task.only:
                    raise  # of an earlier appendix, whose samples this task doesn't know
                # Outputs that are there already were made of what they should: only what follows needs codes.
                _log.warning("%s: its codes are drawn again", error, extra=PLAIN)
                shutil.rmtree(place)
                lease.require(self._spec.out, self._spec.epoch)
                storage.delete(storage.join(home, task.name + MARKER_SUFFIX))
        folder, name = scratch / "encoding", task.name + journal.OF_CODES
        folder.mkdir()
        every = self._spec.recipe.run.journal_every * self._spec.recipe.outputs
        with (
            self._ledger(task, folder) as ledger,
            journal.opened(self._journals, name, scratch=folder, every=every) as kept,
        ):
            transform = drawn_by(*self._made_with, decoder=self._decoder)
            self._draw(task, ledger, transform, kept=kept, stopped=stopped, progress=coded)
            marker = self._commit(ledger, task, folder, out=home)
        journal.remove(self._journals, name)
        shutil.rmtree(folder)
        return Codes(home, marker, place)

    def _ledger(self, task: Task, folder: Path) -> Ledger:
        by_pseudonym = self._spec.recipe.purpose == "anonymize"
        return Ledger(folder / "spool", by_pseudonym=by_pseudonym, wants=task.wants)

    def _draw(
        self,
        task: Task,
        ledger: Ledger,
        transform: Transform,
        *,
        kept: journal.Journal | None,
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
    ) -> None:
        """Draw everything into a ledger."""
        ShardDrawing(
            task,
            ledger,
            drawing=self._drawer(transform),
            transform=transform,
            journal=kept,
            keep_originals=self._spec.recipe.keep_originals and not isinstance(transform, Encoding),
            # The reader's messages reach logs, which others may read: under anonymize they name the output.
            shown=task.url if self._private_dir is None else task.name,
            about=self._about(task),
            stopped=stopped,
            progress=progress,
        ).run()

    def _drawer(self, transform: Transform) -> Drawer:
        """What draws for a transform: codes may take several trials, and outputs another model or refining."""
        if isinstance(transform, Encoding):
            return transform.drawer(self._drawing, self._decoding)
        return transform.drawer(self._decoding) if isinstance(transform, Decoding) else self._drawing

    def _commit(self, ledger: Ledger, task: Task, scratch: Path, *, out: str) -> Marker:
        """Publish what a ledger holds as a shard of `out`."""
        tar, provenance = scratch / "shard.tar", scratch / "provenance.parquet"
        write_shard(tar, ledger.samples())
        target = self._spec.recipe.target
        several = target is not None and target.trials > 1
        write_rows(provenance, (row for _, row in ledger.rows()), schema=WITH_TRIALS if several else SCHEMA)
        counts: dict[str, int] = dict(sorted(Counter(str(row.status) for _, row in ledger.rows()).items()))
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
        commit(out, marker, tar=tar, provenance=provenance, holding=self._holding)
        return marker

    def _holding(self) -> None:
        """Raise LeaseError when OUT is no longer this run's to write to."""
        lease.require(self._spec.out, self._spec.epoch)

    def _about(self, task: Task) -> dict[str, str]:
        """What every log line on a task carries.

        Its words may name the input, and under anonymize the output's name must not stand beside that.
        """
        return {} if self._private_dir is not None else {"shard": task.name}

    def _count(self, name: str, amount: float = 1) -> None:
        with self._counting:
            self._totals[name] += amount


def _log_failures(task: Task, ledger: Ledger) -> None:
    """A line for each output that failed, with what OUT tells of it.

    In OUT's order and when all is done, for the moment of a failure would tell its place in the input.
    """
    for _, row in ledger.rows():
        if row.status in BAD:
            facts = {"shard": task.name, "key": row.key, "variant": row.variant, "reason": row.reason}
            # Under anonymize a row has no detail.
            _log.info("%s: %s", row.status, row.detail or row.reason, extra={**facts, **PLAIN})
