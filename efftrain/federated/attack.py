"""Clients that send what harms, in simulation: to find out what a strategy stands.

An attacker behaves on the wire as an honest client does: it trains, encodes and passes the gate. Who attacks is drawn
from the recipe's seed, so a run with attackers repeats as any other.
"""

import math
import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from efftrain.data import ArrayDataset
from efftrain.federated.checks import num_attackers
from efftrain.federated.recipe import FederatedRecipe

State = dict[str, npt.NDArray[np.generic]]
TrainAs = Callable[[int], State]
_COLLUDERS = 8
"""Attackers of ``alie`` that share what they know: enough for a mean and a spread."""


def attackers(recipe: FederatedRecipe) -> frozenset[int]:
    """Numbers of the clients that attack; none without an attack, at least one with one."""
    count = num_attackers(recipe)
    return _draw(recipe.num_clients, count, recipe.seed) if count else frozenset()


@lru_cache(maxsize=8)
def _draw(num_clients: int, count: int, seed: int) -> frozenset[int]:
    return frozenset(random.Random(f"attack {seed}").sample(range(num_clients), count))


def poison_data(recipe: FederatedRecipe, partition: int, data: ArrayDataset) -> ArrayDataset:
    """What a client trains on: its data, with labels turned round if it is an attacker that does so."""
    if recipe.attack.kind != "label_flip" or partition not in attackers(recipe):
        return data
    flipped = data.num_classes - 1 - data.targets
    return ArrayDataset(data.name, data.inputs, flipped, data.groups, data.num_classes)


def poison_update(
    recipe: FederatedRecipe, partition: int, sent: Mapping[str, Any], trained: State, train: TrainAs
) -> State:
    """What a client replies with instead of the model that it trained.

    Args:
        recipe: With the attack.
        partition: Number of the client; an honest one's model is returned as it is.
        sent: The model that it was sent.
        trained: The model that it trained.
        train: Trains as another client: attackers of ``alie`` know what they all would send.
    """
    kind = recipe.attack.kind
    if kind in ("none", "label_flip") or partition not in attackers(recipe):
        return trained
    if kind == "alie":
        return _a_little_is_enough(recipe, sent, train)
    factor = -1.0 if kind == "sign_flip" else recipe.attack.factor
    return _moved(sent, {name: factor * (trained[name] - _float(sent[name])) for name in _floats(sent)})


def _a_little_is_enough(recipe: FederatedRecipe, sent: Mapping[str, Any], train: TrainAs) -> State:
    """The mean of what the attackers would honestly send, less so many standard deviations that half of the clients
    still lie further out. Source: Baruch et al., A Little Is Enough (arXiv:1902.06156), algorithm 3."""
    num_clients, evil = recipe.cohort, round(recipe.attack.share * recipe.cohort)
    supporters = num_clients // 2 + 1 - evil
    z = NormalDist().inv_cdf(min(0.999, max(0.5, (num_clients - evil - supporters) / max(1, num_clients - evil))))
    models = [train(partition) for partition in sorted(attackers(recipe))[:_COLLUDERS]]
    deltas = {}
    for name in _floats(sent):
        stacked = np.stack([model[name] - _float(sent[name]) for model in models])
        deltas[name] = stacked.mean(axis=0) - z * stacked.std(axis=0)
    return _moved(sent, deltas)


def _moved(sent: Mapping[str, Any], deltas: Mapping[str, Any]) -> State:
    limit = math.sqrt(float(np.finfo(np.float32).max))  # what overflows would not even be sent
    return {
        name: np.asarray(tensor + np.clip(deltas[name], -limit, limit), tensor.dtype) if name in deltas else tensor
        for name, tensor in sent.items()
    }


def _floats(state: Mapping[str, Any]) -> list[str]:
    return [name for name, tensor in state.items() if np.issubdtype(tensor.dtype, np.floating)]


def _float(tensor: Any) -> Any:
    return tensor.astype(np.float64)
