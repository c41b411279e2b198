"""`regenerate`: an output made again is the same, or it is told why it is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from boomerang_batch.audit.sameness import distance, tolerance_for
from boomerang_batch.cli import main
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.provenance import Row, read_rows
from tests import worlds
from tests.test_appendix import breaking

pytestmark = pytest.mark.slow

ROW = Row(key="a", variant=0, status="ok", output_digest="", model_digest="", recipe_digest="", versions="")


@dataclass(frozen=True, kw_only=True)
class World:
    """A finished run and what it was made of."""

    model: Path
    recipe: Recipe
    manifest: Path
    out: Path

    @property
    def private(self) -> Path:
        return Path(f"{self.out}-private")

    def call(self, *words: object, key: str) -> Result:
        command = ["regenerate", self.out, "--key", key, "--model", self.model, "--device", "cpu", *words]
        return CliRunner().invoke(main, [str(word) for word in command])


def a_world(folder: Path, model: Path, *overrides: str, purpose: str = "anonymize") -> World:
    recipe = worlds.recipe(model, *overrides, purpose=purpose)
    manifest = worlds.save_shards(folder / "in", shards=2, samples=4)
    assert worlds.run(recipe, manifest, folder / "out").exit_code == 0
    return World(model=model, recipe=recipe, manifest=manifest, out=folder / "out")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """Anonymized, two variants."""
    return a_world(tmp_path_factory.mktemp("hidden"), tiny_model, "variants=2")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """Augmented, two variants beside their originals."""
    more = ("variants=2", "keep_originals=true")
    return a_world(tmp_path_factory.mktemp("shown"), tiny_model, *more, purpose="augment")


@pytest.fixture
def copied(tmp_path: Path, shown: World) -> World:
    """One to harm."""
    shutil.copytree(shown.out.parent, tmp_path / "copy")
    shutil.copytree(shown.model, tmp_path / shown.model.name)
    folder = tmp_path / "copy"
    return World(
        model=tmp_path / shown.model.name,
        recipe=shown.recipe,
        manifest=folder / "in" / "manifest.yaml",
        out=folder / "out",
    )


def test_every_output_of_an_anonymized_run_comes_back(hidden: World, tmp_path: Path):
    before = worlds.tree(hidden.out), worlds.tree(hidden.private)
    outputs = worlds.outputs(hidden.out)
    for pseudonym in list(outputs)[::5]:
        again = tmp_path / "again.png"
        result = hidden.call("--private-dir", hidden.private, "-o", again, key=pseudonym)
        assert result.exit_code == 0, result.output
        assert f"the pseudonym {pseudonym}, variant " in result.stdout
        assert f"identical, all {len(outputs[pseudonym]['png'])} bytes" in result.stdout
        assert again.read_bytes() == outputs[pseudonym]["png"]
    assert (worlds.tree(hidden.out), worlds.tree(hidden.private)) == before


def test_the_sources_key_will_do_where_the_private_dir_is(hidden: World):
    words = ("--private-dir", hidden.private, "--json")
    made = {}
    for variant in (0, 1):
        result = hidden.call(*words, "--variant", variant, key="img00005")
        assert result.exit_code == 0, result.output
        made[variant] = json.loads(result.stdout)
        assert made[variant]["verdict"] == "identical"
        assert (made[variant]["source_key"], made[variant]["variant"]) == ("img00005", variant)
        assert made[variant]["why"] == []
    assert made[0]["key"] != made[1]["key"]
    said = hidden.call("--private-dir", hidden.private, "--variant", 1, key="img00005").stdout
    assert f"the source's key img00005, variant 1: {made[1]['key']} in shard" in said
    several = hidden.call("--private-dir", hidden.private, key="img00005")
    assert several.exit_code == 2
    assert "has several outputs; say which with --variant: 0, 1" in several.stderr


def test_without_the_private_dir_it_refuses(hidden: World):
    key = next(iter(worlds.outputs(hidden.out)))
    for words in ((), ("--against", hidden.manifest)):
        result = hidden.call(*words, key=key)
        assert result.exit_code == 2
        assert "give it with --private-dir DIR" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_anothers_private_dir_is_refused(hidden: World, tmp_path: Path, tiny_model: Path):
    other = a_world(tmp_path, tiny_model, "variants=2")
    key = next(iter(worlds.outputs(hidden.out)))
    result = hidden.call("--private-dir", other.private, key=key)
    assert result.exit_code == 2
    assert "is the private dir of another run" in result.stderr
    result = hidden.call("--private-dir", tmp_path, key=key)
    assert result.exit_code == 2
    assert "not the private dir of a run" in result.stderr


def test_an_augmented_output_needs_its_manifest(shown: World, tmp_path: Path):
    again = tmp_path / "again.png"
    result = shown.call("--against", shown.manifest, "--variant", 1, "-o", again, key="img00006")
    assert result.exit_code == 0, result.output
    assert "key img00006, variant 1, shard s-001: identical, all " in result.stdout
    assert again.read_bytes() == worlds.outputs(shown.out)["img00006-v1"]["png"]
    result = shown.call("--variant", 1, key="img00006")
    assert result.exit_code == 2
    assert "give the run's manifest with --against MANIFEST" in result.stderr
    other = worlds.save_samples(tmp_path / "other", {"a": {"png": worlds.png(1)}})
    result = shown.call("--against", other, "--variant", 1, key="img00006")
    assert result.exit_code == 2
    assert "manifest tiny does not list the shard that s-001 was made of" in result.stderr


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        ((), "img00099", "img00099 is no row's key; the column key of OUT's *.parquet lists them"),
        ((), "img00003-v1", "it may stand for --key img00003 --variant 1"),
        (("--variant", "7"), "img00003", "has no variant 7; there is --variant -1, 0, 1"),
        ((), "img00003", "has several outputs; say which with --variant: -1, 0, 1"),
        (("--variant", "-1"), "img00003", "is the kept original, the source's own bytes"),
        (("--variant", "0", "--shard", "s-001"), "img00003", "img00003 is no row's key in shard s-001"),
    ],
)
def test_what_has_no_output_to_make_again_is_refused_with_the_fix(
    shown: World, words: tuple[str, ...], key: str, said: str
):
    result = shown.call("--against", shown.manifest, *words, key=key)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_where_the_model_is_must_be_said_and_nothing_is_put_into_out(shown: World):
    plain = ["regenerate", str(shown.out), "--key", "img00003", "--variant", "0"]
    plain += ["--against", str(shown.manifest)]
    result = CliRunner().invoke(main, plain)
    assert result.exit_code == 2
    assert "say where it is with --model" in result.stderr
    result = shown.call("--against", shown.manifest, "--variant", 0, "-o", shown.out / "x.png", key="img00003")
    assert result.exit_code == 2
    assert "lies in OUT" in result.stderr
    assert not (shown.out / "x.png").exists()


def test_a_key_in_two_shards_needs_the_shard(tmp_path: Path, tiny_model: Path):
    fields = {"png": worlds.png(1), "cls": b"1"}
    manifest = worlds.save_samples(tmp_path / "in", {"a": fields}, {"a": fields})
    recipe = worlds.recipe(tiny_model, "identity=shard+key", purpose="augment")
    worlds.run(recipe, manifest, tmp_path / "out")
    world = World(model=tiny_model, recipe=recipe, manifest=manifest, out=tmp_path / "out")
    result = world.call("--against", manifest, key="a")
    assert result.exit_code == 2
    assert "say which with --shard: s-000, s-001" in result.stderr
    result = world.call("--against", manifest, "--shard", "s-001", key="a")
    assert (result.exit_code, "shard s-001: identical" in result.stdout) == (0, True), result.output


@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_a_failed_row_is_refused_and_what_was_mended_comes_from_its_appendix(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, purpose: str
):
    recipe = worlds.recipe(tiny_model, purpose=purpose)
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=4)
    out = tmp_path / "out"
    breaks = breaking(monkeypatch, ("img00002", 0))
    worlds.run(recipe, manifest, out)
    breaks.__exit__(None, None, None)
    world = World(model=tiny_model, recipe=recipe, manifest=manifest, out=out)
    words = ("--private-dir", world.private) if purpose == "anonymize" else ("--against", manifest)
    result = world.call(*words, key="img00002")
    assert result.exit_code == 2
    assert "its row says failed, internal-error; run it again with --only-failed" in result.stderr
    worlds.run(recipe, manifest, out, only_failed=True)
    result = world.call(*words, "--json", key="img00002")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["shard"].endswith("~1")
    assert made["verdict"] == "identical"


def stretched(model: Path, factor: float) -> None:
    """Make a model's weights so many times as large."""
    (path,) = model.rglob("*.safetensors")
    save_file({name: values * factor for name, values in load_file(path).items()}, path)


def test_another_model_is_told(copied: World):
    stretched(copied.model, 1.5)
    result = copied.call("--against", copied.manifest, "--variant", 0, key="img00002")
    assert result.exit_code == 1, result.output
    assert ": differs: pixels differ by up to " in result.stdout
    assert "why: model digest: " in result.stdout
    assert result.stdout.count("why: ") == 1


def test_a_difference_within_tolerance_is_named_with_it(copied: World):
    stretched(copied.model, 1 + 3e-3)
    result = copied.call("--against", copied.manifest, "--variant", 0, "--json", key="img00002")
    made = json.loads(result.stdout)
    assert result.exit_code == 0, made
    assert made["verdict"] == "within tolerance"
    assert 1 <= made["max_difference"] <= 2
    assert made["tolerance"] == {"levels": 2, "psnr_db": None}
    assert made["psnr_db"] > 40
    said = copied.call("--against", copied.manifest, "--variant", 0, key="img00002").stdout
    assert "(tolerance: 2 levels)\nthough: model digest: " in said


def test_equal_pixels_in_other_bytes_are_told_apart(shown: World, monkeypatch: pytest.MonkeyPatch):
    real = images.encode

    def padded(picture, *, policy):
        data, format = real(picture, policy=policy)
        return data + b"\0", format

    monkeypatch.setattr(images, "encode", padded)
    result = shown.call("--against", shown.manifest, "--variant", 0, key="img00002")
    assert (result.exit_code, "identical pixels, in other bytes" in result.stdout) == (0, True), result.output


def test_another_source_is_told(copied: World):
    path = copied.manifest.parent / "s-000.tar"
    members = [
        member for number in range(4) for member in worlds.sample_members(f"img{number:05d}", number + 50)
    ]
    worlds.write_tar(path, members)
    result = copied.call("--against", copied.manifest, "--variant", 0, key="img00002")
    assert result.exit_code == 1, result.output
    assert "why: source digest: " in result.stdout
    worlds.write_tar(path, members[:6])
    result = copied.call("--against", copied.manifest, "--variant", 0, key="img00003")
    assert result.exit_code == 2
    assert "has no sample img00003" in result.stderr


def test_a_source_of_which_nothing_can_be_made_is_told(copied: World):
    path = copied.manifest.parent / "s-000.tar"
    worlds.write_tar(path, [("img00002.png", b"no image"), ("img00002.cls", b"1")])
    result = copied.call("--against", copied.manifest, "--variant", 0, key="img00002")
    assert result.exit_code == 1, result.output
    assert "why: it can't be made again: undecodable: " in result.stdout


def test_another_secret_is_told(hidden: World, monkeypatch: pytest.MonkeyPatch):
    key = next(iter(worlds.outputs(hidden.out)))
    monkeypatch.setenv("BOOMERANG_SECRET", "ab" * 32)
    result = hidden.call("--private-dir", hidden.private, key=key)
    assert result.exit_code == 1, result.output
    assert "why: secret id: secret:" in result.stdout
    assert "why: source digest: it is a MAC under the secret" in result.stdout


def test_another_stack_is_told_though_it_made_the_same(copied: World):
    record = json.loads((copied.out / "run.json").read_text())
    record["stack"]["torch"] = "1.0"
    (copied.out / "run.json").write_text(json.dumps(record))
    result = copied.call("--against", copied.manifest, "--variant", 0, key="img00002")
    assert result.exit_code == 0, result.output
    assert ": identical, all " in result.stdout
    assert "though: stack: torch (1.0 there, " in result.stdout


def test_all_that_differs_is_listed(copied: World):
    """Every reason at once, and none hides another."""
    record = json.loads((copied.out / "run.json").read_text())
    record["stack"]["numpy"] = "0.1"
    record["recipe"]["seed"] = 8
    record["recipe"]["t"] = {"fraction": 0.8}
    (copied.out / "run.json").write_text(json.dumps(record))
    stretched(copied.model, 1.5)
    path = copied.manifest.parent / "s-000.tar"
    worlds.write_tar(path, worlds.sample_members("img00002", 77))
    result = copied.call("--against", copied.manifest, "--variant", 0, key="img00002")
    assert result.exit_code == 1, result.output
    told = [line.removeprefix("why: ").partition(":")[0] for line in result.stdout.splitlines()[1:]]
    expected = ["stack", "model digest", "recipe digest", "seed id", "t", "node", "tau", "sigma", "evaluations"]
    assert [name for name in told if name in expected] == expected
    assert "label" in told  # 77 is of another class than 2


def test_an_output_that_was_harmed_is_told(copied: World):
    path = copied.out / "s-000.tar"
    (row,) = (
        row for row in read_rows(copied.out / "s-000.parquet") if (row.key, row.variant) == ("img00002", 0)
    )
    outputs = worlds.read_output(copied.out, "s-000")
    worlds.write_tar(
        path,
        [
            (f"{key}.{name}", worlds.png(99) if (key, name) == ("img00002-v0", "png") else data)
            for key, fields in outputs
            for name, data in fields.items()
        ],
    )
    result = copied.call("--against", copied.manifest, "--variant", row.variant, key="img00002")
    assert result.exit_code == 1
    assert "why: OUT's own image is not the one its row tells of: run verify --deep" in result.stdout
    with tarfile.open(path, "w"):
        pass
    result = copied.call("--against", copied.manifest, "--variant", row.variant, key="img00002")
    assert result.exit_code == 1
    assert "has no sample img00002-v0" in result.stderr


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_tolerance_takes_what_rounding_does_and_no_more(tiny_model: Path, format: str):
    """One pixel in a hundred a level off before encoding; and a picture that is plainly another."""
    policy = worlds.recipe(tiny_model, f"images.format={format}", purpose="augment").images
    generator = np.random.default_rng(0)
    for number in range(20):
        clean = worlds.pixels(worlds.png(number, (64, 64)))[..., None]
        step = (generator.random(clean.shape) < 0.01) * generator.choice([-1, 1], clean.shape)
        off = (clean.astype(int) + step).clip(0, 255).astype(np.uint8)
        files = [
            images.encode(images.Picture(pixels=pixels, alpha=None, format="png"), policy=policy)[0]
            for pixels in (clean, off, clean[::-1])
        ]
        true, near, far = (images.decode(data, field=format, channels=None, policy=policy) for data in files)
        for dtype in ("float32", "bfloat16"):
            tolerance = tolerance_for(dataclasses.replace(ROW, dtype=dtype), files[0])
            assert tolerance.takes(*distance(near, true)), (number, tolerance)
            assert not tolerance.takes(*distance(far, true)), (number, tolerance)
