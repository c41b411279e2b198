"""Codes as bytes: one safetensors file for all pieces of an image, read back only as what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save

from boomerang_batch.diffusion.codes import Code
from boomerang_batch.errors import SampleError

FIELD = "code.safetensors"
"""The field of a shard that holds a code."""
_STALE = "its code was drawn of another image, or by another run; --only-failed draws it anew"


def code_bytes(codes: Sequence[Code], *, proof: bytes, trial: int | None = None) -> bytes:
    """The codes of an image's pieces, in order, with what proves whose they are; equal ones in equal bytes.

    `trial`: which one of several this is.
    """
    tensors = {"proof": torch.frombuffer(bytearray(proof), dtype=torch.uint8)}
    if trial is not None:
        tensors["trial"] = torch.tensor(trial)
    for index, code in enumerate(codes):
        tensors[f"{index}.x_n"] = code.x_n.contiguous()
        if code.residuals is not None:
            tensors[f"{index}.residuals"] = code.residuals.contiguous()
    return save(tensors)


def read_codes(data: bytes, *, proof: bytes | None, pieces: int, steps: int | None) -> list[Code]:
    """What `code_bytes` was given, for walks of so many steps; None: codes without residuals.

    `proof` None: whosever it is. Raises SampleError `bad-code` for anything else, and `stale-code` where it was
    drawn of something else.
    """
    try:
        tensors = load(data)
        if proof is not None and tensors["proof"].numpy().tobytes() != proof:
            raise SampleError("stale-code", _STALE)
        found = [
            Code(x_n=tensors[f"{index}.x_n"], residuals=tensors.get(f"{index}.residuals"))
            for index in range(pieces)
        ]
    except (SafetensorError, KeyError, ValueError) as error:
        raise SampleError("bad-code", f"what is kept of it is no code: {error}") from error
    for code in found:
        shape = None if steps is None else (steps + 1, *code.x_n.shape)
        found_shape = None if code.residuals is None else code.residuals.shape
        if code.x_n.dtype != torch.float32 or found_shape != shape:
            told = "a latent alone" if steps is None else f"one of {steps} steps, as this walk has"
            raise SampleError("bad-code", f"its code is not {told}")
    return found


def check_codes(path: Path, *, proof: bytes, pieces: int, steps: int) -> int | None:
    """Which trial the codes in a file are, if any, as `code_bytes` made it; looks at their outline alone.

    Raises SampleError as `read_codes` does.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if file.get_tensor("proof").numpy().tobytes() != proof:
                raise SampleError("stale-code", _STALE)
            for index in range(pieces):
                x_n, residuals = (file.get_slice(f"{index}.{name}") for name in ("x_n", "residuals"))
                shape = [steps + 1, *x_n.get_shape()]
                if {x_n.get_dtype(), residuals.get_dtype()} != {"F32"} or residuals.get_shape() != shape:
                    raise SampleError("bad-code", f"its code is not one of {steps} steps, as this walk has")
            return int(file.get_tensor("trial")) if "trial" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise SampleError("bad-code", f"what is kept of it is no code: {error}") from error


def load_codes(path: Path, *, pieces: int) -> tuple[list[Code], int]:
    """The codes in a file that `check_codes` let pass, and which trial they are."""
    tensors = load_file(path)
    codes = [Code(x_n=tensors[f"{i}.x_n"], residuals=tensors[f"{i}.residuals"]) for i in range(pieces)]
    return codes, int(tensors.get("trial", 0))
