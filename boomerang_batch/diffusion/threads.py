"""How many threads PyTorch may use on a CPU for what the calling thread computes."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Let operations called from this thread, and no other, use `count` threads.

    `torch.set_num_threads` alone does not do that: a thread's first operation takes over what any thread set
    last, in whose favour it forgets what was set for itself. Asking for the number is such a first operation.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)
