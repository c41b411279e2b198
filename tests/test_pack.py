"""Packing folders: every image once and byte for byte, every other file named, the same shards every time."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.manifest_build import check_manifest
from boomerang_batch.data.pack import pack_folder
from boomerang_batch.data.shards import read_samples
from boomerang_batch.errors import ConfigError


def picture(path, seed=0, format="png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path, format)
    return path.read_bytes()


@pytest.fixture
def classes(tmp_path):
    """A folder with two classes, and the bytes of each of its images by key."""
    folder = tmp_path / "My Photos"
    images = {}
    for seed in range(7):
        name = ["cat", "dog"][seed % 2]
        images[f"{name}/{seed}"] = picture(folder / name / f"{seed}.png", seed)
    images["dog/deep/x_1"] = picture(folder / "dog" / "deep" / "x.1.JPG", 9, "jpeg")
    return folder, images


def samples(manifest):
    found = []
    for entry in manifest.shards:
        with Path(entry.url).open("rb") as stream:
            found += [(entry.stem, sample) for sample in read_samples(stream, shard=entry.url)]
    return found


def test_classes_become_labels_and_images_stay_as_they_are(classes, tmp_path):
    folder, images = classes
    packed = pack_folder(str(folder), str(tmp_path / "out"), samples_per_shard=3)
    assert packed.classes == ("cat", "dog")
    assert packed.left_out == ()
    assert [entry.stem for entry in packed.manifest.shards] == [f"my-photos-{n:06}" for n in range(3)]
    assert [entry.samples for entry in packed.manifest.shards] == [3, 3, 2]
    found = {sample.key: sample.fields for _, sample in samples(packed.manifest)}
    assert found.keys() == images.keys()
    for key, data in images.items():
        label = int(key.startswith("dog"))
        field = "jpg" if "deep" in key else "png"
        expected = {
            field: data,
            "cls": str(label).encode(),
            "json": json.dumps({"class_name": packed.classes[label]}),
        }
        assert found[key].keys() == expected.keys()
        assert (found[key][field], found[key]["cls"]) == (data, expected["cls"])
        assert json.loads(found[key]["json"]) == {"class_name": packed.classes[label]}
    assert check_manifest(load_manifest(str(tmp_path / "out" / "manifest.yaml"))) == []


def test_the_same_folder_gives_the_same_bytes(classes, tmp_path):
    folder, _ = classes
    copy = tmp_path / "elsewhere" / "My Photos"
    shutil.copytree(folder, copy)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    trees = []
    for number, source in enumerate((folder, copy)):
        out = tmp_path / f"out{number}"
        pack_folder(str(source), str(out), samples_per_shard=3)
        trees.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert trees[0] == trees[1]
    assert set(trees[0]) == {"manifest.yaml", *(f"my-photos-{n:06}.tar" for n in range(3))}


def test_a_flat_folder_has_no_labels(tmp_path):
    data = picture(tmp_path / "flat" / "a.png")
    packed = pack_folder(str(tmp_path / "flat"), str(tmp_path / "out"))
    ((_, sample),) = samples(packed.manifest)
    assert (packed.classes, sample.key, dict(sample.fields)) == ((), "a", {"png": data})


def test_shards_mix_the_classes(tmp_path):
    for seed in range(60):
        picture(tmp_path / "in" / f"class{seed // 30}" / f"{seed}.png", seed)
    packed = pack_folder(str(tmp_path / "in"), str(tmp_path / "out"), samples_per_shard=30)
    labels = {entry.stem: set() for entry in packed.manifest.shards}
    for stem, sample in samples(packed.manifest):
        labels[stem].add(sample.fields["cls"])
    assert all(found == {b"0", b"1"} for found in labels.values())


def test_every_other_file_is_named_with_what_it_is(classes, tmp_path, caplog):
    folder, images = classes
    (folder / "cat" / "notes.txt").write_text("hello")
    (folder / "cat" / "text.png").write_text("hello")
    (folder / "cat" / "empty.jpg").touch()
    (folder / "cat" / ".hidden.png").write_bytes(images["cat/0"])
    (folder / "cat" / "link.png").symlink_to(folder / "cat" / "0.png")
    (folder / "linked").symlink_to(folder / "cat")
    picture(folder / "dog" / "moving.gif", format="gif")
    packed = pack_folder(str(folder), str(tmp_path / "out"))
    assert packed.left_out == (
        "cat/.hidden.png: hidden",
        "cat/empty.jpg: empty, not png, jpeg or webp",
        "cat/link.png: a link or no regular file",
        "cat/notes.txt: no image, not png, jpeg or webp",
        "cat/text.png: no image, not png, jpeg or webp",
        "dog/moving.gif: GIF, not png, jpeg or webp",
        "linked: a link or no regular file",
    )
    assert len(caplog.records) == 7
    assert len(samples(packed.manifest)) == len(images)


def test_a_wrong_extension_is_put_right(tmp_path):
    data = picture(tmp_path / "in" / "a.png", format="jpeg")
    ((_, sample),) = samples(pack_folder(str(tmp_path / "in"), str(tmp_path / "out")).manifest)
    assert dict(sample.fields) == {"jpg": data}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no png, jpeg or webp images"),
        (["a.png", "cat/b.png"], "a.png lies beside the class folder of cat/b.png"),
        (["cat/a.png", "cat/a.jpg"], "cat/a.jpg and cat/a.png would both have the key cat/a"),
        (["cat/a.b.png", "cat/a_b.png"], "would both have the key cat/a_b"),
        (["c" * 200 + "/a.png"], "shorten the key"),
        ([b"cat/\xff.png"], "not valid UTF-8"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(files, says, tmp_path):
    (tmp_path / "in").mkdir()
    for name in files:
        picture(tmp_path / "in" / os.fsdecode(name))
    with pytest.raises(ConfigError, match=says):
        pack_folder(str(tmp_path / "in"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_out_must_be_another_empty_place(classes, tmp_path):
    folder, _ = classes
    for out in (folder, folder / "out"):
        with pytest.raises(ConfigError, match="choose another OUT"):
            pack_folder(str(folder), str(out))
    pack_folder(str(folder), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="already"):
        pack_folder(str(folder), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="no folder"):
        pack_folder(str(tmp_path / "absent"), str(tmp_path / "out2"))


@pytest.mark.slow
def test_the_datasets_library_reads_packed_shards(classes, tmp_path, monkeypatch):
    folder, images = classes
    shutil.rmtree(folder / "dog" / "deep")  # datasets wants the same fields in every sample
    packed = pack_folder(str(folder), str(tmp_path / "out"), samples_per_shard=4)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    rows = datasets.load_dataset(
        "webdataset",
        data_files={"train": [entry.url for entry in packed.manifest.shards]},
        split="train",
        streaming=True,
    )
    found = {row["__key__"]: row for row in rows}
    assert found.keys() == {key for key in images if "deep" not in key}
    for key, row in found.items():
        assert row["cls"] == int(key.startswith("dog"))
        assert row["json"] == {"class_name": key.partition("/")[0]}
        assert np.asarray(row["png"]).shape == (6, 5, 3)
