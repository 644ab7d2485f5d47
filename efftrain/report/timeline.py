"""Pictures of a memory plan as SVG: address against time, whole RAM, and the waterfall of the passes.

Written by hand, not by matplotlib: a device build needs no extra, and every buffer has a text that shows when it is
pointed at.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from efftrain.report.figures import COLORS, Figure

KIND_COLORS = {
    "input": COLORS[2],
    "activation": COLORS[0],
    "mask": COLORS[3],
    "logits": COLORS[6],
    "gradient": COLORS[1],
    "scratch": COLORS[7],
    "ring": COLORS[5],
}
"""Colors of the kinds of buffers; others take what is left of the palette."""

LABELED = 12
"""Largest buffers, numbered in the picture and listed beside it."""

_PART_COLORS = (COLORS[0], COLORS[4], COLORS[3], COLORS[7], COLORS[5])
_WIDTH, _LEFT, _RIGHT = 1040, 78, 14
_INK, _SOFT, _LINE, _FREE = "#1c2430", "#5b6675", "#dfe4ea", "#eef1f5"


def largest_buffers(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ``LABELED`` largest, the earlier first among equals."""
    return sorted(plan["buffers"], key=lambda b: (-b["num_bytes"], b["first_op"], b["name"]))[:LABELED]


def timeline(name: str, plan: Mapping[str, Any], *, caption: str) -> Figure:
    """Address against time of the arena, and under it the bytes that are alive during each op.

    Args:
        name: Identifier in the page.
        plan: ``MemoryPlan.to_dict()`` with ``num_forward_ops`` and ``alive_bytes``, one number an op.
        caption: Under the picture.
    """
    ops, arena = plan["ops"], max(plan["arena_bytes"], 1)
    bound, alive = plan["arena_lower_bound_bytes"], plan["alive_bytes"]
    top, map_height, gap, alive_height = 48, 380, 36, 96
    column = (_WIDTH - _LEFT - _RIGHT) / max(len(ops), 1)
    names_height = 150 if column >= 11 else 34
    alive_top = top + map_height + gap
    height = alive_top + alive_height + names_height
    scale = _nice_top(arena)

    def x(op: float) -> float:
        return _LEFT + op * column

    def y(num_bytes: float) -> float:
        return top + map_height * (1 - num_bytes / scale)

    def y_alive(num_bytes: float) -> float:
        return alive_top + alive_height * (1 - num_bytes / scale)

    border = plan["num_forward_ops"]
    parts = [*_legend(plan)]
    for low, high, word, fill in ((0, border, "forward", "#fff"), (border, len(ops), "backward and update", "#faf7f2")):
        if high > low:
            parts.append(_rect(x(low), top, x(high) - x(low), map_height, fill))
            parts.append(_rect(x(low), alive_top, x(high) - x(low), alive_height, fill))
            if x(high) - x(low) > 6 * len(word):
                parts.append(_text((x(low) + x(high)) / 2, top - 6, word, anchor="middle", fill=_SOFT))
    for tick in _ticks(scale):
        parts += [_line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), _LINE), _text(_LEFT - 6, y(tick) + 4, _kib(tick))]
    for tick in (0, scale):
        parts.append(_text(_LEFT - 6, y_alive(tick) + 4, _kib(tick)))
        parts.append(_line(_LEFT, y_alive(tick), _WIDTH - _RIGHT, y_alive(tick), _LINE))
    parts.append(_text(14, top + map_height / 2, "address in the arena", anchor="middle", turn=-90, fill=_SOFT))
    parts.append(_text(14, alive_top + alive_height / 2, "bytes alive", anchor="middle", turn=-90, fill=_SOFT))

    numbers = {buffer["name"]: number for number, buffer in enumerate(largest_buffers(plan), 1)}
    labels, taken = list[str](), list[tuple[float, float, float]]()
    for buffer in sorted(plan["buffers"], key=lambda b: (b["first_op"], -b["num_bytes"])):
        left, right = x(buffer["first_op"]), x(buffer["last_op"] + 1)
        low, high = y(buffer["offset"]), y(buffer["offset"] + buffer["num_bytes"])
        title = (
            f"{buffer['name']} ({buffer['kind']}), {buffer['num_bytes']:,} B at {buffer['offset']:,}, "
            f"ops {buffer['first_op']} to {buffer['last_op']}: {ops[buffer['first_op']]} ... {ops[buffer['last_op']]}"
        )
        color = _color(buffer["kind"])
        parts.append(
            f'<rect class="buffer" x="{left:.2f}" y="{high:.2f}" width="{right - left:.2f}" '
            f'height="{max(low - high, 0.6):.2f}" fill="{color}" fill-opacity=".8" stroke="#fff" stroke-width=".7">'
            f"<title>{html.escape(title)}</title></rect>"
        )
        number = numbers.get(buffer["name"])
        if number is None or low - high < 11:
            continue
        long = f"{number}  {buffer['name']}"
        label = long if right - left > 6.2 * len(long) + 8 else str(number)
        half = 3.6 * len(label)
        middle = (left + right) / 2
        # Buffers that lie over each other have the same middle: the later label goes lower.
        base = (low + high) / 2 + 4
        while any(abs(middle - at) < half + other + 3 and abs(base - line) < 12 for at, line, other in taken):
            base += 12
        if right - left > 2 * half - 2 and base < low:
            fill = _INK if buffer["kind"] == "logits" else "#fff"
            labels.append(_text(middle, base, label, anchor="middle", fill=fill, bold=True))
            taken.append((middle, base, half))
    parts += labels
    for op, num_bytes in enumerate(alive):
        color = COLORS[0] if op < border else COLORS[1]
        parts.append(
            f'<rect class="op" x="{x(op) + 0.4:.2f}" y="{y_alive(num_bytes):.2f}" width="{max(column - 0.8, 0.5):.2f}" '
            f'height="{alive_height * num_bytes / scale:.2f}" fill="{color}" fill-opacity=".75">'
            f"<title>{html.escape(f'op {op}, {ops[op]}: {num_bytes:,} B alive')}</title></rect>"
        )
    for place in (y(bound), y_alive(bound)):
        parts.append(_line(_LEFT, place, _WIDTH - _RIGHT, place, _INK, dash="5 4"))
    words = f"lower bound {bound:,} B"
    words += ", met" if bound == plan["arena_bytes"] else f"; arena {plan['arena_bytes']:,} B"
    parts.append(_text(_WIDTH - _RIGHT - 4, y(bound) - 5, words, fill=_INK, bold=True))
    if 0 < border < len(ops):
        parts.append(_line(x(border), top - 18, x(border), alive_top + alive_height, _INK, width=1.4))
    parts += _op_axis(ops, x, column, alive_top + alive_height)
    return Figure(name, caption, _svg(name, height, parts), wide=True)


def _op_axis(ops: Sequence[str], x: Any, column: float, top: float) -> Iterator[str]:
    """Names of all ops if there is room, else every tenth number."""
    if column >= 11:
        for op, name in enumerate(ops):
            short = name if len(name) <= 22 else name[:20] + ".."
            yield _text(x(op + 0.5) + 4, top + 8, short, turn=-90, fill=_SOFT, size=10.5)
        return
    step = next(step for step in (5, 10, 20, 50, 100, 1000) if len(ops) / step <= 25 or step == 1000)
    for op in range(0, len(ops), step):
        yield _line(x(op + 0.5), top, x(op + 0.5), top + 4, _SOFT)
        yield _text(x(op + 0.5), top + 16, str(op), anchor="middle", fill=_SOFT)
    yield _text(x(len(ops) / 2), top + 31, "op of the training step", anchor="middle", fill=_SOFT)


def _legend(plan: Mapping[str, Any]) -> Iterator[str]:
    at: float = _LEFT
    for kind in dict.fromkeys(buffer["kind"] for buffer in plan["buffers"]):
        yield _rect(at, 5, 12, 12, _color(kind))
        yield _text(at + 17, 15, kind, anchor="start")
        at += 17 + 7 * len(kind) + 20


def ram_bar(name: str, parts: Mapping[str, int], board_bytes: int, *, caption: str) -> Figure:
    """One bar: the parts of the RAM, one after another, in that of the board."""
    total = sum(parts.values())
    scale = max(total, board_bytes, 1)
    width = _WIDTH - 2 * _RIGHT
    drawn = [_rect(_RIGHT, 8, width * board_bytes / scale, 34, _FREE)]
    at, key = float(_RIGHT), float(_RIGHT)
    for (part, num_bytes), color in zip(
        parts.items(), (COLORS[0], COLORS[4], COLORS[3], COLORS[7], COLORS[5]), strict=False
    ):
        if num_bytes == 0:
            continue
        wide = width * num_bytes / scale
        title = html.escape(f"{part}: {num_bytes:,} B")
        drawn.append(
            f'<rect class="part" x="{at:.2f}" y="8" width="{max(wide, 1):.2f}" height="34" fill="{color}">'
            f"<title>{title}</title></rect>"
        )
        at += wide
        drawn += [_rect(key, 54, 12, 12, color), _text(key + 17, 64, f"{part} {num_bytes:,} B", anchor="start")]
        key += 17 + 6.6 * len(f"{part} {num_bytes:,} B") + 22
    free = board_bytes - total
    if free > 0.25 * scale:
        drawn.append(_text(_RIGHT + width * board_bytes / scale - 10, 30, f"{free:,} B free", fill=_SOFT))
    if free < 0:
        edge = _RIGHT + width * board_bytes / scale
        drawn += [_line(edge, 2, edge, 48, _INK, width=2), _text(edge - 6, 30, "end of the board's RAM", fill="#fff")]
    return Figure(name, caption, _svg(name, 74, drawn), wide=True)


def waterfall_bars(
    name: str,
    steps: Sequence[Mapping[str, Any]],
    titles: Sequence[str],
    board_bytes: int,
    board: str,
    *,
    caption: str,
) -> Figure:
    """A bar a pass: RAM in all by part, and dashed behind it what the pass took away.

    Args:
        name: Identifier in the page.
        steps: ``WaterfallStep.to_dict()`` of each.
        titles: What stands before each bar.
        board_bytes: RAM of the board, drawn as a line if it lies in the picture.
        board: Its name.
        caption: Under the picture.
    """
    left, right, row, top = 236, 150, 44, 46
    scale = _nice_top(max(step["total_ram_bytes"] for step in steps))
    width = _WIDTH - left - right
    bottom = top + row * len(steps)

    def x(num_bytes: float) -> float:
        return left + width * num_bytes / scale

    parts: list[str] = []
    at: float = left
    for word, color in (("arena", COLORS[0]), ("trained state", COLORS[4]), ("stack and static", COLORS[7])):
        parts += [_rect(at, 5, 12, 12, color), _text(at + 17, 15, word, anchor="start")]
        at += 17 + 7 * len(word) + 20
    parts += [_rect(at, 5, 12, 12, "#fff", stroke=_SOFT), _text(at + 17, 15, "taken away by the pass", anchor="start")]
    for tick in _ticks(scale):
        parts += [_line(x(tick), top - 8, x(tick), bottom, _LINE)]
        parts.append(_text(x(tick), bottom + 15, _kib(tick), anchor="middle", fill=_SOFT))
    before, after = None, list[str]()
    for number, (step, title) in enumerate(zip(steps, titles, strict=True)):
        y, total = top + row * number, step["total_ram_bytes"]
        parts.append(_text(left - 10, y + 17, title))
        if before is not None and before > total:
            parts.append(_rect(x(total), y + 2, x(before) - x(total), 22, "#fff", stroke=_SOFT, dash="3 3"))
        offset = 0
        rest = total - step["arena_bytes"] - step["trained_state_bytes"]
        for word, num_bytes, color in (
            ("arena", step["arena_bytes"], COLORS[0]),
            ("trained state", step["trained_state_bytes"], COLORS[4]),
            ("stack and static", rest, COLORS[7]),
        ):
            drawn = html.escape(f"{title}: {word} {num_bytes:,} B")
            parts.append(
                f'<rect class="part" x="{x(offset):.2f}" y="{y + 2}" width="{x(num_bytes) - left:.2f}" height="22" '
                f'fill="{color}"><title>{drawn}</title></rect>'
            )
            offset += num_bytes
        for letter, key in (("F", "max_live_forward_bytes"), ("B", "max_live_backward_bytes")):
            if step[key]:
                mark = x(step[key])
                words = html.escape(f"{title}: {step[key]:,} B alive")
                parts.append(
                    f'<g class="mark"><title>{words}</title>'
                    f"{_line(mark, y, mark, y + 26, '#fff', width=3)}{_line(mark, y, mark, y + 28, _INK, width=1.2)}"
                    f"{_text(mark + (-4 if letter == 'F' else 4), y + 37, letter, anchor='middle', size=10)}</g>"
                )
        words = f"{total:,} B"
        saved = "" if before is None or before == total else f"  -{100 * (before - total) / before:.0f} %"
        end = x(max(before or 0, total))
        after.append(_text(end + 8, y + 17, words + saved, anchor="start", bold=True, halo=True))
        before = total
    if board_bytes <= scale:
        parts.append(_line(x(board_bytes), top - 8, x(board_bytes), bottom, COLORS[1], dash="6 3", width=1.5))
        parts.append(_text(x(board_bytes), top - 12, board, anchor="middle", fill=COLORS[1], bold=True))
    return Figure(name, caption, _svg(name, bottom + 22, parts + after), wide=True)


# --- small pieces -----------------------------------------------------------------------------------------------------


def _color(kind: str) -> str:
    return KIND_COLORS.get(kind, COLORS[4])


def _nice_top(num_bytes: int) -> int:
    """The next multiple of the distance between ticks, in steps that are whole in KiB."""
    step = _step(num_bytes)
    return step * max(1, math.ceil(num_bytes / step))


def _step(num_bytes: int) -> int:
    rough = max(num_bytes, 8) / 8
    return 1 << math.ceil(math.log2(rough))


def _ticks(top: int) -> range:
    step = _step(top)
    return range(0, top + 1, step)


def _kib(num_bytes: float) -> str:
    if num_bytes == 0:
        return "0"
    return f"{num_bytes / 1024:g} KiB" if num_bytes >= 512 else f"{num_bytes:g} B"


def _rect(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none", dash: str = "") -> str:
    style = f' stroke="{stroke}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"{style}/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    place = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
    return f'<line {place} stroke="{color}" stroke-width="{width}"{dashes}/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "end",
    fill: str = _INK,
    bold: bool = False,
    turn: int = 0,
    size: float = 12,
    halo: bool = False,
) -> str:
    style = f' text-anchor="{anchor}" fill="{fill}" font-size="{size}"' + (' font-weight="600"' if bold else "")
    style += ' stroke="#fff" stroke-width="4" paint-order="stroke"' if halo else ""
    rotate = f' transform="rotate({turn} {x:.2f} {y:.2f})"' if turn else ""
    return f'<text x="{x:.2f}" y="{y:.2f}"{style}{rotate}>{html.escape(text)}</text>'


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg role="img" data-figure="{html.escape(name)}" xmlns="http://www.w3.org/2000/svg"'
    # Labels on buffers let the mouse through, so that the buffer's own text shows.
    style = 'font-family="system-ui, -apple-system, sans-serif" style="font-variant-numeric: tabular-nums"'
    return f'{head} viewBox="0 0 {_WIDTH} {height:.0f}" {style}>\n' + "\n".join(parts) + "\n</svg>"
