"""Where a network runs, and process settings that make the same input give the same bytes.

The settings are the process's, not the model's: a worker owns its process, and an inline run is alone in its
own. They trade a little speed for repeatability on one stack.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.diffusion.threads import use_threads
from boomerang_batch.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how a model's networks run."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    """Whether the denoising network goes through torch.compile, for its one shape."""

    @property
    def is_half(self) -> bool:
        """Whether networks run in 16 bits."""
        return self.dtype != torch.float32

    def in_float32(self) -> Placement:
        """The same in full precision, uncompiled: the few samples that need it would not repay compiling."""
        return replace(self, dtype=torch.float32, compiled=False)


def choose_placement(spec: ModelSpec, device: str) -> Placement:
    """Where and how the recipe's model runs on `device` (cpu, cuda or auto). Raises ModelError."""
    return Placement(
        device=choose_device(device, dtype=spec.dtype),
        dtype=DTYPES[spec.dtype],
        memory_format=torch.channels_last if spec.channels_last else torch.contiguous_format,
        compiled=spec.compile,
    )


def choose_device(device: str, *, dtype: str) -> torch.device:
    """`cpu`, `cuda` or `auto` (CUDA when there is one) as a torch device fit for `dtype`.

    Raises ModelError when there is no such device or it can't compute in that dtype.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"device {device}: choose auto, cpu or cuda")
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ModelError(
            "device cuda: PyTorch sees no CUDA device here; use --device cpu, or a CUDA build of torch"
        )
    chosen = "cuda" if device == "cuda" or (device == "auto" and present) else "cpu"
    if chosen == "cpu" and dtype == "float16":
        raise ModelError("model.dtype float16 on a CPU loses both speed and accuracy; use float32 or bfloat16")
    return torch.device(chosen)


def settle_numerics(device: torch.device, *, threads: int | None) -> None:
    """Make this process compute repeatably: fixed threads, no TF32, no autotuning, deterministic kernels.

    `threads` is PyTorch's intra-op thread count; None leaves it. The number of threads can change the last
    bits of a result, so a run that promises bytes must set it.
    """
    if threads is not None:
        use_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    # Meant to expose reads of uninitialised memory; it costs a fill per allocation and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        # cuBLAS is deterministic only with a fixed workspace, read when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
