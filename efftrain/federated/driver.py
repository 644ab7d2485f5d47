"""One federated run in the making: the global model, who is on the way, and the two ways to move on.

``round`` is synchronous: a cohort trains the same model, and the round ends when enough have replied, when nobody is
left, or at the deadline. ``buffered`` is FedBuff: clients come and go, and the model moves on with every ``K`` updates.
"""

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from efftrain.config import to_dict
from efftrain.errors import ConfigError, RoundError
from efftrain.federated.aggregate import HELD, Aggregation, is_mean_only
from efftrain.federated.client_app import EVALUATE_METRICS, RAM, TRAIN_METRICS
from efftrain.federated.client_uplink import Tensors
from efftrain.federated.data import server_test
from efftrain.federated.engines import State, get_engine
from efftrain.federated.fleet import Fleet
from efftrain.federated.flower import (
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MessageType,
    RecordDict,
    Run,
    Strategy,
    read_arrays,
    write_arrays,
)
from efftrain.federated.grid import FIRST_NODE_ID, InProcessGrid
from efftrain.federated.journal import restore_strategy, strategy_memory
from efftrain.federated.mailbox import TOO_LATE, Delivery, Mailbox, VirtualMailbox, WallMailbox
from efftrain.federated.recipe import FederatedRecipe
from efftrain.federated.results import MAX_REASONS, ClientResult, Outcome, RoundResult, state_sha256
from efftrain.federated.selection import Selector
from efftrain.federated.strategies.scaffold import Scaffold
from efftrain.federated.uplink import UplinkGrid
from efftrain.units import format_seconds

OnReply = Callable[[int, int, int], None]
SURPLUS = "the round was complete without it"
ABANDONED = "the round was abandoned"
_WEEK_S = 604_800.0
"""So long in virtual time a simulated server waits where nobody can be asked."""
_MEASURE_FACTOR = 2.0
"""Clients have so many times as long for measuring as the slowest of them took for training, or what is left of the
round's deadline if that is more."""


class Driver:
    """See the top of this file.

    Args:
        grid: Carries the messages. An ``InProcessGrid`` is a simulation, with the recipe's fleet and virtual time.
        recipe: What to do.
        strategy: What goes out, and how replies become a model.
        on_reply: Called with each accepted update: number of the round, updates so far, updates that it takes.

    Raises:
        ConfigError: A network is given a recipe that simulates devices or attacks, or no simulated device can do the
            training.
    """

    def __init__(
        self, grid: Grid, recipe: FederatedRecipe, strategy: Strategy, on_reply: OnReply | None = None
    ) -> None:
        simulated = isinstance(grid, InProcessGrid)
        if not simulated and (recipe.fleet.devices or recipe.fleet.drop_out or recipe.attack.kind != "none"):
            raise ConfigError("[fleet] and [attack] are for simulation in one process; real clients bring their own")
        self.recipe = recipe
        self.strategy = strategy
        self._on_reply = on_reply or (lambda number, num_replies, goal: None)
        self.wire = UplinkGrid(
            grid,
            recipe.uplink.build(),
            recipe.gate,
            feedback=recipe.uplink.feedback,
            downlink=recipe.downlink.build(),
            seed=recipe.seed,
            train_metrics=TRAIN_METRICS,
            evaluate_metrics=EVALUATE_METRICS,
        )
        self.fleet = Fleet(recipe) if simulated else None
        if self.fleet is not None:
            self.fleet.check()
        self.selector = Selector(recipe, self.fleet)
        self.arrays = ArrayRecord()
        self.old_arrays: dict[int, ArrayRecord] = {}
        """Model versions that clients on the way were sent, in buffered mode."""
        self.initial_sha256 = ""
        self.accuracy_before = float("nan")
        self.accuracy_per_person_before: dict[str, float] = {}
        self.peak_ram_bytes = 0
        self.mailbox: Mailbox
        self._mean_only = is_mean_only(strategy) and (recipe.fedbuff.buffer > 0 or recipe.cohort > HELD)
        self._nodes: list[int] = list(grid.get_node_ids()) if simulated else []
        self._text = json.dumps(to_dict(recipe), separators=(",", ":"))
        self._state: Tensors = {}
        self._measured: tuple[float, dict[str, float], float] = (float("nan"), {}, float("nan"))
        self._num_unmeasured = 0
        self._silent: set[int] = set()
        """Nodes on a network that gave no reply in time when they were last asked."""
        self._busy: set[int] = set()

    def begin(self, state: State) -> None:
        """Start from a model: wait for the nodes, measure it."""
        self._set_model(write_arrays(state))
        self.initial_sha256 = state_sha256(self._state)
        self.make_mailbox()
        _wait_for_nodes(self.wire, self.recipe)
        self._measure(0, self.recipe.server.timeout_s)
        self.accuracy_before, self.accuracy_per_person_before, _ = self._measured
        self.wire.take_traffic()  # measuring the start is no part of any round

    def make_mailbox(self) -> None:
        """The mailbox of this kind of grid."""
        limit_s = self.recipe.server.timeout_s if self.recipe.fedbuff.buffer else math.inf
        if self.fleet is None:
            self.mailbox = WallMailbox(self.wire, limit_s)
            return
        fleet, codec, sent = self.fleet, self.recipe.uplink.build(), self._sent_state()
        known: dict[str | None, int] = {}

        def uplink_bytes(partition: int) -> int:
            device = fleet.kind(partition).device
            if device not in known:
                known[device] = fleet.uplink_bytes(partition, sent, codec)
            return known[device]

        self.mailbox = VirtualMailbox(self.wire, fleet, uplink_bytes, limit_s)

    # A journal's -------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[dict[str, Any], Tensors]:
        """Everything that the rounds to come depend on, after a round: plain values, and tensors."""
        layout, strategy_tensors = strategy_memory(self.strategy)
        tickets, taken = self.wire.memory()
        box = self.mailbox.state() if isinstance(self.mailbox, VirtualMailbox) else {}
        needed = {int(row["version"]) for row in box.get("waiting", ())}
        self.old_arrays = {version: arrays for version, arrays in self.old_arrays.items() if version in needed}
        accuracy, per_person, loss = self._measured
        memory = {
            "measured": [accuracy, per_person, loss],
            "accuracy_before": self.accuracy_before,
            "accuracy_per_person_before": self.accuracy_per_person_before,
            "initial_sha256": self.initial_sha256,
            "peak_ram_bytes": self.peak_ram_bytes,
            "selector": self.selector.state(),
            "tickets": tickets,
            "taken": sorted(taken.items()) if self.recipe.clients_remember else [],
            "mailbox": box,
            "strategy": layout,
            "names": list(self.arrays),
        }
        tensors = {f"model/{name}": tensor for name, tensor in self._state.items()}
        tensors |= {f"strategy/{name}": tensor for name, tensor in strategy_tensors.items()}
        for version, arrays in self.old_arrays.items():
            tensors |= {f"version {version}/{name}": tensor for name, tensor in read_arrays(arrays).items()}
        return memory, tensors

    def restore(self, memory: Mapping[str, Any], tensors: Tensors) -> None:
        """Go on from ``memory``, instead of ``begin``."""

        def model(prefix: str) -> ArrayRecord:
            return write_arrays({name: tensors[f"{prefix}/{name}"] for name in memory["names"]})

        self._set_model(model("model"))
        self.make_mailbox()
        _wait_for_nodes(self.wire, self.recipe)
        accuracy, per_person, loss = memory["measured"]
        self._measured = accuracy, dict(per_person), loss
        self.accuracy_before = memory["accuracy_before"]
        self.accuracy_per_person_before = dict(memory["accuracy_per_person_before"])
        self.initial_sha256, self.peak_ram_bytes = memory["initial_sha256"], memory["peak_ram_bytes"]
        self.selector.restore(memory["selector"])
        self.wire.restore(memory["tickets"], {int(node): int(ticket) for node, ticket in memory["taken"]})
        if isinstance(self.mailbox, VirtualMailbox):
            messages: dict[str, Message] = {}
            waiting = memory["mailbox"]["waiting"]
            for version in sorted({int(row["version"]) for row in waiting}):
                self.old_arrays[version] = model(f"version {version}")
                rows = {int(row["node_id"]): row["message_id"] for row in waiting if row["version"] == version}
                sent = self._messages(version + 1, self.old_arrays[version], sorted(rows))
                messages |= {rows[message.metadata.dst_node_id]: message for message in sent}
            self._busy = {int(row["node_id"]) for row in waiting}
            self.mailbox.restore(memory["mailbox"], messages)
        # After the old messages were made again, for making them is something that a strategy may remember.
        inside = {n.removeprefix("strategy/"): t for n, t in tensors.items() if n.startswith("strategy/")}
        restore_strategy(self.strategy, memory["strategy"], inside)
        self.wire.take_traffic()

    # Synchronous rounds ------------------------------------------------------------------------------------------

    def round(self, number: int) -> RoundResult:
        """Train one cohort and aggregate; measure the result if it is due."""
        wall_s, server, box = time.perf_counter(), self.recipe.server, self.mailbox
        goal = min(self.recipe.cohort, self.recipe.num_clients)
        cohort = self._select(number, self.selector.num_to_ask(goal))
        started_s = box.now_s
        self.selector.asked(cohort, started_s)
        box.post(self._messages(number, self.arrays, cohort), number - 1)
        taken = Aggregation(self.strategy, mean_only=self._mean_only)
        tickets: dict[int, int] = {}
        held: list[Delivery] = []
        rows: list[ClientResult] = []
        while len(tickets) < goal and box.num_waiting:
            num_before = len(rows)
            for delivery in box.collect(goal - len(tickets), started_s + server.timeout_s):
                rows.append(self._row(number, delivery))
                arrival = delivery.arrival
                if arrival.update is None:
                    continue
                tickets[arrival.node_id] = arrival.ticket
                self._on_reply(number, len(tickets), goal)
                if box.in_order and self._mean_only:  # added at once, for 10,000 of them would be gigabytes
                    taken.add(arrival.update, arrival.node_id, weight=arrival.update.num_samples)
                else:
                    held.append(delivery)
            if len(rows) == num_before:
                break
        for delivery in box.give_up(SURPLUS if len(tickets) >= goal else TOO_LATE):
            rows.append(self._row(number, delivery))
        for delivery in sorted(held, key=_order):  # a sum of floats depends on its order, and a network's never repeats
            if (update := delivery.arrival.update) is not None:
                taken.add(update, delivery.arrival.node_id, weight=update.num_samples)
        self.selector.learn(
            sum(row.outcome != "surplus" for row in rows), sum(row.outcome in ("dropped", "late") for row in rows)
        )
        problem = ""
        if len(tickets) < server.min_replies:
            problem = _too_few("training", number, len(tickets), len(cohort), server.min_replies, _reasons(rows))
        elif not self._close(number, taken):
            problem = f"round {number}: strategy {server.strategy} makes no model of {len(tickets)} accepted replies"
        else:
            self.wire.settle(tickets)
        return self._result(number, rows, taken, wall_s, problem)

    def _select(self, number: int, size: int) -> list[int]:
        """A cohort; the server waits until at least the quorum can be asked. Of fewer that are connected when it has
        waited for long the round is tried, and abandoned."""
        min_replies, patience_s = self.recipe.server.min_replies, self._patience_s()
        until_s = self.mailbox.now_s + patience_s
        while True:
            nodes = self._nodes or sorted(self.wire.get_node_ids())
            cohort = self.selector.cohort(number, nodes, size, self.mailbox.now_s)
            if len(cohort) >= min(size, min_replies):
                return cohort
            if self.mailbox.wait(until_s):
                continue
            if cohort and self.fleet is None:
                return cohort
            raise RoundError(
                f"round {number}: for {format_seconds(patience_s)} fewer than server.min_replies ({min_replies}) "
                f"clients were {self._ready()}"
            )

    def _patience_s(self) -> float:
        """How long the server waits for somebody to ask, on the mailbox's clock."""
        return self.recipe.server.timeout_s if self.fleet is None else _WEEK_S

    def _ready(self) -> str:
        """What a client must be to be asked."""
        if self.fleet is None:
            return "connected and not resting (server.pace_s)"
        return "online, fitted their device and were not resting (server.pace_s), in virtual time"

    # Buffered updates --------------------------------------------------------------------------------------------

    def buffered(self, number: int) -> RoundResult:
        """Collect ``fedbuff.buffer`` updates of clients that started at various times, and move the model on."""
        wall_s, box, size = time.perf_counter(), self.mailbox, self.recipe.fedbuff.buffer
        taken = Aggregation(self.strategy, mean_only=self._mean_only)
        rows: list[ClientResult] = []
        nodes = self._nodes or sorted(self.wire.get_node_ids())
        while taken.num_updates < size:
            self._fill_up(number, box.now_s)
            # Who starts meanwhile is sent the same model: it changes with the last of the updates, not before.
            fill_up = partial(self._fill_up, number)
            for delivery in box.collect(size - taken.num_updates, math.inf, fill_up):
                row = self._row(number, delivery)
                rows.append(row)
                self._busy.discard(delivery.arrival.node_id)
                update = delivery.arrival.update
                if update is not None:
                    # Section 5 of the paper: each update counts 1 / sqrt(1 + staleness), whatever the client's number
                    # of samples, and the sum is divided by K.
                    share = 1 / math.sqrt(1 + row.staleness)
                    taken.add(update, delivery.arrival.node_id, weight=1.0, share=share)
                    self.wire.settle({delivery.arrival.node_id: delivery.arrival.ticket})
                    self._on_reply(number, taken.num_updates, size)
            if len(rows) >= size * (2 + self.recipe.server.max_abandoned) and not taken.num_updates:
                raise RoundError(_too_few("training", number, 0, len(rows), 1, _reasons(rows)))
        # A strategy that remembers what it sent must remember the model that this moves on from.
        self._messages(number, self.arrays, nodes[:1])
        if not self._close(number, taken, lr=self.recipe.fedbuff.lr):
            strategy = self.recipe.server.strategy
            raise RoundError(f"update {number}: strategy {strategy} makes no model of {size} updates")
        return self._result(number, rows, taken, wall_s, "")

    def _fill_up(self, number: int, time_s: float) -> None:
        """Start clients with the current model until ``concurrency`` train."""
        box, chosen = self.mailbox, list[int]()
        until_s = box.now_s + self._patience_s()
        while True:
            nodes = self._nodes or sorted(self.wire.get_node_ids())
            missing = min(self.recipe.fedbuff.concurrency or self.recipe.cohort, len(nodes)) - box.num_waiting
            while len(chosen) < missing:
                node_id = self.selector.one(nodes, self._busy, time_s)
                if node_id is None:
                    break
                self._busy.add(node_id)
                chosen.append(node_id)
            # Busy, but on no way: their replies have come, and are about to be looked at.
            if chosen or box.num_waiting or self._busy or not box.wait(until_s):
                break
            time_s = box.now_s
        if chosen:
            self.selector.asked(chosen, time_s)
            self.old_arrays[number - 1] = self.arrays
            messages = self._messages(number, self.arrays, sorted(chosen))
            box.post(messages, number - 1, [time_s] * len(messages))
        elif not box.num_waiting and not self._busy:
            waited = format_seconds(self._patience_s())
            raise RoundError(f"update {number}: for {waited} there was nobody to ask; no client was {self._ready()}")

    # Both --------------------------------------------------------------------------------------------------------

    def _messages(self, number: int, arrays: ArrayRecord, nodes: Sequence[int]) -> list[Message]:
        """What the strategy sends to these nodes, in their order; see Note [seeded sampling] in ``selection``."""
        cohort = _CohortGrid(self.wire, list(nodes))
        with _seeded(self.recipe.seed, number, 0):
            messages = list(self.strategy.configure_train(number, arrays, ConfigRecord({"recipe": self._text}), cohort))
        return sorted(messages, key=lambda message: message.metadata.dst_node_id)

    def _close(self, number: int, taken: Aggregation, *, lr: float = 1.0) -> bool:
        """Move the model on, if the strategy makes one of these updates."""
        arrays = taken.close(number, self._sent_state(), lr=lr)
        if arrays is not None:
            self._set_model(arrays)
        return arrays is not None

    def _sent_state(self) -> Tensors:
        """The global model, with what the strategy sends beside it: what a client's update may be of."""
        return dict(self.strategy.sent(self._state)) if isinstance(self.strategy, Scaffold) else self._state

    def _set_model(self, arrays: ArrayRecord) -> None:
        self.arrays, self._state = arrays, read_arrays(arrays)

    def _row(self, number: int, delivery: Delivery) -> ClientResult:
        arrival, update = delivery.arrival, delivery.arrival.update
        outcome: Outcome = "trained"
        if update is None:
            outcomes: Mapping[str, Outcome] = {SURPLUS: "surplus", TOO_LATE: "late"}
            outcome = "refused" if arrival.refused else outcomes.get(arrival.problem, "dropped")
        ram_bytes = device_ram_bytes = 0
        device, integers = None, False
        if self.fleet is not None and delivery.partition is not None:
            kind = self.fleet.kind(delivery.partition)
            ram_bytes, device = kind.cost.ram_bytes, kind.device
            integers = kind.cost.number_format == "int8"
            device_ram_bytes = 0 if kind.profile is None else kind.profile.ram_bytes
        # What a plan was made for in floating point is this machine, not the simulated device.
        if update is not None and (self.fleet is None or integers):
            ram_bytes = int(update.metrics.get(RAM, 0)) or ram_bytes
        if outcome == "trained":
            self.peak_ram_bytes = max(self.peak_ram_bytes, ram_bytes)
        return ClientResult(
            round=number,
            node_id=arrival.node_id,
            partition=delivery.partition,
            device=device,
            outcome=outcome,
            reason=arrival.problem,
            started_s=delivery.started_s,
            ended_s=delivery.ended_s,
            energy_j=delivery.energy_j,
            uplink_bytes=arrival.uplink_bytes,
            num_samples=0 if update is None else update.num_samples,
            loss=None if update is None else update.metrics.get("loss"),
            ram_bytes=ram_bytes,
            device_ram_bytes=device_ram_bytes,
            staleness=number - 1 - delivery.version,
        )

    def _result(
        self, number: int, rows: list[ClientResult], taken: Aggregation, wall_s: float, problem: str
    ) -> RoundResult:
        server = self.recipe.server
        train_s = time.perf_counter() - wall_s
        if self.fleet is None:
            silent = {row.node_id: row.outcome == "late" for row in rows if row.outcome != "surplus"}
            self._silent = {node for node in self._silent | set(silent) if silent.get(node, True)}
        if problem:  # what was accepted came to nothing
            rows = [
                replace(row, outcome="surplus", reason=ABANDONED) if row.outcome == "trained" else row for row in rows
            ]
        trained = [row for row in rows if row.outcome == "trained"]
        due = number % server.evaluate_every == 0 or number == server.rounds
        unmeasured = ""
        if due:
            slowest_s = max((row.ended_s - row.started_s for row in trained), default=server.timeout_s)
            limit_s = min(server.timeout_s, _MEASURE_FACTOR * slowest_s)
            unmeasured = self._measure(number, max(server.timeout_s - train_s, limit_s))
        accuracy, per_person, loss = self._measured
        traffic = self.wire.take_traffic()
        dropped = [one for one in traffic.dropped if one.reason != SURPLUS]
        reasons = [text for text in (problem, unmeasured) if text]
        reasons += [f"node {one.node_id} dropped: {one.reason}" for one in dropped]
        reasons += [f"node {one.node_id} refused: {one.reason}" for one in traffic.refused]
        gone = [row.node_id for row in rows if row.outcome in ("dropped", "late")]
        num_surplus = sum(row.outcome == "surplus" for row in rows)
        simulated = self.fleet is not None and self.fleet.has_devices
        return RoundResult(
            round=number,
            accuracy=accuracy,
            accuracy_per_person=per_person,
            loss=loss,
            measured=due and not unmeasured,
            train_loss=float(taken.metrics.get("loss", float("nan"))),
            uplink_bytes=traffic.uplink_bytes,
            downlink_bytes=traffic.downlink_bytes,
            fp32_uplink_bytes=traffic.fp32_uplink_bytes,
            clients_selected=len(rows),
            clients_trained=len(trained),
            clients_dropped=len(gone) + len({one.node_id for one in dropped} - set(gone)),
            clients_surplus=num_surplus,
            replies_refused=len(traffic.refused),
            abandoned=bool(problem),
            staleness=float(np.mean([row.staleness for row in trained])) if trained else 0.0,
            reasons=tuple(reasons[:MAX_REASONS]),
            virtual_s=self.mailbox.now_s if simulated else None,
            energy_j=math.fsum(row.energy_j for row in rows) if simulated else None,
            train_s=train_s,
            round_s=time.perf_counter() - wall_s,
            clients=tuple(rows),
        )

    # Measuring ---------------------------------------------------------------------------------------------------

    def _measure(self, number: int, limit_s: float) -> str:
        """Accuracy, accuracy of each person, and loss of the global model.

        Args:
            number: Of the round.
            limit_s: Clients have so long, on the wall.

        Returns:
            Why there are none but those of before; empty if there are.

        Raises:
            RoundError: There were none too often, or at the end.
        """
        server = self.recipe.server
        if server.evaluate == "server":
            # fp32 in torch, whatever the clients compute in: the global model is fp32.
            client = replace(self.recipe.client, engine="torch", scheme="fp32")
            found = get_engine("torch").evaluate(self.recipe.model, self._state, server_test(self.recipe.data), client)
            self._measured = found.accuracy, {}, found.loss
            return ""
        deliveries = self._ask_all(number, limit_s)
        accuracies: dict[str, float] = {}
        losses = []
        for delivery in sorted(deliveries, key=_order):
            metrics = delivery.arrival.metrics
            name = None if delivery.partition is None else self._name_of(delivery.partition)
            if metrics is not None and name is not None and name not in accuracies:
                accuracies[name] = metrics["accuracy"]
                losses.append(metrics["loss"])
        if accuracies:
            self._measured = float(np.mean(list(accuracies.values()))), accuracies, float(np.mean(losses))
            self._num_unmeasured = 0
            return ""
        self._num_unmeasured += 1
        reasons = [f"node {one.arrival.node_id}: {one.arrival.problem}" for one in deliveries if one.arrival.problem]
        problem = _too_few("evaluation", number, 0, len(deliveries), 1, reasons)
        if self._num_unmeasured > server.max_abandoned or number == server.rounds:
            raise RoundError(problem)
        return problem

    def _ask_all(self, number: int, limit_s: float) -> list[Delivery]:
        """As the clients report it. The driver asks every client itself: a strategy would give it one mean weighted by
        samples. Outside of virtual time: no device of the simulation spends anything on it.

        A node that let a deadline pass is asked again for training, where nobody but the round's own deadline waits
        for it, but measures nothing until it has replied.
        """
        content = RecordDict(
            {"arrays": self.arrays, "config": ConfigRecord({"recipe": self._text, "server-round": number})}
        )
        nodes = self._nodes or sorted(self.wire.get_node_ids())
        if self.fleet is None:
            nodes = [node_id for node_id in nodes if node_id not in self._silent] or nodes
        else:
            nodes = [node_id for node_id in nodes if self.fleet.can_measure(node_id - FIRST_NODE_ID)]
        box = WallMailbox(self.wire)
        box.post([Message(content, node_id, MessageType.EVALUATE) for node_id in nodes], number)
        deliveries: list[Delivery] = []
        while box.num_waiting:
            found = list(box.collect(box.num_waiting, limit_s))
            deliveries += found or list(box.give_up(TOO_LATE))
        if self.fleet is None:
            late = {one.arrival.node_id for one in deliveries if one.arrival.problem == TOO_LATE}
            self._silent = (self._silent - {one.arrival.node_id for one in deliveries}) | late
        return deliveries

    def _name_of(self, partition: int) -> str | None:
        """A client's name in the figures: the person, where there is one."""
        if not 0 <= partition < self.recipe.num_clients:
            return None
        data = self.recipe.data
        return str(data.people[partition] if data.of_people else partition)


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


@contextlib.contextmanager
def _seeded(*seeds: int) -> Iterator[None]:
    """See Note [seeded sampling] in ``selection``."""
    before = random.getstate()
    random.seed(repr(seeds))
    try:
        yield
    finally:
        random.setstate(before)


def _wait_for_nodes(grid: Grid, recipe: FederatedRecipe) -> None:
    """For all of them; from the deadline on a quorum will do, for a node that is dead must not stop the others."""
    server = recipe.server
    end = time.monotonic() + server.timeout_s
    while (found := len(list(grid.get_node_ids()))) < recipe.num_clients:
        if time.monotonic() >= end:
            if found >= server.min_replies:
                return
            raise RoundError(
                f"{found} of {recipe.num_clients} nodes connected within {server.timeout_s:g} s, expected at least "
                f"{server.min_replies} (server.min_replies); start the others, or wait longer (server.timeout_s)"
            )
        time.sleep(0.2)


def _reasons(rows: Sequence[ClientResult]) -> list[str]:
    keys = {"late": " (server.timeout_s)"}
    return [f"node {row.node_id} {row.outcome}: {row.reason}{keys.get(row.outcome, '')}" for row in rows if row.reason]


def _too_few(what: str, number: int, num_accepted: int, num_sent: int, expected: int, reasons: Sequence[str]) -> str:
    return (
        f"round {number}, {what}: {num_accepted} of {num_sent} replies were accepted, expected at least {expected}. "
        f"{reasons[0] if reasons else ''}"
    ).strip()


def _order(delivery: Delivery) -> tuple[float, int]:
    """By partition where the reply says it: node ids differ from one deployment to the next."""
    return float("inf") if delivery.partition is None else delivery.partition, delivery.arrival.node_id
