"""The ``board`` engine: every client is replayed on an emulated microcontroller, instruction by instruction."""

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError
from efftrain.federated.engines import Correction, Measured, State, Trained, refuse_correction
from efftrain.federated.engines.int8_clients import Int8Clients
from efftrain.federated.engines.modules import fresh_state
from efftrain.federated.recipe import ClientConfig, ModelConfig


class BoardEngine:
    """See ``Engine``. Gives the same bits as the ``device`` engine, some hundred times slower.

    The emulator maps the RAM that ``config.board`` has and nothing else, so a training that comes back has fitted.
    """

    def __init__(self) -> None:
        self._integers = Int8Clients("board")

    def initial_state(self, model: ModelConfig, seed: int) -> State:
        """The same as the torch engine's."""
        return fresh_state(model, seed)

    def train(
        self,
        model: ModelConfig,
        state: State,
        data: ArrayDataset,
        config: ClientConfig,
        seed: int,
        correction: Correction | None = None,
    ) -> Trained:
        """See ``Int8Clients.train``."""
        refuse_correction("board", correction)
        return self._integers.train(model, state, data, _integers(config), seed)

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """See ``Int8Clients.evaluate``."""
        return self._integers.evaluate(model, state, data, _integers(config))


def _integers(config: ClientConfig) -> ClientConfig:
    if config.scheme == "fp32":
        raise ConfigError(
            'client.scheme is "fp32", but a microcontroller trains in integers. Set client.scheme to an update scheme '
            'such as "sparse", or client.engine="device".'
        )
    return config
