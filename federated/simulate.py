"""Run a federated recipe in this process: ``python federated/simulate.py federated/recipes/watch_people.toml``."""

import argparse
import json
import sys
from pathlib import Path

from efftrain.config import load_recipe
from efftrain.errors import EfftrainError
from efftrain.federated import FederatedRecipe, run_federated
from efftrain.units import format_bytes


def main() -> int:
    """Rounds to stderr, the result as one JSON object to stdout. Exit code 0 only if all rounds were run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--initial", type=Path, help="safetensors file to start from; default: fresh weights")
    args = parser.parse_args()
    try:
        recipe = load_recipe(FederatedRecipe, args.recipe, args.overrides)
        initial = None
        if args.initial:
            from safetensors.torch import load_file

            initial = load_file(args.initial)
        result = run_federated(
            recipe,
            initial=initial,
            on_round=lambda one: print(
                f"round {one.round:3}  accuracy {one.accuracy:.3f}  uplink {format_bytes(one.uplink_bytes)}"
                f" (fp32 {format_bytes(one.fp32_uplink_bytes)})  {one.round_s:.2f} s",
                file=sys.stderr,
            ),
        )
    except EfftrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
