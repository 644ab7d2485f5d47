"""Run a federated recipe in this process: ``python federated/simulate.py federated/recipes/watch_people.toml``."""

import argparse
import json
import sys
from pathlib import Path

from efftrain.config import load_recipe
from efftrain.errors import EfftrainError
from efftrain.federated import FederatedRecipe, RoundResult, run_federated
from efftrain.units import format_bytes


def main() -> int:
    """Rounds to stderr, the result as one JSON object to stdout. Exit code 0 only if all rounds were run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    try:
        recipe = load_recipe(FederatedRecipe, args.recipe, args.overrides)
        print(json.dumps(run_federated(recipe, on_round=show).to_dict()))
    except EfftrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def show(one: RoundResult) -> None:
    """One line a round."""
    uplink, fp32 = format_bytes(one.uplink_bytes), format_bytes(one.fp32_uplink_bytes)
    line = f"round {one.round:3}  accuracy {one.accuracy:.3f}  uplink {uplink} (fp32 {fp32})  {one.round_s:.2f} s"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
