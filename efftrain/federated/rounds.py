"""Federated runs: select, send, wait, gate, aggregate, measure; in rounds or with a buffer.

Flower's ``Strategy`` says what goes out and how replies become one model; its own loop (``Strategy.start``) is not
used, for it can neither be seeded, nor watched, nor resumed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from efftrain.errors import ConfigError, RoundError
from efftrain.federated.client_app import app
from efftrain.federated.driver import Driver
from efftrain.federated.engines import State, get_engine
from efftrain.federated.flower import FedAvg, Grid, Strategy, quiet, read_arrays
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import FederatedRecipe
from efftrain.federated.results import FederatedResult, RoundResult, state_sha256

__all__ = ["FederatedResult", "RoundResult", "drive_rounds", "run_federated", "state_sha256"]


def run_federated(
    recipe: FederatedRecipe,
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    on_round: Callable[[RoundResult], None] | None = None,
) -> FederatedResult:
    """Run all rounds in this process, on the app's own ``ClientApp``.

    Args:
        recipe: What to do.
        initial: ``state_dict`` of the model to start from; None starts from fresh weights of the recipe's seed.
        on_round: Called after each round.

    Raises:
        ConfigError: ``initial`` does not fit the model, or the recipe does not fit its data or its devices.
        RoundError: More than ``server.max_abandoned`` rounds one after the other, or all of them, got fewer accepted
            replies than ``server.min_replies``.
    """
    grid = InProcessGrid(app, recipe.num_clients, workers=recipe.fleet.workers, timeout_s=recipe.client.timeout_s)
    with quiet():
        return drive_rounds(grid, recipe, initial=initial, on_round=on_round)


def drive_rounds(
    grid: Grid,
    recipe: FederatedRecipe,
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    on_round: Callable[[RoundResult], None] | None = None,
    strategy: Strategy | None = None,
) -> FederatedResult:
    """Run all rounds on any grid: in process, in Flower's simulation or over a SuperLink.

    Waits at most ``server.timeout_s`` for ``recipe.num_clients`` nodes to connect.

    Args:
        grid: Carries the messages.
        recipe: What to do.
        initial: As for ``run_federated``.
        on_round: As for ``run_federated``.
        strategy: Used instead of the recipe's. It is shown the cohort of the round as if there were no other nodes.

    Raises:
        ConfigError: As ``run_federated``; or a network is given a recipe that simulates devices or attacks.
        RoundError: As ``run_federated``, or no nodes connected in time.
    """
    started = time.perf_counter()
    driver = Driver(grid, recipe, strategy or _strategy(recipe))
    driver.begin(_first_state(recipe, initial))
    rounds: list[RoundResult] = []
    first_round_s = 0.0
    abandoned = 0
    while len(rounds) < recipe.server.rounds:
        result = driver.buffered(len(rounds) + 1) if recipe.fedbuff.buffer else driver.round(len(rounds) + 1)
        rounds.append(replace(result, clients=()))
        first_round_s = first_round_s or time.perf_counter() - started
        if on_round is not None:
            on_round(result)
        abandoned = abandoned + 1 if result.abandoned else 0
        if abandoned > recipe.server.max_abandoned or abandoned == recipe.server.rounds:
            raise RoundError(f"{abandoned} rounds one after the other were abandoned. The last: {result.reasons[0]}")
    state = read_arrays(driver.arrays)
    return FederatedResult(
        recipe=recipe,
        rounds=tuple(rounds),
        accuracy_before=driver.accuracy_before,
        accuracy_per_person_before=driver.accuracy_per_person_before,
        state={name: torch.from_numpy(tensor.copy()) for name, tensor in state.items()},
        initial_sha256=driver.initial_sha256,
        final_sha256=state_sha256(state),
        first_round_s=first_round_s,
        wall_s=time.perf_counter() - started,
        peak_ram_bytes=driver.peak_ram_bytes,
    )


def _strategy(recipe: FederatedRecipe) -> Strategy:
    """The recipe's strategy, set to take the whole cohort that it is shown."""
    strategies = {"fedavg": FedAvg}
    if recipe.server.strategy not in strategies:
        known = ", ".join(strategies)
        raise ConfigError(f"server.strategy is {recipe.server.strategy!r}, expected one of {known}")
    return strategies[recipe.server.strategy](
        fraction_train=1.0, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
    )


def _first_state(recipe: FederatedRecipe, initial: Mapping[str, torch.Tensor] | None) -> State:
    fresh = get_engine(recipe.client.engine).initial_state(recipe.model, recipe.seed)
    if initial is None:
        return fresh
    given = {name: tensor.detach().cpu().numpy() for name, tensor in initial.items()}
    for name in sorted(set(fresh) | set(given)):
        found, expected = (state[name].shape if name in state else "nothing" for state in (given, fresh))
        if found != expected:
            raise ConfigError(
                f"the initial state is no {recipe.model.name}: tensor {name!r} has {found}, expected {expected}"
            )
    return given
