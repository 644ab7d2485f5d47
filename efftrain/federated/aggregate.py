"""From updates to the next model: a running mean, and the strategy's own rule over it or over all updates.

Note [one reply for many]
    FedAvg, and every strategy that only looks at the mean of the models (momentum, Adam and the like on the server),
    gets the mean of a large round as one reply. So updates are added up as they arrive, in fp64, and a round of 10,000
    clients needs the memory of one. Rules that compare clients (median, Krum, ...) get one reply a client, and need the
    memory of all. So does a round of at most ``HELD`` clients, for the sake of stock Flower's bits: there the mean is
    Flower's own, in fp32 and in the order of the clients.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from efftrain.compression import kernels
from efftrain.federated.client_uplink import Tensors
from efftrain.federated.flower import (
    MEAN_STRATEGIES,
    ArrayRecord,
    Message,
    MessageType,
    RecordDict,
    Strategy,
    read_arrays,
    write_arrays,
)
from efftrain.federated.gate import Floats, is_trained
from efftrain.federated.uplink import PartialUpdate, whole_model

HELD = 64
"""Rounds of so many clients are small enough to hold."""

Doubles = npt.NDArray[np.float64]


class Fold:
    """The weighted mean of updates, added one by one. An element's mean is over the clients that trained it."""

    def __init__(self) -> None:
        self._sums: dict[str, Doubles] = {}
        # Per tensor a number as long as all clients train the whole of it, else an array.
        self._weights: dict[str, float | Doubles] = {}
        self._metrics: dict[str, float] = {}
        self.num_samples = 0
        self.num_updates = 0
        self._weight = 0.0

    def add(self, update: PartialUpdate, weight: float, share: float = 1.0) -> None:
        """Add ``weight * share * update``; only ``weight`` counts in what the mean is divided by."""
        for name, delta in update.deltas.items():
            size = update.sent[name].size
            if name not in self._sums:
                self._sums[name] = np.zeros(size)
                self._weights[name] = 0.0
            mask = update.masks.get(name)
            if mask is None:
                if kernels.add_in_double(delta, weight * share, self._sums[name]) is kernels.MISSING:
                    self._sums[name] += np.multiply(delta, weight * share, dtype=np.float64)
                self._weights[name] = self._weights[name] + weight
            else:
                self._sums[name][mask] += np.multiply(delta, weight * share, dtype=np.float64)
                self._weights[name] = self._weights[name] + np.multiply(mask, weight, dtype=np.float64)
        for name, value in update.metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + weight * value
        self._weight += weight
        self.num_samples += update.num_samples
        self.num_updates += 1

    def mean(self) -> dict[str, Floats]:
        """Flat mean update of each tensor that anybody trained; 0 where nobody did."""
        means = {}
        for name, total in self._sums.items():
            weight = self._weights[name]
            means[name] = (total / np.where(np.asarray(weight) > 0, weight, 1.0)).astype(np.float32)
        return means

    def metrics(self) -> dict[str, float]:
        """Weighted mean of every metric."""
        return {name: value / self._weight for name, value in self._metrics.items()} if self._weight else {}


class Aggregation:
    """Collects the updates of one round and applies the strategy to them.

    Args:
        strategy: Whose ``aggregate_train`` makes the model.
        mean_only: Give it the mean as one reply; see Note [one reply for many].
    """

    def __init__(self, strategy: Strategy, *, mean_only: bool) -> None:
        self._strategy, self._mean_only = strategy, mean_only
        self._fold = Fold()
        self._updates: list[tuple[PartialUpdate, int, float]] = []

    @property
    def num_updates(self) -> int:
        """Updates added."""
        return self._fold.num_updates

    @property
    def metrics(self) -> Mapping[str, float]:
        """Weighted mean of the clients' metrics."""
        return self._fold.metrics()

    def add(self, update: PartialUpdate, node_id: int, *, weight: float, share: float = 1.0) -> None:
        """Take one client's update.

        Args:
            update: Accepted by the gate.
            node_id: Whose.
            weight: In the mean: the number of samples, or 1.
            share: Of the update that counts: less for a stale one.
        """
        self._fold.add(update, weight, share)
        if not self._mean_only:
            self._updates.append((update, node_id, share))

    def close(self, number: int, current: Tensors, *, lr: float = 1.0) -> ArrayRecord | None:
        """The next global model, or None if the strategy makes none.

        Args:
            number: Of the round.
            current: The global model that the updates are applied to.
            lr: Factor of every update.
        """
        mean = {name: np.float32(lr) * delta for name, delta in self._fold.mean().items()}
        if self._mean_only:
            update = PartialUpdate(mean, {}, self._fold.num_samples, self._fold.metrics(), current)
            replies = [_reply(whole_model(update, current), 0)]
        else:
            replies = [
                _reply(self._whole(update, share * lr, mean, current), node_id)
                for update, node_id, share in self._updates
            ]
        arrays, _ = self._strategy.aggregate_train(number, replies)
        return None if arrays is None else _with_types_of(arrays, current)

    def _whole(self, update: PartialUpdate, share: float, mean: Mapping[str, Floats], current: Tensors) -> RecordDict:
        """The model as this client would have it; what it did not train is as those that did have it on the mean."""
        deltas = {}
        for name, average in mean.items():
            if name not in update.deltas:
                deltas[name] = average
            elif name in update.masks:
                deltas[name] = average.copy()
                deltas[name][update.masks[name]] = np.float32(share) * update.deltas[name]
            else:
                deltas[name] = np.float32(share) * update.deltas[name]
        return whole_model(PartialUpdate(deltas, {}, update.num_samples, update.metrics, current), current)


def _reply(content: RecordDict, node_id: int) -> Message:
    asked = Message(RecordDict(), node_id, MessageType.TRAIN)
    return Message(content, reply_to=asked)


def _with_types_of(arrays: ArrayRecord, current: Tensors) -> ArrayRecord:
    """Flower's means turn counters into floats; a model keeps its types, and its counters."""
    state = {
        name: tensor.astype(current[name].dtype, copy=False) if is_trained(current[name]) else current[name]
        for name, tensor in read_arrays(arrays).items()
    }
    return write_arrays(state)


def is_mean_only(strategy: Strategy) -> bool:
    """Whether a strategy looks at nothing but the mean. A subclass may look at anything, so it does not count."""
    return type(strategy) in MEAN_STRATEGIES
