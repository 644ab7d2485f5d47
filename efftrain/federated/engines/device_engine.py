"""The ``device`` engine: clients in C that ``efftrain.ondevice`` generates, on this machine's processor.

With ``client.scheme = "fp32"`` that is the host profile: every parameter in floating point, batches as in PyTorch, the
whole training of a client in one call. With any other scheme it is the program of the microcontroller itself, in
integers; see ``int8_clients``. Neither holds Python's lock while it trains, so worker threads scale with cores.
"""

import math
import threading
from dataclasses import dataclass

import numpy as np

from efftrain.data import ArrayDataset
from efftrain.errors import CompileError, ConfigError, NonFiniteError
from efftrain.federated.engines import Correction, Measured, State, Trained, refuse_correction
from efftrain.federated.engines.int8_clients import Int8Clients
from efftrain.federated.engines.modules import blank_module, fresh_state
from efftrain.federated.recipe import ClientConfig, ModelConfig
from efftrain.ondevice.backends.host_f32 import HostProgram

_EVALUATION_BATCH = 32
_PROGRAMS_KEPT = 8


@dataclass(frozen=True)
class _Built:
    model: ModelConfig
    input_shape: tuple[int, ...]
    batch_size: int
    program: HostProgram


class DeviceEngine:
    """See ``Engine``. ``config.threads`` has no meaning here: one client is one thread's work."""

    def __init__(self) -> None:
        self._building = threading.Lock()
        self._built: list[_Built] = []
        self._integers = Int8Clients("host")

    def initial_state(self, model: ModelConfig, seed: int) -> State:
        """The same as the torch engine's."""
        return fresh_state(model, seed)

    def why_not(self, model: ModelConfig, data: ArrayDataset, batch_size: int) -> str:
        """Why the fp32 host profile cannot train a model on such data; empty if it can.

        Raises:
            ToolError: There is no C compiler.
        """
        try:
            self._program(model, data, batch_size)
        except ConfigError as error:
            return str(error)
        return ""

    def train(
        self,
        model: ModelConfig,
        state: State,
        data: ArrayDataset,
        config: ClientConfig,
        seed: int,
        correction: Correction | None = None,
    ) -> Trained:
        """As the torch engine with the same arguments, up to rounding, if the scheme is ``fp32``.

        Otherwise as ``Int8Clients.train``. ``Trained.ram_bytes`` is the arena of the host profile, or what the plan of
        the integer program counts.

        Raises:
            ConfigError: The model holds an operator that the generated code does not have, the data do not fit it, or
                there is a correction.
            NonFiniteError: The loss or a weight became inf or NaN.
        """
        refuse_correction("device", correction)
        if config.scheme != "fp32":
            return self._integers.train(model, state, data, config, seed)
        program = self._program(model, data, config.batch_size)
        rng = np.random.default_rng(seed)
        order = np.array([rng.permutation(len(data)) for _ in range(config.epochs)])
        try:
            trained, total = program.train(state, data.inputs, data.targets, order, config.lr, config.momentum)
        except ValueError as error:
            raise ConfigError(f"this client's training does not fit {model.name}: {error}") from error
        if not math.isfinite(total):
            raise NonFiniteError(f"local training diverged: the loss is {total}. Lower client.lr ({config.lr}).")
        loss = total / (config.epochs * len(data))
        return Trained(dict(trained), loss, len(data), ram_bytes=4 * program.plan.arena_floats)

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """See ``Engine.evaluate``; in integers if the scheme is one of integers."""
        if config.scheme != "fp32":
            return self._integers.evaluate(model, state, data, config)
        program = self._program(model, data, _EVALUATION_BATCH)
        try:
            right, total = program.evaluate(state, data.inputs, data.targets)
        except ValueError as error:
            raise ConfigError(f"this client's test does not fit {model.name}: {error}") from error
        return Measured(right / len(data), total / len(data), len(data))

    def _program(self, model: ModelConfig, data: ArrayDataset, batch_size: int) -> HostProgram:
        """Built once; whoever comes meanwhile waits for it."""
        key = (model, data.input_shape, batch_size)
        with self._building:
            for one in self._built:
                if (one.model, one.input_shape, one.batch_size) == key:
                    return one.program
            try:
                program = HostProgram(blank_module(model), data.input_shape, batch_size)
            except CompileError as error:
                raise ConfigError(
                    f'{model.name} cannot be trained by the device engine: {error}. Set client.engine="torch".'
                ) from error
            self._built = [*self._built, _Built(*key, program)][-_PROGRAMS_KEPT:]
            return program
