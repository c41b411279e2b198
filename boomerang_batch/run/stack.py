"""The stack's fingerprint: everything outside recipe and input that the output's bytes depend on.

On one stack a run is bitwise reproducible; on another one kernels, encoders or thread counts may differ in the
last bits. So the fingerprint is frozen in run.json and a resume on another stack is refused unless asked for.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import torch

from boomerang_batch import __version__
from boomerang_batch.data.images import codec_versions

_LIBRARIES = ("torch", "diffusers", "numpy", "pillow", "pyarrow")


def fingerprint(*, device: torch.device, dtype: str, batch_size: int, threads: int) -> dict[str, str]:
    """What this process computes with. Equal dictionaries mean equal bytes for equal inputs."""
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        hardware = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "boomerang-batch": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        **codec_versions(),
        "device": hardware,
        "dtype": dtype,
        "batch_size": str(batch_size),
        "threads": str(threads),
    }


def short_versions(stack: Mapping[str, str]) -> str:
    """The versions column of a provenance row."""
    names = ("boomerang-batch", "torch", "diffusers", "pillow")
    return "; ".join(f"{name} {stack[name]}" for name in names)
