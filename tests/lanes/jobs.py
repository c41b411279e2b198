"""Runs that read a bucket of a real S3 server, and write to it or to a folder here."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests import worlds
from tests.lanes.commands import Place, run_words, without_logs
from tests.lanes.seaweedfs import SeaweedFS

_buckets = (f"runs-{number}" for number in itertools.count(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run, and the server it stands on."""

    server: SeaweedFS
    bucket: str
    out: str
    place: Place
    words: tuple[str, ...]

    def tree(self) -> Mapping[str, bytes]:
        """What the run has left in OUT, logs apart."""
        if self.out.startswith("s3://"):
            return without_logs(self.server.tree(self.bucket, "out"))
        return worlds.tree(Path(self.out))

    def markers(self) -> int:
        """How many shards are done."""
        if self.out.startswith("s3://"):
            names = self.server.names(self.bucket, "out/")
        else:
            names = [path.name for path in Path(self.out).glob("*")]
        return sum(name.endswith("_stats.json") for name in names)


def job(
    server: SeaweedFS,
    inputs: Mapping[str, bytes],
    work: Path,
    url: str | None = None,
    out: str | None = None,
    **environment: str,
) -> Job:
    """`inputs` in a new bucket, and the words of a run over them to `out`, else to the bucket.

    The run takes `url` for the store.
    """
    bucket = next(_buckets)
    server.make_bucket(bucket)
    for name, data in inputs.items():
        server.put(bucket, f"in/{name}", data)
    place = Place(work=work, environment=server.environment_at(url or server.url, **environment))
    source, out = f"s3://{bucket}/in", out or f"s3://{bucket}/out"
    words = run_words(f"{source}/recipe.yaml", f"{source}/manifest.yaml", out, place)
    return Job(server=server, bucket=bucket, out=out, place=place, words=words)


def until(true: Callable[[], bool], *, within_s: float = 240) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
