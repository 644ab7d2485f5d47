"""Who is asked: seeded cohorts of clients that are there, fit their device, and were not asked a moment ago.

Note [seeded sampling]
    Stock strategies draw the nodes of a round from the global, unseeded ``random``, and in no order. Here the driver
    draws the cohort from the recipe's seed and shows the strategy a grid that holds just this cohort, so that it takes
    everybody; messages and replies are put in the order of the partitions, because a sum of floats depends on its
    order. ``random`` is seeded while a strategy configures a round and put back afterwards, for strategies that draw
    more than nodes. NumPy's generator is left alone: a strategy that adds noise for privacy must not get a known one.

Source: selection goal, over-selection, pace steering: Bonawitz et al., Towards Federated Learning at Scale
    (arXiv:1902.01046).
Differs: a client that was asked is not told when to come back; the server does not ask it before. Over-selection
    follows the drop-out that was seen instead of a fixed 30 %.
"""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from efftrain.federated.fleet import Fleet
from efftrain.federated.grid import FIRST_NODE_ID
from efftrain.federated.recipe import FederatedRecipe

_MEMORY = 0.7
"""Weight of the past in the drop-out that over-selection goes by: five rounds ago counts a sixth of the last."""
_MOST_OVER = 2.0
_TRIES = 64


class Selector:
    """Draws cohorts.

    Args:
        recipe: Seed, goal, pace.
        fleet: Of simulated devices; None on a network, where who is connected is there.
    """

    def __init__(self, recipe: FederatedRecipe, fleet: Fleet | None) -> None:
        self._recipe, self._fleet = recipe, fleet
        self._drop_out = 0.0
        self._free_again_s: dict[int, float] = {}
        self._num_drawn = 0

    @property
    def drop_out(self) -> float:
        """Share of the clients that dropped out lately, the last rounds counting most."""
        return self._drop_out

    def num_to_ask(self, goal: int) -> int:
        """Clients to ask, so that ``goal`` of them are likely to reply."""
        if not self._recipe.server.over_select:
            return goal
        return min(math.ceil(goal / max(1e-9, 1 - self._drop_out)), math.ceil(_MOST_OVER * goal))

    def learn(self, num_asked: int, num_dropped: int) -> None:
        """What came of a cohort."""
        if num_asked:
            self._drop_out = _MEMORY * self._drop_out + (1 - _MEMORY) * num_dropped / num_asked

    def cohort(self, number: int, nodes: Sequence[int], size: int, now_s: float) -> list[int]:
        """Nodes of a round, ascending; fewer than ``size`` if not so many can be asked now."""
        order = np.random.default_rng([self._recipe.seed, number]).permutation(len(nodes))
        has_devices = self._fleet is not None and self._fleet.has_devices
        if not has_devices and not self._recipe.server.pace_s:  # nobody need be looked at
            return [nodes[i] for i in sorted(order[:size])]
        chosen: list[int] = []
        for place in order:
            if len(chosen) == size:
                break
            if self._can_be_asked(nodes[place], now_s):
                chosen.append(nodes[place])
        return sorted(chosen)

    def one(self, nodes: Sequence[int], busy: Container[int], now_s: float) -> int | None:
        """One node that is not busy; None if a few dozen draws find none that can be asked now."""
        for _ in range(_TRIES):
            self._num_drawn += 1
            rng = np.random.default_rng([self._recipe.seed, 0, self._num_drawn])
            node_id = nodes[int(rng.integers(len(nodes)))]
            if node_id not in busy and self._can_be_asked(node_id, now_s):
                return node_id
        return None

    def asked(self, nodes: Sequence[int], now_s: float) -> None:
        """These clients take part now; see ``server.pace_s``."""
        if self._recipe.server.pace_s:
            for node_id in nodes:
                self._free_again_s[node_id] = now_s + self._recipe.server.pace_s

    def state(self) -> dict[str, Any]:
        """Plain values, for a journal."""
        return {
            "drop_out": self._drop_out,
            "num_drawn": self._num_drawn,
            "free_again_s": sorted(self._free_again_s.items()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._drop_out, self._num_drawn = float(state["drop_out"]), int(state["num_drawn"])
        self._free_again_s = {int(node_id): float(time_s) for node_id, time_s in state["free_again_s"]}

    def _can_be_asked(self, node_id: int, now_s: float) -> bool:
        if self._free_again_s.get(node_id, 0.0) > now_s:
            return False
        if self._fleet is None:
            return True
        partition = node_id - FIRST_NODE_ID
        return self._fleet.is_online(partition, now_s) and not self._fleet.refusal(partition)
