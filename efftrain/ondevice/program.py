"""``compile``: a module, a scheme and a board in; a program with its plan, its C and three engines out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from efftrain.errors import BudgetError, ConfigError
from efftrain.ondevice import memory
from efftrain.ondevice.autodiff import differentiate
from efftrain.ondevice.backends.board import BoardEngine, Firmware, build_firmware
from efftrain.ondevice.backends.host import HostEngine, build_library
from efftrain.ondevice.backends.simulator import Simulator
from efftrain.ondevice.backends.toolchain import Kind
from efftrain.ondevice.calibrate import Method, as_maps, calibrate
from efftrain.ondevice.choose import apply_scheme
from efftrain.ondevice.constants import LOSSES, ConvConstants, Layers, Loss, Number, Optimizer, layer_of
from efftrain.ondevice.emit.c_source import CSource, emit_c
from efftrain.ondevice.emit.code_size import code_bytes
from efftrain.ondevice.emit.names import check_identifier
from efftrain.ondevice.emit.project import write_project
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.ir import (
    ChannelTiles,
    ConvForward,
    ConvInputGrad,
    FloatGraph,
    HeadForward,
    StepGraph,
    WeightUpdate,
    runs,
)
from efftrain.ondevice.memory import Arena, MemoryPlan, TiledBlock
from efftrain.ondevice.moves import plan_with_moves
from efftrain.ondevice.passes import OVERLAP, run_passes
from efftrain.ondevice.quantize import quantize
from efftrain.ondevice.scheme import Scheme, Trained
from efftrain.ondevice.state import Rounding, StateLayout, initial_state, lay_out
from efftrain.ondevice.target import Board, CpuName, family_of

STATIC_BYTES = 8
"""Seed and learning-rate shift in the context."""


@dataclass(frozen=True, eq=False)
class Program:
    """A training step for one model, scheme and board, lowered to integers and planned to the byte.

    Args:
        name: Prefix of the C functions.
        scheme: What learns.
        target: The board that it is planned for.
        graph: The step, after the passes.
        layers: Constants by layer.
        trained: What learns, by layer.
        layout: Of the trained state.
        initial_state: The trained state before the first step.
        code: The generated C.
        plan: Memory.
        rounding: How weights move.
        seed: Of the stochastic rounding, for engines that are not given another.
        numbers: How every activation stores real values.
        float_graph: The model as it was read.
        loss: What is minimized.
        optimizer: How steps become moves.
    """

    name: str
    scheme: Scheme
    target: Board
    graph: StepGraph = field(repr=False)
    layers: Layers = field(repr=False)
    trained: dict[str, Trained] = field(repr=False)
    layout: StateLayout = field(repr=False)
    initial_state: bytes = field(repr=False)
    code: CSource = field(repr=False)
    plan: MemoryPlan = field(repr=False)
    rounding: Rounding
    seed: int
    numbers: Mapping[str, Number] = field(repr=False)
    float_graph: FloatGraph = field(repr=False)
    loss: Loss = "cross_entropy"
    optimizer: Optimizer = Optimizer()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.graph.tensors[self.graph.input].shape

    @property
    def input_scale(self) -> float:
        """Real value of one unit of the input."""
        return self.numbers[self.graph.input].scale

    @property
    def input_zero_point(self) -> int:
        """What the input stores for the real value 0: always 0, so that zero padding is one of its values."""
        return self.numbers[self.graph.input].zero_point

    @property
    def num_classes(self) -> int:
        """Outputs of the last layer."""
        return self.graph.tensors[self.graph.logits].num_elements

    def quantize_input(self, x: npt.NDArray[np.floating] | Tensor) -> npt.NDArray[np.int8]:
        """Real samples as the device takes them.

        Args:
            x: ``(N, F)``, ``(N, C, L)`` or ``(N, C, H, W)``, prepared as in training.

        Returns:
            int8, ``(N, H, W, C)``, to the nearest unit and clipped.

        Raises:
            ValueError: The shape is not the model's, or a value is inf or NaN.
        """
        height, width, channels = self.input_shape
        array = as_maps(x)
        if array.ndim != 4 or array.shape[1:] != (channels, height, width):
            raise ValueError(
                f"samples have shape {np.shape(x)}; expected (N, {channels}, ...) with {height} x {width} positions"
            )
        if not np.isfinite(array).all():
            raise ValueError("samples hold inf or NaN")
        quantized = np.clip(np.rint(array / np.float32(self.input_scale)), -128, 127)
        return np.ascontiguousarray(quantized.transpose(0, 2, 3, 1).astype(np.int8))

    def simulator(self, seed: int | None = None) -> Simulator:
        """The program in NumPy."""
        return Simulator(
            self.graph,
            self.layers,
            self.layout,
            self.rounding,
            self.initial_state,
            self.seed if seed is None else seed,
            self.loss,
            self.optimizer,
        )

    def host(self, seed: int | None = None, toolchain: Kind = "auto") -> HostEngine:
        """The program as C on this machine.

        Raises:
            ToolError: There is no C compiler.
        """
        return HostEngine(
            build_library(self.name, self.code, toolchain),
            self.name,
            self.input_shape,
            self.num_classes,
            self.layout.num_bytes,
            self.seed if seed is None else seed,
        )

    def firmware(self, cpu: CpuName | None = None, toolchain: Kind = "auto", board: Board | None = None) -> Firmware:
        """The program linked for its board, or for another.

        Raises:
            ToolError: A tool is missing or failed.
            BudgetError: It does not fit.
        """
        return build_firmware(self.name, self.code, self.plan, board or self.target, cpu, toolchain)

    def board(
        self,
        cpu: CpuName | None = None,
        *,
        seed: int | None = None,
        toolchain: Kind = "auto",
        board: Board | None = None,
        timeout_s: float = 300.0,
    ) -> BoardEngine:
        """The program as firmware on an emulated board.

        Args:
            cpu: A short name such as ``m4``; the board's own if not given.
            seed: Of the stochastic rounding.
            toolchain: Which cross compiler.
            board: Another board than the one planned for.
            timeout_s: A call that takes longer on the host's clock is a fault.

        Raises:
            ToolError: A tool is missing or failed.
            BudgetError: It does not fit.
        """
        return BoardEngine(
            self.firmware(cpu, toolchain, board),
            board or self.target,
            cpu,
            self.input_shape,
            self.num_classes,
            self.layout.num_bytes,
            self.seed if seed is None else seed,
            timeout_s,
        )

    def write(self, folder: Path | str) -> Path:
        """Write the program, its kernels, an example and a README into a folder, and return the folder."""
        folder, number = Path(folder), self.numbers[self.graph.input]
        write_project(folder, self.name, self.code, self.plan, self.target, self.scheme.name, number)
        return folder


def compile(
    model: nn.Module,
    example: Tensor,
    *,
    scheme: Scheme | str,
    board: Board | str,
    calibration: npt.NDArray[np.float32],
    learning_rate: float,
    seed: int = 0,
    rounding: Rounding = "master",
    name: str = "model",
    switch_off: tuple[str, ...] = (),
    loss: Loss = "cross_entropy",
    optimizer: Optimizer | None = None,
    copy_input: bool = True,
    calibration_method: Method = "max",
    qas: bool = True,
    must_fit: bool = True,
) -> Program:
    """Turn a small CNN into a program that trains on a microcontroller.

    Args:
        model: A module of the supported operators whose outputs are logits; not changed.
        example: One input, ``(1, F)``, ``(1, C, L)`` or ``(1, C, H, W)``.
        scheme: What learns, or what ``Scheme.parse`` takes: a preset, ``last_k=K`` or a TOML file.
        board: What it must fit, or the name of a board.
        calibration: Samples of the data that the model was trained on, ``(N, C, L)`` or ``(N, C, H, W)``.
        learning_rate: Of plain SGD at batch 1 in real units: what would be used in fp32.
        seed: Of the stochastic rounding.
        rounding: ``master`` keeps 16 bits of every trained weight (2 bytes each) and 4 bytes of every trained bias;
            ``stochastic`` keeps 8 bits and 2 bytes, and costs up to a point of accuracy when every layer is trained.
        name: Prefix of the C functions.
        switch_off: Passes to leave out, to see what they save.
        loss: Softmax cross-entropy, or ``squared_error`` for an autoencoder whose target is its input.
        optimizer: Momentum or accumulation over several samples; plain SGD if not given.
        copy_input: False reads a sample where the caller has it, in flash or in a buffer of its own, and keeps no
            place for it in the arena. It must not change during a call.
        calibration_method: How ranges follow from the calibration data: ``max``, ``percentile`` or ``mse``.
        qas: False leaves out quantization-aware scaling (arXiv:2206.15472, section 3.1), to see what it does.
        must_fit: False returns a program that needs more memory than the board has, to look at its plan.

    Raises:
        CompileError: The model cannot be compiled.
        ConfigError: A setting is out of its range.
        BudgetError: The plan needs more memory than the board has, and ``must_fit`` is set.
    """
    check_identifier(name)
    if rounding not in ("master", "stochastic"):
        raise ConfigError(f"rounding {rounding!r} is not known; known are master and stochastic")
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is not known; known are {' and '.join(LOSSES)}")
    optimizer = optimizer or Optimizer()
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    target = Board.named(board) if isinstance(board, str) else board
    model_graph = read_module(model, example, autoencoder=loss == "squared_error")
    model_graph, trained = apply_scheme(model_graph, scheme)
    ranges = calibrate(model_graph, calibration, calibration_method)
    quantized = quantize(model_graph, ranges, learning_rate, loss, qas=qas)
    step = replace(differentiate(quantized, trained, rounding), copies_input=copy_input)
    layout = lay_out(quantized.layers, trained, rounding, optimizer)
    initial = initial_state(layout, quantized.layers)
    arena_bytes = target.ram_bytes - layout.ram_bytes - target.stack_bytes - STATIC_BYTES
    graph, arena = _place(step, quantized.layers, switch_off, arena_bytes)
    unpacked, number = layout.unpack(initial), quantized.numbers[graph.input]
    code = emit_c(name, graph, quantized.layers, layout, arena, unpacked, number, loss, optimizer)
    flash_bytes = code_bytes(graph, code.source, family_of(target.cpu)) + code.constant_bytes
    plan = _plan(graph, quantized.layers, trained, layout, arena, target, flash_bytes)
    if must_fit:
        _check_budget(plan, code.constant_bytes)
    return Program(
        name=name,
        scheme=scheme,
        target=target,
        graph=graph,
        layers=quantized.layers,
        trained=trained,
        layout=layout,
        initial_state=initial,
        code=code,
        plan=plan,
        rounding=rounding,
        seed=seed,
        numbers=quantized.numbers,
        float_graph=model_graph,
        loss=loss,
        optimizer=optimizer,
    )


def _place(step: StepGraph, layers: Layers, switch_off: tuple[str, ...], arena_bytes: int) -> tuple[StepGraph, Arena]:
    """The step after the passes, and its arena, smaller than ``arena_bytes`` where that can be reached.

    A placement may exceed the bytes that are alive at once, which is what passes go by: then they get less.
    """
    limit = arena_bytes
    while True:
        graph = run_passes(step, layers, switch_off, limit)
        if OVERLAP in switch_off:
            return graph, memory.plan_arena(graph, layers, overlap=False)
        graph, arena = plan_with_moves(graph, layers)
        excess = arena.num_bytes - arena_bytes
        if excess <= 0 or arena.lower_bound_bytes > limit:
            return graph, arena
        limit = min(limit, arena.lower_bound_bytes) - max(excess // 2, memory.ALIGNMENT)


def _plan(
    graph: StepGraph,
    layers: Layers,
    trained: Mapping[str, Trained],
    layout: StateLayout,
    arena: Arena,
    board: Board,
    flash_bytes: int,
) -> MemoryPlan:
    forward = backward = 0
    for op in (inner for each in graph.ops for inner in runs(each)):
        layer = layers.get(getattr(op, "layer", ""))
        if not isinstance(layer, ConvConstants):
            continue
        match op:
            case ConvForward() | HeadForward():
                forward += layer.macs
            case ConvInputGrad():
                backward += layer.macs
            case WeightUpdate():
                backward += layer.macs // layer.master.shape[3] * trained[op.layer].channels
            case _:
                pass
    return MemoryPlan(
        board=board.name,
        board_ram_bytes=board.ram_bytes,
        board_flash_bytes=board.flash_bytes,
        arena_bytes=arena.num_bytes,
        arena_lower_bound_bytes=arena.lower_bound_bytes,
        trained_state_bytes=layout.ram_bytes,
        scratch_bytes=0,
        stack_bytes=board.stack_bytes,
        static_bytes=STATIC_BYTES,
        flash_bytes=flash_bytes,
        macs_forward=forward,
        macs_backward=backward,
        buffers=arena.buffers,
        ops=tuple(op.name for op in graph.ops),
        tiled_blocks=tuple(_tiled(op, graph, layers) for op in graph.ops if isinstance(op, ChannelTiles)),
    )


def _tiled(op: ChannelTiles, graph: StepGraph, layers: Layers) -> TiledBlock:
    macs = [layer_of(layers, gradient.layer, ConvConstants).macs for gradient in op.gradients]
    return TiledBlock(
        name=op.name,
        tile_channels=graph.tensors[op.tiles[0]].shape[2],
        channels=layer_of(layers, op.gradients[-1].layer, ConvConstants).shape.out_c,
        repeated_macs=sum(times * each for times, each in enumerate(reversed(macs))),
    )


def shortage(plan: MemoryPlan, constant_bytes: int) -> str | None:
    """What a plan needs more than its board has, and for what; ``None`` if it fits.

    Args:
        plan: Memory.
        constant_bytes: Of the flash, weights and other constants.
    """
    if plan.total_ram_bytes > plan.board_ram_bytes:
        parts = {f"{b.kind} {b.name}": b.num_bytes for b in plan.buffers}
        parts |= {"the trained state": plan.trained_state_bytes, "the stack": plan.stack_bytes}
        return (
            f"the plan needs {plan.total_ram_bytes} B of RAM (arena {plan.arena_bytes}, trained state "
            f"{plan.trained_state_bytes}, stack {plan.stack_bytes}, static {plan.static_bytes}); {plan.board} has "
            f"{plan.board_ram_bytes} B. Largest: {memory.largest(parts)}."
        )
    if plan.flash_bytes > plan.board_flash_bytes:
        return (
            f"the plan needs {plan.flash_bytes} B of flash, {constant_bytes} B of it weights and other constants; "
            f"{plan.board} has {plan.board_flash_bytes} B."
        )
    return None


def _check_budget(plan: MemoryPlan, constant_bytes: int) -> None:
    found = shortage(plan, constant_bytes)
    if found is None:
        return
    remedy = "Choose a smaller model or a larger board."
    if plan.total_ram_bytes > plan.board_ram_bytes:
        remedy = (
            "Train fewer channels or layers (scheme sparse, last_layer or bias_only), use rounding='stochastic' if it "
            "is 'master' (halves the trained state), read inputs in place (copy_input=False) if the input is among the "
            "largest, or choose a larger board."
        )
    raise BudgetError(f"{found} {remedy}")
