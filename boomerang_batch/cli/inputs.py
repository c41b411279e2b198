"""What several commands read alike: recipes by name or path, the options of a run, and the wish to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from boomerang_batch.run import log_lines

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


def rig_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that loads a finished run's model again: --model, --device, --threads."""
    options = (
        click.option(
            "--model", metavar="FOLDER", help="Where the model is, if it is neither shipped nor pinned."
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto: CUDA where there is any.",
        ),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the run's]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """How a run is to be done, by the options that `run` and `submit` share. Named as they are."""

    private_dir: str | None
    workers: int | None
    device: str
    threads: int | None
    overrides: tuple[str, ...]
    limit: int | None
    extend: bool
    accept_stack: bool
    only_failed: bool
    if_held: str
    log_format: log_lines.Format

    def words(self) -> list[str]:
        """The options that say the same to `run` in another folder."""
        from boomerang_batch import storage

        named = {
            "--private-dir": self.private_dir and storage.absolute(self.private_dir),
            "--workers": self.workers,
            "--device": self.device,
            "--threads": self.threads,
            "--limit": self.limit,
            "--if-held": self.if_held,
            "--log-format": self.log_format,
        }
        switches = {
            "--extend": self.extend,
            "--accept-stack": self.accept_stack,
            "--only-failed": self.only_failed,
        }
        return [
            *(f"{name}={value}" for name, value in named.items() if value is not None),
            *(f"--set={override}" for override in self.overrides),
            *(name for name, on in switches.items() if on),
        ]


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `run` and `submit` share; the command gets them as one `flags`."""

    @functools.wraps(command)
    def gathered(*words: Any, **given: Any) -> None:
        flags = RunFlags(**{field.name: given.pop(field.name) for field in dataclasses.fields(RunFlags)})
        command(*words, flags=flags, **given)

    options = (
        click.option(
            "--private-dir", metavar="DIR", help="Secret and tables that link back; anonymize needs it."
        ),
        click.option(
            "--workers", type=click.IntRange(min=1), help="Ray workers.  [default: one per GPU, else 1]"
        ),
        recipe_options,
        click.option(
            "--limit", type=click.IntRange(min=1), metavar="N", help="Only the manifest's first N shards."
        ),
        click.option("--extend", is_flag=True, help="Accept a manifest that adds shards to the run in OUT."),
        click.option(
            "--accept-stack", is_flag=True, help="Resume on another stack, and record that in run.json."
        ),
        click.option(
            "--only-failed",
            is_flag=True,
            help="Do failed samples again, into appendix shards STEM~1, ...",
        ),
        click.option(
            "--if-held",
            type=click.Choice(["stop", "wait"]),
            default="stop",
            show_default=True,
            help="What to do while another run is at work on OUT.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(log_lines.FORMATS),
            default="text",
            show_default=True,
            help="What the run says on stderr: text, with a progress bar on a terminal, or one JSON object a "
            "line, with shard and key where it is about one.",
        ),
    )
    wrapped: Callable[..., None] = gathered
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


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
            said = "stopping at the next batch boundary; once more to end at once"
            os.write(2, f"{log_lines.line(logging.WARNING, said)}\n".encode())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
