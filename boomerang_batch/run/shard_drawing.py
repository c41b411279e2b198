"""Everything that is drawn for one shard, on its way into the shard's ledger.

What half precision may be to blame for is refused at first. When all else is done, the shard is read again and
those outputs are drawn once more with the network in float32 and the same noise, whichever of them came first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, cast

from boomerang_batch import storage
from boomerang_batch.data.scan import Measured, contradictions
from boomerang_batch.data.shards import Sample, Unreadable, read_samples
from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.errors import ModelError, SampleError, ShardError, StoppedError, StorageError
from boomerang_batch.run import log_lines
from boomerang_batch.run.chained import Drawer
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.guards import RETRIED
from boomerang_batch.run.journal import Journal
from boomerang_batch.run.ledger import Ledger
from boomerang_batch.run.stages import Made, Output, Prepared
from boomerang_batch.run.tasks import Task
from boomerang_batch.run.transform import Transform

_log = logging.getLogger(__name__)


class ShardDrawing:
    """One task's samples, drawn by `drawing` and put into `ledger`. `shown` names the shard in messages.

    `about` is what log lines are to tell beside their message; empty where nothing may stand there.

    A stop is honoured between samples. `progress` is called with the number of outputs finished so far.
    """

    def __init__(
        self,
        task: Task,
        ledger: Ledger,
        *,
        drawing: Drawer,
        transform: Transform,
        journal: Journal | None,
        keep_originals: bool,
        shown: str,
        about: Mapping[str, str],
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
    ) -> None:
        self._task = task
        self._ledger = ledger
        self._drawing = drawing
        self._transform = transform
        self._journal = journal
        self._keep_originals = keep_originals
        self._shown = shown
        self._about = about
        self._stopped = stopped
        self._progress = progress
        self._seen = transform.nothing_seen()
        self._suspects: dict[tuple[int, int], bytes] = {}
        """Outputs by their sample's offset and their own number, with the sample's fingerprint."""
        self._finished = 0

    def run(self) -> None:
        """Draw it all.

        Raises ShardError where the shard can't be read, StoppedError, StorageError, and what the engine raises.
        """
        try:
            for made in self._drawing.run(self._draws(), stopped=self._stopped):
                self._finish(made)
                self._finished += 1
                self._progress(self._finished)
        except StoppedError:
            if self._journal is not None:
                self._journal.flush()
            raise
        if self._suspects and not self._drawing.exact:
            if self._journal is not None:
                self._journal.flush()
            self._look_again()

    def _draws(self) -> Iterator[Draw]:
        """Read and prepare samples as the engine asks for them; what can't be prepared goes to the ledger.

        A sample with nothing to draw, for its region is empty, is finished here.
        """
        shard, ledger, transform = self._task.source_stem, self._ledger, self._transform
        for item in self._read():
            if not self._task.wants(item.key):
                continue
            if isinstance(item, Unreadable):
                ledger.withdraw(*transform.unreadable(item, shard=shard))
                continue
            try:
                with self._sample_boundary(item.key):
                    prepared = self._prepare(item)
                    original = transform.original(prepared) if self._keep_originals else None
            except SampleError as error:
                for source, row in transform.failed(item, error, shard=shard):
                    ledger.refuse(source, row)
                continue
            if original is not None:
                ledger.add(prepared.source, original.row, original.member_key, original.fields)
            if self._restore(prepared):
                continue
            for untouched in transform.untouched(prepared):
                self._finish(untouched, kept=False)
            for draw in transform.draws(prepared):
                if any(self._task.wants(item.key, number) for number in transform.numbers(draw.tag.variant)):
                    self._mind_stop()  # variants of one sample may fill many batches
                    yield draw

    def _look_again(self) -> None:
        """Draw the suspects in float32. Where memory can't hold that they stay refused."""
        suspects, self._suspects = self._suspects, {}
        try:
            for made in self._drawing.run_in_float32(self._draws_of(suspects), stopped=self._stopped):
                if (made.prepared.source.offset, self._transform.number(made)) in suspects:
                    self._finish(made, kept=False, again=True)
                    self._progress(self._finished)
        except ModelError as error:
            said = "shard %s: %d outputs stay refused that float32 might have saved: %s"
            shard = self._task.name
            _log.warning(said, shard, len(suspects), error, extra={"shard": shard, **PLAIN})

    def _draws_of(self, suspects: Mapping[tuple[int, int], bytes]) -> Iterator[Draw]:
        """The draws behind some outputs. A cascade that is drawn again gives its other passes too.

        Raises ShardError where the shard is no longer what it was.
        """
        variants = {(offset, self._transform.variant(number)) for offset, number in suspects}
        missing = {offset: fingerprint for (offset, _), fingerprint in suspects.items()}
        for item in self._read():
            if item.offset not in missing:
                continue
            prepared = self._prepared_again(item)
            if prepared is None or prepared.fingerprint != missing[item.offset]:
                break
            del missing[item.offset]
            for draw in self._transform.draws(prepared):
                if (item.offset, draw.tag.variant) in variants:
                    self._mind_stop()
                    yield draw
        if missing:
            raise ShardError(f"{self._shown} changed while it was worked on; nothing of it was kept")

    def _prepared_again(self, item: Sample | Unreadable) -> Prepared | None:
        if isinstance(item, Unreadable):
            return None
        try:
            with self._sample_boundary(item.key):
                return self._prepare(item)
        except SampleError:
            return None

    def _restore(self, prepared: Prepared) -> bool:
        """Take a sample's outputs from the journal, if all of them are there."""
        if self._journal is None:
            return False
        found: dict[int, Output] = {}
        for number in self._transform.output_numbers:
            if not self._task.wants(prepared.source.key, number):
                continue
            output = self._journal.find(self._transform.proof(prepared, number))
            if output is None:
                return False
            found[number] = output
        if not found:
            return False
        for number, output in found.items():
            try:
                self._transform.check_repeated(prepared, number, output.digests, seen=self._seen)
            except SampleError as error:
                self._refuse(prepared, number, error)
            else:
                self._ledger.add(prepared.source, output.row, output.member_key, output.fields)
        self._finished += len(found)
        return True

    def _finish(self, made: Made, *, kept: bool = True, again: bool = False) -> None:
        """One output into the ledger, or the row that says why there is none; perhaps an earlier one's too.

        `kept`: in the journal too. Not what is saved when drawn `again`: whoever goes on must come to the same
        suspects.
        """
        prepared, number = made.prepared, self._transform.number(made)
        try:
            with self._sample_boundary(prepared.source.key):
                output = self._transform.finish(made, seen=self._seen)
        except SampleError as error:
            self._refuse(prepared, number, error)
        else:
            self._ledger.add(prepared.source, output.row, output.member_key, output.fields, again=again)
            if kept and self._journal is not None:
                self._journal.add(output, self._transform.proof(prepared, number))

    def _refuse(self, prepared: Prepared, number: int, error: SampleError) -> None:
        for refusal in self._transform.failed_output(prepared, number, error):
            self._ledger.refuse(refusal.source, refusal.row)
            if error.reason in RETRIED:
                self._suspects[refusal.source.offset, refusal.row.variant] = refusal.fingerprint

    def _prepare(self, sample: Sample) -> Prepared:
        return self._transform.prepare(sample, shard=self._task.source_stem)

    def _read(self) -> Iterator[Sample | Unreadable]:
        """The shard's samples. Whatever goes wrong with reading is this shard's misfortune, not the run's.

        Its bytes must be those that the manifest claims; they are known at the end, and so before anything of
        the shard is published.
        """
        task = self._task
        shown = storage.without_secrets(task.url)
        try:
            with log_lines.about(**self._about), storage.open_read(task.url) as stream:
                measured = Measured(stream)
                for item in read_samples(cast("BinaryIO", measured), shard=self._shown):
                    self._mind_stop()
                    yield item
                measured.finish()
        except StorageError as error:
            raise ShardError(str(error)) from error
        except OSError as error:
            raise ShardError(f"{shown}: reading broke off: {error.strerror or error}") from error
        wrong = contradictions(measured, size_bytes=task.size_bytes, digest=task.digest)
        if wrong:
            raise ShardError(f"{shown}: {'; '.join(wrong)}; restore the shard, or build the manifest anew")

    def _mind_stop(self) -> None:
        if self._stopped():
            raise StoppedError(f"stopped within shard {self._task.name}; run the same command to resume")

    @contextlib.contextmanager
    def _sample_boundary(self, key: str | None) -> Iterator[None]:
        """Nothing that happens inside can cost more than one sample: an unforeseen error becomes a row too."""
        with log_lines.about(**self._about, **({"key": key} if self._about and key is not None else {})):
            try:
                yield
            except (SampleError, MemoryError):
                raise
            except Exception as error:
                _log.exception("unforeseen error in one sample; please report it")
                raise SampleError("internal-error", f"{type(error).__name__}: {error}") from error
