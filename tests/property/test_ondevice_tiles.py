"""Any block on any board that its plan fits: tiles of channels, and the bits of the whole step."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from efftrain.ondevice import Board, Program, Scheme, compile
from efftrain.ondevice.constants import Optimizer
from efftrain.ondevice.ir import ChannelTiles
from efftrain.ondevice.memory import step_bytes
from efftrain.ondevice.overlap import leads
from efftrain.ondevice.scheme import LayerShare

Drawn = tuple[nn.Module, tuple[int, ...]]
"""A model, and the shape of its input."""
BOARD = replace(Board.named("stm32f746"), ram_bytes=4 << 20)


class Block(nn.Module):
    """Pointwise, depthwise and pointwise, or a pair of the three; added to its input on request."""

    def __init__(self, layers: list[nn.Module], *, adds: bool) -> None:
        super().__init__()
        self.layers, self.adds = nn.Sequential(*layers), adds

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


@st.composite
def blocks(draw: st.DrawFn, inputs: int) -> tuple[nn.Module, int]:
    wide, channels = draw(st.integers(30, 64)), draw(st.integers(2, 8))
    kernel, stride = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
    activation = draw(st.sampled_from([nn.ReLU6, nn.ReLU6, nn.Identity, nn.Hardswish]))
    depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide)
    middle = draw(st.sampled_from([[depthwise, activation()], []]))
    first = nn.Conv2d(inputs, wide, draw(st.sampled_from([1, 1, 3])), padding="same")
    last = nn.Conv2d(wide, channels, draw(st.sampled_from([1, 1, 3])), 1, 1)
    adds = draw(st.booleans())
    if adds:
        channels = inputs
        depthwise.stride = (1, 1)
        last = nn.Conv2d(wide, inputs, 1)
    return Block([first, activation(), *middle, last], adds=adds), channels


@st.composite
def nets(draw: st.DrawFn) -> Drawn:
    torch.manual_seed(draw(st.integers(0, 1000)))
    channels = draw(st.integers(2, 6))
    layers: list[nn.Module] = [nn.Conv2d(2, channels, 3, 1, 1), nn.ReLU()]
    for _ in range(draw(st.integers(1, 2))):
        block, channels = draw(blocks(channels))
        layers.append(block)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return nn.Sequential(*layers), (2, draw(st.integers(6, 10)), draw(st.integers(6, 10)))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    weights = (LayerShare(layer="*", share=share),) if share else ()
    return Scheme(name="drawn", head=True, last_biases=-1, weights=weights)


def check_plan(program: Program) -> None:
    """No two live buffers share a byte, except as far as the one is written where the other is not read any more."""
    allowed = leads(program.graph, program.layers)
    for index, a in enumerate(program.plan.buffers):
        for b in program.plan.buffers[:index]:
            alive = a.first_op <= b.last_op and b.first_op <= a.last_op
            if alive and a.offset < b.offset + b.num_bytes and b.offset < a.offset + a.num_bytes:
                written, read = (a, b) if (a.name, b.name) in allowed else (b, a)
                assert written.first_op == read.last_op
                assert read.offset - written.offset >= allowed[written.name, read.name]
    assert program.plan.arena_lower_bound_bytes == max(step_bytes(program.graph, program.layers))


def check_learning(net: nn.Module, shape: tuple[int, ...], share: float, seed: int, **settings: Any) -> None:
    """Train on a board that holds everything and on one that has a share of what tiles can save."""
    data = np.random.default_rng(seed).normal(size=(4, *shape)).astype(np.float32)

    def program_of(ram_bytes: int, *, must_fit: bool = True) -> Program:
        board = replace(BOARD, ram_bytes=ram_bytes)
        example = torch.zeros(1, *shape)
        return compile(net, example, board=board, calibration=data, learning_rate=0.05, must_fit=must_fit, **settings)

    whole, least = program_of(BOARD.ram_bytes), program_of(1, must_fit=False).plan.total_ram_bytes
    ram_bytes = round(least + share * (whole.plan.total_ram_bytes - least))
    tiled = program_of(ram_bytes)
    assert tiled.plan.total_ram_bytes <= ram_bytes
    check_plan(tiled)
    event(f"{sum(isinstance(op, ChannelTiles) for op in tiled.graph.ops)} blocks in tiles")
    xs, labels = whole.quantize_input(data), np.random.default_rng(seed).integers(0, 3, 4)
    engines = (whole.simulator(), tiled.simulator(), tiled.host())
    for x, label in zip(xs, labels, strict=True):
        assert len({engine.train_step(x, int(label)) for engine in engines}) == 1
        assert len({engine.state_sha256() for engine in engines}) == 1


ANY = given(
    drawn=nets(),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
    scheme=schemes(),
    rounding=st.sampled_from(["master", "stochastic"]),
    optimizer=st.sampled_from([Optimizer(), Optimizer(momentum=0.9), Optimizer(batch=2)]),
    copy_input=st.booleans(),
)
SLOWLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(SLOWLY, max_examples=4)
@ANY
def test_blocks(drawn: Drawn, share: float, seed: int, **others: Any) -> None:
    check_learning(*drawn, share, seed, **others)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(SLOWLY, max_examples=60)
@ANY
def test_many_blocks(drawn: Drawn, share: float, seed: int, **others: Any) -> None:
    check_learning(*drawn, share, seed, **others)
