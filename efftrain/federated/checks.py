"""What the sections of a recipe cannot mean together: found when it is built, not by a client in the middle of a round.

Like the recipe, without Flower and without torch. What training in FedProx and SCAFFOLD excludes is in ``local``.
"""

import math
from typing import TYPE_CHECKING

from efftrain.federated.local import rule_of

if TYPE_CHECKING:
    from efftrain.federated.recipe import FederatedRecipe

_REPLIES_PER_LIAR = {"krum": 2, "multi_krum": 2, "bulyan": 4}
"""A rule that stands ``f`` liars needs 3 replies more than this times ``f``; see ``strategies`` for the papers."""


def check_recipe(recipe: "FederatedRecipe") -> None:
    """Refuse a recipe whose sections contradict each other.

    Raises:
        ValueError: Names both keys, and says what to do.
    """
    _check_liars(recipe)


def _check_liars(recipe: "FederatedRecipe") -> None:
    """A rule that sees too few replies for the liars that it is to stand makes no model of them, or a bad one."""
    rule, options = rule_of(recipe), recipe.server.strategy_options
    num_liars, num_selected = options.get("num_malicious", 0), options.get("num_selected", 0)
    size = options.get("size", 2) if recipe.server.strategy == "bucketing" else 1
    if not (isinstance(num_liars, int) and isinstance(num_selected, int) and isinstance(size, int)):
        return  # the strategy itself says what is wrong with its options
    if rule not in _REPLIES_PER_LIAR:
        return
    taken = recipe.fedbuff.buffer or recipe.cohort
    num_rows = math.ceil(taken / max(1, size))
    factor = _REPLIES_PER_LIAR[rule]
    where = f"{num_rows} buckets" if size > 1 else f"{num_rows} replies"
    if num_rows < factor * num_liars + 3:
        raise ValueError(
            f"server.strategy {rule} with num_malicious={num_liars} needs {factor} * num_malicious + 3 = "
            f"{factor * num_liars + 3} replies, but sees {where} at most; lower num_malicious, or take more clients "
            "(server.cohort, fedbuff.buffer)"
        )
    if num_selected > num_rows - num_liars:
        raise ValueError(
            f"server.strategy {rule} with num_selected={num_selected} of {where} takes in some of the "
            f"{num_liars} liars (num_malicious); select at most {num_rows - num_liars}, or 0 for as many as that"
        )
