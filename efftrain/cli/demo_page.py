"""What the demo shows at its end: a table on screen and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from efftrain.cli.demo_acts import Act
from efftrain.report.compare import comparison_table, facts, learning_figures
from efftrain.report.figures import Series, bar_plot, line_plot, memory_map
from efftrain.report.page import Page, Section, Table
from efftrain.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.table import Table as ScreenTable


def demo_table(acts: Sequence[Act]) -> ScreenTable:
    """Every claim with a tick or a cross."""
    from rich.table import Table as ScreenTable

    table = ScreenTable("act", "claim", "", box=None, pad_edge=False)
    for act in acts:
        for index, claim in enumerate(act.claims):
            mark = "[green]holds[/green]" if claim.holds else "[red]BROKEN[/red]"
            table.add_row(act.title if index == 0 else "", claim.text, mark)
    return table


def demo_page(acts: Sequence[Act], result: Mapping[str, Any]) -> Page:
    """The report of all three acts."""
    cluster, federated, device = acts
    num_claims = sum(len(act.claims) for act in acts)
    num_kept = sum(claim.holds for act in acts for claim in act.claims)
    lead = (
        f"A model of smartwatch exercises: pretrained on a cluster with {cluster.figures['wire_ratio']:.0f}x fewer "
        f"bytes on the wire, improved by {len(federated.figures['compressed']['accuracy_per_person'])} watches with "
        f"{federated.figures['uplink_ratio']:.0f}x fewer uplink bytes, and fine-tuned on the watch of a new person in "
        f"{format_bytes(device.figures['plan']['total_ram_bytes'])} of RAM: "
        f"{_percent(device.figures['accuracy_before'])} before, {_percent(device.figures['accuracy'])} after. "
        f"{num_kept} of {num_claims} claims hold."
    )
    summary = Table(
        ("act", "claim", "holds"),
        [(act.title, claim.text, "yes" if claim.holds else "NO") for act in acts for claim in act.claims],
        num_text_columns=3,
    )
    sections = [Section("Claims", "", [summary]), _cluster(cluster), _federated(federated), _device(device)]
    seconds = {"wall time": format_seconds(result["wall_s"])}
    return Page("efftrain demo: cluster, crowd, microcontroller", lead, sections, {**facts(result), **seconds})


def _cluster(act: Act) -> Section:
    runs = act.drawn["runs"]
    return Section(act.title, act.story, [comparison_table(runs)], learning_figures(runs, prefix="cluster-"))


def _federated(act: Act) -> Section:
    results = act.drawn["results"]
    rows, accuracy, uplink = [], [], []
    for label, result in results.items():
        per_round = [result.accuracy_before, *result.accuracy_per_round]
        sent = _running_sum([one.uplink_bytes for one in result.rounds])
        accuracy.append(Series(label, list(range(len(per_round))), per_round))
        uplink.append(Series(label, sent, result.accuracy_per_round))
        total = result.total("uplink_bytes")
        rows.append(
            (
                label,
                _percent(result.accuracy_before),
                _percent(result.accuracy),
                format_bytes(total),
                format_bytes(result.total("downlink_bytes")),
                format_seconds(result.wall_s),
            )
        )
    table = Table(("uplink", "accuracy before", "accuracy after", "uplink", "downlink", "wall time"), rows)
    people = sorted(results["compressed"].accuracy_per_person_before, key=lambda name: (len(name), name))
    last = results["compressed"].rounds[-1].accuracy_per_person
    before = results["compressed"].accuracy_per_person_before
    figures = [
        line_plot(
            "federated-accuracy",
            accuracy,
            x_label="rounds",
            y_label="accuracy (%)",
            caption="Accuracy on each person's own test part, mean over people, after each round.",
            percent=True,
        ),
        line_plot(
            "federated-uplink",
            uplink,
            x_label="uplink bytes of all watches together",
            y_label="accuracy (%)",
            caption="The same accuracy against the bytes that the watches had sent by then.",
            log_x=True,
            percent=True,
        ),
        bar_plot(
            "federated-people",
            {"before": [before[name] for name in people], "after": [last[name] for name in people]},
            people,
            y_label="accuracy (%)",
            caption="Each person, before the first and after the last round.",
            percent=True,
        ),
    ]
    return Section(act.title, act.story, [table], figures)


def _device(act: Act) -> Section:
    figures, plan = act.figures, act.drawn["plan"]
    parts = (
        ("arena", "arena_bytes"),
        ("trained state", "trained_state_bytes"),
        ("scratch", "scratch_bytes"),
        ("stack", "stack_bytes"),
        ("static", "static_bytes"),
        ("total, planned", "total_ram_bytes"),
    )
    rows = [(name, f"{plan[key]:,} B") for name, key in parts]
    rows += [
        ("total, touched: the stack as deep as it got", f"{figures['measured_ram_bytes']:,} B"),
        ("flash", f"{plan['flash_bytes']:,} B"),
        ("MACs forward", format_count(plan["macs_forward"])),
        ("MACs backward", format_count(plan["macs_backward"])),
    ]
    curve = act.drawn["curve"]
    gap = plan["arena_bytes"] - plan["arena_lower_bound_bytes"]
    bound = "equal to the lower bound" if gap == 0 else f"{gap} bytes above the lower bound"
    drawn = [
        line_plot(
            "device-accuracy",
            [Series("on the device", list(range(len(curve))), curve)],
            x_label="epochs on the device",
            y_label="accuracy (%)",
            caption="Accuracy on the newcomer's later movements, before and after each epoch.",
            percent=True,
        ),
        memory_map(
            "device-memory",
            plan,
            caption=f"The arena during one training step, address against time; its size is {bound} (dotted).",
        ),
    ]
    return Section(act.title, act.story, [Table(("part", "size"), rows, "Memory of the board")], drawn)


def _running_sum(values: Sequence[float]) -> list[float]:
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
