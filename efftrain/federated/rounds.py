"""The round driver: select, send, wait, gate, aggregate, measure.

Flower's ``Strategy`` says what goes out and how replies become one model; its own loop (``Strategy.start``) is not
used, for it can neither be seeded, nor watched, nor resumed.

Note [seeded sampling]
    Stock strategies draw the nodes of a round from the global, unseeded ``random``, and in no order. Here the driver
    draws the cohort from the recipe's seed and shows the strategy a grid that holds just this cohort, so that it takes
    everybody; messages and replies are put in the order of the partitions, because a sum of floats depends on its
    order. ``random`` is seeded while a strategy configures a round and put back afterwards, for strategies that draw
    more than nodes. NumPy's generator is left alone: a strategy that adds noise for privacy must not get a known one.
"""

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from efftrain.compression import format_codec
from efftrain.config import to_dict
from efftrain.errors import ConfigError, RoundError
from efftrain.federated.client_app import EVALUATE_METRICS, PARTITION, TRAIN_METRICS, app
from efftrain.federated.engines import State, get_engine
from efftrain.federated.flower import (
    VERSION,
    Array,
    ArrayRecord,
    ConfigRecord,
    FedAvg,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    Run,
    Strategy,
    quiet,
)
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import FederatedRecipe
from efftrain.federated.uplink import Traffic, UplinkGrid


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """One round: figures of the global model after it, and what it cost."""

    round: int
    """From 1."""
    accuracy: float
    """Share of right answers on a person's own test part, mean over people (each counts the same)."""
    accuracy_per_person: dict[str, float]
    loss: float
    """Test loss, mean over people."""
    train_loss: float
    """Loss during local training, mean over the samples of the cohort."""
    uplink_bytes: int
    """Records of all replies of the round, training and evaluation: encoded updates, metrics, names."""
    downlink_bytes: int
    """Records of all messages to clients. The model goes out uncompressed, for training and again for evaluation."""
    fp32_uplink_bytes: int
    """The updates taken as plain fp32: 4 bytes an element, no names, no headers."""
    clients_trained: int
    clients_dropped: int
    """Clients that failed or did not reply in time, in training and evaluation."""
    replies_refused: int
    """Replies that did not pass the gate."""
    reasons: tuple[str, ...]
    """Why clients were dropped or refused, one line each."""
    round_s: float
    """Wall-clock seconds, evaluation included."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON lines."""
        return {**asdict(self), "reasons": list(self.reasons)}


@dataclass(frozen=True, kw_only=True, eq=False)
class FederatedResult:
    """A finished run."""

    recipe: FederatedRecipe
    rounds: tuple[RoundResult, ...]
    accuracy_before: float
    """As ``RoundResult.accuracy``, of the model that the run started with."""
    accuracy_per_person_before: dict[str, float]
    state: dict[str, torch.Tensor]
    """The global model after the last round."""
    initial_sha256: str
    final_sha256: str
    """SHA-256 of ``state``; see ``state_sha256``."""
    wall_s: float
    """Seconds from start to end, the first evaluation included."""

    @property
    def accuracy(self) -> float:
        """Accuracy after the last round."""
        return self.rounds[-1].accuracy

    @property
    def accuracy_per_round(self) -> list[float]:
        """Accuracy after each round."""
        return [one.accuracy for one in self.rounds]

    def total(self, figure: str) -> int:
        """Sum of an integer figure of ``RoundResult`` over all rounds."""
        return sum(int(getattr(one, figure)) for one in self.rounds)

    @property
    def uplink_ratio(self) -> float:
        """How many times fewer uplink bytes than the same updates as plain fp32."""
        return self.total("fp32_uplink_bytes") / max(1, self.total("uplink_bytes"))

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values for JSON, without the model. Times vary, the rest repeats with the seed."""
        return {
            "name": self.recipe.name,
            "rounds": len(self.rounds),
            "accuracy": self.accuracy,
            "accuracy_before": self.accuracy_before,
            "accuracy_per_round": self.accuracy_per_round,
            "accuracy_per_person": self.rounds[-1].accuracy_per_person,
            "accuracy_per_person_before": self.accuracy_per_person_before,
            "loss": self.rounds[-1].loss,
            "uplink_bytes": self.total("uplink_bytes"),
            "downlink_bytes": self.total("downlink_bytes"),
            "fp32_uplink_bytes": self.total("fp32_uplink_bytes"),
            "uplink_ratio": self.uplink_ratio,
            "clients_trained": self.total("clients_trained"),
            "clients_dropped": self.total("clients_dropped"),
            "replies_refused": self.total("replies_refused"),
            "round_s": float(np.mean([one.round_s for one in self.rounds])),
            "first_round_s": self.rounds[0].round_s,
            "wall_s": self.wall_s,
            "engine": self.recipe.client.engine,
            "codec": format_codec(self.recipe.uplink.build()),
            "seed": self.recipe.seed,
            "initial_sha256": self.initial_sha256,
            "final_sha256": self.final_sha256,
            "flwr_version": VERSION,
            "recipe": to_dict(self.recipe),
        }


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
        ConfigError: ``initial`` does not fit the model, or the recipe does not fit its data.
        RoundError: A round got fewer accepted replies than ``server.min_replies``.
    """
    with quiet():
        return drive_rounds(InProcessGrid(app, recipe.num_clients), recipe, initial=initial, on_round=on_round)


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
        RoundError: As ``run_federated``, or no nodes connected in time.
    """
    start = time.perf_counter()
    wire = UplinkGrid(
        grid,
        recipe.uplink.build(),
        recipe.gate,
        feedback=recipe.uplink.feedback,
        seed=recipe.seed,
        train_metrics=TRAIN_METRICS,
        evaluate_metrics=EVALUATE_METRICS,
    )
    driver = _Driver(wire, recipe, strategy or _strategy(recipe))
    arrays = _record(_first_state(recipe, initial))
    initial_sha256 = state_sha256(_state(arrays))
    _wait_for_nodes(wire, recipe)
    before, _ = driver.evaluate(0, arrays)
    wire.take_traffic()  # measuring the start is no part of any round
    rounds = []
    for number in range(1, recipe.server.rounds + 1):
        result, arrays = driver.round(number, arrays)
        rounds.append(result)
        if on_round is not None:
            on_round(result)
    state = _state(arrays)
    return FederatedResult(
        recipe=recipe,
        rounds=tuple(rounds),
        accuracy_before=_mean(before),
        accuracy_per_person_before=before,
        state={name: torch.from_numpy(tensor) for name, tensor in state.items()},
        initial_sha256=initial_sha256,
        final_sha256=state_sha256(state),
        wall_s=time.perf_counter() - start,
    )


def state_sha256(state: Mapping[str, Any]) -> str:
    """SHA-256 over name, dtype, shape and bytes (little endian) of every tensor, by name.

    Args:
        state: Name -> NumPy array or torch tensor on the CPU.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = np.asarray(state[name])
        tensor = tensor.astype(tensor.dtype.newbyteorder("<"), order="C", copy=False)
        digest.update(f"{name} {tensor.dtype.name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


# The driver ------------------------------------------------------------------------------------------------------


class _Driver:
    """One run: the strategy, the wire and what they share over its rounds."""

    def __init__(self, wire: UplinkGrid, recipe: FederatedRecipe, strategy: Strategy) -> None:
        self._wire = wire
        self._recipe = recipe
        self._strategy = strategy
        self._text = json.dumps(to_dict(recipe), separators=(",", ":"))

    def round(self, number: int, arrays: ArrayRecord) -> tuple[RoundResult, ArrayRecord]:
        """Train one cohort, aggregate, let all clients measure the result."""
        start = time.perf_counter()
        cohort = _CohortGrid(self._wire, self._select(number))
        with _seeded(self._recipe.seed, number, 0):
            messages = list(self._strategy.configure_train(number, arrays, self._config(), cohort))
        replies = self._exchange(messages)
        accepted = [reply for reply in replies if not reply.has_error()]
        if len(accepted) < self._recipe.server.min_replies:
            raise RoundError(self._too_few("training", number, len(accepted), len(messages)))
        new_arrays, metrics = self._strategy.aggregate_train(number, replies)
        if new_arrays is None:
            raise RoundError(f"round {number}: the strategy made no model of {len(accepted)} accepted replies")
        train_loss = metrics.get("loss") if metrics is not None else None
        accuracies, loss = self.evaluate(number, new_arrays)
        traffic = self._wire.take_traffic()
        result = RoundResult(
            round=number,
            accuracy=_mean(accuracies),
            accuracy_per_person=accuracies,
            loss=loss,
            train_loss=float(train_loss) if isinstance(train_loss, (int, float)) else float("nan"),
            uplink_bytes=traffic.uplink_bytes,
            downlink_bytes=traffic.downlink_bytes,
            fp32_uplink_bytes=traffic.fp32_uplink_bytes,
            clients_trained=len(traffic.trained),
            clients_dropped=len(traffic.dropped),
            replies_refused=len(traffic.refused),
            reasons=_reasons(traffic),
            round_s=time.perf_counter() - start,
        )
        return result, new_arrays

    def evaluate(self, number: int, arrays: ArrayRecord) -> tuple[dict[str, float], float]:
        """Accuracy of each person, and the mean loss, as the clients report them.

        The driver asks every client itself: a strategy would give it one mean weighted by samples.
        """
        config = self._config()
        config["server-round"] = number
        content = RecordDict({"arrays": arrays, "config": config})
        nodes = sorted(self._wire.get_node_ids())
        replies = self._exchange([Message(content, node_id, MessageType.EVALUATE) for node_id in nodes])
        accuracies: dict[str, float] = {}
        losses = []
        for reply in replies:
            if reply.has_error():
                continue
            metrics = next(iter(reply.content.metric_records.values()))
            person = self._person(metrics)
            if person is not None and person not in accuracies:
                accuracies[person] = float(metrics["accuracy"])  # type: ignore[arg-type]
                losses.append(float(metrics["loss"]))  # type: ignore[arg-type]
        if not accuracies:
            raise RoundError(self._too_few("evaluation", number, 0, len(nodes)))
        return accuracies, float(np.mean(losses))

    def _select(self, number: int) -> list[int]:
        """The cohort of a round; see Note [seeded sampling]."""
        nodes = sorted(self._wire.get_node_ids())
        size = max(1, round(self._recipe.server.fraction * len(nodes)))
        rng = np.random.default_rng([self._recipe.seed, number])
        return [nodes[i] for i in sorted(rng.permutation(len(nodes))[:size])]

    def _config(self) -> ConfigRecord:
        return ConfigRecord({"recipe": self._text})

    def _exchange(self, messages: Iterable[Message]) -> list[Message]:
        """Send in the order of the nodes, give the replies in the order of the partitions."""
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        replies = self._wire.send_and_receive(messages, timeout=self._recipe.server.timeout_s)
        return sorted(replies, key=_order)

    def _person(self, metrics: MetricRecord) -> str | None:
        partition = metrics[PARTITION]
        people = self._recipe.data.people
        if isinstance(partition, float) and partition.is_integer() and 0 <= partition < len(people):
            return str(people[int(partition)])
        return None

    def _too_few(self, what: str, number: int, num_accepted: int, num_sent: int) -> str:
        reasons = _reasons(self._wire.take_traffic())
        return (
            f"round {number}, {what}: {num_accepted} of {num_sent} replies were accepted, expected at least "
            f"{self._recipe.server.min_replies if what == 'training' else 1}. {reasons[0] if reasons else ''}"
        ).strip()


class _CohortGrid(Grid):
    """Shows a strategy the nodes of one cohort. Sending is the driver's business."""

    def __init__(self, grid: Grid, node_ids: list[int]) -> None:
        self._grid = grid
        self._node_ids = node_ids

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> list[int]:
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


def _strategy(recipe: FederatedRecipe) -> Strategy:
    """The recipe's strategy, set to take the whole cohort that it is shown."""
    strategies = {"fedavg": FedAvg}
    if recipe.server.strategy not in strategies:
        known = ", ".join(strategies)
        raise ConfigError(f"server.strategy is {recipe.server.strategy!r}, expected one of {known}")
    return strategies[recipe.server.strategy](
        fraction_train=1.0, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
    )


@contextlib.contextmanager
def _seeded(*seeds: int) -> Iterator[None]:
    """See Note [seeded sampling]."""
    before = random.getstate()
    random.seed(repr(seeds))
    try:
        yield
    finally:
        random.setstate(before)


def _wait_for_nodes(grid: Grid, recipe: FederatedRecipe) -> None:
    end = time.monotonic() + recipe.server.timeout_s
    while len(list(grid.get_node_ids())) < recipe.num_clients:
        if time.monotonic() >= end:
            found = len(list(grid.get_node_ids()))
            raise RoundError(f"{found} of {recipe.num_clients} nodes connected within {recipe.server.timeout_s:g} s")
        time.sleep(0.2)


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


def _record(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(tensor)) for name, tensor in state.items()})


def _state(arrays: ArrayRecord) -> State:
    return {name: array.numpy() for name, array in arrays.items()}


def _order(reply: Message) -> tuple[float, int]:
    """By partition where the reply says it: node ids differ from one deployment to the next."""
    partition = float("inf")
    if reply.has_content():
        for record in reply.content.metric_records.values():
            value = record.get(PARTITION)
            partition = float(value) if isinstance(value, (int, float)) else partition
    return partition, reply.metadata.src_node_id


def _mean(accuracies: Mapping[str, float]) -> float:
    return float(np.mean(list(accuracies.values())))


def _reasons(traffic: Traffic) -> tuple[str, ...]:
    lines = [f"node {one.node_id} dropped: {one.reason}" for one in traffic.dropped]
    return tuple(lines + [f"node {one.node_id} refused: {one.reason}" for one in traffic.refused])
