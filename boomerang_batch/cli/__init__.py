"""The command line: parse, call, print, exit code. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import logging
from typing import Any

import click

from boomerang_batch import __version__
from boomerang_batch.cli.audit import audit
from boomerang_batch.cli.choosing import calibrate_command, sweep_command
from boomerang_batch.cli.demo import demo
from boomerang_batch.cli.doctor import doctor
from boomerang_batch.cli.jobs import list_jobs, logs, stop, submit
from boomerang_batch.cli.manifest import manifest
from boomerang_batch.cli.pack import pack
from boomerang_batch.cli.plan import plan
from boomerang_batch.cli.regenerate import explain, regenerate
from boomerang_batch.cli.report import report
from boomerang_batch.cli.run import run
from boomerang_batch.cli.status import status
from boomerang_batch.cli.verify import verify
from boomerang_batch.errors import BoomerangError
from boomerang_batch.run import log_lines


class _Commands(click.Group):
    """Turns a BoomerangError into one clear line and its exit code; a bug keeps its traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BoomerangError as error:
            said = log_lines.words(error)
            told = log_lines.line(logging.ERROR, said, text=f"error: {said}", exit_code=error.exit_code)
            click.echo(told, err=True)
            context.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="boomerang-batch")
def main() -> None:
    """Turn a dataset of images into a private, augmented or enhanced twin of itself.

    \b
    Start here:
      boomerang-batch demo
      boomerang-batch run demo-anonymize my-manifest.yaml OUT --private-dir PRIVATE

    Exit codes: 0 all done, 1 failed, 2 usage or configuration, 3 finished with quarantined samples or
    shards, 4 a gate was broken, 75 stopped and resumable.
    """
    log_lines.set_up("text")


_COMMANDS = (
    *(demo, plan, run, submit, status, logs, stop, list_jobs),
    *(sweep_command, calibrate_command),
    *(pack, manifest, verify, audit, report, regenerate, explain, doctor),
)
for command in _COMMANDS:
    main.add_command(command)
