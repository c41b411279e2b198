"""Whole runs from S3 to S3, by the command line: the same bytes as on local disk, whatever happens."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.lanes.commands import demo_inputs, ended
from tests.lanes.fault_proxy import FaultProxy
from tests.lanes.faults import INTERNAL_ERROR, SLOW_DOWN, Cut, Rule, Shorten, Stall
from tests.lanes.jobs import job, until
from tests.lanes.seaweedfs import SeaweedFS

pytestmark = [pytest.mark.lane, pytest.mark.timeout(600)]


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.url, seed=7) as proxy:
        yield proxy


@pytest.mark.timeout(1800)
def test_the_demo_gives_the_same_bytes_from_s3_to_s3(
    seaweed: SeaweedFS, demo_here: Mapping[str, bytes], tmp_path: Path
):
    demo = job(seaweed, demo_inputs(), tmp_path / "work")
    demo.place.call(*demo.words).expect(0)
    assert demo.tree() == demo_here
    verified = demo.place.call("verify", f"s3://{demo.bucket}/out", "--deep").expect(0)
    assert f"{sum(name.endswith('.tar') for name in demo_here)} shards" in verified.stdout
    assert seaweed.unfinished_uploads(demo.bucket) == []


def test_verify_reads_every_byte_on_s3(
    seaweed: SeaweedFS, inputs: Mapping[str, bytes], tiny_here: Mapping[str, bytes], tmp_path: Path
):
    tiny = job(seaweed, inputs, tmp_path / "work")
    tiny.place.call(*tiny.words).expect(0)
    assert tiny.tree() == tiny_here
    name = min(name for name in tiny_here if name.endswith(".tar"))
    harmed = bytearray(tiny_here[name])
    harmed[-2000] ^= 1  # within the last member or its padding; the length stays
    seaweed.put(tiny.bucket, f"out/{name}", bytes(harmed))
    found = tiny.place.call("verify", f"s3://{tiny.bucket}/out", "--deep").expect(1)
    assert f"s3://{tiny.bucket}/out/{name} does not have the digest its marker says" in found.stdout


@pytest.mark.parametrize("address", ["inline", "local"])
def test_a_killed_run_resumes_to_the_same_bytes(
    seaweed: SeaweedFS,
    inputs: Mapping[str, bytes],
    tiny_here: Mapping[str, bytes],
    tmp_path: Path,
    short_folder: Path,
    address: str,
):
    """With Ray the workers die with their driver; what one of them had begun to upload is nobody's."""
    tiny = job(seaweed, inputs, tmp_path / "work", RAY_TMPDIR=str(short_folder))
    words = (*tiny.words, "--address", address)
    process = tiny.place.begin(*words)
    try:
        until(lambda: tiny.markers() >= 2 or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        killed = ended(process)
    assert killed.code == -signal.SIGKILL, killed
    assert 2 <= tiny.markers() < 12
    resumed = tiny.place.call(*words, "--json").expect(0)
    report = json.loads(resumed.stdout)
    assert report["shards"]["there"] >= 2
    assert report["shards"]["there"] + report["shards"]["done"] == 12
    assert tiny.tree() == tiny_here


def test_a_server_that_is_killed_and_comes_back_costs_time_alone(
    inputs: Mapping[str, bytes], tiny_here: Mapping[str, bytes], tmp_path: Path
):
    with SeaweedFS(tmp_path / "own") as server:
        tiny = job(server, inputs, tmp_path / "work")
        process = tiny.place.begin(*tiny.words)
        try:
            until(lambda: tiny.markers() >= 2 or process.poll() is not None)
            assert process.poll() is None
            server.kill()
            time.sleep(8)
            assert process.poll() is None
            server.start()
        except BaseException:
            process.kill()
            raise
        finally:
            said = ended(process)
        said.expect(0)
        assert "trying again" in said.stderr
        assert tiny.tree() == tiny_here


def test_a_storm_changes_no_byte(
    seaweed: SeaweedFS,
    inputs: Mapping[str, bytes],
    tiny_here: Mapping[str, bytes],
    proxy: FaultProxy,
    tmp_path: Path,
):
    proxy.rules = [Rule(fault=SLOW_DOWN, share=0.3)]
    tiny = job(seaweed, inputs, tmp_path / "work", proxy.url)
    tiny.place.call(*tiny.words).expect(0)
    assert tiny.tree() == tiny_here
    assert len(proxy.seen(faults=True)) > 20


def test_bad_weather_of_every_kind_changes_no_byte(
    seaweed: SeaweedFS,
    inputs: Mapping[str, bytes],
    tiny_here: Mapping[str, bytes],
    proxy: FaultProxy,
    tmp_path: Path,
):
    proxy.rules = [
        Rule(fault=Stall(seconds=600), method="GET", path=r"s-003\.tar", times=1),
        Rule(fault=Cut(), method="PUT", path="_stats", share=0.5),
        Rule(fault=Cut(after_bytes=5000, reset=True), method="GET", path=r"\.tar", share=0.3, times=20),
        Rule(fault=Cut(of="request", after_bytes=100, reset=True), method="PUT", share=0.2, times=10),
        Rule(fault=Shorten(missing_bytes=10), method="GET", path="parquet", share=0.3, times=10),
        Rule(fault=INTERNAL_ERROR, share=0.1),
    ]
    tiny = job(seaweed, inputs, tmp_path / "work", proxy.url)
    tiny.place.call(*tiny.words).expect(0)
    assert tiny.tree() == tiny_here
    assert {type(each.fault) for each in proxy.seen(faults=True)} >= {Stall, Cut, type(INTERNAL_ERROR)}


def test_a_wrong_secret_ends_the_run_at_once(
    seaweed: SeaweedFS, inputs: Mapping[str, bytes], proxy: FaultProxy, tmp_path: Path
):
    tiny = job(seaweed, inputs, tmp_path / "work", proxy.url, AWS_SECRET_ACCESS_KEY="Zq0123456789abcdefghKx")
    refused = tiny.place.call(*tiny.words).expect(1)
    assert refused.stderr.startswith("error: can't ")
    assert f"s3://{tiny.bucket}/in/recipe.yaml: permission denied" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert len(proxy.seen()) <= 2
    assert seaweed.names(tiny.bucket, "out/") == []


def test_a_bucket_that_is_not_there_ends_the_run_at_once(
    seaweed: SeaweedFS, inputs: Mapping[str, bytes], proxy: FaultProxy, tmp_path: Path
):
    tiny = job(seaweed, inputs, tmp_path / "work", proxy.url)
    words = [word.replace(f"s3://{tiny.bucket}/out", "s3://never-made/out") for word in tiny.words]
    refused = tiny.place.call(*words).expect(1)
    assert refused.stderr.splitlines()[-1].startswith("error: can't ")
    assert "s3://never-made/out" in refused.stderr.splitlines()[-1]


def test_a_bucket_that_goes_in_mid_run_ends_the_run(inputs: Mapping[str, bytes], tmp_path: Path):
    with SeaweedFS(tmp_path / "own") as server:
        tiny = job(server, inputs, tmp_path / "work")
        server.make_bucket("elsewhere")
        words = [word.replace(f"s3://{tiny.bucket}/out", "s3://elsewhere/out") for word in tiny.words]
        process = tiny.place.begin(*words)
        try:
            until(lambda: bool(server.names("elsewhere", "out/")) or process.poll() is not None)
            assert process.poll() is None
            server.drop_bucket("elsewhere")
            begun = time.monotonic()
        except BaseException:
            process.kill()
            raise
        finally:
            said = ended(process)
        assert time.monotonic() - begun < 60
        said.expect(1)
        assert said.stderr.splitlines()[-1].startswith("error: can't ")
        assert "s3://elsewhere/out" in said.stderr.splitlines()[-1]


def test_a_model_is_read_from_the_store(
    seaweed: SeaweedFS,
    inputs: Mapping[str, bytes],
    tiny_here: Mapping[str, bytes],
    tiny_model: Path,
    tmp_path: Path,
):
    tiny = job(seaweed, inputs, tmp_path / "work")
    for path in tiny_model.rglob("*"):
        if path.is_file():
            seaweed.put(tiny.bucket, f"model/{path.relative_to(tiny_model)}", path.read_bytes())
    tiny.place.call(*tiny.words, "--set", f"model.source=s3://{tiny.bucket}/model").expect(0)
    record, here = (json.loads(tree["run.json"]) for tree in (tiny.tree(), tiny_here))
    assert record["model_digest"] == here["model_digest"]  # the source is in the recipe, and so in the noise
    assert tiny.markers() == 12


def test_a_manifest_is_built_and_checked_on_s3(seaweed: SeaweedFS, inputs: Mapping[str, bytes], tmp_path: Path):
    tiny = job(seaweed, inputs, tmp_path / "work")
    built = f"s3://{tiny.bucket}/in/built.parquet"
    tiny.place.call("manifest", "build", f"s3://{tiny.bucket}/in/s-*.tar", built).expect(0)
    checked = tiny.place.call("manifest", "check", built).expect(0)
    assert "12 shards: all well" in checked.stdout
    seaweed.put(tiny.bucket, "in/s-004.tar", inputs["s-005.tar"])
    checked = tiny.place.call("manifest", "check", built).expect(1)
    assert f"s3://{tiny.bucket}/in/s-004.tar: digest is" in checked.stdout
