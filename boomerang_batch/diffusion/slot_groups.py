"""The slots of every shape of image: whose turn it is, how many there are, and what to do when memory runs out.

The fullest go next, for a network call costs the same however many slots are busy; but none are passed over for
more than `_TURNS` turns. Under an elastic run slots are halved while no more than half are needed and no more
draws can come, and once when memory runs out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from boomerang_batch.diffusion.batch_size import is_out_of_memory, largest_that_fits
from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.diffusion.draws import Draw, Finished
from boomerang_batch.diffusion.slots import Slots
from boomerang_batch.errors import ModelError

_TURNS = 32
"""A shape of few draws then costs a 32nd of the time at most, and its draws come to an end all the same."""

_log = logging.getLogger(__name__)


class SlotGroups:
    """A group of slots for each shape. Not thread-safe: the engine's one thread owns it."""

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        batch_size: int,
        device: torch.device,
        order: int,
        encode_batch: int,
        elastic: bool,
    ) -> None:
        self.batch_size = batch_size
        self._denoiser = denoiser
        self._device = device
        self._order = order
        self._encode_batch = encode_batch
        self._micro_batch = encode_batch if denoiser.spec.latent else 1
        self._elastic = elastic
        self._may_halve = elastic
        self._groups: dict[tuple[int, ...], Slots] = {}
        self._passed_over: dict[Slots, int] = {}

    @property
    def draws(self) -> Iterator[Draw]:
        """The draws that are on their way."""
        for slots in self._groups.values():
            yield from slots.draws

    @property
    def busy(self) -> bool:
        """Whether any draw is on its way."""
        return any(slots.busy for slots in self._groups.values())

    def of(self, draw: Draw) -> Slots:
        """The slots of a draw's shape."""
        shape = tuple(draw.image.shape)
        if shape not in self._groups:
            self._groups[shape] = Slots(
                self._denoiser,
                batch_size=self.batch_size,
                device=self._device,
                order=self._order,
                encode_batch=self._encode_batch,
            )
        return self._groups[shape]

    def free(self, slots: Slots) -> int:
        """How many more draws there are slots for; less than 0 while some draws have none."""
        return self.batch_size - slots.busy

    def room(self, slots: Slots) -> int:
        """How many more draws to take: as many as fill the free slots, and their last micro-batch."""
        return self._in_micro_batches(max(self.free(slots), 0))

    @property
    def most_room(self) -> int:
        """How many draws idle slots would take."""
        return self._in_micro_batches(self.batch_size)

    def full(self, taken: Mapping[Slots, Sequence[Draw]]) -> bool:
        """Whether some slots are all busy, with the draws `taken` for them."""
        return any(self.free(slots) <= len(taken.get(slots, ())) for slots in self._groups.values())

    def admit(self, taken: Mapping[Slots, Sequence[Draw]], *, dry: bool) -> list[Finished]:
        """Put draws on their way; see `Slots.admit`. `dry`: no others can come."""
        finished = []
        for slots, draws in taken.items():
            self._fit(slots, slots.busy + len(draws), dry=dry)
            finished += slots.admit(draws)
        return finished

    def advance(self, *, dry: bool) -> list[Finished]:
        """The slots whose turn it is one node further; there must be some that are busy."""
        slots = self._next()
        self._fit(slots, slots.busy, dry=dry)
        while True:
            try:
                return slots.advance()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out of the except clause, whose traceback would keep the failed call's tensors alive.
            if not self._may_halve or slots.size == 1:
                break
            self._may_halve = False
            self.batch_size = slots.size // 2
            _log.warning("memory ran out; going on with batches of %d", self.batch_size)
            slots.resize(self.batch_size)
        fitting = largest_that_fits(slots.try_size, slots.size // 2)
        advice = f"batch_size: {fitting} fits" if fitting else "not even 1 fits: use a smaller size"
        raise ModelError(f"memory ran out with batch_size: {slots.size}; {advice}, on {self._device}")

    def drop(self, unwanted: Callable[[Draw], bool]) -> None:
        """Free the slots whose draw nobody waits for."""
        for slots in self._groups.values():
            slots.drop(unwanted)

    def _in_micro_batches(self, count: int) -> int:
        """`count` or more: a latent model's encoder costs the same for a whole micro-batch as for one image."""
        return -(-count // self._micro_batch) * self._micro_batch

    def _next(self) -> Slots:
        """Whose turn it is: the fullest, or one passed over too often."""
        ready = [slots for slots in self._groups.values() if slots.busy]
        passed = self._passed_over

        def claim(slots: Slots) -> tuple[bool, int, int]:
            turns = passed.get(slots, 0)
            return turns >= _TURNS, min(slots.busy, self.batch_size), turns

        chosen = max(ready, key=claim)
        self._passed_over = {slots: passed.get(slots, 0) + 1 for slots in ready if slots is not chosen}
        return chosen

    def _fit(self, slots: Slots, wanted: int, *, dry: bool) -> None:
        """Give `slots` the size for `wanted` draws: the full one, or halves of it at an elastic run's end."""
        size = self.batch_size
        while self._elastic and dry and size > 1 and wanted <= size // 2:
            size //= 2
        if size != slots.size:
            slots.resize(size)
