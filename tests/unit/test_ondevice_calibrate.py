"""Ranges from calibration data, and what quantization-aware scaling changes."""

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.errors import CompileError, ConfigError
from efftrain.ondevice import Program, compile
from efftrain.ondevice.calibrate import Method, calibrate
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.reference import run_float
from tests.ondevice_models import CLASSIFIERS, Dead, InvertedResiduals, build

METHODS: tuple[Method, ...] = ("max", "percentile", "mse")


def ranges_of(model: type[nn.Module], method: Method) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    shape = model.shape  # type: ignore[attr-defined]
    graph = read_module(build(model), torch.zeros(1, *shape))
    # Long tails: that is what the methods differ in.
    data = np.random.default_rng(0).standard_t(2, (64, *shape)).astype(np.float32)
    values = {name: value.numpy() for name, value in run_float(graph, data).items()}
    return calibrate(graph, data, method), values


def error(values: np.ndarray, clip: float) -> float:
    """Mean squared error of rounding to 8 bits within [-clip, clip], or [0, clip] where nothing is negative."""
    low, levels = (-clip, 127) if (values < 0).any() else (0.0, 255)
    step = clip / levels
    stored = np.clip(np.rint(values / step) * step, low, clip)
    return float(((values - stored) ** 2).mean())


def test_methods_do_what_they_say() -> None:
    better = 0
    for model in CLASSIFIERS:
        if model is Dead:
            continue  # half of its values are a few constants, whose rounding errors do not average out
        ranges = {}
        for method in METHODS:
            ranges[method], values = ranges_of(model, method)
        for name, value in values.items():
            if name == "input":
                continue
            assert ranges["max"][name] == pytest.approx(np.abs(value).max(), rel=1e-6)
            assert np.mean(np.abs(value) > ranges["percentile"][name]) <= 0.0006
            assert ranges["percentile"][name] <= ranges["max"][name]
            assert error(value, ranges["mse"][name]) <= 1.05 * error(value, ranges["max"][name])
            better += error(value, ranges["mse"][name]) < 0.9 * error(value, ranges["max"][name])
    assert better >= 3, "no tensor has a tail: the test would see nothing"


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match="calibration method 'kl' is not known; known are max, percentile, mse"):
        ranges_of(InvertedResiduals, "kl")  # type: ignore[arg-type]


class Silent(nn.Module):
    """One branch whose ReLU never opens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        nn.init.constant_(self.b.bias, -100.0)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        logits: torch.Tensor = self.head((x + torch.relu(self.b(x))).mean((2, 3)))
        return logits


SILENT_INPUTS = np.random.default_rng(0).normal(size=(8, 2, 6, 6)).astype(np.float32)


def silent_program(learning_rate: float) -> Program:
    torch.manual_seed(0)
    example = torch.zeros(1, 2, 6, 6)
    return compile(
        Silent(), example, scheme="full", board="stm32f746", calibration=SILENT_INPUTS, learning_rate=learning_rate
    )


def parameters_after_training(program: Program) -> set[bytes]:
    """In the simulator and in the host's engine; the state begins with the step."""
    engines = (program.simulator(), program.host())
    for engine in engines:
        engine.train(program.quantize_input(SILENT_INPUTS), np.arange(8) % 3)
    return {engine.state()[4:] for engine in engines}


def test_a_layer_that_is_silent_on_the_data_compiles() -> None:
    program = silent_program(0.01)
    learned = parameters_after_training(program)
    assert len(learned) == 1
    assert learned != {program.host().state()[4:]}


def test_a_rate_too_small_for_a_byte_of_shift_moves_nothing() -> None:
    program = silent_program(1e-40)
    assert parameters_after_training(program) == {program.host().state()[4:]}


def test_a_rate_too_large_for_a_byte_of_shift_is_refused() -> None:
    with pytest.raises(CompileError, match="learning rate"):
        silent_program(1e60)


def test_without_qas_a_step_is_smaller_by_the_square_of_each_scale() -> None:
    data = np.random.default_rng(0).normal(size=(8, *InvertedResiduals.shape)).astype(np.float32)
    programs = [
        compile(
            build(InvertedResiduals),
            torch.zeros(1, *InvertedResiduals.shape),
            scheme="full",
            board="stm32f746",
            calibration=data,
            learning_rate=0.1,
            qas=qas,
        )
        for qas in (True, False)
    ]
    for with_qas, without in zip(*(program.layers.values() for program in programs), strict=True):
        if hasattr(with_qas, "weight_rate"):
            rates = [layer.weight_rate.multiplier * 2.0**-layer.weight_rate.shift for layer in (with_qas, without)]
            np.testing.assert_allclose(rates[1], rates[0] * with_qas.weight_scale**2, rtol=1e-6)
