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
    _check_quorum(recipe)
    _check_schemes(recipe)
    _check_attackers(recipe)
    _check_liars(recipe)


def schemes_of(recipe: "FederatedRecipe") -> set[str]:
    """What the clients train with: the schemes of the devices, else ``client.scheme``."""
    client, fleet = recipe.client, recipe.fleet
    return {fleet.schemes.get(device, client.scheme) for device in fleet.devices} or {client.scheme}


def num_attackers(recipe: "FederatedRecipe") -> int:
    """Clients that attack, at least one; 0 without an attack."""
    attack = recipe.attack
    return 0 if attack.kind == "none" else max(1, round(attack.share * recipe.num_clients))


def _check_quorum(recipe: "FederatedRecipe") -> None:
    min_replies = recipe.server.min_replies
    if min_replies > recipe.cohort and not recipe.fedbuff.buffer:
        raise ValueError(
            f"server.min_replies is {min_replies}, but a round takes {recipe.cohort} replies of {recipe.num_clients} "
            "clients, so every round would be abandoned; lower it, or raise server.cohort or server.fraction"
        )


def _check_schemes(recipe: "FederatedRecipe") -> None:
    engine, schemes = recipe.client.engine, schemes_of(recipe)
    integers = sorted(schemes - {"fp32"})
    if integers and engine not in ("device", "board"):
        raise ValueError(
            f"client.engine is {engine!r}, which trains in fp32 only, but there are clients with the scheme "
            f"{integers[0]!r} (client.scheme, fleet.schemes); set "
            'client.engine="device", or leave the schemes at "fp32"'
        )
    if engine == "board" and "fp32" in schemes:
        raise ValueError(
            'client.engine is "board", which trains in integers only, but there are clients with the scheme "fp32"; '
            'set client.scheme to an update scheme such as "sparse", or client.engine="device"'
        )


def _check_attackers(recipe: "FederatedRecipe") -> None:
    if num_attackers(recipe) >= recipe.num_clients:
        raise ValueError(
            f"attack.share {recipe.attack.share} of {recipe.num_clients} clients leaves nobody honest; lower it, or "
            "take more clients"
        )


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
