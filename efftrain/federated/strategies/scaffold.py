"""SCAFFOLD, the server's half; the client's is in ``client_uplink`` and ``client_app``."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from efftrain.federated.flower import (
    ArrayRecord,
    ConfigRecord,
    FedAvg,
    Grid,
    Message,
    MetricRecord,
    read_arrays,
    write_arrays,
)
from efftrain.federated.gate import is_trained
from efftrain.federated.local import CONTROL
from efftrain.federated.strategies.robust import Around, arrays_of, contents_of

Tensors = Mapping[str, npt.NDArray[np.generic]]


class Scaffold(Around):
    """The model moves by the mean of the updates, the control variates by what their clients' moved.

    A round of ``S`` clients out of ``N``: ``x += lr / S * sum(y_i - x)`` and ``c += 1 / N * sum(c_i_new - c_i)``. All
    updates of a round are held in memory, each of twice the model's size. See Note [control variates] in ``local``.

    Args:
        inner: Says who trains, and makes the metrics.
        lr: Server learning rate.
        population: ``N``: how many clients there are, in the cohort or not.

    Source: Karimireddy et al., SCAFFOLD (arXiv:1910.06378), algorithm 1 with option II. As there, every client counts
    the same, whatever its number of samples.
    """

    _inner: FedAvg

    def __init__(self, inner: FedAvg, lr: float, population: int) -> None:
        self._inner, self._lr, self._population = inner, lr, population
        self._model: ArrayRecord | None = None
        self._controls: dict[str, npt.NDArray[np.float32]] = {}

    def sent(self, model: Tensors) -> Tensors:
        """What goes out: a model with the control variates beside it."""
        trained = {name: tensor for name, tensor in model.items() if is_trained(tensor)}
        zeros = {CONTROL + name: np.zeros(t.shape, np.float32) for name, t in trained.items()}
        return {**model, **zeros, **self._controls}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the inner strategy, with the control variates in the message."""
        self._model = arrays
        return self._inner.configure_train(server_round, write_arrays(self.sent(read_arrays(arrays))), config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model, or nothing if there are no replies."""
        contents = contents_of(replies)
        if not contents:
            return None, None
        assert self._model is not None, "configure_train comes before aggregate_train"
        model, sent = {}, self.sent(read_arrays(self._model))
        records = [read_arrays(arrays_of(content)) for content in contents]
        for name, tensor in sent.items():
            if is_trained(tensor):
                total = np.zeros(tensor.shape)
                for record in records:
                    total += np.subtract(record[name], tensor, dtype=np.float64)
                factor = 1 / self._population if name.startswith(CONTROL) else self._lr / len(records)
                tensor = np.add(tensor, factor * total).astype(tensor.dtype)
            if name.startswith(CONTROL):
                self._controls[name] = np.asarray(tensor, np.float32)
            else:
                model[name] = tensor
        return write_arrays(model), self._inner.train_metrics_aggr_fn(contents, self._inner.weighted_by_key)
