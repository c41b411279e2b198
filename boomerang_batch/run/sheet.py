"""Contact sheets: what came out, and what went in beside it.

Outputs go to OUT. Before/after pairs show the input, so under anonymize they go to the private dir and
nowhere else. Which samples are shown is fixed by their names, so a resumed run draws the same sheet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import fields, images
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import BoomerangError, StorageError
from boomerang_batch.run.commit import TAR_SUFFIX
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.naming import Naming, member_key
from boomerang_batch.run.record import SHEET_NAME
from boomerang_batch.run.tasks import ShardReport, Task

PAIRS_NAME = "before-after.png"
_SHARDS, _PER_SHARD = 8, 8

_log = logging.getLogger(__name__)


def publish_sheets(
    recipe: Recipe,
    out: str,
    private_dir: str | None,
    naming: Naming,
    tasks: Sequence[Task],
    done: Sequence[ShardReport],
) -> None:
    """Draw and publish both sheets from the first shards of the output."""
    finished = {report.name for report in done if report.counts.get("ok")}
    chosen = sorted((task for task in tasks if task.name in finished), key=lambda task: task.name)[:_SHARDS]
    outputs = {task: dict(_outputs(recipe, storage.join(out, task.name + TAR_SUFFIX))) for task in chosen}
    outputs = {task: after for task, after in outputs.items() if after}
    if not outputs:
        return
    sheet = images.contact_sheet([list(after.values()) for after in outputs.values()])
    storage.publish_bytes(sheet, storage.join(out, SHEET_NAME))

    home = private_dir if recipe.purpose == "anonymize" else out
    if home is None:
        return
    pairs = []
    for task, after in outputs.items():
        try:
            before = dict(_inputs(recipe, naming, task, wanted=set(after)))
        except (StorageError, OSError):
            # A finished run needs its inputs no more, and they may be gone by now.
            said = "the input of shard %s can't be read; %s stays as it is"
            _log.warning(said, task.name, PAIRS_NAME, extra={"shard": task.name, **PLAIN})
            return
        pairs.append([before[key] for key in after if key in before])
        pairs.append([after[key] for key in after if key in before])
    storage.publish_bytes(images.contact_sheet(pairs), storage.join(home, PAIRS_NAME))


def _outputs(recipe: Recipe, url: str) -> Iterator[tuple[str, np.ndarray]]:
    """The first pictures of an output shard, by key."""
    shown = 0
    with storage.open_read(url) as stream:
        for item in read_samples(stream, shard=url):
            picture = _picture(recipe, item) if isinstance(item, Sample) else None
            if isinstance(item, Sample) and picture is not None:
                yield item.key, picture
                shown += 1
                if shown == _PER_SHARD:
                    return


def _inputs(
    recipe: Recipe, naming: Naming, task: Task, *, wanted: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The pictures in the input shard that `wanted` output keys were made from, by output key."""
    missing = set(wanted)
    with storage.open_read(task.url) as stream:
        for item in read_samples(stream, shard=task.name):
            if not missing:
                return
            if not isinstance(item, Sample):
                continue
            for variant in range(recipe.outputs):
                row_key = naming.row_key(shard=task.source_stem, key=item.key, variant=variant)
                key = member_key(recipe, row_key, variant)
                picture = _picture(recipe, item) if key in missing else None
                missing.discard(key)
                if picture is not None:
                    yield key, picture


def _picture(recipe: Recipe, sample: Sample) -> np.ndarray | None:
    """Small, as the sheet will show it: many large ones would not fit into memory."""
    try:
        name = fields.image_field(sample, recipe.images)
        picture = images.decode(sample.fields[name], field=name, channels=3, policy=recipe.images)
        return images.fitted(picture.pixels)
    except BoomerangError:
        return None
