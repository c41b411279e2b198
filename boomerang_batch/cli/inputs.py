"""What several commands read alike: recipes by name or path, and the wish to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from boomerang_batch.config.pipeline import Recipe


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that loads a recipe's model: --device, --threads, --set."""
    options = (
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto: CUDA where there is any.",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="CPU threads a worker.  [default: all cores]"
        ),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load_recipe(ref: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe called `ref` (a shipped name, a path or a URL), with `--set` overrides applied."""
    from boomerang_batch import shipped, storage
    from boomerang_batch.config.pipeline import parse_recipe
    from boomerang_batch.errors import RecipeError

    path = shipped.named("pipelines", ref)
    url = str(path) if path else shipped.resolve(ref)
    if not storage.exists(url):
        known = ", ".join(shipped.names("pipelines"))
        raise RecipeError(f"{ref}: no such pipeline file; shipped ones: {known}")
    try:
        text = storage.read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{ref}: not a text file") from error
    return parse_recipe(text, source=ref, overrides=overrides)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets. A second one ends the process the usual way."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)
        # Not by print: the signal may have come in the middle of one, and the reader of stderr may be gone.
        with contextlib.suppress(OSError):
            os.write(2, b"stopping at the next batch boundary; once more to end at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
