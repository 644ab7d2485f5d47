"""The same firmware in qemu-system-arm: the same bits, every instruction counted, and no byte beyond the board's."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efftrain.errors import DeviceFault, ToolError
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Board, Program, Scheme, compile
from efftrain.ondevice.backends import qemu
from efftrain.ondevice.backends.qemu import INSTRUCTIONS_PER_TICK, RAM_GRANULE, QemuEngine, relocated
from efftrain.ondevice.target import CpuName

pytestmark = [
    pytest.mark.firmware,
    pytest.mark.skipif(
        not shutil.which("qemu-system-arm") and not os.environ.get("EFFTRAIN_NO_SKIPS"), reason="no qemu-system-arm"
    ),
]

DATA = np.random.default_rng(0).normal(size=(20, 6, 128)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 7, 20)


def build(scheme: Scheme | str, **options: object) -> Program:
    torch.manual_seed(0)
    settings = {"board": "stm32f746", "calibration": DATA, "learning_rate": 0.02, "seed": 7, **options}
    return compile(WatchCNN(), torch.zeros(1, 6, 128), scheme=scheme, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("cpu", ["m7", "m4"])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_every_bit_is_that_of_the_host(cpu: CpuName, rounding: str) -> None:
    program = build("full", rounding=rounding)
    samples = program.quantize_input(DATA)
    host, board = program.host(), QemuEngine.of(program, cpu)
    assert board.state() == host.state()
    found = []
    for engine in (host, board):
        right = engine.train(samples, LABELS)
        engine.set_lr_shift(2)
        right += engine.train(samples, LABELS, [3, 1, 4, 1, 5])
        predicted = [engine.predict(x) for x in samples[:2]]
        found.append((right, predicted, engine.evaluate(samples[:5], LABELS[:5]), engine.train_step(samples[0], 3)))
    assert found[0] == found[1]
    assert board.state() == host.state()
    assert board.state() != program.initial_state
    other = QemuEngine.of(program, cpu, seed=8)
    other.load_state(board.state())
    assert other.state() == board.state()


def test_instructions_and_stack_are_measured() -> None:
    program = build("full")
    samples = program.quantize_input(DATA)
    board = QemuEngine.of(program)
    board.train(samples[:3], LABELS[:3])
    assert len(board.instructions) == 3
    first = QemuEngine.of(program)
    forward, step = first.count_instructions(samples[0]), first.count_instructions(samples[0], int(LABELS[0]))
    assert abs(step - board.instructions[0]) <= INSTRUCTIONS_PER_TICK
    assert program.plan.macs_forward / 4 < forward < step
    assert 32 <= board.measured_stack_bytes <= program.plan.stack_bytes
    assert board.measured_ram_bytes <= program.plan.total_ram_bytes


def test_a_board_of_exactly_the_planned_size_runs_and_a_smaller_one_faults() -> None:
    program = build("full")
    total = program.plan.total_ram_bytes
    samples = program.quantize_input(DATA)
    firmware = program.firmware(board=relocated(program.target))
    shape, classes, num_bytes = program.input_shape, program.num_classes, program.layout.num_bytes
    board = Board.named("stm32f746")
    exact = QemuEngine(firmware, replace(board, ram_bytes=total), "m7", shape, classes, num_bytes, 0)
    exact.train(samples[:2], LABELS[:2])
    used_to = max(b.offset + b.num_bytes for b in program.plan.buffers)
    smaller = replace(board, ram_bytes=total - (program.plan.arena_bytes - used_to) - RAM_GRANULE)
    engine = QemuEngine(firmware, smaller, "m7", shape, classes, num_bytes, 0)
    with pytest.raises(DeviceFault, match=r"on stm32f746 stopped at pc .*, access to 0x2000"):
        engine.train(samples[:2], LABELS[:2])
    assert engine.state() == program.initial_state


def test_a_stack_that_is_too_small_faults() -> None:
    program = build("full")
    firmware = program.firmware(board=relocated(program.target))
    symbols = dict(firmware.symbols)
    symbols["_stack_top"] = symbols["_stack_bottom"] + 256
    what = (program.input_shape, program.num_classes, program.layout.num_bytes, 0)
    engine = QemuEngine(replace(firmware, symbols=symbols), program.target, "m7", *what)
    with pytest.raises(DeviceFault, match="RAM is"):
        engine.train_step(program.quantize_input(DATA)[0], 0)


def test_a_state_that_is_none_is_refused_and_the_old_one_kept() -> None:
    program = build("sparse")
    engine = QemuEngine.of(program)
    bad = bytearray(engine.state())
    entry = program.layout.find("weight", "conv3")
    assert entry is not None
    bad[entry.offset] = 0x80
    with pytest.raises(ValueError, match="cannot have"):
        engine.load_state(bytes(bad))
    assert engine.state() == program.initial_state


@given(st.integers(1, 1 << 20))
def test_regions_cover_the_ram_and_nothing_behind_it(ram_bytes: int) -> None:
    regions = qemu._regions(0x2000_0000, ram_bytes, 3 << 24, exact=True)
    parts = []
    for base, word in regions:
        size = 2 << (word >> 1 & 31)
        assert base % size == 0, "a region begins at a multiple of its size"
        parts += [(base + n * size // 8, size // 8) for n in range(8) if not word >> 8 >> n & 1]
    at = 0x2000_0000
    for start, length in sorted(parts):
        assert start == at
        at += length
    assert at == 0x2000_0000 + -(-ram_bytes // RAM_GRANULE) * RAM_GRANULE
    assert len(regions) <= 6, "the processor has 8, and flash and samples take one each"


def test_without_qemu_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program = build("none")
    firmware = program.firmware(board=relocated(program.target))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ToolError, match="apt install qemu-system-arm"):
        QemuEngine(firmware, program.target, "m7", program.input_shape, 7, program.layout.num_bytes, 0)


def test_a_board_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="unicorn"):
        relocated(replace(Board.named("stm32f746"), ram_bytes=2 << 20))
