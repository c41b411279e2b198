"""An arm of peers.py or peer_data_juicer.py as a command: ARM JOB.json OUT in, one JSON line out.

Python's own library alone, for an arm may run in an environment that does not hold this project.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(
    doc: str | None, arms: Sequence[str], run: Callable[[str, dict[str, Any], Path], dict[str, Any]]
) -> None:
    """Do the job that the command line names, by `run(arm, job, out)`, and print what it tells."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=arms)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(json.dumps(run(args.arm, json.loads(args.job.read_text()), args.out.resolve())))
