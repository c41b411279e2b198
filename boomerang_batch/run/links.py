"""The table of pseudonyms: what leads from an output row back to its input. It lives in the private dir alone.

One Parquet file per shard, `links/<stem>.parquet`, written before the shard's marker, so a committed shard
always has its links. It also keeps what OUT may not: the sentence that says why a sample failed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.data.provenance import ROW_GROUP_ROWS, Row
from boomerang_batch.errors import ObjectMissingError, PrivateDirError
from boomerang_batch.run.ledger import Source
from boomerang_batch.run.tasks import Task

SCHEMA = pa.schema(
    [
        pa.field("row_key", pa.string()),
        pa.field("variant", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("source_url", pa.string(), nullable=False),
        pa.field("source_key", pa.string()),
        pa.field("offset", pa.int64(), nullable=False),
    ]
)


def write_links(private_dir: str, task: Task, rows: Iterable[tuple[Source, Row]]) -> None:
    """Publish the links of one shard. Built in memory: a killed worker leaves its scratch folder behind."""
    records = (
        {
            "row_key": row.key,
            "variant": row.variant,
            "status": row.status,
            "reason": row.reason,
            "detail": source.detail,
            "source_url": storage.without_secrets(task.url),
            "source_key": source.key,
            "offset": source.offset,
        }
        for source, row in rows
    )
    built = io.BytesIO()
    with pq.ParquetWriter(built, SCHEMA, compression="zstd") as writer:
        while group := list(itertools.islice(records, ROW_GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
    storage.make_folder(storage.join(private_dir, "links"))
    storage.publish_bytes(built.getvalue(), links_url(private_dir, task.name))


def read_links(private_dir: str, name: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The links of shard `name`. Raises PrivateDirError where there are none, or they are no such table."""
    url = links_url(private_dir, name)
    try:
        with storage.open_read(url) as stream:
            return pq.read_table(stream, columns=columns)
    except ObjectMissingError as error:
        raise PrivateDirError(
            f"{url} is missing, which tells the sources of shard {name}; give the run's own private dir"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise PrivateDirError(f"{url} is not a table of links: {error}") from error


def links_url(private_dir: str, name: str) -> str:
    """Where the links of shard `name` are."""
    return storage.join(private_dir, "links", f"{name}.parquet")
