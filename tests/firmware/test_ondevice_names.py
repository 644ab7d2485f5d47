"""Names of a user's modules reach the generated C in comments alone, whatever they hold."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from efftrain.ondevice import Board, Program, compile
from efftrain.ondevice.emit.c_source import CSource, emit_c
from efftrain.ondevice.ir import ChannelTiles
from efftrain.ondevice.memory import Arena

pytestmark = pytest.mark.firmware

PIECES = ["*/", "/*", "//", '"', "'", "\n", "\r", "\\", "\\\n", "??/", "%s%n", "${name}", "#define x", "\0", "§é中"]
NAMES = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join))


@functools.cache
def program() -> Program:
    """Rows that are streamed, tiles, masks, moves, trained slices: all that a comment may be about."""
    torch.manual_seed(0)
    block = (nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 8, 1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    data = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    return compile(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *block, *head),
        torch.zeros(1, 3, 8, 8),
        scheme="full",
        board=dataclasses.replace(Board.named("stm32f746"), ram_bytes=1),
        calibration=data,
        learning_rate=0.02,
        must_fit=False,
    )


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A structure of dataclasses with other names in it."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, tuple):
        return tuple(renamed(each, names) for each in value)
    if isinstance(value, Mapping):
        return {renamed(key, names): renamed(each, names) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{key: renamed(each, names) for key, each in fields.items()})
    return value


def source_with(names: Mapping[str, str]) -> CSource:
    p = program()
    arena = Arena(p.plan.buffers, p.plan.arena_bytes, p.plan.arena_lower_bound_bytes)
    initial = p.layout.unpack(p.initial_state)
    graph, layers, layout = (renamed(part, names) for part in (p.graph, p.layers, p.layout))
    number = p.numbers[p.graph.input]
    return emit_c("model", graph, layers, layout, renamed(arena, names), renamed(initial, names), number)


def statements(text: str) -> str:
    """What a compiler sees."""
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def check(suffixes: list[str]) -> None:
    """Every name of the graph gets one of the suffixes and a number of its own, so that names stay apart."""
    p = program()
    known = [*p.graph.tensors, *p.layers, *(op.name for op in p.graph.ops)]
    known.remove(p.graph.input)  # "input" is ours
    names = {name: f"{number}{suffixes[number % len(suffixes)]}" for number, name in enumerate(dict.fromkeys(known))}
    plain, hostile = p.code, source_with(names)
    assert statements(hostile.source) == statements(plain.source)
    assert hostile.header == plain.header
    assert re.fullmatch(r"[\n -~]*", hostile.source), "nothing but printable ASCII"
    assert hostile.source.count("\n") == plain.source.count("\n")
    assert "??/" not in hostile.source


def test_the_program_says_all_kinds_of_things() -> None:
    assert any(isinstance(op, ChannelTiles) for op in program().graph.ops)
    assert source_with({}) == program().code
    assert "/*" in program().code.source


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=5, max_size=5))
def test_hostile_names_change_nothing_but_comments(suffixes: list[str]) -> None:
    """300 names: 60 programs of 5."""
    check(suffixes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(NAMES, min_size=5, max_size=5))
def test_ten_thousand_hostile_names_change_nothing_but_comments(suffixes: list[str]) -> None:
    check(suffixes)
