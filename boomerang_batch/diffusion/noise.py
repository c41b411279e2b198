"""Noise that depends on its name alone: keyed, counter-based, the same in any batch, order, attempt or worker.

Philox4x32-10 (Salmon et al., SC 2011) turns a key and a counter into 128 random bits; Box-Muller in float64
turns those into normals, rounded to float32. A 128-bit noise key names (secret or seed, identity, variant): 64
of its bits are the cipher's key, the other 64 its counter words 2 and 3. Counter word 0 is the block of four
elements, word 1 packs what the draw is for: purpose (8 bits), pass (8 bits), node (16 bits). Nothing is ever
drawn in sequence, so skipping, repeating or reordering draws changes none of them.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes never share bits. Values are part of the format."""

    FORWARD = 1
    REVERSE = 2
    VAE = 3
    T_DRAW = 4
    LABEL_DRAW = 5
    MIX_COIN = 6
    NEW_LATENT = 7


def noise_key(material: bytes, *, identity: bytes, variant: int) -> bytes:
    """The 16-byte noise key of one variant of one sample.

    BLAKE2b-128 over length-prefixed fields, keyed with `material` (16 to 64 bytes): the run's secret, or a
    seed in the form `seed_material` gives it. Keyed BLAKE2b is a MAC, so without the secret the key, and with
    it every draw, is unpredictable. Raises ValueError when `material` is too short to be either, or too long.
    """
    if not 16 <= len(material) <= 64:
        raise ValueError(f"noise key material must have 16 to 64 bytes, not {len(material)}")
    mac = hashlib.blake2b(key=material, digest_size=16, person=b"boomerang-noise")
    for field in (identity, struct.pack("<q", variant)):
        mac.update(struct.pack("<Q", len(field)))
        mac.update(field)
    return mac.digest()


def derived_key(key: bytes, purpose: str) -> bytes:
    """A noise key of its own for another use of a variant, by that use's name: unpredictable as `key` is."""
    return hashlib.blake2b(purpose.encode(), key=key, digest_size=16, person=b"boomerang-noise2").digest()


def seed_material(seed: int) -> bytes:
    """Key material for a plain, publishable seed (0 <= seed < 2**63)."""
    return b"public-seed-" + struct.pack("<q", seed)


def key_words(keys: Sequence[bytes], device: torch.device | str = "cpu") -> Tensor:
    """(B, 4) int64 tensor of the keys' little-endian 32-bit words."""
    words = [struct.unpack("<4I", key) for key in keys]
    return torch.tensor(words, dtype=torch.int64, device=device).view(-1, 4)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10. Four counter words and two key words, int64 tensors of one broadcast shape holding
    unsigned 32-bit values; returns four of the same. Products wrap modulo 2**64, which keeps all their bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        high_0, low_0 = (product_0 >> 32) & _MASK, product_0 & _MASK
        high_1, low_1 = (product_1 >> 32) & _MASK, product_1 & _MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def normal(
    keys: Tensor, shape: Sequence[int], *, purpose: Purpose, node: Tensor, pass_index: Tensor | int = 0
) -> Tensor:
    """Standard normals (B, *shape) float32 on keys' device.

    keys (B, 4) from `key_words`; node (B,) int64 in [0, 65535]; pass_index in [0, 255], (B,) int64 or one for
    all. Element e of a row is normal e % 4 of block e // 4, whatever the shape.
    """
    count = math.prod(shape)
    blocks = torch.arange(-(-count // 4), device=keys.device, dtype=torch.int64)[None, :]
    flat = _of_blocks(keys, blocks, _label(keys, purpose, node, pass_index))[:, :count]
    return flat.contiguous().view(len(keys), *shape)


def normal_window(
    keys: Tensor,
    shape: tuple[int, int, int],
    *,
    corner: Tensor,
    field: Tensor,
    purpose: Purpose,
    node: Tensor,
    pass_index: Tensor | int = 0,
) -> Tensor:
    """Windows (B, C, h, w) of larger fields: tiles of one image, each noised as the whole would be.

    Row b is bitwise `normal(keys, (C, H, W), ...)[b, :, top : top + h, left : left + w]`, with corner (B, 2)
    int64 of (top, left) and field (B, 2) int64 of (H, W); only the blocks under the window are computed.
    Windows must lie inside their fields, which is not checked, because checking would wait for the device.
    """
    channels, height, width = shape
    corner, field = corner.to(keys.device), field.to(keys.device)
    top, left, field_height, field_width = (
        values[:, i, None, None] for values in (corner, field) for i in range(2)
    )
    channel = torch.arange(channels, device=keys.device)[:, None]
    line = torch.arange(height, device=keys.device)
    # A window's line is a run of `width` elements; a run that starts within a block touches one block more.
    start = ((channel * field_height + top + line) * field_width + left).flatten(1)
    run = torch.arange((width + 2) // 4 + 1, device=keys.device)
    blocks = ((start >> 2)[..., None] + run).flatten(1)
    drawn = _of_blocks(keys, blocks, _label(keys, purpose, node, pass_index))
    offset = (start & 3)[..., None] + torch.arange(width, device=keys.device)
    return drawn.view(*start.shape, -1).gather(2, offset).view(len(keys), *shape)


def _label(keys: Tensor, purpose: Purpose, node: Tensor, pass_index: Tensor | int) -> Tensor:
    """Counter word 1 (B, 1): what the draw is for."""
    if isinstance(pass_index, Tensor):
        pass_index = pass_index.to(keys.device)
    return (node.to(keys.device) | (int(purpose) << 24) | (pass_index << 16))[:, None]


def _of_blocks(keys: Tensor, blocks: Tensor, label: Tensor) -> Tensor:
    """The four normals of each block, (B, 4n) float32; blocks (B or 1, n)."""
    k0, k1, c2, c3 = (keys[:, i : i + 1] for i in range(4))
    words = philox4x32((blocks, label, c2, c3), (k0, k1))

    # Box-Muller on the pairs (0, 1) and (2, 3): radius from the first word of a pair, angle from the second.
    parts = []
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log((first.double() + 1) * 2.0**-32))
        angle = second.double() * (2 * math.pi * 2.0**-32)
        parts += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(parts, dim=-1).flatten(1).float()


def uniform(key: bytes, *, purpose: Purpose) -> float:
    """One uniform number in (0, 1) for a noise key: the middle of one of 2**32 equal parts."""
    words = key_words([key])
    counter = torch.tensor([int(purpose) << 24])
    first, *_ = philox4x32(
        (torch.zeros_like(counter), counter, words[:, 2], words[:, 3]), (words[:, 0], words[:, 1])
    )
    return (int(first) + 0.5) * 2.0**-32
