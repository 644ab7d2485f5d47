"""The compiler for training on microcontrollers.

``compile`` turns a small CNN into dependency-free C99 that trains with integers alone, plans every byte of its RAM, and
runs it in NumPy, on the host and on an emulated Cortex-M, equal to the bit. Names are imported when they are first
used, so that importing this package loads neither torch nor an emulator.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efftrain.ondevice.backends.board import BoardEngine
    from efftrain.ondevice.backends.engine import Engine
    from efftrain.ondevice.backends.host import HostEngine
    from efftrain.ondevice.backends.simulator import Simulator
    from efftrain.ondevice.memory import MemoryPlan
    from efftrain.ondevice.program import Program, compile
    from efftrain.ondevice.scheme import LayerShare, Scheme
    from efftrain.ondevice.target import Board

_HOMES = {
    "Board": "target",
    "BoardEngine": "backends.board",
    "Engine": "backends.engine",
    "HostEngine": "backends.host",
    "LayerShare": "scheme",
    "MemoryPlan": "memory",
    "Program": "program",
    "Scheme": "scheme",
    "Simulator": "backends.simulator",
    "compile": "program",
}

__all__ = [
    "Board",
    "BoardEngine",
    "Engine",
    "HostEngine",
    "LayerShare",
    "MemoryPlan",
    "Program",
    "Scheme",
    "Simulator",
    "compile",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
