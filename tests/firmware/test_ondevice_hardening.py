"""The C of every operator: clean under all compilers and an analyzer, silent under sanitizers on extreme inputs."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from efftrain.ondevice.backends.toolchain import build, compile_objects, host_instructions
from efftrain.ondevice.constants import Optimizer
from tests.firmware.compilers import COMPILERS, sanitized, sources
from tests.firmware.test_ondevice_c import HARNESS
from tests.firmware.test_ondevice_models import program_of
from tests.ondevice_models import CLASSIFIERS, Autoencoder

pytestmark = pytest.mark.firmware
MODELS = [*CLASSIFIERS, Autoencoder]
OPTIMIZERS = [Optimizer(), Optimizer(momentum=0.9), Optimizer(batch=4)]


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_sanitizers_report_nothing_and_extremes_stay_equal(number: int, tmp_path: Path) -> None:
    """A learning rate that drives weights into their limits, and samples of nothing but the ends of int8."""
    model, rounding = MODELS[number], ("master", "stochastic")[number % 2]
    optimizer = OPTIMIZERS[number % 3]
    program = program_of(model, "full", rounding=rounding, optimizer=optimizer, learning_rate=2.0)
    folder = program.write(tmp_path)
    (folder / "main.c").write_text(HARNESS)
    toolchain = sanitized(*(host_instructions() if number == 0 else ()))
    harness = build(toolchain, sources(folder), "harness")
    rng = np.random.default_rng(1)
    samples = rng.integers(-128, 128, (300, *program.input_shape)).astype(np.int8)
    samples[::7], samples[1::7], samples[2::7] = -128, 127, 0
    samples[3::7] = rng.choice(np.array([-128, 127], np.int8), samples[3::7].shape)
    labels = rng.integers(0, program.num_classes, 300).astype(np.int32)
    data = b"".join(x.tobytes() + y.tobytes() for x, y in zip(samples, labels, strict=True))
    (folder / "data.bin").write_bytes(data)
    result = subprocess.run([harness, "data.bin"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    engine = program.simulator(seed=3)
    engine.train(samples, labels)
    assert bytes.fromhex(result.stdout) == engine.state()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_warnings(compiler: str, tmp_path: Path) -> None:
    folder = tmp_path
    for index, model in enumerate(MODELS):
        in_place = index % 2 == 1
        program_of(model, "full", name=f"model{index}", copy_input=not in_place).write(folder)
        (folder / "main.c").rename(folder / f"main{index}.c")
    compile_objects(COMPILERS[compiler], sources(folder))


@pytest.mark.skipif(shutil.which("cppcheck") is None, reason="cppcheck is missing; apt install cppcheck")
@pytest.mark.parametrize("model", [CLASSIFIERS[0], CLASSIFIERS[2]])
def test_static_analysis_finds_nothing(model: type[nn.Module], tmp_path: Path) -> None:
    folder = program_of(model, "full").write(tmp_path)
    command = ["cppcheck", "--enable=warning,performance,portability", "--std=c99", "--error-exitcode=1", "--quiet"]
    result = subprocess.run([*command, "--inline-suppr", "."], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
