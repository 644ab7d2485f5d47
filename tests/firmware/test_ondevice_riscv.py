"""The same program on a processor of another family: RV32IMAC, a board of 32 KB."""

import shutil
from dataclasses import replace

import pytest

from efftrain.errors import BudgetError, DeviceFault
from efftrain.ondevice import Board
from efftrain.ondevice.backends.toolchain import Kind
from efftrain.ondevice.target import family_of
from tests.firmware.test_ondevice_board import DATA, LABELS, ORDER, build

pytestmark = pytest.mark.firmware

BOARD = Board.named("gd32vf103")
KINDS: tuple[Kind, ...] = ("gcc", "zig") if shutil.which(family_of(BOARD.cpu).gcc) else ("zig",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scheme", "rounding"), [("full", "stochastic"), ("sparse", "master")])
def test_every_bit_is_that_of_the_host(scheme: str, rounding: str, kind: Kind) -> None:
    program = build(scheme, BOARD, rounding=rounding)
    samples = program.quantize_input(DATA)
    board, host = program.board(toolchain=kind), program.host()
    for engine in (board, host):
        engine.set_lr_shift(1)
        engine.train(samples, LABELS, ORDER)
    assert board.state() == host.state() != program.initial_state
    assert [board.predict(x) for x in samples[:5]] == [host.predict(x) for x in samples[:5]]
    assert board.firmware.flash_bytes <= program.plan.flash_bytes
    assert board.measured_ram_bytes <= program.plan.total_ram_bytes <= BOARD.ram_bytes
    if kind == "gcc":
        bound = board.firmware.stack_bound_bytes
        assert bound is not None
        assert board.measured_stack_bytes <= bound <= program.plan.stack_bytes
    step = board.count_instructions(samples[0], 3)
    assert program.plan.macs_forward < step < 30 * (program.plan.macs_forward + program.plan.macs_backward)


def test_a_program_planned_for_another_family_runs_as_well() -> None:
    program = build("sparse", "stm32f746")
    samples = program.quantize_input(DATA)
    board, host = program.board("rv32"), program.host()
    for engine in (board, host):
        engine.train(samples, LABELS, ORDER[:20])
    assert board.state() == host.state()


def test_memory_is_the_boards_and_no_byte_more() -> None:
    program = build("full", BOARD, rounding="stochastic")
    firmware = program.firmware()
    total = program.plan.total_ram_bytes
    with pytest.raises(BudgetError, match="region"):
        program.firmware(board=replace(BOARD, ram_bytes=total - 16))
    assert firmware.ram_bytes == total - program.plan.stack_bytes
    engine = program.board()
    engine._board = replace(BOARD, ram_bytes=4096)
    engine._uc = engine._machine()
    with pytest.raises(DeviceFault, match=r"stopped at pc 0x08.* RAM is \[0x20000000"):
        engine.train(program.quantize_input(DATA), LABELS, ORDER[:2])


def test_a_stack_that_the_abi_does_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a positive multiple of 16"):
        replace(BOARD, stack_bytes=1544)
