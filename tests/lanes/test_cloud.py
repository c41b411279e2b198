"""The emulators of Azure's and Google's stores: the demo there and back, and what storage promises."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.lanes.azurite import Azurite
from tests.lanes.commands import Place, demo_inputs, run_words, without_logs
from tests.lanes.fake_gcs import FakeGcs
from tests.lanes.processes import ObjectServer

pytestmark = [pytest.mark.lane, pytest.mark.timeout(600)]

_buckets = (f"lane-{number}" for number in itertools.count(1))


@pytest.fixture(scope="module", params=[Azurite, FakeGcs], ids=["azure", "gcs"])
def cloud(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with request.param(tmp_path_factory.mktemp("cloud")) as server:
        yield server


PROMISES = """
import hashlib, json, sys, threading
from pathlib import Path
from boomerang_batch import storage
from boomerang_batch.errors import ObjectExistsError, StorageError

folder, source = sys.argv[1], Path(sys.argv[2])
found = {}

def refusal(call, kind=StorageError):
    try:
        call()
    except kind as error:
        return str(error)
    return None

url = folder + "/large.tar"
storage.publish(source, url)
with storage.open_read(url) as stream:
    found["large"] = hashlib.file_digest(stream, "sha256").hexdigest()
found["size"] = storage.size(url)
storage.publish_bytes(b"short", url)
found["replaced"] = storage.read_bytes(url).decode()

storage.create_only(folder + "/a.json", b"first")
found["second"] = refusal(lambda: storage.create_only(folder + "/a.json", b"second"), ObjectExistsError)
found["kept"] = storage.read_bytes(folder + "/a.json").decode()

wins, start = [], threading.Barrier(16)
def racer(name):
    for number in range(10):
        start.wait(60)
        create = lambda: storage.create_only(f"{folder}/race/{number}", name.encode())
        if refusal(create, ObjectExistsError) is None:
            wins.append((number, name))
racers = [threading.Thread(target=racer, args=(f"racer {each}",)) for each in range(16)]
for each in racers:
    each.start()
for each in racers:
    each.join()
found["wins"] = sorted(number for number, _ in wins)
found["told"] = all(storage.read_bytes(f"{folder}/race/{number}").decode() == name for number, name in wins)

found["names"] = storage.list_names(folder)
found["glob"] = storage.glob(folder + "/*.json")
found["missing"] = refusal(lambda: storage.read_bytes(folder + "/missing.tar"))
found["there"] = [storage.exists(folder + "/a.json"), storage.exists(folder + "/missing")]
storage.delete(folder + "/a.json")
storage.delete(folder + "/a.json")
found["left"] = storage.list_names(folder)
print(json.dumps(found))
"""


def test_storage_keeps_its_promises(cloud: ObjectServer, tmp_path: Path):
    """In a process of its own, for a client may read its environment when it is imported."""
    source = tmp_path / "large"
    source.write_bytes(bytes(range(256)) * 200_000)
    url = cloud.make_bucket(next(_buckets)) + "/out"
    place = Place(work=tmp_path / "work", environment=cloud.environment)
    command = [sys.executable, "-c", PROMISES, url, str(source)]
    ended = subprocess.run(command, env=place.environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    missing = found.pop("missing")
    assert f"{url}/missing.tar" in missing
    assert "nothing at that path" in missing
    assert f"{url}/a.json" in found.pop("second")
    assert found == {
        "large": hashlib.sha256(source.read_bytes()).hexdigest(),
        "size": 51_200_000,
        "replaced": "short",
        "kept": "first",
        "wins": list(range(10)),
        "told": True,
        "names": ["a.json", "large.tar", "race"],
        "glob": [f"{url}/a.json"],
        "there": [True, False],
        "left": ["large.tar", "race"],
    }


@pytest.mark.timeout(1800)
def test_the_demo_gives_the_same_bytes_there_and_back(
    cloud: ObjectServer, demo_here: Mapping[str, bytes], tmp_path: Path
):
    bucket = next(_buckets)
    home = cloud.make_bucket(bucket)
    for name, data in demo_inputs().items():
        cloud.put(bucket, f"in/{name}", data)
    place = Place(work=tmp_path / "work", environment=cloud.environment)
    words = run_words(f"{home}/in/recipe.yaml", f"{home}/in/manifest.yaml", f"{home}/out", place)
    place.call(*words).expect(0)
    assert without_logs(cloud.tree(bucket, "out")) == demo_here
    verified = place.call("verify", f"{home}/out", "--deep").expect(0)
    assert f"{sum(name.endswith('.tar') for name in demo_here)} shards" in verified.stdout


def test_a_run_resumes_where_the_server_was_started_again(
    cloud: ObjectServer, tiny_inputs: Path, tiny_here: Mapping[str, bytes], tmp_path: Path
):
    bucket = next(_buckets)
    home = cloud.make_bucket(bucket)
    for path in tiny_inputs.iterdir():
        cloud.put(bucket, f"in/{path.name}", path.read_bytes())
    place = Place(work=tmp_path / "work", environment=cloud.environment)
    words = run_words(f"{home}/in/recipe.yaml", f"{home}/in/manifest.yaml", f"{home}/out", place)
    place.call(*words).expect(0)
    cloud.kill()
    cloud.start()
    again = place.call(*words, "--json").expect(0)
    assert json.loads(again.stdout)["shards"] == {
        "done": 0,
        "there": 12,
        "mended": 0,
        "quarantined": 0,
        "left": 0,
    }
    assert without_logs(cloud.tree(bucket, "out")) == tiny_here
