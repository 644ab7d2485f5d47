"""Strategies of our own, as Flower's driver and ours call them. Each wraps another one and changes one thing."""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from efftrain.federated.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    FedAvg,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    MultiKrum,
    RecordDict,
    Strategy,
)

Rule = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Updates ``(K, N)`` -> update ``(N,)``, fp32."""
_NUM_SAMPLES = "num-examples"


class Around(Strategy):
    """What stays as the inner strategy has it: whom it asks, evaluation and the summary."""

    _inner: Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the inner strategy."""
        return self._inner.configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the inner strategy."""
        return self._inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the inner strategy."""
        return self._inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """As the inner strategy."""
        self._inner.summary()


class Ruled(Around):
    """FedAvg with another rule than the mean: the model moves by what the rule makes of the clients' updates.

    Tensors that are no floating point, such as counters, stay as they were sent.

    Args:
        inner: Says who trains, and makes the metrics.
        rule: Of the updates, all floating-point tensors of a client in one row.
    """

    _inner: FedAvg

    def __init__(self, inner: FedAvg, rule: Rule) -> None:
        self._inner, self._rule = inner, rule
        self._sent: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the inner strategy; the model is remembered, updates are counted from it."""
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model, or nothing if there are no replies."""
        replies = list(replies)
        contents = contents_of(replies)
        if not contents:
            return None, None
        assert self._sent is not None, "configure_train comes before aggregate_train"
        sent = {name: array.numpy() for name, array in self._sent.items()}
        names = [name for name, tensor in sent.items() if np.issubdtype(tensor.dtype, np.floating)]
        update_N = self._rule(np.stack([_row(content, sent, names) for content in contents]))
        model, start = {}, 0
        for name, tensor in sent.items():
            if name in names:
                delta = update_N[start : start + tensor.size].reshape(tensor.shape)
                tensor, start = np.asarray(tensor + delta, tensor.dtype), start + tensor.size
            model[name] = Array(np.ascontiguousarray(tensor))
        metrics = self._inner.train_metrics_aggr_fn(contents, self._inner.weighted_by_key)
        return ArrayRecord(model), metrics


class AllButLiars(Around):
    """MultiKrum that averages as many replies as there are, but for those that may be lies.

    Args:
        inner: Its ``num_nodes_to_select`` is set anew each round.

    Source: Blanchard et al. (arXiv:1703.02757), section 4, with ``m = n - f``.
    """

    _inner: MultiKrum

    def __init__(self, inner: MultiKrum) -> None:
        self._inner = inner

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of them."""
        replies = list(replies)
        self._inner.num_nodes_to_select = max(1, len(contents_of(replies)) - self._inner.num_malicious_nodes)
        return self._inner.aggregate_train(server_round, replies)


class Bucketing(Around):
    """Mixes the clients into buckets of a few, and gives the means of the buckets to another strategy.

    Clients with different data disagree, and a robust rule takes the rare ones for liars. Means of a few disagree
    less. The price: a bucket with one liar in it is a lie, so ``size`` times as many of the rows that the inner rule
    sees may be.

    Args:
        inner: Any strategy; it sees the buckets as if they were clients.
        size: Clients in a bucket; the last bucket may be smaller. 1 changes nothing.
        seed: Of who meets whom, anew each round.

    Source: Karimireddy, He, Jaggi, Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing
    (arXiv:2006.09365), algorithm 1.
    """

    def __init__(self, inner: Strategy, size: int, seed: int) -> None:
        self._inner, self._size, self._seed = inner, size, seed

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of the buckets."""
        contents = contents_of(replies)
        order = np.random.default_rng([self._seed, server_round]).permutation(len(contents))
        buckets = [
            _bucket([contents[i] for i in order[start : start + self._size]])
            for start in range(0, len(order), self._size)
        ]
        return self._inner.aggregate_train(server_round, [_reply(bucket) for bucket in buckets])


def contents_of(replies: Iterable[Message]) -> list[RecordDict]:
    """Of the replies that are no errors."""
    return [reply.content for reply in replies if not reply.has_error()]


def arrays_of(content: RecordDict) -> ArrayRecord:
    """The one record of arrays of a reply."""
    [record] = content.array_records.values()
    return record


def _row(content: RecordDict, sent: dict[str, npt.NDArray[np.generic]], names: list[str]) -> npt.NDArray[np.float32]:
    arrays = arrays_of(content)
    return np.concatenate([np.subtract(arrays[name].numpy(), sent[name]).astype(np.float32).ravel() for name in names])


def _bucket(contents: list[RecordDict]) -> RecordDict:
    """The plain mean of some models; metrics weighted by samples, as Flower's strategies do it, samples added up."""
    records = [arrays_of(content) for content in contents]
    arrays = {}
    for name, first in records[0].items():
        tensor = first.numpy()
        if np.issubdtype(tensor.dtype, np.floating):
            tensor = np.mean([record[name].numpy() for record in records], axis=0, dtype=np.float64).astype(
                tensor.dtype
            )
        arrays[name] = Array(np.ascontiguousarray(tensor))
    metrics = [next(iter(content.metric_records.values())) for content in contents]
    weights = [float(metric[_NUM_SAMPLES]) for metric in metrics]  # type: ignore[arg-type]
    mean = {
        name: float(np.average([float(metric[name]) for metric in metrics], weights=weights))  # type: ignore[arg-type]
        for name in metrics[0]
        if name != _NUM_SAMPLES
    }
    record = MetricRecord({_NUM_SAMPLES: int(sum(weights)), **mean})
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": record})


def _reply(content: RecordDict) -> Message:
    return Message(content, reply_to=Message(RecordDict(), 0, MessageType.TRAIN))
