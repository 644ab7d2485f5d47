"""Federated runs: select, send, wait, gate, aggregate, measure; in rounds or with a buffer.

Flower's ``Strategy`` says what goes out and how replies become one model; its own loop (``Strategy.start``) is not
used, for it can neither be seeded, nor watched, nor resumed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch

from efftrain.errors import ConfigError, RoundError, ToolError
from efftrain.federated.checks import schemes_of
from efftrain.federated.client_app import app
from efftrain.federated.data import client_train
from efftrain.federated.driver import Driver, OnReply
from efftrain.federated.engines import State, get_engine
from efftrain.federated.engines.modules import blank_module
from efftrain.federated.fleet import Fleet
from efftrain.federated.flower import Grid, RecordDict, Strategy, quiet, read_arrays
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.journal import Journal
from efftrain.federated.own_code import allow
from efftrain.federated.recipe import FederatedRecipe
from efftrain.federated.results import FederatedResult, RoundResult, state_sha256
from efftrain.federated.strategies import build_strategy
from efftrain.training import check_fit

__all__ = ["FederatedResult", "RoundResult", "drive_rounds", "run_federated", "state_sha256", "with_usable_engine"]


def run_federated(
    recipe: FederatedRecipe,
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    on_round: Callable[[RoundResult], None] | None = None,
    on_reply: OnReply | None = None,
    journal: Path | None = None,
) -> FederatedResult:
    """Run all rounds in this process, on the app's own ``ClientApp``.

    Args:
        recipe: What to do.
        initial: ``state_dict`` of the model to start from; None starts from fresh weights of the recipe's seed.
        on_round: Called after each round.
        on_reply: Called with each accepted update: number of the round, updates so far, updates that it takes.
        journal: Folder to write down every round in. If there are rounds in it, the run goes on after the last one, to
            the same bits as if it had never stopped; ``initial`` is then not looked at.

    Raises:
        CheckpointError: The journal is damaged, or cannot be written.
        ConfigError: ``initial`` or the data do not fit the model, the recipe does not fit its data or its devices, or a
            client finds that it cannot be trained as the recipe says.
        RoundError: More than ``server.max_abandoned`` rounds one after the other, or all of them, got fewer accepted
            replies than ``server.min_replies``.
    """
    allow(recipe)
    check_model(recipe)
    grid = InProcessGrid(
        app,
        recipe.num_clients,
        workers=recipe.fleet.workers,
        timeout_s=recipe.client.timeout_s,
        fatal=(ConfigError, ToolError),  # what one client cannot do, no client of this process can
    )
    with quiet():
        return drive_rounds(grid, recipe, initial=initial, on_round=on_round, on_reply=on_reply, journal=journal)


def drive_rounds(
    grid: Grid,
    recipe: FederatedRecipe,
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    on_round: Callable[[RoundResult], None] | None = None,
    on_reply: OnReply | None = None,
    strategy: Strategy | None = None,
    journal: Path | None = None,
) -> FederatedResult:
    """Run all rounds on any grid: in process, in Flower's simulation or over a SuperLink.

    Waits at most ``server.timeout_s`` for ``recipe.num_clients`` nodes to connect; then ``server.min_replies`` will do.

    Args:
        grid: Carries the messages.
        recipe: What to do.
        initial: As for ``run_federated``.
        on_round: As for ``run_federated``.
        on_reply: As for ``run_federated``.
        strategy: Used instead of the recipe's. It is shown the cohort of the round as if there were no other nodes.
        journal: As for ``run_federated``. What clients on a network keep is their own business.

    Raises:
        ConfigError: As ``run_federated``; or a network is given a recipe that simulates devices or attacks.
        RoundError: As ``run_federated``, or fewer nodes than the quorum connected in time.
    """
    started = time.perf_counter()
    try:
        recipe, _ = with_usable_engine(recipe)
    except ToolError:
        if isinstance(grid, InProcessGrid):
            raise  # clients on a network have a compiler of their own, or say that they have none
    driver = Driver(grid, recipe, strategy or _strategy_of(recipe), on_reply)
    book = None if journal is None else Journal(journal)
    rounds = [] if book is None else book.results()
    if book is not None and book.round:
        driver.restore(*book.load())
        if isinstance(grid, InProcessGrid):
            for node_id, client_state in book.client_states():
                grid.put_state(node_id, client_state)
    else:
        driver.begin(_first_state(recipe, initial))
    resumed_after, first_round_s = len(rounds), 0.0
    while len(rounds) < recipe.server.rounds:
        result = driver.buffered(len(rounds) + 1) if recipe.fedbuff.buffer else driver.round(len(rounds) + 1)
        rounds.append(replace(result, clients=()))
        first_round_s = first_round_s or time.perf_counter() - started
        if on_round is not None:
            on_round(result)
        if book is not None:
            book.write(rounds[-1], *driver.memory(), _client_states(grid, result))
        _check_abandoned(rounds, recipe)
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
        resumed_after=resumed_after,
    )


def check_model(recipe: FederatedRecipe) -> None:
    """Try the model on the first client's data.

    Raises:
        ConfigError: It does not run on them, or has too few outputs.
    """
    name = recipe.model.name
    check_fit(
        f"model {name!r}", blank_module(recipe.model), recipe.data.name, client_train(recipe.data, 0, recipe.seed)
    )


def check_run(recipe: FederatedRecipe) -> list[str]:
    """Build what a simulated run is made of, before it leaves anything on the disk.

    Returns:
        Which devices of the fleet are never asked, and why: a line each.

    Raises:
        ConfigError: The strategy is unknown, or no device of the fleet can do the training.
    """
    _strategy_of(recipe)
    fleet = Fleet(recipe)
    fleet.check()
    return fleet.refusals()


def with_usable_engine(recipe: FederatedRecipe) -> tuple[FederatedRecipe, str]:
    """The recipe with the ``torch`` engine where the ``device`` engine cannot train the model.

    Returns:
        The recipe, and why it is another one; empty if it is not.

    Raises:
        ConfigError: Some devices have an update scheme in integers, which the ``torch`` engine cannot train; or the
            model has layers that the ``vmap`` engine cannot train.
        ToolError: There is no C compiler.
    """
    client, schemes = recipe.client, schemes_of(recipe)
    if client.engine == "vmap":
        from efftrain.federated.engines.vmap_engine import check_layers

        check_layers(recipe.model)
    if client.engine != "device" or "fp32" not in schemes:
        return recipe, ""
    from efftrain.federated.engines.device_engine import DeviceEngine

    engine = get_engine("device")
    assert isinstance(engine, DeviceEngine), "the registry has it under this name"
    reason = engine.why_not(recipe.model, client_train(recipe.data, 0, recipe.seed), client.batch_size)
    if not reason:
        return recipe, ""
    if schemes != {"fp32"}:
        raise ConfigError(f"{reason} And leave out fleet.schemes: the torch engine trains in fp32 only.")
    return replace(recipe, client=replace(client, engine="torch")), reason


def _strategy_of(recipe: FederatedRecipe) -> Strategy:
    server = recipe.server
    return build_strategy(server.strategy, server.strategy_options, seed=recipe.seed, population=recipe.num_clients)


def _client_states(grid: Grid, result: RoundResult) -> dict[int, RecordDict]:
    """What the simulated clients of a round keep, as far as they keep anything."""
    if not isinstance(grid, InProcessGrid):
        return {}
    states = {row.node_id: grid.context(row.node_id).state for row in result.clients}
    return {node_id: state for node_id, state in states.items() if len(state)}


def _check_abandoned(rounds: Sequence[RoundResult], recipe: FederatedRecipe) -> None:
    abandoned = list(takewhile(lambda one: one.abandoned, reversed(rounds)))
    if len(abandoned) > recipe.server.max_abandoned or len(abandoned) == recipe.server.rounds:
        which = f"{len(abandoned)} rounds one after the other were abandoned. The last"
        if len(abandoned) == 1:
            which = "the only round was abandoned"
        raise RoundError(f"{which}: {rounds[-1].reasons[0]}")


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
