"""Tensors between the host and its device, neither waiting for the other.

A CUDA device works off what it is given in order, while the host goes on. Copies from and to pinned memory join
that queue; copies from ordinary memory, and reading a value off the device, would wait until all of it is done.
On a CPU everything is done at once, so there is nothing to wait for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` (on the CPU), floats as float32, on `device`, without waiting for the copy."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU; off a CUDA device it is there once a `Mark` set after this call is reached."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Mark:
    """A point in what a device has been asked to do so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a wait that sleeps
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the device has come this far."""
        if self._event is not None:
            self._event.synchronize()
