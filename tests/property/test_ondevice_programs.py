"""Any model of the supported operators, under any scheme: simulator and C learn the same, and the plan holds."""

import dataclasses

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from efftrain.errors import CompileError
from efftrain.ondevice import Board, Program, compile
from efftrain.ondevice.constants import Optimizer
from efftrain.ondevice.memory import Buffer
from efftrain.ondevice.overlap import leads
from tests.drawn_models import models

BOARD = dataclasses.replace(Board.named("stm32f746"), ram_bytes=4 << 20, flash_bytes=8 << 20)
OPTIMIZERS = (Optimizer(), Optimizer(momentum=0.9), Optimizer(batch=2))


def apart(a: Buffer, b: Buffer) -> bool:
    return a.offset + a.num_bytes <= b.offset or b.offset + b.num_bytes <= a.offset


def check_plan(program: Program) -> None:
    """No two live buffers share a byte, except where an output starts far enough below the input that dies with it."""
    allowed = leads(program.graph, program.layers)
    buffers = program.plan.buffers
    assert max(b.offset + b.num_bytes for b in buffers) <= program.plan.arena_bytes
    for index, a in enumerate(buffers):
        for b in buffers[:index]:
            if a.last_op < b.first_op or b.last_op < a.first_op or apart(a, b):
                continue
            written, read = (a, b) if a.first_op >= b.first_op else (b, a)
            assert written.first_op == read.last_op, (written, read)
            assert read.offset - written.offset >= allowed[written.name, read.name], (written, read)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    drawn=models(),
    scheme=st.sampled_from(["full", "bias_only", "last_k=1", "last_layer", "none"]),
    rounding=st.sampled_from(["master", "stochastic"]),
    optimizer=st.sampled_from(OPTIMIZERS),
    copy_input=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_simulator_and_c_learn_the_same(
    drawn: tuple[nn.Module, Tensor], scheme: str, rounding: str, optimizer: Optimizer, copy_input: bool, seed: int
) -> None:
    model, example = drawn
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(8, *example.shape[1:])).astype(np.float32)
    try:
        program = compile(
            model,
            example,
            scheme=scheme,
            board=BOARD,
            calibration=data,
            learning_rate=0.02,
            rounding=rounding,  # type: ignore[arg-type]
            optimizer=optimizer,
            copy_input=copy_input,
            seed=seed,
        )
    except CompileError:
        assume(False)  # a drawn model whose scales no integer can hold; hypothesis complains if they are many
    check_plan(program)
    xs, labels = program.quantize_input(data), rng.integers(0, program.num_classes, 8)
    engines = (program.simulator(), program.host())
    for x, label in zip(xs, labels, strict=True):
        assert len({engine.train_step(x, int(label)) for engine in engines}) == 1
        assert len({engine.state_sha256() for engine in engines}) == 1
