"""Run a federated recipe in this process: ``python federated/simulate.py federated/recipes/watch_people.toml``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from efftrain.config import load_recipe
from efftrain.errors import ConfigError, EfftrainError
from efftrain.federated import FederatedRecipe
from efftrain.units import format_bytes

if TYPE_CHECKING:
    import torch

    from efftrain.federated import RoundResult


def main() -> int:
    """Rounds to stderr, the result as one JSON object to stdout. Exit code 0 only if all rounds were run."""
    try:
        return run(parse_args())
    except EfftrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        # What is still in the buffers has no reader; Python would complain about that when it ends.
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, sys.stdout.fileno())
        os.dup2(silence, sys.stderr.fileno())
        return 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--initial",
        type=Path,
        metavar="FOLDER",
        help="start from the model that save_pretrained wrote there (runs/NAME/model), not from fresh weights",
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    """All rounds, and at the end a line that says what they started from."""
    recipe = load_recipe(FederatedRecipe, args.recipe, args.overrides)
    from efftrain.federated import run_federated  # here, where a missing Flower becomes one line

    initial = None if args.initial is None else read_model(args.initial, recipe)
    result = run_federated(recipe, initial=initial, on_round=show)
    start = "fresh weights (--initial FOLDER starts from a trained model)" if initial is None else f"{args.initial}"
    print(f"started from {start}, accuracy {result.accuracy_before:.3f}", file=sys.stderr)
    print(json.dumps(result.to_dict()), flush=True)
    return 0


def read_model(folder: Path, recipe: FederatedRecipe) -> dict[str, torch.Tensor]:
    """The weights of the model in ``folder``.

    Raises:
        CheckpointError: Files are missing or damaged.
        ConfigError: It is another model than the recipe's.
    """
    from efftrain.models import load_pretrained

    model = load_pretrained(folder)
    if model.name != recipe.model.name:
        raise ConfigError(f"--initial {folder} holds a {model.name}, the recipe trains a {recipe.model.name}.")
    return model.state_dict()


def show(one: RoundResult) -> None:
    """One line a round."""
    uplink, fp32 = format_bytes(one.uplink_bytes), format_bytes(one.fp32_uplink_bytes)
    line = f"round {one.round:3}  accuracy {one.accuracy:.3f}  uplink {uplink} (fp32 {fp32})  {one.round_s:.2f} s"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
