"""Every operator on all three back ends: one trained state to the bit, whatever the passes did to the memory."""

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.ondevice import Program, compile
from efftrain.ondevice.passes import OVERLAP, PASSES
from tests.ondevice_models import CLASSIFIERS, Autoencoder, build

SCHEMES = ("full", "bias_only", "sparse")


def program_of(model: type[nn.Module], scheme: str, **settings: object) -> Program:
    shape = model.shape  # type: ignore[attr-defined]
    data = np.random.default_rng(1).normal(size=(16, *shape)).astype(np.float32)
    return compile(
        build(model),
        torch.zeros(1, *shape),
        scheme=scheme,
        board="stm32f746",
        calibration=data,
        learning_rate=0.02,
        loss="squared_error" if model is Autoencoder else "cross_entropy",
        **settings,  # type: ignore[arg-type]
    )


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
