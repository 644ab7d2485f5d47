"""Clients that train in integers, as a microcontroller does: generated code on the host or on an emulated board.

Note [a program a round]
    The weights that a scheme leaves alone are constants of the program, in flash on a device, and the real values of
    all integers (their scales) follow from the weights and from how large activations get. So what the server sends is
    compiled: once for all clients that are sent the same model, which in a round is everybody. That takes a fifth of a
    second, and makes the engine stateless: equal arguments give equal bits, whatever came before.

    A client's update is the difference of its trained integers before and after, in real units, added to the floats
    that it was sent: what did not move stays exactly as it was, and what rounding to integers loses is no update.

Note [calibration]
    How large activations get is measured on samples that every client's program may know: a fixed, public part of the
    data set that the client's are of (``early`` parts of the smartwatch recordings, the first training samples of the
    others). A client's own data never go into its program.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from efftrain.data import ArrayDataset, load_dataset, load_watch, standardize
from efftrain.errors import BudgetError, CompileError, ConfigError
from efftrain.federated.devices import DeviceProfile
from efftrain.federated.engines import Measured, State, Trained
from efftrain.federated.engines.modules import loaded_module, torch_threads
from efftrain.federated.recipe import DATASETS, DEVICES, ClientConfig, ModelConfig, is_own
from efftrain.ondevice import Board, Program, Scheme, compile
from efftrain.ondevice.backends.board import BoardEngine
from efftrain.ondevice.backends.engine import Engine
from efftrain.ondevice.backends.host import HostEngine, build_library
from efftrain.ondevice.constants import ConvConstants, Optimizer, layer_of
from efftrain.ondevice.ir import Conv

_PROGRAMS_KEPT = 8
_CALIBRATION_SAMPLES = 256
_EVALUATION_BATCH = 256

Masks = dict[str, npt.NDArray[np.bool_] | None]
_Element = TypeVar("_Element", bound=np.generic)


class Int8Clients:
    """Trains and measures clients with generated integer code.

    Args:
        back_end: ``host`` for the C on this machine, ``board`` for firmware in the emulator; their results are equal
            to the bit.
    """

    def __init__(self, back_end: Literal["host", "board"]) -> None:
        self._back_end = back_end
        self._compiling = threading.Lock()
        self._programs: OrderedDict[str, Compiled] = OrderedDict()

    def train(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig, seed: int) -> Trained:
        """Train what ``config.scheme`` names, one sample at a time.

        ``config.batch_size`` has no meaning: a microcontroller holds one sample, and moves its weights after each. The
        program counts right answers and no loss, so ``Trained.loss`` is that of the trained weights in fp32 on the same
        samples.

        Raises:
            ConfigError: The model, scheme or board cannot be used, or the plan needs more memory than the board has.
        """
        compiled = self._compiled(model, state, config, data.name)
        engine, program = compiled.engine(self._back_end), compiled.program
        engine.load_state(program.initial_state)
        samples = program.quantize_input(data.inputs)
        rng = np.random.default_rng(seed)
        for _ in range(config.epochs):
            engine.train(samples, data.targets, rng.permutation(len(data)))
        trained = compiled.moved(state, engine.state())
        loss = _loss(model, trained, data)
        return Trained(trained, loss, len(data), compiled.masks, program.plan.total_ram_bytes)

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """Accuracy of the integer program; loss of the weights in fp32."""
        compiled = self._compiled(model, state, config, data.name)
        engine, program = compiled.engine(self._back_end), compiled.program
        engine.load_state(program.initial_state)
        accuracy = engine.evaluate(program.quantize_input(data.inputs), data.targets)
        return Measured(accuracy, _loss(model, state, data), len(data))

    def _compiled(self, model: ModelConfig, state: State, config: ClientConfig, dataset: str) -> "Compiled":
        """See Note [a program a round]. Whoever comes while it is compiled waits."""
        key = _digest(model, state, config, dataset)
        with self._compiling:
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
            compiled = self._programs[key] = compile_clients(model, state, config, dataset)
            if len(self._programs) > _PROGRAMS_KEPT:
                self._programs.popitem(last=False)
            return compiled


@dataclass(frozen=True, eq=False)
class Compiled:
    """A program for one model with its weights, and what runs it."""

    program: Program
    masks: Masks
    """As ``Trained.trained``."""
    _local: threading.local = field(default_factory=threading.local)
    _linking: threading.Lock = field(default_factory=threading.Lock)

    def engine(self, back_end: Literal["host", "board"]) -> Engine:
        """This thread's device."""
        if not hasattr(self._local, "engine"):
            with self._linking:
                self._local.engine = self._host() if back_end == "host" else self._board()
        engine: Engine = self._local.engine
        return engine

    def moved(self, state: State, after: bytes) -> State:
        """``state`` moved by what the integers moved."""
        program = self.program
        arrays = [program.layout.unpack(one) for one in (program.initial_state, after)]
        result = {name: np.array(tensor, np.float32) for name, tensor in state.items()}
        for op in program.float_graph.ops:
            if not isinstance(op, Conv):
                continue
            layer = layer_of(program.layers, op.name, ConvConstants)
            old, new = arrays
            if ("bias", op.name) in new and op.bias is not None:
                difference = new["bias", op.name] - old["bias", op.name]
                result[op.bias] += (difference * (layer.x_scale * layer.weight_scale)).astype(np.float32)
            if ("weight", op.name) in new:
                old_master, new_master = (
                    256 * one["weight", op.name] + one.get(("residual", op.name), 0) for one in arrays
                )
                real = (new_master - old_master) * layer.per_channel(layer.weight_scale) / 256
                _channels(result[op.weight], layer, real.shape[3])[...] += _as_torch(real, layer).astype(np.float32)
        return dict(result)

    def _host(self) -> HostEngine:
        program = self.program
        library = build_library(program.name, program.code)
        shape, state_bytes = program.input_shape, program.layout.num_bytes
        return HostEngine(library, program.name, shape, program.num_classes, state_bytes, program.seed)

    def _board(self) -> BoardEngine:
        return self.program.board()


def _as_torch(values: npt.NDArray[np.float64], layer: ConvConstants) -> npt.NDArray[np.float64]:
    """From (out, height, width, in) to (out, in, height, width); of a depthwise layer (1, height, width, channels) to
    (channels, 1, height, width)."""
    return values.transpose(3, 0, 1, 2) if layer.depthwise else values.transpose(0, 3, 1, 2)


def _channels(tensor: npt.NDArray[_Element], layer: ConvConstants, count: int) -> npt.NDArray[_Element]:
    """A view of the first input channels of a weight, in four dimensions; PyTorch has fewer for some layers."""
    shape = layer.shape
    if layer.depthwise:
        return tensor.reshape(shape.in_c, 1, shape.kernel_h, shape.kernel_w)[:count]
    return tensor.reshape(shape.out_c, -1, shape.kernel_h, shape.kernel_w)[:, :count]


def compile_clients(model: ModelConfig, state: State, config: ClientConfig, dataset: str) -> Compiled:
    """The program of all clients that are sent this model. What it needs of a device depends on no weight.

    Raises:
        ConfigError: The model, scheme or board cannot be used, or the plan needs more memory than the board has.
    """
    module = loaded_module(model, state)
    samples = calibration_samples(dataset)
    try:
        program = compile(
            module,
            torch.zeros(1, *samples.shape[1:]),
            scheme=Scheme.parse(config.scheme),
            board=_board(config.board),
            calibration=samples,
            learning_rate=config.lr,
            optimizer=Optimizer(momentum=config.momentum),
            name="client",
        )
        return Compiled(program, _masks(program, state))
    except CompileError as error:
        raise ConfigError(
            f'{model.name} cannot be trained in integers: {error} Set client.engine="torch" and client.scheme="fp32".'
        ) from error
    except BudgetError as error:
        raise ConfigError(f"{model.name} does not fit with client.scheme={config.scheme!r}: {error}") from error


def _board(name: str) -> Board:
    """A board, or what a device profile says of its memory.

    Raises:
        ConfigError: There is neither of that name.
    """
    return DeviceProfile.named(name).board(name) if name in DEVICES and name not in Board.names() else Board.named(name)


def _masks(program: Program, state: State) -> Masks:
    """What the scheme trains, in PyTorch's shapes.

    Raises:
        CompileError: The layers of the program are not those of the module: a batch norm was folded, or the scheme
            put channels in another order or made two layers of one. What learns would have no tensor to go to.
    """
    masks: Masks = {}
    layers = [op for op in program.float_graph.ops if isinstance(op, Conv)]
    known = {name for op in layers for name in (op.weight, op.bias) if name is not None}
    for name in sorted(set(state) ^ known):
        raise CompileError(
            f"what a client trains cannot be sent as tensors of the model (tensor {name!r}): a batch norm or another "
            f"layer without weights of its own was folded, or scheme {program.scheme.name!r} has a share with "
            'choose = "largest" or of = "outputs". Use a model without, and shares of the first inputs.'
        )
    for op in layers:
        learns = program.trained[op.name]
        if learns.bias and op.bias is not None:
            masks[op.bias] = None
        if learns.channels:
            layer = layer_of(program.layers, op.name, ConvConstants)
            mask = np.zeros(state[op.weight].shape, np.bool_)
            _channels(mask, layer, learns.channels)[...] = True
            masks[op.weight] = None if mask.all() else mask
    return masks


def _digest(model: ModelConfig, state: State, config: ClientConfig, dataset: str) -> str:
    known = (model, dataset, config.scheme, config.board, config.lr, config.momentum)
    digest = hashlib.sha256(repr(known).encode())
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _loss(model: ModelConfig, state: State, data: ArrayDataset) -> float:
    """Mean cross-entropy in fp32."""
    module = loaded_module(model, state).eval()
    total = 0.0
    with torch_threads(1), torch.no_grad():
        for start in range(0, len(data), _EVALUATION_BATCH):
            inputs, targets = data.batch(np.arange(start, min(start + _EVALUATION_BATCH, len(data))))
            logits = module(torch.from_numpy(inputs))
            total += torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="sum").item()
    return total / len(data)


# --- calibration ------------------------------------------------------------------------------------------------------


@cache
def calibration_samples(dataset: str) -> npt.NDArray[np.float32]:
    """See Note [calibration].

    Raises:
        ConfigError: No public samples are known of this data set.
        DataError: The data set is not installed.
    """
    if dataset not in DATASETS and not is_own(dataset):
        raise ConfigError(
            f"there are no samples of data set {dataset!r} to calibrate a model with, so it cannot be trained in "
            f'integers; known are {", ".join(DATASETS)}. Set client.scheme="fp32".'
        )
    if dataset == "watch":
        early, _ = standardize(load_watch().select(None, "early"))
        return np.asarray(early.inputs[:: max(1, len(early) // _CALIBRATION_SAMPLES)])
    data = load_dataset(dataset, "train")
    return np.asarray(data.batch(np.arange(min(len(data), _CALIBRATION_SAMPLES)))[0])
