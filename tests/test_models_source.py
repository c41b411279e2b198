"""Finding a model on disk, refusing what can't be trusted, and the digest that pins it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.errors import ModelError
from boomerang_batch.models.families import find_model
from boomerang_batch.models.weights import load_weights
from tests import tiny_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny_models.save_pipeline(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A fresh copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def spec(source: object, **options: object) -> ModelSpec:
    return ModelSpec(source=str(source), **options)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(source: object, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(spec(source, **options))
    return str(caught.value)


def test_a_saved_pipeline_is_found(folder):
    source = find_model(spec(folder))
    assert source.network.folder == folder / "unet"
    assert source.scheduler == folder / "scheduler" / "scheduler_config.json"
    assert source.network.config["sample_size"] == 8
    assert source.scheduler_config["num_train_timesteps"] == 20
    assert len(source.digest) == 64


def test_the_digest_stays_when_the_folder_moves(folder, tmp_path):
    before = find_model(spec(folder)).digest
    moved = folder.rename(tmp_path / "elsewhere")
    assert find_model(spec(moved)).digest == before
    # Naming the network by hand finds the same files.
    assert find_model(spec(moved, subfolder="unet")).digest == before
    assert find_model(spec(moved / "unet")).digest == before


def test_the_digest_changes_with_one_weight(folder):
    before = find_model(spec(folder)).digest
    tensors = load_file(folder / "unet" / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    assert find_model(spec(folder)).digest != before


@pytest.mark.parametrize(
    ("file", "change"),
    [("unet/config.json", {"norm_eps": 1e-4}), ("scheduler/scheduler_config.json", {"beta_end": 0.25})],
)
def test_the_digest_changes_with_either_configuration(folder, file, change):
    before = find_model(spec(folder)).digest
    edit_json(folder / file, **change)
    assert find_model(spec(folder)).digest != before


def test_a_file_that_is_not_the_model_changes_nothing(folder):
    before = find_model(spec(folder)).digest
    (folder / "README.md").write_text("about")
    assert find_model(spec(folder)).digest == before


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_bare_network_finds_its_scheduler(folder, place):
    """In a sibling scheduler/, or in the one folder that early diffusers wrote everything into."""
    (folder / "model_index.json").unlink()
    if place == "inside":
        config = folder / "scheduler" / "scheduler_config.json"
        config.rename(folder / "unet" / "scheduler_config.json")
    assert find_model(spec(folder / "unet")).scheduler_config["num_train_timesteps"] == 20


def test_a_pipeline_in_one_flat_folder(folder):
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    source = find_model(spec(folder))
    assert (source.network.folder, source.scheduler) == (folder, folder / "scheduler_config.json")


def test_a_bare_network_without_scheduler_is_refused(folder):
    shutil.rmtree(folder / "scheduler")
    message = refusal(folder / "unet")
    assert "no scheduler configuration" in message
    assert str(folder / "unet") in message


@pytest.mark.parametrize("pipeline", ["KandinskyPipeline", "WanPipeline", None])
def test_other_pipelines_are_refused_by_name(folder, pipeline):
    edit_json(folder / "model_index.json", _class_name=pipeline)
    message = refusal(folder)
    assert repr(pipeline) in message
    assert "DDPMPipeline" in message


def test_another_network_is_refused(folder):
    edit_json(folder / "unet" / "config.json", _class_name="UNet2DConditionModel")
    assert "UNet2DConditionModel" in refusal(folder)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickle_weights_are_refused_and_never_read(folder, tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / f"diffusion_pytorch_model{suffix}").write_bytes(pickle.dumps(Bomb()))
    message = refusal(folder)
    assert f"diffusion_pytorch_model{suffix}" in message
    assert "pickle" in message
    assert "save_pretrained" in message
    assert not (tmp_path / "exploded").exists()


def test_no_weights_at_all(folder):
    (folder / "unet" / WEIGHTS).unlink()
    assert WEIGHTS in refusal(folder)


def test_sharded_weights_load_and_a_missing_part_is_named(tmp_path):
    unet = tiny_models.network()
    folder = tiny_models.save_pipeline(tmp_path / "model", unet=unet)
    (folder / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    parts = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(parts) > 1
    source = find_model(spec(folder))
    assert_same_weights(load_weights(source.network, UNet2DModel), unet)
    parts[1].unlink()
    assert parts[1].name in refusal(folder)


def test_an_index_that_leads_outside_is_refused(folder, tmp_path):
    (folder / "unet" / WEIGHTS).rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"conv_in.bias": "../../outside.safetensors"}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "../../outside.safetensors" in refusal(folder)


def test_a_lone_variant_is_taken_and_two_are_refused(tmp_path):
    unet = tiny_models.network()
    folder = tiny_models.save_pipeline(tmp_path / "model", unet=unet)
    weights = folder / "unet" / WEIGHTS
    half = weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    source = find_model(spec(folder))
    assert source.network.variant == "fp16"
    assert_same_weights(load_weights(source.network, UNet2DModel), unet)
    shutil.copy(half, half.with_name("diffusion_pytorch_model.ema.safetensors"))
    assert "diffusion_pytorch_model.ema.safetensors" in refusal(folder)


def test_weights_saved_in_half_precision_load_as_float32(tmp_path):
    unet = tiny_models.network().half()
    folder = tiny_models.save_pipeline(tmp_path / "model", unet=unet)
    loaded = load_weights(find_model(spec(folder)).network, UNet2DModel)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert_same_weights(loaded, unet.float())


@pytest.mark.parametrize("problem", ["missing", "extra", "shape", "truncated", "text"])
def test_weights_that_do_not_fit_are_refused(folder, problem):
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    if problem == "missing":
        del tensors["conv_in.bias"]
    elif problem == "extra":
        tensors["conv_of_another_network.bias"] = torch.zeros(3)
    elif problem == "shape":
        tensors["conv_in.bias"] = torch.zeros(5)
    save_file(tensors, path, metadata={"format": "pt"})
    if problem == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif problem == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError) as caught:
        load_weights(find_model(spec(folder)).network, UNet2DModel)
    assert str(folder / "unet") in str(caught.value)


def test_attention_weights_under_their_old_names_load(folder):
    """google/ddpm-* and their like were saved before diffusers renamed its attention layers."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "unet" / WEIGHTS
    expected = load_weights(find_model(spec(folder)).network, UNet2DModel)
    renamed = {}
    for name, tensor in load_file(path).items():
        for today, once in new.items():
            name = name.replace(f".{today}.", f".{once}.")
        renamed[name] = tensor
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, path, metadata={"format": "pt"})
    assert_same_weights(load_weights(find_model(spec(folder)).network, UNet2DModel), expected)


def test_what_is_not_there_is_named(tmp_path):
    assert "neither model_index.json nor config.json" in refusal(tmp_path)
    assert "there is no such folder" in refusal(tmp_path / "absent")
    assert "ships no such folder" in refusal("shipped:demo/nothing")
    assert "nothing of a model is there" in refusal("memory://bucket/nothing")
    (tmp_path / "one.safetensors").write_bytes(b"")
    assert "a single file" in refusal(tmp_path / "one.safetensors")


def test_configurations_that_are_not_json_objects(folder):
    config = folder / "unet" / "config.json"
    config.write_text("{")
    assert f"{config}: not readable as JSON" in refusal(folder)
    config.write_text("[]")
    assert "a JSON object" in refusal(folder)
    config.unlink()
    assert "there is no such file" in refusal(folder)


def test_subfolder_must_lie_inside(folder):
    assert "model.subfolder unet2" in refusal(folder, subfolder="unet2")
    assert "model.subfolder .." in refusal(folder, subfolder="..")


def test_a_hub_id_needs_its_commit():
    assert "model.revision" in refusal("google/ddpm-cifar10-32")


@pytest.fixture
def unreachable_hub(monkeypatch, tmp_path):
    """No network as far as the hub's client knows, which spares the test its retries; and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_without_network_says_so(unreachable_hub):
    message = refusal("someone/some-model", revision=COMMIT)
    assert "can't be reached" in message
    assert COMMIT[:12] in message


def test_a_pinned_hub_id_in_the_cache_needs_no_network(unreachable_hub, saved):
    shutil.copytree(saved, unreachable_hub / "models--someone--some-model" / "snapshots" / COMMIT)
    cached = find_model(spec("someone/some-model", revision=COMMIT))
    assert cached.digest == find_model(spec(saved)).digest


def assert_same_weights(network, expected):
    loaded, wanted = network.state_dict(), expected.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_whole_weights_beside_parts_are_refused(folder):
    """diffusers would load the parts, while the digest told of the whole."""
    index = {"weight_map": {"conv_in.bias": WEIGHTS}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "keep one of them" in refusal(folder)
