"""Every operator on all three back ends: one trained state to the bit, whatever the passes did to the memory."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.ondevice import Program, compile
from efftrain.ondevice.constants import Optimizer
from efftrain.ondevice.passes import OVERLAP, PASSES
from tests.ondevice_models import CLASSIFIERS, Autoencoder, build

SCHEMES = ("full", "bias_only", "sparse")


def program_of(model: type[nn.Module], scheme: str, **settings: object) -> Program:
    shape = model.shape  # type: ignore[attr-defined]
    data = np.random.default_rng(1).normal(size=(16, *shape)).astype(np.float32)
    loss = "squared_error" if model is Autoencoder else "cross_entropy"
    settings = {"board": "stm32f746", "learning_rate": 0.02, "loss": loss, **settings}
    return compile(build(model), torch.zeros(1, *shape), scheme=scheme, calibration=data, **settings)  # type: ignore[arg-type]


def samples_of(program: Program, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    height, width, channels = program.input_shape
    xs = program.quantize_input(rng.normal(size=(count, channels, height, width)).astype(np.float32))
    return xs, rng.integers(0, program.num_classes, count)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("model", [*CLASSIFIERS, Autoencoder])
def test_three_back_ends_are_one(model: type[nn.Module], scheme: str, rounding: str) -> None:
    program = program_of(model, scheme, rounding=rounding)
    xs, labels = samples_of(program, 12)
    engines = [program.simulator(), program.host(), program.board()]
    start = engines[0].state_sha256()
    for x, label in zip(xs, labels, strict=True):
        results = {engine.train_step(x, int(label)) for engine in engines}
        assert len(results) == 1
        assert len({engine.state_sha256() for engine in engines}) == 1
    assert engines[0].state_sha256() != start
    assert len({engine.predict(xs[0]) for engine in engines}) == 1


@pytest.mark.parametrize("model", [CLASSIFIERS[0], Autoencoder])
def test_inputs_are_read_where_they_are(model: type[nn.Module]) -> None:
    copying, in_place = program_of(model, "full"), program_of(model, "full", copy_input=False)
    size = copying.graph.tensors[copying.graph.input].num_bytes
    assert in_place.plan.arena_bytes >= copying.plan.arena_bytes - size
    assert not any(buffer.kind == "input" for buffer in in_place.plan.buffers)
    xs, labels = samples_of(copying, 6)
    before = xs.copy()
    engines = [copying.host(), in_place.simulator(), in_place.host(), in_place.board()]
    for x, label in zip(xs, labels, strict=True):
        assert len({engine.train_step(x, int(label)) for engine in engines}) == 1
        assert len({engine.state_sha256() for engine in engines}) == 1
    assert np.array_equal(xs, before)


@pytest.mark.parametrize("optimizer", [Optimizer(momentum=0.9), Optimizer(batch=4)])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_optimizers_keep_the_same_on_all_back_ends(optimizer: Optimizer, rounding: str) -> None:
    program = program_of(CLASSIFIERS[0], "full", rounding=rounding, optimizer=optimizer)
    xs, labels = samples_of(program, 10)
    engines = [program.simulator(), program.host(), program.board()]
    plain = program_of(CLASSIFIERS[0], "full", rounding=rounding)
    parts = ("bias", "moved_bias", "weight")
    trained = sum(math.prod(entry.shape) for entry in plain.layout.entries if entry.part in parts)
    assert program.layout.num_bytes - plain.layout.num_bytes == 4 * trained
    for x, label in zip(xs, labels, strict=True):
        for engine in engines:
            engine.train_step(x, int(label))
        assert len({engine.state_sha256() for engine in engines}) == 1
    saved = engines[0].state()
    fresh = program.host()
    fresh.load_state(saved)
    fresh.train_step(xs[0], 1)
    engines[0].train_step(xs[0], 1)
    assert fresh.state_sha256() == engines[0].state_sha256()


def test_a_batch_moves_by_the_mean_of_its_steps() -> None:
    """Eight times the same sample in one batch is one step of plain SGD, but for what the steps are rounded to."""
    plain = program_of(CLASSIFIERS[0], "full")
    batched = program_of(CLASSIFIERS[0], "full", optimizer=Optimizer(batch=8))
    xs, _ = samples_of(plain, 1)
    one, eight = plain.host(), batched.host()
    one.train_step(xs[0], 2)
    start = dict(batched.layout.unpack(eight.state()))
    for _ in range(8):
        eight.train_step(xs[0], 2)
    ours, wanted = batched.layout.unpack(eight.state()), plain.layout.unpack(one.state())
    moved = 0
    for key in wanted:
        if key[0] in ("bias", "weight"):
            assert np.abs(ours[key] - wanted[key]).max() <= 1
            moved += int(np.abs(ours[key] - start[key]).sum())
    assert moved > 100


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_weights_stand_still_as_the_learning_rate_goes_to_zero(rounding: str) -> None:
    """A step that is rounded toward zero moves every weight, however small it is; here no weight drifts.

    Rounded stochastically, a step of a thousandth of a unit moves one weight in a thousand, in its own direction.
    """
    moved, towards_zero, trained = 0, 0, 0
    program = program_of(CLASSIFIERS[1], "full", rounding=rounding, learning_rate=1e-4)
    xs, labels = samples_of(program, 40)
    engine = program.host()
    start = program.layout.unpack(engine.state())
    engine.train(xs, labels)
    end = program.layout.unpack(engine.state())
    for key, before in start.items():
        if key[0] == "weight":
            change = end[key] - before
            moved += int((change != 0).sum())
            towards_zero += int((change * before < 0).sum())
            trained += before.size
    if rounding == "master":
        assert moved <= 0.01 * trained
    else:
        assert 0 < moved < 0.2 * trained
        # Half of the moves of a fair coin, within five of its standard deviations.
        assert abs(towards_zero - moved / 2) < 5 * (moved / 4) ** 0.5


@pytest.mark.parametrize("model", [*CLASSIFIERS, Autoencoder])
def test_no_pass_changes_a_bit(model: type[nn.Module]) -> None:
    states, arenas = set(), {}
    for switched_off in ((), *((name,) for name in (*PASSES, OVERLAP)), (*PASSES, OVERLAP)):
        program = program_of(model, "full", switch_off=switched_off)
        xs, labels = samples_of(program, 6)
        engine = program.host()
        engine.train(xs, labels)
        states.add(engine.state_sha256())
        arenas[switched_off] = program.plan.arena_bytes
    assert len(states) == 1
    assert arenas[()] < arenas[(*PASSES, OVERLAP)]
