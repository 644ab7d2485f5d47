"""What computes a client's training: the registry.

An engine takes plain arrays and gives plain arrays, so that a client's app, the wire and the server need not know
whether torch, generated C or a microcontroller did the work.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError
from efftrain.federated.recipe import ClientConfig, ModelConfig

State: TypeAlias = dict[str, npt.NDArray[np.generic]]
"""A model's tensors by name, as in torch's ``state_dict``."""


@dataclass(frozen=True, eq=False)
class Correction:
    """What a strategy adds to every gradient of a client: ``mu * (w - w_sent) + offset``."""

    mu: float = 0.0
    """Weight of the proximal term. Source: Li et al., FedProx (arXiv:1812.06127)."""
    offset: State = field(default_factory=dict)
    """Of a parameter by name; of one that is missing nothing. SCAFFOLD's ``c - c_i`` (arXiv:1910.06378)."""


@dataclass(frozen=True)
class Trained:
    """Result of one client's local training."""

    state: State
    loss: float
    """Mean training loss over the samples seen, while the weights moved."""
    num_samples: int
    """Size of the client's data set: its weight in the mean."""
    trained: Mapping[str, npt.NDArray[np.bool_] | None] | None = None
    """Which elements this client trained: a tensor that is missing was not trained, None stands for a whole tensor.
    None instead of the mapping: everything was trained."""
    ram_bytes: int | None = None
    """What the training needs on the client's device, from its memory plan; None where there is no plan."""


@dataclass(frozen=True)
class Measured:
    """Result of one client's evaluation."""

    accuracy: float
    """Share of right answers, in ``[0, 1]``."""
    loss: float
    num_samples: int


class Engine(Protocol):
    """Trains and measures one client. Stateless, and called by several threads at once: equal arguments give equal
    results, to the bit, for any number of threads."""

    def initial_state(self, model: ModelConfig, seed: int) -> State:
        """A model with fresh weights."""
        ...

    def train(
        self,
        model: ModelConfig,
        state: State,
        data: ArrayDataset,
        config: ClientConfig,
        seed: int,
        correction: Correction | None = None,
    ) -> Trained:
        """Train a copy of ``state`` on one client's data.

        Args:
            model: Which model.
            state: Its tensors. Not changed.
            data: The client's training data.
            config: Epochs, batch size, learning rate.
            seed: Of the order of the samples.
            correction: Added to the gradients; None adds nothing, to the bit.

        Raises:
            ConfigError: The engine cannot train this model or scheme, or cannot correct gradients; the message says
                what can.
            NonFiniteError: The loss became inf or NaN.
        """
        ...

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """Accuracy and mean loss of ``state`` on one client's test data."""
        ...


_ENGINES: Mapping[str, tuple[str, str]] = {
    "torch": ("efftrain.federated.engines.torch_engine", "TorchEngine"),
    "vmap": ("efftrain.federated.engines.vmap_engine", "VmapEngine"),
    "device": ("efftrain.federated.engines.device_engine", "DeviceEngine"),
    "board": ("efftrain.federated.engines.board_engine", "BoardEngine"),
}

ENGINES: tuple[str, ...] = tuple(_ENGINES)
"""Names that ``get_engine`` knows."""


@cache
def get_engine(name: str) -> Engine:
    """The engine of that name; imported when first asked for.

    Raises:
        ConfigError: Unknown name.
    """
    if name not in _ENGINES:
        raise ConfigError(f"engine {name!r} is unknown, expected one of {', '.join(ENGINES)}")
    module, attribute = _ENGINES[name]
    engine: Engine = getattr(importlib.import_module(module), attribute)()
    return engine


def refuse_correction(engine: str, correction: Correction | None) -> None:
    """For an engine whose gradients nothing can be added to.

    Raises:
        ConfigError: There is a correction.
    """
    if correction is not None:
        raise ConfigError(
            f"the strategy adds to the clients' gradients, which the {engine} engine cannot do. Set "
            'client.engine="torch" and leave client.scheme at "fp32".'
        )


__all__ = ["ENGINES", "Correction", "Engine", "Measured", "State", "Trained", "get_engine", "refuse_correction"]
