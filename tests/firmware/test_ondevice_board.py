"""Simulator, host and emulated boards: the same bits, and not one byte of RAM more than planned."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.errors import BudgetError, DeviceFault, ToolError
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Board, LayerShare, Program, Scheme, compile
from efftrain.ondevice.backends import toolchain
from efftrain.ondevice.backends.board import BoardEngine, _core, _num_instructions
from efftrain.ondevice.backends.toolchain import Kind
from efftrain.ondevice.scheme import PRESETS
from efftrain.ondevice.target import CpuName

pytestmark = pytest.mark.firmware

DATA = np.random.default_rng(0).normal(size=(50, 6, 128)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 7, 50)
ORDER = np.random.default_rng(2).integers(0, 50, 100)


def build(scheme: Scheme | str, board: Board | str = "stm32f746", **options: object) -> Program:
    torch.manual_seed(0)
    settings = {"calibration": DATA, "learning_rate": 0.02, "seed": 7, **options}
    return compile(WatchCNN(), torch.zeros(1, 6, 128), scheme=scheme, board=board, **settings)  # type: ignore[arg-type]


# The board extra brings zig, so every machine runs these tests; where arm-none-eabi-gcc is too, both must agree.
KINDS: tuple[Kind, ...] = ("gcc", "zig") if shutil.which("arm-none-eabi-gcc") else ("zig",)


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("scheme", PRESETS)
def test_every_bit_is_equal_after_100_steps(scheme: str, rounding: str) -> None:
    program = build(scheme, rounding=rounding)
    samples = program.quantize_input(DATA)
    engines = {
        "simulator": program.simulator(),
        "host": program.host(),
        "m7": program.board("m7", toolchain=KINDS[0]),
        "m4": program.board("m4", toolchain="zig"),
    }
    if scheme == "full":
        engines["host, zig"] = program.host(toolchain="zig")
    states, results = {}, {}
    for name, engine in engines.items():
        right = engine.train(samples, LABELS, ORDER[:60])
        engine.set_lr_shift(2)
        right += engine.train(samples, LABELS, ORDER[60:])
        predicted = [engine.predict(x) for x in samples[:5]]
        results[name] = (right, predicted, engine.evaluate(samples[:5], LABELS[:5]), engine.train_step(samples[0], 3))
        states[name] = engine.state()
    assert len(set(states.values())) == 1, {name: state[:16].hex() for name, state in states.items()}
    assert len({repr(result) for result in results.values()}) == 1, results
    changed = states["host"][4:] != program.initial_state[4:]
    assert changed == (scheme != "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cpu", ["m0plus", "m33", "m55"])
def test_other_processors_run_the_same_program(cpu: CpuName, kind: Kind) -> None:
    """They are linked within the plan by each compiler, and learn the same bits where an emulator has them."""
    program = build("full", rounding="stochastic")
    firmware = program.firmware(cpu, kind)
    assert firmware.flash_bytes <= program.plan.flash_bytes
    if cpu == "m55":
        with pytest.raises(ToolError, match="unicorn does not emulate cortex-m55"):
            program.board(cpu, toolchain=kind)
        return
    samples = program.quantize_input(DATA)
    engine, simulator = program.board(cpu, toolchain=kind), program.simulator()
    for each in (engine, simulator):
        each.train(samples, LABELS, ORDER[:20])
    assert engine.state() == simulator.state() != program.initial_state


class Small2d(nn.Module):
    """What watch-cnn does not have: two dimensions, padding, a layer without bias, one without ReLU, positions in the
    head's input, channels that are no multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
        self.b = nn.Conv2d(5, 7, (2, 3), padding=(1, 0))
        self.head = nn.Linear(7 * 6 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.b(F.relu(self.a(x))).flatten(1))
        return logits


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_another_network_is_equal_too(rounding: str, share: float) -> None:
    torch.manual_seed(0)
    data = np.random.default_rng(0).normal(size=(20, 3, 10, 11)).astype(np.float32)
    scheme = Scheme(
        name="some", last_biases=-1, weights=tuple(LayerShare(layer=n, share=share) for n in ("a", "b", "head"))
    )
    example = torch.zeros(1, 3, 10, 11)
    settings = {"calibration": data, "learning_rate": 0.05, "rounding": rounding}
    program = compile(Small2d(), example, scheme=scheme, board="nrf52840", **settings)  # type: ignore[arg-type]
    samples, labels = program.quantize_input(data), np.arange(20) % 4
    engines = [program.simulator(), program.host(), program.board(), program.board("m7", toolchain="zig")]
    for engine in engines:
        engine.train(samples, labels, list(range(20)) * 3)
    assert len({engine.state() for engine in engines}) == 1
    assert engines[0].state() != program.initial_state


def test_a_state_moves_between_back_ends() -> None:
    program = build("sparse", rounding="stochastic")
    samples = program.quantize_input(DATA)
    whole = program.simulator()
    whole.train(samples, LABELS, ORDER)
    first = program.board("m4")
    first.train(samples, LABELS, ORDER[:50])
    second = program.board("m7")
    second.load_state(first.state())
    second.train(samples, LABELS, ORDER[50:])
    assert second.state_sha256() == whole.state_sha256()
    bad = bytearray(second.state())
    entry = program.layout.find("weight", "conv3")
    assert entry is not None
    bad[entry.offset] = 0x80
    with pytest.raises(ValueError, match="cannot have"):
        second.load_state(bytes(bad))
    assert second.state_sha256() == whole.state_sha256()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "kind"), [*((name, KINDS[0]) for name in PRESETS), *(("full", kind) for kind in KINDS[1:])]
)
def test_the_plan_holds_on_a_board_of_exactly_its_size(scheme: str, kind: str) -> None:
    program = build(scheme)
    plan = program.plan
    exact = replace(Board.named("stm32f746"), ram_bytes=plan.total_ram_bytes)
    engine = program.board(board=exact, toolchain=kind)  # type: ignore[arg-type]
    samples = program.quantize_input(DATA)
    engine.train(samples, LABELS, ORDER[:10])
    engine.evaluate(samples[:5], LABELS[:5])
    engine.load_state(engine.state())
    assert engine.firmware.ram_bytes == plan.total_ram_bytes - plan.stack_bytes
    assert 0 < engine.measured_stack_bytes <= plan.stack_bytes
    assert engine.measured_ram_bytes <= plan.total_ram_bytes
    if kind == "gcc":
        bound = engine.firmware.stack_bound_bytes
        assert bound is not None
        assert engine.measured_stack_bytes <= bound <= plan.stack_bytes
    host = program.host()
    host.train(samples, LABELS, ORDER[:10])
    assert engine.state() == host.state()


def test_one_byte_less_is_refused_by_plan_linker_and_emulator() -> None:
    program = build("full")
    total = program.plan.total_ram_bytes
    board = Board.named("stm32f746")
    with pytest.raises(BudgetError, match=f"needs {total} B of RAM"):
        build("full", replace(board, ram_bytes=total - 1))
    smaller = replace(board, ram_bytes=total - 1)
    for kind in KINDS:
        with pytest.raises(BudgetError, match="linker refuses"):
            program.firmware(board=smaller, toolchain=kind)
    # Firmware that was linked for the whole board, on a machine with a byte less, reads the last word of the context.
    firmware = program.firmware()
    ram = firmware.ram_bytes + program.plan.stack_bytes
    assert ram == total
    end = board.ram_origin + total
    for missing, at in ((1, end - 4), (8, end - 8)):
        engine = BoardEngine(firmware, replace(board, ram_bytes=total - missing), "m7", (1, 128, 6), 7, 0, 0)
        with pytest.raises(DeviceFault, match="outside RAM"):
            engine._invoke("board_load_state", at, program.layout.num_bytes)


def test_planned_steps_fault_on_a_machine_that_lacks_what_they_use() -> None:
    program = build("full")
    firmware, total = program.firmware(), program.plan.total_ram_bytes
    used_to = max(b.offset + b.num_bytes for b in program.plan.buffers)
    lacking = program.plan.arena_bytes - used_to + 1
    board = replace(Board.named("stm32f746"), ram_bytes=total - lacking)
    engine = BoardEngine(firmware, board, "m7", program.input_shape, 7, program.layout.num_bytes, 0)
    with pytest.raises(DeviceFault) as caught:
        engine.train(program.quantize_input(DATA), LABELS)
    assert "board_train on stm32f746 stopped at pc" in str(caught.value)


@pytest.mark.parametrize("address", [0x2000_FFFC, 0x2005_0000, 0x4000_0000, 0x10])
def test_an_access_outside_the_memories_is_a_fault(address: int) -> None:
    program = build("none")
    engine = program.board()
    with pytest.raises(DeviceFault, match="RAM is"):
        engine._invoke("board_load_state", address, program.layout.num_bytes)


def test_flash_and_samples_cannot_be_written() -> None:
    """A copy of the state with the context itself as its source reads RAM; a copy into flash faults."""
    program = build("none")
    engine = program.board()
    copy = program.firmware().symbols
    if "eft_copy" not in copy:
        pytest.skip("the linker inlined the copy")
    for target in (0x0800_1000, 0x9000_0000):
        with pytest.raises(DeviceFault):
            engine._invoke("eft_copy", target, 0x2001_0400, 4)


def test_a_stack_that_is_too_small_faults_instead_of_writing_over_data() -> None:
    program = build("full")
    tiny = replace(program.plan, stack_bytes=64)
    object.__setattr__(program, "plan", tiny)
    if "gcc" in KINDS:  # zig writes no stack usage; with it alone only the emulator's fault below holds
        with pytest.raises(BudgetError, match="64 B are reserved"):
            program.board(toolchain="gcc")
    engine_without_bound = program.firmware(toolchain="zig")
    samples = program.quantize_input(DATA)

    def run() -> None:
        BoardEngine(engine_without_bound, program.target, "m7", program.input_shape, 7, 4, 0).train(samples, LABELS)

    with pytest.raises(DeviceFault, match="end of the stack"):
        run()


def test_a_call_that_does_not_end_is_a_fault() -> None:
    program = build("full")
    engine = program.board(timeout_s=0.02)
    with pytest.raises(DeviceFault, match="did not finish"):
        engine.train(program.quantize_input(DATA), LABELS, ORDER)


def test_instructions_are_counted_and_do_not_change_the_result() -> None:
    program = build("sparse")
    samples = program.quantize_input(DATA)
    engine, plain = program.board(), program.board()
    forward = engine.count_instructions(samples[0])
    step = engine.count_instructions(samples[0], 3)
    plain.train_step(samples[0], 3)
    assert engine.state() == plain.state()
    assert program.plan.macs_forward < forward < step < 30 * (program.plan.macs_forward + program.plan.macs_backward)
    assert _num_instructions(bytes.fromhex("00bf aff30080 00bf"), _core("m7").is_wide) == 3
    assert _num_instructions(bytes.fromhex("0100 13000000 8280"), _core("rv32").is_wide) == 3  # c.nop, nop, ret


# --- tools ------------------------------------------------------------------------------------------------------------


def test_missing_tools_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    program = build("none")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(toolchain, "_has_zig", lambda: False)
    with pytest.raises(ToolError, match=r"pip install 'efftrain\[board\]'"):
        program.board()
    with pytest.raises(ToolError, match=r"no C compiler.*pip install 'efftrain\[board\]'"):
        program.host()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "unicorn", None)
    with pytest.raises(ToolError, match=r"unicorn is missing. `pip install 'efftrain\[board\]'"):
        program.board()
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(ToolError, match="pyelftools is missing"):
        program.board()


def test_a_compiler_that_fails_is_an_error_of_ours_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolError, match=r"failed on code that this library generated:\n.*broken"):
        toolchain.build(toolchain.host_toolchain(), {"bad.c": "int broken(void) { return x; }\n"}, "bad.so")
