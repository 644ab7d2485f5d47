"""Plots as SVG text, made by matplotlib (extra ``report``). Text stays text, so a browser can search it."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efftrain.errors import ToolError

# The colors of the Okabe-Ito palette, told apart by color-blind readers too (jfly.uni-koeln.de/color).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#444444")


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """One picture of a report.

    Attributes:
        name: Identifier in the page, unique in it.
        caption: What is to be seen, in a sentence.
        svg: The picture, an ``<svg>`` element.
        wide: As wide as the page; on a narrow screen it scrolls instead of shrinking.
    """

    name: str
    caption: str
    svg: str
    wide: bool = False


def line_plot(
    name: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    log_x: bool = False,
    percent: bool = False,
) -> Figure:
    """Lines over a common axis.

    Args:
        name: Identifier in the page.
        series: Lines, at least one.
        x_label: With its unit.
        y_label: With its unit.
        caption: Under the picture.
        log_x: Logarithmic horizontal axis.
        percent: Values of ``y`` are shares; show per cent.
    """
    figure, axes = _axes()
    for index, line in enumerate(series):
        y = [100 * value for value in line.y] if percent else list(line.y)
        style = "--" if line.dashed else "-"
        marker = "o" if len(y) < 40 else None
        axes.plot(line.x, y, style, color=COLORS[index % len(COLORS)], marker=marker, markersize=3)
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    if len(series) > 1:
        _legend(axes, axes.get_lines(), [line.label for line in series], fontsize=9)
    return Figure(name, caption, _svg(figure, name))


def bar_plot(
    name: str,
    bars: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    *,
    y_label: str,
    caption: str,
    percent: bool = False,
) -> Figure:
    """Bars side by side in groups.

    Args:
        name: Identifier in the page.
        bars: Label -> one value a group.
        groups: Names under the groups.
        y_label: With its unit.
        caption: Under the picture.
        percent: Values are shares; show per cent.
    """
    figure, axes = _axes()
    width = 0.8 / len(bars)
    drawn = []
    for index, values in enumerate(bars.values()):
        places = [g - 0.4 + (index + 0.5) * width for g in range(len(groups))]
        heights = [100 * v for v in values] if percent else list(values)
        drawn.append(axes.bar(places, heights, width * 0.92, color=COLORS[index % len(COLORS)]))
    axes.set_xticks(range(len(groups)), groups, parse_math=False)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", alpha=0.25)
    _legend(axes, drawn, list(bars), fontsize=9, ncols=len(bars), loc="lower left", bbox_to_anchor=(0, 1))
    return Figure(name, caption, _svg(figure, name))


def memory_map(name: str, plan: Mapping[str, Any], *, caption: str) -> Figure:
    """Address against time of a device's arena: one rectangle a buffer.

    Args:
        name: Identifier in the page.
        plan: ``MemoryPlan.to_dict()``: ``buffers`` (``name, kind, offset, num_bytes, first_op, last_op``), ``ops``,
            ``arena_bytes``, ``arena_lower_bound_bytes``.
        caption: Under the picture.
    """
    from matplotlib.patches import Rectangle

    figure, axes = _axes(height=4.2)
    kinds = list(dict.fromkeys(buffer["kind"] for buffer in plan["buffers"]))
    for buffer in plan["buffers"]:
        first, last = buffer["first_op"], buffer["last_op"] + 1
        color = COLORS[kinds.index(buffer["kind"]) % len(COLORS)]
        place, size = (first, buffer["offset"]), (last - first, buffer["num_bytes"])
        patch = Rectangle(place, *size, facecolor=color, edgecolor="white", linewidth=0.7, alpha=0.85)
        patch.set_gid(f"{name}-buffer-{buffer['name']}")
        axes.add_patch(patch)
        if buffer["num_bytes"] > 0.06 * plan["arena_bytes"] and last - first > 1:
            middle = (first + (last - first) / 2, buffer["offset"] + buffer["num_bytes"] / 2)
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white"}
            axes.annotate(buffer["name"], middle, parse_math=False, **style)
    axes.axhline(plan["arena_lower_bound_bytes"], color="#444444", linestyle=":", linewidth=1)
    axes.set_xlim(0, len(plan["ops"]))
    axes.set_ylim(0, plan["arena_bytes"] * 1.02)
    axes.set_xlabel("operation of the training step")
    axes.set_ylabel("address in the arena (bytes)")
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[i % len(COLORS)]) for i in range(len(kinds))]
    _legend(axes, handles, kinds, fontsize=8, ncols=len(kinds), loc="lower left", bbox_to_anchor=(0, 1))
    return Figure(name, caption, _svg(figure, name))


def _axes(height: float = 3.2) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ToolError("plots need matplotlib, which is not installed; run: pip install 'efftrain[report]'") from error
    figure = Canvas(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(axes: Any, handles: Sequence[Any], labels: Sequence[str], **style: Any) -> None:
    """Labels are names of folders and layers: matplotlib would hide "_x" and read "$x$" as mathematics."""
    legend = axes.legend(handles, ["."] * len(labels), frameon=False, **style)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _svg(figure: Any, name: str) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    # A fixed salt, and no date: the same figures give the same file.
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": f"{name}-plot", "font.family": "sans-serif"}
    ):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r"<[^<>]+>", lambda tag: _with_own_ids(tag[0], name), svg[svg.index("<svg") :])
    return svg.replace("<svg ", f'<svg role="img" data-figure="{name}" ', 1)


def _with_own_ids(tag: str, name: str) -> str:
    """Ids, and references to them, start with the figure's name: matplotlib calls an axis the same in every picture."""
    return re.sub(rf'(\bid="|url\(#|href="#)(?!{re.escape(name)}-)', rf"\g<1>{name}-", tag)
