"""Training the demo's model: stopped and resumed it comes to the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from boomerang_batch.demo.learning import Learner, export_pipeline
from tests import tiny_models


def learn(checkpoint: Path, steps: int) -> Learner:
    learner = Learner(tiny_models.network, checkpoint, seed=3, ema_decay=0.9, weight_decay=0.01, grad_clip=1.0)
    while learner.step < steps:
        x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(learner.step))
        learner.learn(learner.net(x_t, 5).sample.square().mean(), rate=1e-3)
    learner.keep()
    return learner


def test_a_resumed_training_comes_to_the_same_weights_average_and_optimizer(tmp_path):
    learn(tmp_path / "whole.pt", 4)
    learn(tmp_path / "parts.pt", 2)
    assert learn(tmp_path / "parts.pt", 4).step == 4
    whole, parts = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    for name in ("net", "ema"):
        for weight, other in zip(whole[name].values(), parts[name].values(), strict=True):
            assert torch.equal(weight, other)
    for state, other in zip(
        whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True
    ):
        assert torch.equal(state["exp_avg"], other["exp_avg"])
    assert any(not torch.equal(whole["net"][name], whole["ema"][name]) for name in whole["net"])


def test_an_exported_model_is_a_folder_that_anyone_may_read(tmp_path):
    net = tiny_models.network()
    export_pipeline(net, tiny_models.scheduler(), {"steps": 4}, tmp_path)
    assert json.loads((tmp_path / "training.json").read_text()) == {"steps": 4}
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    [weights] = tmp_path.rglob("*.safetensors")
    assert weights.stat().st_mode & 0o777 == 0o644
    assert torch.equal(type(net).from_pretrained(tmp_path / "unet").conv_in.weight, net.conv_in.weight)
