"""B slots of one shape: each holds one draw at its own place on its own walk, and all share each network call.

A slot's state is a row of a few tensors, its place a node of its draw's walk. `admit` fills free slots,
`advance` takes every slot one node further with one call of fixed shape, and what has arrived comes out.
The fixed shape is what makes a result independent of its neighbours, its slot and its time of arrival:
kernels choose their algorithm by shape, so the same sample in a smaller batch would differ in its last bits.
Empty slots are therefore computed too, and their results thrown away. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from boomerang_batch.diffusion.batch_size import in_fixed_batches
from boomerang_batch.diffusion.codes import Code, code_step
from boomerang_batch.diffusion.denoiser import Condition, Denoiser
from boomerang_batch.diffusion.draws import Draw, Finished
from boomerang_batch.diffusion.noise import Purpose, key_words
from boomerang_batch.diffusion.samplers import Column, jump, step
from boomerang_batch.diffusion.slot_noise import normals
from boomerang_batch.diffusion.transfer import to_device, upload

# An idle slot's step gives zeros, whatever finite things the network says.
_IDLE_ROW = [1.0 if column is Column.SIGMA else 0.0 for column in Column]


@dataclass(kw_only=True)
class _Slot:
    """A busy slot: whose it is, and where on its walk."""

    draw: Draw
    node: int
    pass_index: int = 0
    batch_size: int = 1 << 30
    """The smallest batch shape of its steps so far."""
    fed: Tensor | None = None
    """The residuals of its draw's code, (n + 1, c, h, w), on the device."""
    drawn: list[Tensor] = field(default_factory=list)
    """Of a draw with a path: its start, (c, h, w), and the residuals so far."""

    @property
    def coefficients(self) -> list[float]:
        """Of its next step."""
        walk = self.draw.walk
        return (walk.rows if self.fed is None else walk.fed_rows)[self.node]


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A draw that waits for a slot, its images encoded already, for it came in one micro-batch with others."""

    draw: Draw
    x_0: Tensor
    """Of a draw with a code, where that begins instead."""
    around: tuple[Tensor, Tensor] | None
    """What is known of where it leads: (c, h, w), and a mask (1, h, w) that is false there. Around its region;
    everywhere for a draw with a path."""


@dataclass(frozen=True, kw_only=True)
class _Parked:
    """A busy slot that has no row at present, and what stood in the row."""

    slot: _Slot
    rows: dict[str, Tensor]


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
        self._parked: list[_Parked] = []
        self._encoded: list[_Encoded] = []
        # One row per slot in each: x (c, h, w) and key (4,); before, the last x0h, for order 2; known (c, h, w)
        # and mask (1, h, w) once a draw has a region.
        self._rows: dict[str, Tensor] = {}
        spec = denoiser.spec
        self._idle_tau = float(spec.levels.tau[0])
        self._idle_condition: Condition = 0 if spec.conditioning == "label" else None

    @property
    def size(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    @property
    def busy(self) -> int:
        """How many draws are on their way, with those that have no slot at present."""
        return self.size - self._slots.count(None) + len(self._parked) + len(self._encoded)

    @property
    def draws(self) -> Iterable[Draw]:
        """The draws that are on their way."""
        yield from (slot.draw for slot in self._slots if slot is not None)
        yield from (parked.slot.draw for parked in self._parked)
        yield from (encoded.draw for encoded in self._encoded)

    def admit(self, draws: Sequence[Draw]) -> list[Finished]:
        """Put draws on their way, a jump out each; t = 0 comes back at once.

        Those for which no slot is free take the next that come free, which `advance` sees to.
        """
        if not draws:
            return []
        regions = [draw.region for draw in draws if draw.region is not None and draw.walk.n > 0]
        shown = [draw.image for draw in draws if draw.code is None]
        encoded = iter(self._encode([*shown, *(region.outside for region in regions)]))
        states = [next(encoded) if draw.code is None else upload(draw.code.x_n, self._device) for draw in draws]
        for draw, x_0 in zip(draws, states, strict=True):
            if draw.walk.n > 0:
                around = None if draw.region is None else (next(encoded), draw.region.mask)
                if draw.leaves_residuals:
                    around = (x_0, torch.zeros_like(x_0[:1], dtype=torch.bool))
                self._encoded.append(_Encoded(draw=draw, x_0=x_0, around=around))
        self._settle()
        return [
            Finished(
                draw=draw,
                pass_number=number,
                x_0=state,
                batch_size=self._encode_batch,
                code=_code_of_nothing(draw, state),
            )
            for draw, state in zip(draws, states, strict=True)
            if draw.walk.n == 0
            for number in (range(1, draw.passes + 1) if draw.emit_all else [draw.passes])
        ]

    def advance(self) -> list[Finished]:
        """Every busy slot one node further. Returns the draws, or passes of draws, that came to their end.

        When something in here fails, memory for one, no slot has moved and it can be done again.
        """
        self._settle()
        moved, residuals = self._step()

        # Emit what has arrived; start the next pass of cascades.
        arrived = [(index, slot) for index, slot in enumerate(self._slots) if slot and slot.node == 1]
        finished = [
            Finished(
                draw=slot.draw,
                pass_number=slot.pass_index + 1,
                x_0=moved["x"][index].clone(),
                batch_size=min(slot.batch_size, self.size),
                code=_code(slot, moved["x"][index], residuals.get(index)),
            )
            for index, slot in arrived
            if slot.draw.emit_all or slot.pass_index + 1 == slot.draw.passes
        ]
        again = [(index, slot) for index, slot in arrived if slot.pass_index + 1 < slot.draw.passes]
        if again:
            places = [index for index, _ in again]
            draws, passes = zip(*((slot.draw, slot.pass_index + 1) for _, slot in again), strict=True)
            self._jump(self._rows | moved, places, moved["x"][self._index(places)], draws, passes)

        # Only now does anything change.
        self._rows |= moved
        for index, slot in enumerate(self._slots):
            if slot is not None:
                if index in residuals:
                    slot.drawn.append(residuals[index])
                slot.node -= 1
                slot.batch_size = min(slot.batch_size, self.size)
        for index, slot in arrived:
            slot.pass_index, slot.node = slot.pass_index + 1, slot.draw.walk.n
            if slot.pass_index == slot.draw.passes:
                self._slots[index] = None
        return finished

    def drop(self, unwanted: Callable[[Draw], bool]) -> None:
        """Free the slots whose draw nobody waits for."""
        self._slots = [None if slot is None or unwanted(slot.draw) else slot for slot in self._slots]
        self._parked = [parked for parked in self._parked if not unwanted(parked.slot.draw)]
        self._encoded = [encoded for encoded in self._encoded if not unwanted(encoded.draw)]

    def resize(self, size: int) -> None:
        """Go on with `size` slots; busy ones beyond that are parked until others are free.

        Results differ in their last bits from then on.
        """
        busy = [(index, slot) for index, slot in enumerate(self._slots) if slot is not None]
        for index, slot in busy[size:]:
            # Copies, for a view would keep all of the larger tensor.
            rows = {name: tensor[index].clone() for name, tensor in self._rows.items()}
            self._parked.append(_Parked(slot=slot, rows=rows))
        kept = [index for index, _ in busy[:size]]
        for name, tensor in self._rows.items():
            fitted = tensor.new_zeros((size, *tensor.shape[1:]))
            fitted[: len(kept)] = tensor[self._index(kept)]
            self._rows[name] = fitted
        self._slots = [*(slot for _, slot in busy[:size]), *[None] * (size - len(kept))]

    def try_size(self, size: int) -> None:
        """One network call on `size` idle rows, to see whether memory holds it."""
        states = torch.zeros((size, *self._rows["x"].shape[1:]), device=self._device)
        tau = torch.full((size,), self._idle_tau, dtype=torch.float64)
        self._denoiser.denoise(states, tau, [self._idle_condition] * size)

    def _unpark(self) -> None:
        """Let parked slots go on, in free ones."""
        for index, slot in enumerate(self._slots):
            if slot is None and self._parked:
                parked = self._parked.pop()
                self._slots[index] = parked.slot
                for name, tensor in self._rows.items():
                    if name in parked.rows:
                        tensor[index] = parked.rows[name]
                    elif name == "mask":  # made since then, for others: all of this draw changes
                        tensor[index] = True

    def _encode(self, images: Sequence[Tensor]) -> Tensor:
        """States (k, c, h, w) on the device, in micro-batches of a fixed shape."""
        if not images:
            return torch.zeros(0)
        batch = upload(torch.stack(list(images)), self._device)
        if not self._denoiser.spec.latent:
            return batch
        return in_fixed_batches(self._denoiser.encode, batch, self._encode_batch)

    def _settle(self) -> None:
        """Jump out with the draws that wait for a slot, as many as slots are free; the parked ones go first."""
        self._unpark()
        places = [index for index, slot in enumerate(self._slots) if slot is None][: len(self._encoded)]
        if not places:
            return
        settling = self._encoded[: len(places)]
        draws, x_0 = [one.draw for one in settling], torch.stack([one.x_0 for one in settling])
        around = [(place, *one.around) for place, one in zip(places, settling, strict=True) if one.around]
        self._allocate(x_0, regions=bool(around))
        where = self._index(places)
        self._rows["key"][where] = to_device(key_words([draw.noise_key for draw in draws]), self._device)
        if "mask" in self._rows:
            self._rows["mask"][where] = True
        for place, outside, mask in around:
            self._rows["known"][place] = outside
            self._rows["mask"][place] = to_device(mask, self._device)
        self._jump(self._rows, places, x_0, draws, [0] * len(draws))
        slots = [_Slot(draw=draw, node=draw.walk.n) for draw in draws]
        for place, slot, begin in zip(places, slots, x_0, strict=True):
            draw = slot.draw
            if draw.code is not None or draw.path == "ddim":
                self._rows["x"][place] = begin  # with no jump
            if draw.code is not None and draw.code.residuals is not None:
                slot.fed = upload(draw.code.residuals, self._device)
            if draw.leaves_residuals:
                slot.drawn.append(self._rows["x"][place].clone())
        # Only now does anything change: memory may have run out above.
        for place, slot in zip(places, slots, strict=True):
            self._slots[place] = slot
        del self._encoded[: len(places)]

    def _jump(
        self,
        rows: dict[str, Tensor],
        places: Sequence[int],
        x_0: Tensor,
        draws: Sequence[Draw],
        passes: Sequence[int],
    ) -> None:
        """The one draw of the way out, from x_0 (k, c, h, w) to the rows at `places`."""
        where = self._index(places)
        # The jump's noise does not depend on the node, so equal keys show the same noise at any t.
        windows = [draw.window for draw in draws]
        eps = normals(rows["key"][where], x_0.shape[1:], Purpose.FORWARD, [0] * len(draws), passes, windows)
        if "known" in rows:
            x_0 = torch.where(rows["mask"][where], x_0, rows["known"][where])
        coefficients = torch.tensor([draw.walk.rows[draw.walk.n] for draw in draws])
        rows["x"][where] = jump(to_device(coefficients, self._device), x_0, eps)
        if "before" in rows:
            # The first step has no history; a stale one might hold a NaN, and 0 * NaN is none the better.
            rows["before"][where] = 0

    def _step(self) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """One network call and one step of every slot: the rows that it changes, as they are after it, and the
        residuals (c, h, w) of those slots that draw a path.
        """
        slots, rows = self._slots, self._rows
        idle = (_IDLE_ROW, self._idle_tau, self._idle_condition)
        coefficients, taus, conditions = zip(
            *(
                (slot.coefficients, slot.draw.walk.tau[slot.node], slot.draw.condition) if slot else idle
                for slot in slots
            ),
            strict=True,
        )
        output = self._denoiser.denoise(rows["x"], torch.tensor(taus, dtype=torch.float64), conditions)
        z = None
        paths = [(index, slot) for index, slot in enumerate(slots) if slot and slot.draw.leaves_residuals]
        if paths or any(row[Column.NOISE] != 0 for row in coefficients):
            nodes = [slot.node if slot else 0 for slot in slots]
            passes = [slot.pass_index if slot else 0 for slot in slots]
            windows = [slot.draw.window if slot else None for slot in slots]
            z = normals(rows["key"], rows["x"].shape[1:], Purpose.REVERSE, nodes, passes, windows)
            for index, slot in enumerate(slots):
                if slot and slot.fed is not None:
                    z[index] = slot.fed[slot.node]
        known = (rows["known"], rows["mask"]) if "known" in rows else None
        table = to_device(torch.tensor(coefficients), self._device)
        x, x0 = step(table, rows["x"], output, z, rows.get("before"), known)
        moved = {"x": x, "before": x0} if self._order == 2 else {"x": x}
        if z is None or not paths:
            return moved, {}
        where = self._index([index for index, _ in paths])
        below = torch.tensor([slot.draw.walk.rows[slot.node - 1] for _, slot in paths])
        x[where], residuals = code_step(
            table[where],
            to_device(below, self._device),
            rows["x"][where],
            output[where],
            rows["known"][where],
            z[where],
            apart=to_device(
                torch.tensor([slot.draw.path == "edit-friendly" for _, slot in paths]), self._device
            ),
            last=to_device(torch.tensor([slot.node == 1 for _, slot in paths]), self._device),
        )
        return moved, {index: residual for (index, _), residual in zip(paths, residuals, strict=True)}

    def _index(self, places: Sequence[int]) -> Tensor:
        """Places on the device: indexing by a list would copy it there and wait."""
        return to_device(torch.tensor(places, dtype=torch.int64), self._device)

    def _allocate(self, like: Tensor, *, regions: bool) -> None:
        """Tensors of the slots' shape, made when the first state shows it."""
        if "x" not in self._rows:
            self._rows["x"] = torch.zeros((self.size, *like.shape[1:]), device=self._device)
            self._rows["key"] = torch.zeros((self.size, 4), dtype=torch.int64, device=self._device)
            if self._order == 2:
                self._rows["before"] = torch.zeros_like(self._rows["x"])
        if regions and "known" not in self._rows:
            self._rows["known"] = torch.zeros_like(self._rows["x"])
            self._rows["mask"] = torch.ones_like(self._rows["x"][:, :1], dtype=torch.bool)


def _code_of_nothing(draw: Draw, x_0: Tensor) -> Code | None:
    """Of a draw at t = 0."""
    residuals = torch.zeros_like(x_0)[None] if draw.leaves_residuals else None
    return None if draw.path is None else Code(x_n=x_0, residuals=residuals)


def _code(slot: _Slot, x: Tensor, last: Tensor | None) -> Code | None:
    """What a draw has found when it came to x with this last residual; None for one that makes an image."""
    if slot.draw.path is None:
        return None
    if last is None:
        return Code(x_n=x.clone(), residuals=None)
    x_n, *residuals = slot.drawn
    return Code(x_n=x_n, residuals=torch.stack([torch.zeros_like(last), last, *reversed(residuals)]))
