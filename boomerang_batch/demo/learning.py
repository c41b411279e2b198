"""A network in training: its average, its optimizer and what its loss did, from one checkpoint to the next.

What is seen, how the loss is taken, at what rate and for how long is the caller's: the demo's script, and those
of benchmarks/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

CURVE_STEPS = 50
"""Steps whose mean loss is one point of the curve."""


class Learner:
    """Goes on from `checkpoint` if there is one."""

    def __init__(
        self,
        build: Callable[[], Any],
        checkpoint: Path,
        *,
        seed: int,
        ema_decay: float,
        weight_decay: float,
        grad_clip: float,
    ) -> None:
        """`build` gives the untrained network, its weights drawn from the global generator, which is seeded."""
        torch.manual_seed(seed)
        self.net = build().to(memory_format=torch.channels_last).train()
        self._ema = copy.deepcopy(self.net).eval()
        self._optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self._checkpoint, self._ema_decay, self._grad_clip = checkpoint, ema_decay, grad_clip
        self.step, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []
        self._running: list[float] = []
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.net.load_state_dict(state["net"])
            self._ema.load_state_dict(state["ema"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def learn(self, loss: torch.Tensor, *, rate: float) -> None:
        """Take the optimizer's step and move the average towards it; a young average forgets faster."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self._grad_clip)
        self._optimizer.step()
        decay = min(self._ema_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for average, weight in zip(self._ema.parameters(), self.net.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
        self._running.append(loss.item())
        self.step += 1
        if self.step % CURVE_STEPS == 0:
            self.curve.append([self.step, round(float(np.mean(self._running)), 5)])
            self._running.clear()

    def keep(self) -> None:
        """Write the checkpoint."""
        state = {"net": self.net.state_dict(), "ema": self._ema.state_dict()}
        state |= {"optimizer": self._optimizer.state_dict(), "step": self.step}
        scratch = self._checkpoint.with_suffix(".tmp")
        torch.save(state | {"seconds": self.seconds, "curve": self.curve}, scratch)
        scratch.replace(self._checkpoint)


def export_pipeline(net: Any, scheduler: Any, record: dict[str, object], out: Path) -> None:
    """Write a trained UNet2DModel as a diffusers folder, with `record` of its training beside it."""
    net.save_pretrained(out / "unet", safe_serialization=True)
    scheduler.save_pretrained(out / "scheduler")
    index: dict[str, object] = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    index["unet"] = ["diffusers", "UNet2DModel"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    # diffusers leaves weights readable by their owner alone; these are to be shipped.
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)
