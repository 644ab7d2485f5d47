"""How deep the stack of a linked program can get, from the compiler's own call graph."""

import re
from functools import cache
from pathlib import Path

from efftrain.errors import ToolError

LIBRARY_FRAME_BYTES = 64
"""Allowance for a call of the compiler's arithmetic library, whose frames it does not report: a few saved registers."""
_NODE = re.compile(r'node: \{ title: "([^"]*)" label: "([^"]*)"( shape : ellipse)? \}')
_EDGE = re.compile(r'edge: \{ sourcename: "([^"]*)" targetname: "([^"]*)"')
_USAGE = re.compile(r"\\n(\d+) bytes \(([^)]*)\)")


def stack_bound(program: Path) -> int | None:
    """Most stack that any chain of calls can take, in bytes.

    Args:
        program: Beside it lie the ``.ci`` files that gcc writes with ``-fcallgraph-info=su``. The chains start at the
            functions of the driver; kernels that a program does not call do not count.

    Returns:
        ``None`` if there are none: clang writes no call graph.

    Raises:
        ToolError: A frame is not of fixed size, or a function can call itself: then there is no bound.
    """
    files = sorted(program.parent.glob("*.ci"))
    if not files:
        return None
    frames: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    for file in files:
        text = file.read_text()
        for name, label, outside in _NODE.findall(text):
            usage = _USAGE.search(label)
            if usage and usage[2] != "static":
                raise ToolError(f"the stack usage of {name} is {usage[2]}, not static; it cannot be bounded")
            if usage:
                frames[name] = int(usage[1])
            elif outside:
                frames.setdefault(name, LIBRARY_FRAME_BYTES)
        for caller, callee in _EDGE.findall(text):
            calls.setdefault(caller, set()).add(callee)
    open_calls: list[str] = []

    @cache
    def depth(name: str) -> int:
        if name in open_calls:
            raise ToolError(f"{name} can call itself; its stack cannot be bounded")
        open_calls.append(name)
        below = max((depth(callee) for callee in calls.get(name, ())), default=0)
        open_calls.pop()
        return frames.get(name, LIBRARY_FRAME_BYTES) + below

    entries = [name for name in frames if name.startswith("board_")]
    return max(depth(name) for name in entries or frames)
