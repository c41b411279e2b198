"""What all benchmarks share: what machine this is, alternating repetitions, medians, result files.

A result file names the machine, the versions and the commit it was measured on, and the load average before
each timed process, so that a reader sees whether anything else was running.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("boomerang-batch", "torch", "diffusers", "ray", "webdataset", "pillow", "numpy")


def machine(threads: int) -> dict[str, Any]:
    """Device, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() or "unknown",
    }


def cpu_name() -> str:
    """The processor's model, as Linux tells it, else the architecture alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {models[0]}" if models else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def alternate(
    arms: Sequence[str], repeats: int, measure: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """`measure` each arm `repeats` times, all arms once before any again, every other round backwards.

    What warms or slows the machine over time then falls on all arms alike.
    """
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            load = round(os.getloadavg()[0], 2)
            result = measure(arm) | {"load_before": load}
            found[arm].append(result)
            print(f"round {repeat + 1}/{repeats} {arm}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return found


def run_json(command: Sequence[str], *, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a process of one arm; the last line it prints is its result. Exits with its error where it fails."""
    done = subprocess.run(
        list(command), capture_output=True, text=True, check=False, env=os.environ | (environment or {})
    )
    if done.returncode != 0 or not done.stdout.strip():
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(results: Sequence[dict[str, Any]], name: str) -> float:
    """The median of one number over an arm's repetitions."""
    return statistics.median(float(result[name]) for result in results)


def spread(results: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Its least and greatest value."""
    values = [float(result[name]) for result in results]
    return min(values), max(values)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def publish(name: str, record: dict[str, Any], markdown: str, *, folder: Path = RESULTS) -> None:
    """Write folder/NAME.json and folder/NAME.md, and print the latter on stderr, the former on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = record["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    head = (
        f"{facts['date']}, commit {facts['commit']}; {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['threads']} threads used; Python {facts['python']}, {versions}."
    )
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(f"{markdown.strip()}\n\n{head}\n")
    print(markdown, file=sys.stderr)
    print(json.dumps(record))
