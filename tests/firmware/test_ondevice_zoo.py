"""The shipped models under the published schemes: what they take, and that all back ends learn the same.

Source of the limits: the goals are those of docs/on-device; the reference system (tinyengine, commit 47bb283) takes
255,384 B of RAM for mcunet-5fps with the scheme of 49 KB.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from efftrain.models import build_model
from efftrain.ondevice import Board, Program, compile

KIB = 1024
PUBLISHED = ("mcunetv3-49kb", "mcunetv3-74kb", "mcunetv3-99kb", "mcunetv3-124kb", "mcunetv3-148kb")
TINY = ("resnet8", "ds-cnn", "mobilenet-v1-0.25", "fc-autoencoder")


def program_of(model: str, scheme: str, ram_bytes: int) -> Program:
    torch.manual_seed(0)
    module = build_model(model)
    shape = module.input_shape
    data = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)  # type: ignore[misc]
    return compile(
        module,
        torch.zeros(1, *shape),  # type: ignore[misc]
        scheme=scheme,
        board=replace(Board.named("stm32f746"), ram_bytes=ram_bytes, flash_bytes=2 << 20),
        calibration=data,
        learning_rate=0.001,
        rounding="stochastic",
        loss="squared_error" if model == "fc-autoencoder" else "cross_entropy",
    )


def train_on_all(program: Program, steps: int) -> None:
    rng = np.random.default_rng(1)
    height, width, channels = program.input_shape
    xs = program.quantize_input(rng.normal(size=(steps, channels, height, width)).astype(np.float32))
    labels = rng.integers(0, program.num_classes, steps)
    engines = [program.simulator(), program.host(), program.board()]
    start = engines[0].state_sha256()
    for x, label in zip(xs, labels, strict=True):
        assert len({engine.train_step(x, int(label)) for engine in engines}) == 1
        assert len({engine.state_sha256() for engine in engines}) == 1
    assert engines[0].state_sha256() != start


def test_mcunet_trains_in_less_than_half_of_the_reference_systems_ram() -> None:
    program = program_of("mcunet-5fps", "mcunetv3-49kb", 86_016)
    plan = program.plan
    assert plan.arena_bytes == plan.arena_lower_bound_bytes
    assert plan.total_ram_bytes <= 86_016
    assert plan.macs_forward == 22_455_104
    board = program.board()
    assert board.firmware.flash_bytes <= 600_000
    assert plan.flash_bytes <= 1.01 * board.firmware.flash_bytes
    x = program.quantize_input(np.random.default_rng(2).normal(size=(1, 3, 128, 128)).astype(np.float32))[0]
    assert board.count_instructions(x, 3) <= 103_940_000
    assert board.count_instructions(x) <= 63_330_000
    assert board.measured_ram_bytes <= plan.total_ram_bytes
    train_on_all(program, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scheme", PUBLISHED)
def test_published_schemes(scheme: str) -> None:
    train_on_all(program_of("mcunet-5fps", scheme, 192 * KIB), 100)


@pytest.mark.parametrize("model", TINY)
def test_mlperf_tiny(model: str) -> None:
    train_on_all(program_of(model, "last_k=3", 320 * KIB), 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scheme", ["bias_only", "last_k=3", "full"])
@pytest.mark.parametrize("model", [*TINY, "mobilenet-v2-w0.35", "proxyless-w0.3", "mcunet-5fps"])
def test_every_model_under_every_kind_of_scheme(model: str, scheme: str) -> None:
    train_on_all(program_of(model, scheme, 2 << 20), 20)
