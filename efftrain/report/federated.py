"""The report of a federated run: what the rounds brought, what they cost, and who carried it."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from efftrain.errors import DataError
from efftrain.report.compare import Run, facts
from efftrain.report.figures import Figure, Series, line_plot
from efftrain.report.page import Page, Section, Table
from efftrain.report.run import read_metrics
from efftrain.units import GIB, KIB, MIB, format_bytes, format_seconds

_MOST_ROWS = 40
_WORST = 15
_UNITS = {"uplink": ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B")), "time": ((3600, "h"), (60, "min"), (1, "s"))}
Row = Mapping[str, Any]


def federated_page(result: Row, rounds: Sequence[Row], clients: Sequence[Row]) -> Page:
    """The page of one run.

    Args:
        result: ``result.json``.
        rounds: One a round, as in ``metrics.jsonl``.
        clients: One a client and round, as in ``clients.jsonl``.
    """
    lead = (
        f"{result['rounds']} {_moves(result)} of {result['strategy']}: accuracy {_share(result['accuracy_before'])} "
        f"before, {_share(result['accuracy'])} after. Clients sent {format_bytes(result['uplink_bytes'])}, "
        f"{result['uplink_ratio']:.1f}x less than the same updates as fp32, and were sent "
        f"{format_bytes(result['downlink_bytes'])}."
    )
    if result.get("virtual_s") is not None:
        lead += f" In simulated time it took {_hours(result['virtual_s'])}, and {result['energy_j']:.4g} J."
    sections = [
        Section("Learning", "", [_rounds_table(rounds)], _learning(rounds, result["accuracy_before"])),
        Section("Who took part", _participation(result), [_outcomes(clients)], _drop_outs(rounds)),
        Section("Devices", _within_ram(clients), [_devices(clients)]),
    ]
    worst = _least_accurate(rounds)
    if worst is not None:
        sections.append(Section("The worst off", "Accuracy of the last model on each one's own test data.", [worst]))
    elif (worst := _most_loss(clients)) is not None:
        text = "Clients did not measure the model. Loss of each one's last training, on its own data."
        sections.append(Section("The worst off", text, [worst]))
    return Page(f"efftrain federate: {result['name']}", lead, sections, facts(result))


def read_federated_page(run: Run) -> Page:
    """The page of a finished run, from its folder.

    Raises:
        DataError: Its files are damaged.
    """
    try:
        return federated_page(run.result, run.rows("round"), read_metrics(run.path / "clients.jsonl"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{run.path} is no complete federated run ({type(error).__name__}: {error})") from error


def _moves(result: Row) -> str:
    return "buffered updates" if result["recipe"]["fedbuff"]["buffer"] else "rounds"


def _learning(rounds: Sequence[Row], before: float | None) -> list[Figure]:
    """Accuracy against everything that it costs."""
    costs: dict[str, list[float]] = {"rounds": [], "uplink": [], "joules": [], "time": []}
    accuracy: list[float] = []
    sent, joules = 0, 0.0
    if before is not None:
        accuracy, costs = [before], {name: [0.0] for name in costs}
    for one in rounds:
        sent += one["uplink_bytes"]
        joules += one["energy_j"] or 0.0
        if one["measured"] and one["accuracy"] is not None:
            accuracy.append(one["accuracy"])
            for name, value in zip(costs, (one["round"], sent, joules, one["virtual_s"] or 0.0), strict=True):
                costs[name].append(float(value))
    if len(accuracy) < 2:
        return []
    labels = {"rounds": "rounds", "uplink": "uplink"}
    if rounds[-1]["virtual_s"] is not None:
        labels |= {"joules": "joules of all devices", "time": "virtual time"}
    figures = []
    for name, label in labels.items():
        scale, unit = _unit(_UNITS.get(name, ()), costs[name][-1])
        figures.append(
            line_plot(
                f"accuracy-{name}",
                [Series("accuracy", [value / scale for value in costs[name]], accuracy)],
                x_label=label + (f" ({unit})" if unit else ""),
                y_label="accuracy (%)",
                caption=f"Accuracy of the global model against {label}.",
                percent=True,
            )
        )
    return figures


def _unit(units: Sequence[tuple[float, str]], most: float) -> tuple[float, str]:
    """The largest unit that the largest value has one of."""
    return next(((scale, name) for scale, name in units if most >= scale), (1.0, units[-1][1] if units else ""))


def _rounds_table(rounds: Sequence[Row]) -> Table:
    step = max(1, math.ceil(len(rounds) / _MOST_ROWS))
    shown = [one for one in rounds if one["round"] % step == 0 or one is rounds[-1]]
    rows = [
        (
            str(one["round"]) + (" (abandoned)" if one["abandoned"] else ""),
            _share(one["accuracy"]) if one["measured"] else "-",
            "-" if one["train_loss"] is None else f"{one['train_loss']:.3f}",
            str(one["clients_trained"]),
            str(one["clients_dropped"]),
            str(one["replies_refused"]),
            format_bytes(one["uplink_bytes"]),
            format_bytes(one["downlink_bytes"]),
            "-" if one["virtual_s"] is None else _hours(one["virtual_s"]),
            "-" if one["energy_j"] is None else f"{one['energy_j']:.4g} J",
            format_seconds(one["round_s"]),
        )
        for one in shown
    ]
    columns = ("round", "accuracy", "training loss", "trained", "dropped", "refused")
    costs = ("uplink", "downlink", "virtual time", "energy", "wall time")
    return Table((*columns, *costs), rows, "" if step == 1 else f"Every {step}th round; all are in rounds.csv")


def _participation(result: Row) -> str:
    text = f"{result['clients_trained']} of {result['clients_selected']} trainings became part of the model."
    if result["rounds_abandoned"]:
        abandoned = result["rounds_abandoned"]
        text += f" Abandoned for too few replies: {abandoned} {'round' if abandoned == 1 else 'rounds'}."
    return text


def _outcomes(clients: Sequence[Row]) -> Table:
    counts: dict[str, int] = defaultdict(int)
    reasons: dict[str, str] = {}
    for row in clients:
        counts[row["outcome"]] += 1
        reasons.setdefault(row["outcome"], row["reason"])
    rows = [(name, reasons[name][:120], str(count)) for name, count in sorted(counts.items())]
    return Table(("outcome", "for example", "times"), rows, num_text_columns=2)


def _drop_outs(rounds: Sequence[Row]) -> list[Figure]:
    if not any(one["clients_dropped"] or one["replies_refused"] for one in rounds):
        return []
    x = [float(one["round"]) for one in rounds]
    lines = [
        Series(label, x, [float(one[name]) for one in rounds])
        for label, name in (
            ("trained", "clients_trained"),
            ("dropped", "clients_dropped"),
            ("refused", "replies_refused"),
        )
    ]
    caption = "What came of the clients that were asked, round by round."
    return [line_plot("outcomes", lines, x_label="rounds", y_label="clients", caption=caption)]


def _within_ram(clients: Sequence[Row]) -> str:
    limited = [row for row in clients if row["device_ram_bytes"]]
    if not limited:
        return "No device was simulated."
    if all(row["fits"] for row in limited):
        return f"All {len(limited)} trainings were within their device's RAM."
    return f"{sum(not row['fits'] for row in limited)} of {len(limited)} trainings were not within their device's RAM."


def _devices(clients: Sequence[Row]) -> Table:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in clients:
        found[row["device"] or "not simulated"].append(row)
    rows = []
    for device, mine in sorted(found.items()):
        trained = [row for row in mine if row["outcome"] == "trained"]
        seconds = sorted(row["ended_s"] - row["started_s"] for row in trained)
        have = mine[0]["device_ram_bytes"]
        rows.append(
            (
                device,
                "yes" if all(row["fits"] for row in mine) else "no",
                format_bytes(max(row["ram_bytes"] for row in mine)),
                format_bytes(have) if have else "-",
                str(len({row["partition"] for row in mine})),
                str(len(trained)),
                format_seconds(seconds[len(seconds) // 2]) if seconds else "-",
                f"{sum(row['energy_j'] for row in mine):.4g} J",
            )
        )
    columns = ("device", "within its RAM", "training needs", "it has", "clients", "trainings", "median time", "energy")
    return Table(columns, rows, num_text_columns=2)


def _least_accurate(rounds: Sequence[Row]) -> Table | None:
    last = next((one["accuracy_per_person"] for one in reversed(rounds) if one["accuracy_per_person"]), None)
    if not last:
        return None
    ranked = sorted(last.items(), key=lambda item: (item[1], item[0]))
    mean = sum(last.values()) / len(last)
    rows = [(name, _share(value), f"{100 * (value - mean):+.1f}") for name, value in ranked[:_WORST]]
    return Table(("client", "accuracy", "points from the mean"), rows)


def _most_loss(clients: Sequence[Row]) -> Table | None:
    """Those whose data the models that they were sent fit worst."""
    last = {row["partition"]: row for row in clients if row["outcome"] == "trained" and row["loss"] is not None}
    if not last:
        return None
    mean = sum(row["loss"] for row in last.values()) / len(last)
    ranked = sorted(last.values(), key=lambda row: (-row["loss"], str(row["partition"])))
    rows = []
    for row in ranked[:_WORST]:
        figures = f"{row['loss']:.3f}", f"{row['loss'] - mean:+.3f}"
        rows.append((str(row["partition"]), row["device"] or "-", str(row["round"]), *figures))
    return Table(("client", "device", "last trained in round", "loss", "from the mean"), rows, num_text_columns=2)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else format_seconds(seconds)
