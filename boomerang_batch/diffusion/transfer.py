"""Tensors between the host and its device, neither waiting for the other.

A CUDA device works off each of its streams in order, while the host goes on. Small things join the stream that
computes. Images go beside it, each way on a stream of its own, and only the device is told what has to wait for
what. All copies are from and to pinned memory: one from ordinary memory, like reading a value off the device,
would make the host wait until all is done. On a CPU all is done at once, and there is nothing to wait for.
"""

from __future__ import annotations

import functools
import threading
from typing import Literal

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` (on the CPU), floats as float32, on `device`, without waiting for the copy."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(images: Tensor, device: torch.device) -> Tensor:
    """`to_device` for what is large: while it is copied, the device goes on with what it was asked before."""
    if device.type != "cuda":
        return to_device(images, device)
    computing, copying = torch.cuda.current_stream(device), _copying(device, "in")
    with torch.cuda.stream(copying):
        copied = to_device(images, device)
    computing.wait_stream(copying)
    copied.record_stream(computing)  # else, once dropped, its memory might be reused before it was read
    return copied


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU; off a CUDA device it is there once a `Mark` set after this call is reached."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    copying = _copying(tensor.device, "out")
    copying.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(copying):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(copying)
    return host


class Mark:
    """A point in what a device has been asked to do so far, copies to the host included."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            copying = _copying(device, "out")
            copying.wait_stream(torch.cuda.current_stream(device))
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a wait that sleeps
            self._event.record(copying)

    def wait(self) -> None:
        """Until the device has come this far."""
        if self._event is not None:
            self._event.synchronize()


def _copying(device: torch.device, way: Literal["in", "out"]) -> torch.cuda.Stream:
    """The one stream for copies that way; a device named without a number is the current one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _making:
        return _streams(index)[way]


_making = threading.Lock()
"""Two engines that start together must not make two streams for one way."""


@functools.cache
def _streams(index: int) -> dict[str, torch.cuda.Stream]:
    return {way: torch.cuda.Stream(index) for way in ("in", "out")}  # type: ignore[no-untyped-call]
