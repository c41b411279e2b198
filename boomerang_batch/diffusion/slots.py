"""B slots of one shape: each holds one draw at its own place on its own walk, and all share each network call.

A slot's state is a row of a few tensors, its place a node of its draw's walk. `admit` fills free slots,
`advance` takes every slot one node further with one call of fixed shape, and what has arrived comes out.
The fixed shape is what makes a result independent of its neighbours, its slot and its time of arrival:
kernels choose their algorithm by shape, so the same sample in a smaller batch would differ in its last bits.
Empty slots are therefore computed too, and their results thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition, Denoiser
from boomerang_batch.diffusion.noise import Purpose, key_words, normal, normal_window
from boomerang_batch.diffusion.samplers import Column, Solver, jump, step
from boomerang_batch.diffusion.schedule import Schedule

_IDLE_KEY = bytes(16)
# An idle slot's step gives zeros whatever the network says.
_IDLE_ROW = [1.0 if column is Column.SIGMA else 0.0 for column in Column]


class Walk:
    """One t on one chain, resolved: the nodes to walk and the coefficients of every step."""

    def __init__(self, schedule: Schedule, solver: Solver) -> None:
        self.schedule = schedule
        self.solver = solver
        self.n = schedule.n
        # Plain lists: the loop picks a row for every slot in every iteration.
        self.rows: list[list[float]] = solver.table.tolist()
        self.tau: list[float] = schedule.tau.tolist()


@dataclass(frozen=True, kw_only=True)
class Region:
    """The part of a draw that may change."""

    mask: Tensor
    """(1, h, w) bool on the state's grid; True where it changes."""
    outside: Tensor
    """(C, H, W) float32, the image whose state stands outside the mask. A latent model's must not show the
    inside: an autoencoder mixes what is near."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a tile's noise lies in the one noise field of its image, on the state's grid."""

    corner: tuple[int, int]
    """(top, left)"""
    field: tuple[int, int]
    """(height, width)"""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One variant of one sample, or a tile of it. `tag` is the caller's and comes back untouched."""

    tag: Any
    image: Tensor
    """(C, H, W) float32 in the denoiser's value range."""
    noise_key: bytes
    walk: Walk
    condition: Condition = None
    passes: int = 1
    emit_all: bool = False
    """Whether every pass of a cascade comes out, or the last alone."""
    region: Region | None = None
    window: Window | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A draw, or one pass of it, at the end of its walk."""

    draw: Draw
    pass_number: int
    """1 for the first pass."""
    x_0: Tensor
    """The state, (c, h, w) float32 on the device."""
    batch_size: int
    """The smallest batch shape that any of its steps was computed in."""


@dataclass(kw_only=True)
class _Slot:
    draw: Draw
    words: Tensor
    node: int
    pass_index: int = 0
    batch_size: int = field(default=1 << 30)


class Slots:
    """The slots of one image shape on one device. Not thread-safe: the engine's one thread owns it."""

    def __init__(
        self, denoiser: Denoiser, *, batch_size: int, device: torch.device, order: int, encode_batch: int = 1
    ) -> None:
        self._denoiser = denoiser
        self._device = device
        self._order = order
        self._encode_batch = encode_batch
        self._slots: list[_Slot | None] = [None] * batch_size
        self._parked: list[tuple[_Slot, list[Tensor]]] = []
        self._x = torch.empty(0)
        self._before = torch.empty(0)
        self._known = torch.empty(0)
        self._mask = torch.empty(0)
        self._idle_words = key_words([_IDLE_KEY], device)[0]
        spec = denoiser.spec
        self._idle_tau = float(spec.levels.tau[0])
        self._idle_condition: Condition = 0 if spec.conditioning == "label" else None

    @property
    def size(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    @property
    def busy(self) -> int:
        """How many draws are on their way, waiting ones included."""
        return sum(slot is not None for slot in self._slots) + len(self._parked)

    def admit(self, draws: Sequence[Draw]) -> list[Finished]:
        """Put draws, no more than slots are free, on their way, a jump out each; t = 0 comes back at once."""
        if not draws:
            return []
        states = self._encode([draw.image for draw in draws])
        moving = [i for i, draw in enumerate(draws) if draw.walk.n > 0]
        still = [
            Finished(draw=draw, pass_number=number, x_0=states[i], batch_size=self._encode_batch)
            for i, draw in enumerate(draws)
            if draw.walk.n == 0
            for number in (range(1, draw.passes + 1) if draw.emit_all else [draw.passes])
        ]
        if moving:
            self._settle([draws[i] for i in moving], states[moving])
        return still

    def advance(self) -> list[Finished]:
        """Every busy slot one node further. Returns the draws, or passes of draws, that came to their end."""
        self._unpark()
        slots = self._slots
        rows, tau, conditions = self._gather()
        busy = [slot for slot in slots if slot is not None]
        noisy = any(slot.draw.walk.rows[slot.node][Column.NOISE] != 0 for slot in busy)
        output = self._denoiser.denoise(self._x, tau, conditions)
        nodes = [slot.node if slot else 0 for slot in slots]
        z = self._normals(slots, Purpose.REVERSE, nodes) if noisy else None
        known = (self._known, self._mask) if len(self._known) else None
        self._x, x0 = step(rows, self._x, output, z, self._before if self._order == 2 else None, known)
        if self._order == 2:
            self._before = x0

        for slot in busy:
            slot.node -= 1
            slot.batch_size = min(slot.batch_size, self.size)
        arrived = [(i, slot) for i, slot in enumerate(slots) if slot is not None and slot.node == 0]
        return self._arrive(arrived)

    def drop(self, unwanted: Any) -> None:
        """Free the slots whose draw `unwanted(draw)` says nobody waits for."""
        self._slots = [None if slot is None or unwanted(slot.draw) else slot for slot in self._slots]
        self._parked = [(slot, rows) for slot, rows in self._parked if not unwanted(slot.draw)]

    def resize(self, size: int) -> None:
        """Go on with `size` slots; busy ones beyond that wait until others are free.

        Results differ in their last bits from then on.
        """
        kept = [index for index, slot in enumerate(self._slots) if slot is not None]
        for index in kept[size:]:
            rows = [tensor[index] if len(tensor) else tensor for tensor in self._tensors()]
            self._parked.append((cast("_Slot", self._slots[index]), rows))
        kept = kept[:size]
        self._x, self._before, self._known, self._mask = (
            _refit(tensor, kept, size) for tensor in self._tensors()
        )
        self._slots = [*(self._slots[index] for index in kept), *[None] * (size - len(kept))]

    def try_size(self, size: int) -> None:
        """One network call on `size` idle rows, to see whether memory holds it."""
        states = torch.zeros((size, *self._x.shape[1:]), device=self._device)
        tau = torch.full((size,), self._idle_tau, dtype=torch.float64)
        self._denoiser.denoise(states, tau, [self._idle_condition] * size)

    def _unpark(self) -> None:
        """Let slots that had to wait go on, in free ones."""
        for index, slot in enumerate(self._slots):
            if slot is None and self._parked:
                self._slots[index], rows = self._parked.pop()
                for tensor, row in zip(self._tensors(), rows, strict=True):
                    if len(tensor):
                        # A mask made since then is for others: all of this draw changes.
                        tensor[index] = row if row.numel() else tensor is self._mask

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._x, self._before, self._known, self._mask

    def _encode(self, images: Sequence[Tensor]) -> Tensor:
        """States (k, c, h, w) on the device, in micro-batches of a fixed shape."""
        batch = to_device(torch.stack(list(images)), self._device)
        if not self._denoiser.spec.latent:
            return batch
        return in_fixed_batches(self._denoiser.encode, batch, self._encode_batch)

    def _settle(self, draws: list[Draw], x_0: Tensor) -> None:
        """Jump out from x_0 (k, c, h, w) and take k free slots."""
        self._allocate(x_0, region=any(draw.region is not None for draw in draws))
        places = [index for index, slot in enumerate(self._slots) if slot is None][: len(draws)]
        words = key_words([draw.noise_key for draw in draws], self._device)
        for i, (place, draw) in enumerate(zip(places, draws, strict=True)):
            self._slots[place] = _Slot(draw=draw, words=words[i], node=draw.walk.n)
            if draw.region is not None:
                self._known[place] = self._encode([draw.region.outside])[0]
                self._mask[place] = to_device(draw.region.mask, self._device)
            elif len(self._mask):
                self._mask[place] = True
        self._jump(places, x_0)

    def _jump(self, places: list[int], x_0: Tensor) -> None:
        """The one draw of the way out, for the slots at `places`."""
        slots = [slot for place in places if (slot := self._slots[place]) is not None]
        rows = [slot.draw.walk.rows[slot.node] for slot in slots]
        # The jump's noise does not depend on the node, so equal keys show the same noise at any t.
        eps = self._normals(slots, Purpose.FORWARD, [0] * len(slots))
        where = torch.tensor(places, device=self._device)
        if len(self._known):
            x_0 = torch.where(self._mask[where], x_0, self._known[where])
        self._x[where] = jump(to_device(torch.tensor(rows), self._device), x_0, eps)
        if self._order == 2:
            # The first step has no history; a stale one might hold a NaN, and 0 * NaN is none the better.
            self._before[where] = 0

    def _gather(self) -> tuple[Tensor, Tensor, list[Condition]]:
        """Each slot's coefficients (B, columns), tau (B,) float64 on the CPU, and condition."""
        rows, taus, conditions = [], [], []
        for slot in self._slots:
            rows.append(slot.draw.walk.rows[slot.node] if slot else _IDLE_ROW)
            taus.append(slot.draw.walk.tau[slot.node] if slot else self._idle_tau)
            conditions.append(slot.draw.condition if slot else self._idle_condition)
        return (
            to_device(torch.tensor(rows), self._device),
            torch.tensor(taus, dtype=torch.float64),
            conditions,
        )

    def _normals(self, slots: Sequence[_Slot | None], purpose: Purpose, nodes: Sequence[int]) -> Tensor:
        """What each slot's key draws for `purpose` at its node and pass, (k, c, h, w)."""
        words = torch.stack([slot.words if slot else self._idle_words for slot in slots])
        channels, height, width = self._x.shape[1:]
        node = to_device(torch.tensor(nodes), self._device)
        passes = to_device(torch.tensor([slot.pass_index if slot else 0 for slot in slots]), self._device)
        whole = Window(corner=(0, 0), field=(height, width))
        windows = [slot.draw.window or whole if slot else whole for slot in slots]
        if all(window == whole for window in windows):
            shape = (channels, height, width)
            return normal(words, shape, purpose=purpose, node=node, pass_index=passes)
        return normal_window(
            words,
            (channels, height, width),
            corner=torch.tensor([window.corner for window in windows]),
            field=torch.tensor([window.field for window in windows]),
            purpose=purpose,
            node=node,
            pass_index=passes,
        )

    def _arrive(self, arrived: list[tuple[int, _Slot]]) -> list[Finished]:
        """Emit what is wanted of the slots at node 0; start their next pass or free them."""
        finished, again = [], []
        for index, slot in arrived:
            draw, number = slot.draw, slot.pass_index + 1
            last = number == draw.passes
            if last or draw.emit_all:
                state = self._x[index].clone()
                finished.append(Finished(draw=draw, pass_number=number, x_0=state, batch_size=slot.batch_size))
            if last:
                self._slots[index] = None
            else:
                slot.pass_index, slot.node = number, draw.walk.n
                again.append(index)
        if again:
            self._jump(again, self._x[again])
        return finished

    def _allocate(self, like: Tensor, *, region: bool) -> None:
        """Tensors of the slots' shape, made when the first state shows it."""
        if not len(self._x):
            self._x = torch.zeros((self.size, *like.shape[1:]), device=self._device)
            self._before = torch.zeros_like(self._x) if self._order == 2 else self._before
        if region and not len(self._known):
            self._known = torch.zeros_like(self._x)
            self._mask = torch.ones_like(self._x[:, :1], dtype=torch.bool)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` (on the CPU) in float32 where it is floating, on `device`, without waiting for the copy."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def in_fixed_batches(function: Any, rows: Tensor, size: int) -> Tensor:
    """`function` over rows (k, ...) in batches of exactly `size`, the last one padded with zeros."""
    parts = []
    for chunk in torch.split(rows, size):
        padding = chunk.new_zeros((size - len(chunk), *chunk.shape[1:]))
        parts.append(function(torch.cat([chunk, padding]))[: len(chunk)])
    return torch.cat(parts)


def _refit(tensor: Tensor, kept: list[int], size: int) -> Tensor:
    """The rows `kept` of a slots' tensor, first in one of `size` rows; empty tensors stay empty."""
    if not len(tensor):
        return tensor
    fitted = tensor.new_zeros((size, *tensor.shape[1:]))
    fitted[: len(kept)] = tensor[kept]
    return fitted
