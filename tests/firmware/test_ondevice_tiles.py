"""Blocks whose backward pass runs some channels at a time: the same bits in less RAM, on every back end."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from efftrain.errors import BudgetError
from efftrain.models import build_model
from efftrain.ondevice import Board, Engine, Program, Scheme, compile
from efftrain.ondevice.backends.toolchain import build, compile_objects
from efftrain.ondevice.constants import ConvConstants, Optimizer, layer_of
from efftrain.ondevice.ir import ChannelTiles
from efftrain.ondevice.scheme import LayerShare
from efftrain.ondevice.verify import verify
from tests.firmware.compilers import COMPILERS, sanitized, sources
from tests.firmware.test_ondevice_c import HARNESS

pytestmark = pytest.mark.firmware
SHAPE = (3, 12, 10)
PARTS = Scheme(name="parts", head=True, last_biases=-1, weights=(LayerShare(layer="*", share=0.4),))
BOARD = replace(Board.named("stm32f746"), ram_bytes=4 << 20)


class Block(nn.Module):
    """Pointwise to ``wide`` channels, depthwise, pointwise to ``channels``; added to its input if the shapes agree."""

    def __init__(self, inputs: int, wide: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1),
        )
        self.adds = stride == 1 and inputs == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


def net(*blocks: nn.Module, stem: int = 8, last: int) -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 4))
    return nn.Sequential(nn.Conv2d(3, stem, 3, 1, 1), nn.ReLU(), *blocks, *head)


def mobilenet() -> nn.Module:
    """Depthwise and pointwise layers in turn, so that each pointwise one is the end of one block and begins another."""
    layers: list[nn.Module] = []
    for inputs, channels in ((8, 12), (12, 60), (60, 10)):
        layers += [
            nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, channels, 1),
            nn.ReLU(),
        ]
    return net(*layers, last=10)


def without_depthwise() -> nn.Module:
    """A wide gradient between a convolution of 3 x 3 and one with stride 2."""
    layers = (nn.Conv2d(8, 52, 3, 1, 1), nn.ReLU(), nn.Conv2d(52, 9, 3, 2, 1), nn.ReLU())
    return net(*layers, last=9)


NETS = {
    "residual-3": net(Block(8, 36, 8, 3, 1), last=8),
    "residual-5": net(Block(8, 52, 8, 5, 1), last=8),
    "stride-3": net(Block(8, 44, 12, 3, 2), last=12),
    "stride-5": net(Block(8, 60, 10, 5, 2), Block(10, 50, 10, 3, 1), last=10),
    "chain": mobilenet(),
    "dense": without_depthwise(),
}


def program_of(model: str, ram_bytes: int = BOARD.ram_bytes, **settings: Any) -> Program:
    data = np.random.default_rng(1).normal(size=(8, *SHAPE)).astype(np.float32)
    settings = {"scheme": PARTS, "learning_rate": 0.02, **settings}
    board = replace(BOARD, ram_bytes=ram_bytes)
    return compile(NETS[model], torch.zeros(1, *SHAPE), board=board, calibration=data, **settings)


def smallest_ram(model: str, **settings: Any) -> int:
    """What the refusal on a board of one byte names."""
    with pytest.raises(BudgetError) as refused:
        program_of(model, 1, **settings)
    found = re.search(r"the plan needs (\d+) B of RAM", str(refused.value))
    assert found is not None
    return int(found[1])


def tiles_of(program: Program) -> list[ChannelTiles]:
    return [op for op in program.graph.ops if isinstance(op, ChannelTiles)]


def widths_of(program: Program) -> list[tuple[int, int]]:
    """Channels of each tile, and of what it is a tile of."""
    whole = [layer_of(program.layers, op.gradients[-1].layer, ConvConstants).shape.out_c for op in tiles_of(program)]
    return [(program.graph.tensors[op.tiles[0]].shape[2], c) for op, c in zip(tiles_of(program), whole, strict=True)]


def samples_of(program: Program, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    xs = program.quantize_input(rng.normal(size=(count, *SHAPE)).astype(np.float32))
    return xs, rng.integers(0, program.num_classes, count)


def settings_of(model: str, rounding: str) -> dict[str, Any]:
    """Momentum and a copied input for some."""
    optimizer = Optimizer(momentum=0.9) if model.startswith("stride") else Optimizer()
    return {"rounding": rounding, "optimizer": optimizer, "copy_input": model == "dense"}


def learn_the_same(engines: list[Engine], xs: np.ndarray, labels: np.ndarray) -> None:
    start = engines[0].state_sha256()
    for x, label in zip(xs, labels, strict=True):
        assert len({engine.train_step(x, int(label)) for engine in engines}) == 1
        assert len({engine.state_sha256() for engine in engines}) == 1
    assert engines[0].state_sha256() != start


@pytest.mark.parametrize(("model", "rounding"), [*zip(NETS, ("master", "stochastic") * 3, strict=True)])
def test_tiles_change_no_bit(model: str, rounding: str) -> None:
    settings = settings_of(model, rounding)
    whole = program_of(model, **settings)
    tiled = program_of(model, smallest_ram(model, **settings), **settings)
    assert not tiles_of(whole)
    assert tiles_of(tiled)
    assert tiled.plan.total_ram_bytes < whole.plan.total_ram_bytes
    engines = [whole.simulator(), tiled.simulator(), tiled.host(), tiled.board("m4")]
    learn_the_same(engines, *samples_of(whole, 4))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", NETS)
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_no_width_of_tiles_changes_a_bit(model: str, rounding: str) -> None:
    settings = settings_of(model, rounding)
    whole = program_of(model, **settings)
    most, least = whole.plan.total_ram_bytes, smallest_ram(model, **settings)
    engines: list[Engine] = [whole.host()]
    for share in (0.0, 0.25, 0.5, 0.75):
        program = program_of(model, round(least + share * (most - least)), **settings)
        assert tiles_of(program)
        engines += [program.simulator(), program.host(), program.board("m7"), program.board("m0plus")]
    learn_the_same(engines, *samples_of(whole, 8))


def test_tiles_of_all_kinds_are_among_them() -> None:
    """Groups of two and of three gradients, a depthwise one at the beginning, and tiles that leave a rest."""
    kinds: Counter[tuple[str, ...]] = Counter()
    rests = 0
    for model in NETS:
        whole, smallest = program_of(model).plan.total_ram_bytes, smallest_ram(model)
        for share in (0.0, 0.5, 0.9):
            program = program_of(model, round(smallest + share * (whole - smallest)))
            for op, (width, channels) in zip(tiles_of(program), widths_of(program), strict=True):
                kinds[tuple(layer_of(program.layers, g.layer, ConvConstants).kind for g in op.gradients)] += 1
                rests += channels % width != 0
    assert set(kinds) == {("conv", "conv"), ("depthwise", "conv"), ("conv", "depthwise", "conv")}
    assert rests >= 3


@pytest.mark.parametrize("model", ["residual-5", "chain"])
def test_it_acts_only_where_ram_is_short(model: str) -> None:
    whole = program_of(model)
    enough, less = (program_of(model, whole.plan.total_ram_bytes - missing) for missing in (0, 1))
    assert not tiles_of(enough)
    assert enough.code.source == whole.code.source
    assert len(tiles_of(less)) >= 1
    assert less.plan.total_ram_bytes < whole.plan.total_ram_bytes
    with pytest.raises(BudgetError, match=f"the plan needs {whole.plan.total_ram_bytes} B"):
        program_of(model, whole.plan.total_ram_bytes - 1, switch_off=("tile_channels",))


@pytest.mark.parametrize("model", NETS)
def test_one_byte_less_than_the_smallest_is_refused(model: str) -> None:
    ram_bytes = smallest_ram(model)
    assert program_of(model, ram_bytes).plan.total_ram_bytes == ram_bytes
    with pytest.raises(BudgetError, match=f"the plan needs {ram_bytes} B"):
        program_of(model, ram_bytes - 1)


def test_repeated_work_is_counted() -> None:
    whole, tiled = program_of("residual-3"), program_of("residual-3", smallest_ram("residual-3"))
    repeated = 0
    for op in tiles_of(tiled):
        for times, gradient in enumerate(reversed(op.gradients)):
            repeated += times * layer_of(tiled.layers, gradient.layer, ConvConstants).macs
    assert tiled.plan.macs_backward == whole.plan.macs_backward + repeated
    assert tiled.plan.macs_forward == whole.plan.macs_forward
    assert sum(block.repeated_macs for block in tiled.plan.tiled_blocks) == repeated
    assert not whole.plan.tiled_blocks


def test_tiles_outlive_their_op_for_nobody() -> None:
    graph = program_of("residual-3", smallest_ram("residual-3")).graph
    at, op = next((index, op) for index, op in enumerate(graph.ops) if isinstance(op, ChannelTiles))
    late = (replace(op, updates=op.updates[1:]), op.updates[0])
    with pytest.raises(AssertionError, match="that are gone"):
        verify(replace(graph, ops=(*graph.ops[:at], *late, *graph.ops[at + 1 :])))


@pytest.mark.parametrize("rounding", [pytest.param("master", marks=pytest.mark.slow), "stochastic"])
def test_sanitizers_report_nothing_and_extremes_stay_equal(rounding: str, tmp_path: Path) -> None:
    """A learning rate that drives weights into their limits, and samples of nothing but the ends of int8."""
    settings: dict[str, Any] = {
        "rounding": rounding,
        "learning_rate": 2.0,
        "scheme": "full" if rounding == "master" else PARTS,
    }
    program = program_of("stride-5", smallest_ram("stride-5", **settings), **settings)
    folder = program.write(tmp_path)
    (folder / "main.c").write_text(HARNESS)
    harness = build(sanitized(), sources(folder), "harness")
    rng = np.random.default_rng(1)
    samples = rng.integers(-128, 128, (40, *program.input_shape)).astype(np.int8)
    samples[::7], samples[1::7] = -128, 127
    labels = rng.integers(0, program.num_classes, 40).astype(np.int32)
    (folder / "data.bin").write_bytes(b"".join(x.tobytes() + y.tobytes() for x, y in zip(samples, labels, strict=True)))
    result = subprocess.run([harness, "data.bin"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    engine = program.simulator(seed=3)
    engine.train(samples, labels)
    assert bytes.fromhex(result.stdout) == engine.state()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_warnings(compiler: str, tmp_path: Path) -> None:
    for index, (model, rounding) in enumerate((("stride-5", "master"), ("dense", "stochastic"))):
        ram_bytes = smallest_ram(model, rounding=rounding)
        program_of(model, ram_bytes, rounding=rounding, name=f"model{index}").write(tmp_path)
        (tmp_path / "main.c").rename(tmp_path / f"main{index}.c")
    compile_objects(COMPILERS[compiler], sources(tmp_path))


@pytest.mark.skipif(shutil.which("cppcheck") is None, reason="cppcheck is missing; apt install cppcheck")
def test_static_analysis_finds_nothing(tmp_path: Path) -> None:
    """Of a program in tiles and the kernels for them; the others are analyzed with the operators."""
    program = program_of("stride-5", smallest_ram("stride-5"))
    assert tiles_of(program)
    folder = program.write(tmp_path)
    command = ["cppcheck", "--enable=warning,performance,portability", "--std=c99", "--error-exitcode=1", "--quiet"]
    files = ["model.c", *sorted(path.name for path in folder.glob("eft_*tile*.c")), "eft_store_sums_s16.c"]
    result = subprocess.run([*command, "--inline-suppr", *files], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_board_of_64_kb_trains_mcunet() -> None:
    torch.manual_seed(0)
    module = build_model("mcunet-5fps")
    shape = (3, 128, 128)
    data = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    programs = [
        compile(
            module,
            torch.zeros(1, *shape),
            scheme="mcunetv3-49kb",
            board=replace(BOARD, ram_bytes=ram_bytes),
            calibration=data,
            learning_rate=0.001,
            rounding="stochastic",
            copy_input=False,
        )
        for ram_bytes in (65_536, BOARD.ram_bytes)
    ]
    tiled, whole = programs
    assert tiled.plan.total_ram_bytes <= 65_536 < whole.plan.total_ram_bytes
    xs = tiled.quantize_input(data)
    board = tiled.board()
    assert board.count_instructions(xs[0], 3) <= 112_000_000
    engines = [whole.host(), tiled.simulator(), tiled.host(), board]
    board.load_state(engines[0].state())
    for label, x in enumerate(xs):
        assert len({engine.train_step(x, label) for engine in engines}) == 1
        assert len({engine.state_sha256() for engine in engines}) == 1
    assert board.measured_ram_bytes <= tiled.plan.total_ram_bytes
