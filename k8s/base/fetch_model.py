"""Fetch a recipe's model into the hub's cache, and nothing else: what a worker's init container runs.

The recipe pins the commit, so there is no second place that could name another one. The worker itself then
starts with HF_HUB_OFFLINE=1 and finds the model where this left it. A model on local disk needs no fetching.
"""

from __future__ import annotations

import sys

from boomerang_batch.cli.inputs import load_recipe
from boomerang_batch.errors import BoomerangError
from boomerang_batch.models.families import find_model


def main(recipe: str) -> int:
    """Fetch the model of `recipe`; returns the exit code."""
    try:
        model = load_recipe(recipe).model
        if model.source.startswith("entry-point:"):
            print(f"{model.source}: an installed package brings this model")
            return 0
        print(f"{model.source}: here, digest {find_model(model).digest}")
    except BoomerangError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
