"""Weights read into a module, strictly, and the module put where it runs.

A tensor that is missing, left over or of another shape is an error, never a random initialisation.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from boomerang_batch.errors import ModelError
from boomerang_batch.models.device import Placement
from boomerang_batch.models.parts import Part

_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_weights(part: Part, kind: Any, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network on the CPU, in `dtype` and evaluation mode.

    `kind` is the diffusers or transformers class that `part` was saved from. Raises ModelError naming what
    does not fit.
    """
    try:
        network, report = kind.from_pretrained(
            str(part.folder),
            variant=part.variant,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{part.folder}: the weights don't load into the configured network: {reason}"
        ) from error
    for problem in _PROBLEMS:
        if names := sorted(str(name) for name in report.get(problem, [])):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"{part.folder}: weights and config.json don't belong together: "
                f"{problem.replace('_', ' ')} {shown}"
            )
    module: torch.nn.Module = network.requires_grad_(False).eval()
    # diffusers leaves a network in its file's dtype where the file starts with a buffer that is never cast.
    kept = getattr(kind, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    # Loaded tensors lie wherever the file's header left them, and CPU kernels choose by alignment: the last
    # bits of a result would depend on that. Fresh copies are aligned alike in every process.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


def place(module: torch.nn.Module, placement: Placement) -> torch.nn.Module:
    """The denoising network, ready to run: on its device, in its memory layout, compiled if asked for."""
    module = module.to(device=placement.device)
    module = module.to(memory_format=placement.memory_format)  # type: ignore[call-overload]
    if placement.compiled:
        return torch.compile(module, dynamic=False)  # type: ignore[return-value]
    return module
