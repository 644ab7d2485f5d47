"""How the driver's messages go out and come back: by the wall clock on a network, by a virtual clock in simulation.

Both have the same few verbs, so rounds and buffered updates are written once.

Note [virtual time]
    In simulation a message's arrival is known when it is sent: the fleet says how long download, training and upload
    take, and who drops out. A client is run when its reply is collected, in the order of the arrivals; a client that
    drops out, or whose reply is too late for anyone, is not run at all, since nothing of it would be seen.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from efftrain.federated.client_app import PARTITION
from efftrain.federated.fleet import Fleet, Trip
from efftrain.federated.flower import Message
from efftrain.federated.grid import FIRST_NODE_ID
from efftrain.federated.uplink import NOT_SENT, Arrival, UplinkGrid

_MOST_FAILURES = 1000
"""So many drop-outs are looked at together: where everybody drops out, somebody has to notice."""
_VIRTUAL_WAIT_S, _WALL_WAIT_S = 300.0, 0.5
"""A server that can ask nobody looks again after so long."""
TOO_LATE = "no reply by the deadline"


@dataclass(frozen=True, kw_only=True, eq=False)
class Delivery:
    """One message that came to its end: an update, a refusal, a drop-out, or nothing in time."""

    arrival: Arrival
    partition: int | None
    """Number of the client; None where a reply that was not accepted did not say it."""
    started_s: float
    ended_s: float
    energy_j: float = 0.0
    version: int = 0
    """What ``post`` was told: the version of the model that went out."""


class Mailbox(Protocol):
    """Sends messages and gives what comes of them."""

    in_order: bool
    """Whether deliveries come in an order that repeats. Where they do not, the driver sorts them."""

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        ...

    @property
    def num_waiting(self) -> int:
        """Messages on their way."""
        ...

    def wait(self, until_s: float) -> bool:
        """Let a moment pass in which nothing is sent; False once it is ``until_s``."""
        ...

    def post(self, messages: Iterable[Message], version: int, starts_s: Sequence[float] = ()) -> None:
        """Send messages.

        Args:
            messages: To clients.
            version: Of the model in them.
            starts_s: When each was sent, in simulation; now if it is empty.
        """
        ...

    def collect(self, most: int, until_s: float, on_free: Callable[[float], None] | None = None) -> Iterator[Delivery]:
        """The next deliveries: at least one, unless none comes until ``until_s``; at most ``most`` replies.

        Args:
            most: Stop after so many replies.
            until_s: Deadline, on this mailbox's clock.
            on_free: In simulation, told when each client but the last is done, before any of them is run: then another
                may be sent the same model, and may even be done first.
        """
        ...

    def give_up(self, reason: str) -> Iterator[Delivery]:
        """Wait for nothing that is still on its way."""
        ...


@dataclass
class _Waiting:
    message_id: str
    node_id: int
    started_s: float
    version: int
    trip: Trip


class VirtualMailbox:
    """Simulation on an ``InProcessGrid``; see Note [virtual time].

    Args:
        wire: Around the grid.
        fleet: Says how long everything takes.
        uplink_bytes: Of a client's reply, at most, by its number; known from the codec before anything runs.
        limit_s: A message is given up after so long.
    """

    in_order = True

    def __init__(
        self, wire: UplinkGrid, fleet: Fleet, uplink_bytes: Callable[[int], int], limit_s: float = math.inf
    ) -> None:
        self._wire, self._fleet, self._uplink_bytes, self._limit_s = wire, fleet, uplink_bytes, limit_s
        self._now_s = 0.0
        self._num_posted = 0
        self._queue: list[tuple[float, int, _Waiting]] = []

    @property
    def now_s(self) -> float:
        """Virtual seconds since the run began."""
        return self._now_s

    @property
    def num_waiting(self) -> int:
        """See ``Mailbox``."""
        return len(self._queue)

    def wait(self, until_s: float) -> bool:
        """See ``Mailbox``."""
        if self._now_s >= until_s:
            return False
        self._now_s += _VIRTUAL_WAIT_S
        return True

    def post(self, messages: Iterable[Message], version: int, starts_s: Sequence[float] = ()) -> None:
        """See ``Mailbox``. The replies are planned at once."""
        messages = list(messages)
        starts_s = starts_s or [self._now_s] * len(messages)
        before = self._wire.downlink_bytes
        ids = self._wire.post(messages)
        downlink_bytes = (self._wire.downlink_bytes - before) // max(1, len(messages))
        for message_id, message, start_s in zip(ids, messages, starts_s, strict=True):
            self._num_posted += 1
            node_id = message.metadata.dst_node_id
            partition = node_id - FIRST_NODE_ID
            uplink_bytes = self._uplink_bytes(partition)
            trip = self._fleet.trip(partition, self._num_posted, start_s, downlink_bytes, uplink_bytes)
            if min(trip.duration_s, trip.ends_s or math.inf) > self._limit_s:
                share = self._limit_s / trip.duration_s
                trip = replace(trip, ends_s=self._limit_s, reason=TOO_LATE, energy_j=share * trip.energy_j)
            # The number settles ties, so that clients of equal speed come in the order in which they were asked.
            one = _Waiting(message_id, node_id, start_s, version, trip)
            heapq.heappush(self._queue, (_end_of(one), self._num_posted, one))

    def collect(self, most: int, until_s: float, on_free: Callable[[float], None] | None = None) -> Iterator[Delivery]:
        """See ``Mailbox``."""
        due, num_replies = list[_Waiting](), 0
        while self._queue and self._queue[0][0] <= until_s and len(due) < _MOST_FAILURES + most:
            end_s, _, one = heapq.heappop(self._queue)
            due.append(one)
            num_replies += one.trip.ends_s is None
            if num_replies == most:
                break
            if on_free is not None:
                on_free(end_s)
        if not due:
            self._now_s = max(self._now_s, until_s)
            return
        replies = iter(self._wire.pull_updates([one.message_id for one in due if one.trip.ends_s is None]))
        for one in due:
            self._now_s = max(self._now_s, _end_of(one))
            if one.trip.ends_s is None:
                yield self._delivery(one, next(replies))
            else:
                [arrival] = self._wire.give_up([one.message_id], one.trip.reason)
                yield self._delivery(one, arrival)

    def give_up(self, reason: str) -> Iterator[Delivery]:
        """See ``Mailbox``. Costs the energy of the part of the work that was done by now."""
        left, self._queue = sorted(self._queue, key=lambda entry: entry[:2]), []
        for _, _, one in left:
            [arrival] = self._wire.give_up([one.message_id], reason)
            whole_s = one.trip.duration_s if one.trip.ends_s is None else one.trip.ends_s
            share = min(1.0, (self._now_s - one.started_s) / whole_s) if whole_s else 1.0
            yield self._delivery(one, arrival, share)

    def state(self) -> dict[str, Any]:
        """Plain values for a journal. The messages themselves are not in it; ``restore`` is given them again."""
        waiting = [{**asdict(one), "order": order} for _, order, one in sorted(self._queue, key=lambda e: e[:2])]
        return {"now_s": self._now_s, "num_posted": self._num_posted, "waiting": waiting}

    def restore(self, state: Mapping[str, Any], messages: Mapping[str, Message]) -> None:
        """Go on from ``state``.

        Args:
            state: As it was given.
            messages: Old id of each message on its way -> the message, to be sent again now.
        """
        self._now_s, self._num_posted = float(state["now_s"]), int(state["num_posted"])
        self._queue = []
        for row in state["waiting"]:
            [message_id] = self._wire.post([messages[row["message_id"]]])
            trip = Trip(**row["trip"])
            one = _Waiting(message_id, int(row["node_id"]), float(row["started_s"]), int(row["version"]), trip)
            heapq.heappush(self._queue, (_end_of(one), int(row["order"]), one))

    def _delivery(self, one: _Waiting, arrival: Arrival, share: float = 1.0) -> Delivery:
        return Delivery(
            arrival=arrival,
            partition=one.node_id - FIRST_NODE_ID,
            started_s=one.started_s,
            ended_s=min(self._now_s, _end_of(one)),
            energy_j=share * one.trip.energy_j,
            version=one.version,
        )


def _end_of(one: _Waiting) -> float:
    return one.started_s + (one.trip.duration_s if one.trip.ends_s is None else one.trip.ends_s)


class WallMailbox:
    """A real network: looks for replies until there are some.

    Args:
        wire: Around the grid.
        limit_s: A message is given up after so long.
    """

    in_order = False

    def __init__(self, wire: UplinkGrid, limit_s: float = math.inf) -> None:
        self._wire, self._limit_s = wire, limit_s
        self._begun_s = time.monotonic()
        self._waiting: dict[str, tuple[float, int]] = {}
        self._unsent: list[Delivery] = []

    @property
    def now_s(self) -> float:
        """Seconds on the wall since the run began."""
        return time.monotonic() - self._begun_s

    @property
    def num_waiting(self) -> int:
        """See ``Mailbox``."""
        return len(self._waiting) + len(self._unsent)

    def wait(self, until_s: float) -> bool:
        """See ``Mailbox``."""
        left_s = until_s - self.now_s
        if left_s > 0:
            time.sleep(min(_WALL_WAIT_S, left_s))
        return left_s > 0

    def post(self, messages: Iterable[Message], version: int, starts_s: Sequence[float] = ()) -> None:
        """See ``Mailbox``. A message that cannot be sent is delivered as a drop-out."""
        messages, now_s = list(messages), self.now_s
        for message, message_id in zip(messages, self._wire.post(messages), strict=True):
            if message_id:
                self._waiting[message_id] = (now_s, version)
                continue
            arrival = Arrival("", message.metadata.dst_node_id, problem=NOT_SENT)
            unsent = Delivery(arrival=arrival, partition=None, started_s=now_s, ended_s=now_s, version=version)
            self._unsent.append(unsent)

    def collect(self, most: int, until_s: float, on_free: Callable[[float], None] | None = None) -> Iterator[Delivery]:
        """See ``Mailbox``. All that has arrived is given, for nothing is gained by leaving it; ``most`` is ignored."""
        pause_s = 0.05
        if self._unsent:
            time.sleep(_WALL_WAIT_S)  # or whoever asks the same node again at once would do nothing else
        while self.num_waiting:
            unsent, self._unsent = self._unsent, []
            yield from unsent
            arrivals = list(self._wire.pull_updates(list(self._waiting)))
            late = [one for one, (started_s, _) in self._waiting.items() if self.now_s - started_s > self._limit_s]
            arrivals += self._wire.give_up(late, TOO_LATE)
            for arrival in arrivals:
                yield self._delivery(arrival)
            if unsent or arrivals or self.now_s >= until_s:
                return
            time.sleep(max(0.0, min(pause_s, until_s - self.now_s)))
            pause_s = min(1.0, 1.5 * pause_s)

    def give_up(self, reason: str) -> Iterator[Delivery]:
        """See ``Mailbox``."""
        unsent, self._unsent = self._unsent, []
        yield from unsent
        for arrival in self._wire.give_up(list(self._waiting), reason):
            yield self._delivery(arrival)

    def _delivery(self, arrival: Arrival) -> Delivery:
        started_s, version = self._waiting.pop(arrival.message_id)
        return Delivery(
            arrival=arrival,
            partition=_said_partition(arrival),
            started_s=started_s,
            ended_s=self.now_s,
            version=version,
        )


def _said_partition(arrival: Arrival) -> int | None:
    """The number that a client gave in its metrics."""
    metrics = arrival.metrics if arrival.update is None else arrival.update.metrics
    value = (metrics or {}).get(PARTITION)
    return int(value) if value is not None and value >= 0 and float(value).is_integer() else None
