"""What the slots of one shape draw: each row by its own key, at its own node and pass, in its own window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boomerang_batch.diffusion.draws import Window
from boomerang_batch.diffusion.noise import Purpose, normal, normal_window
from boomerang_batch.diffusion.transfer import to_device


def normals(
    keys: Tensor,
    shape: Sequence[int],
    purpose: Purpose,
    nodes: Sequence[int],
    passes: Sequence[int],
    windows: Sequence[Window | None],
) -> Tensor:
    """Standard normals (k, *shape) float32 on the device of keys (k, 4); a window of None is all of its field.

    A row is the same whatever stands in the others. Doesn't wait for the device.
    """
    channels, height, width = shape
    node, pass_index = (to_device(torch.tensor(values), keys.device) for values in (nodes, passes))
    if not any(windows):
        return normal(keys, shape, purpose=purpose, node=node, pass_index=pass_index)
    whole = Window(corner=(0, 0), field=(height, width))
    corner, field = (
        to_device(torch.tensor(values), keys.device)
        for values in zip(
            *((one.corner, one.field) for one in (window or whole for window in windows)), strict=True
        )
    )
    return normal_window(
        keys,
        (channels, height, width),
        corner=corner,
        field=field,
        purpose=purpose,
        node=node,
        pass_index=pass_index,
    )
