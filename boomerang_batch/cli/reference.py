"""docs/cli.md: what every command answers to --help. `make docs` writes it, and a test keeps it fresh."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from boomerang_batch.cli import main as root

_WIDTH = 100
_HEAD = """\
# Command line

What each command answers to `--help`. Written by `make docs`; edit the commands, not this page.
"""


def commands() -> Iterator[click.Context]:
    """A context of fixed width for every command, parents first, in the order `--help` lists them."""
    yield from _below(root, "boomerang-batch", None)


def reference() -> str:
    """The page."""
    return _HEAD + "".join(
        f"\n## {context.command_path}\n\n```text\n{context.get_help().rstrip()}\n```\n"
        for context in commands()
    )


def _below(command: click.Command, name: str, parent: click.Context | None) -> Iterator[click.Context]:
    settings = {**command.context_settings, "terminal_width": _WIDTH, "max_content_width": _WIDTH}
    context = command.context_class(command, info_name=name, parent=parent, **settings)
    yield context
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from _below(found, child, context)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
