"""``efftrain federate RECIPE``: federated rounds in one process, watched live."""

import atexit
import gc
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from efftrain.cli.console import JsonOption, print_json, say
from efftrain.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from efftrain.federated import FederatedRecipe, RoundResult

OnRound: TypeAlias = "Callable[[RoundResult], None]"
OnReply: TypeAlias = Callable[[int, int, int], None]
OnResume: TypeAlias = "Callable[[list[RoundResult]], None] | None"
_BARS = " ▁▂▃▄▅▆▇█"
_REDRAW_S = 0.2


def federate_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key. May be repeated.")
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Start from the model that save_pretrained wrote there (runs/NAME/model), not from fresh weights.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Go on with the newest run of this recipe's name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run federated rounds in this process, on simulated clients.

    On a network: flwr run federated, see docs/federated.md
    """
    from efftrain.config import load_recipe
    from efftrain.federated import FederatedRecipe

    settings = load_recipe(FederatedRecipe, recipe, overrides or ())
    from efftrain.federated.flower import VERSION  # here, where a missing Flower becomes one line

    assert VERSION is not None, "the adapter refuses a missing Flower"
    from efftrain.federated.run import federate

    # A round makes millions of small objects and hardly a cycle, and a collection walks all that torch has imported: a
    # few per cent of the time of 10,000 clients.
    gc.freeze()
    gc.set_threshold(100_000)
    with _end_in_spite_of_clients(), _dashboard(settings) as (on_round, on_reply, on_resume):
        result = federate(
            settings,
            initial=initial,
            out=out,
            resume=resume,
            on_round=on_round,
            on_reply=on_reply,
            on_note=say,
            on_resume=on_resume,
        )
    if as_json:
        print_json(result)
        return
    _summary(result, settings)


@contextmanager
def _end_in_spite_of_clients() -> Iterator[None]:
    """Keep the exit code where a client computes for ever: Python aborts if it ends while a thread is in torch."""
    from efftrain.federated.workers import are_computing

    code = 1
    try:
        yield
        code = 0
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        if are_computing():
            atexit.register(_end_now, code)


def _end_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _summary(result: dict[str, Any], recipe: "FederatedRecipe") -> None:
    hint = " (--initial FOLDER starts from a trained model)" if result["started_from"] == "fresh weights" else ""
    say(f"started from {result['started_from']}{hint}, accuracy {_percent(result['accuracy_before'])}")
    if result["resumed_after"]:
        say(f"resumed after round {result['resumed_after']}")
    sent = f"clients sent {format_bytes(result['uplink_bytes'])}, {result['uplink_ratio']:.1f}x less than fp32"
    say(f"accuracy {_percent(result['accuracy'])} after {_count(result['rounds'], 'round')}; {sent}")
    if result["virtual_s"] is not None:
        say(f"simulated: {format_seconds(result['virtual_s'])}, {result['energy_j']:.4g} J of all devices")
    if result["rounds_abandoned"]:
        abandoned = f"{result['rounds_abandoned']} of {_count(result['rounds'], 'round')} abandoned"
        say(f"{abandoned}: too few replies (server.min_replies is {recipe.server.min_replies})")
    if result["engine"] != "torch":
        say(f"clients were trained by the {result['engine']} engine, scheme {recipe.client.scheme}")
    say(f"run folder {result['path']}; see {shlex.quote(result['path'])}/report.html")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def round_line(one: "RoundResult") -> str:
    """One round in one line."""
    accuracy = f"accuracy {one.accuracy:.3f}" if one.measured else " " * 14
    line = f"round {one.round:3}  {accuracy}  trained {one.clients_trained}"
    line += "".join(
        f", {number} {word}"
        for number, word in (
            (one.clients_dropped, "dropped"),
            (one.replies_refused, "refused"),
            (one.clients_surplus, "surplus"),
        )
        if number
    )
    line += f"  uplink {format_bytes(one.uplink_bytes)} (fp32 {format_bytes(one.fp32_uplink_bytes)})"
    if one.virtual_s is not None:
        line += f"  at {format_seconds(one.virtual_s)} virtual"
    line += f"  {one.round_s:.2f} s"
    return line + (f"  ABANDONED: {one.reasons[0]}" if one.abandoned else "")


@contextmanager
def _dashboard(recipe: "FederatedRecipe") -> Iterator[tuple[OnRound, OnReply | None, OnResume]]:
    """A live table on a terminal, of the round that is on as well; without one a plain line a round."""
    if not sys.stderr.isatty():
        yield lambda one: say(round_line(one)), None, None
        return
    from rich.console import Console
    from rich.live import Live

    seen: list[RoundResult] = []
    drawn_s = 0.0
    with Live(console=Console(stderr=True), auto_refresh=False) as live:

        def on_round(one: "RoundResult") -> None:
            seen.append(one)
            live.update(_panel(recipe, seen), refresh=True)

        def on_reply(number: int, num_replies: int, goal: int) -> None:
            nonlocal drawn_s
            if time.monotonic() - drawn_s >= _REDRAW_S:
                live.update(_panel(recipe, seen, (number, num_replies, goal)), refresh=True)
                drawn_s = time.monotonic()

        yield on_round, on_reply, seen.extend


def _panel(recipe: "FederatedRecipe", seen: "list[RoundResult]", now: tuple[int, int, int] | None = None) -> Any:
    """The rounds that are done, and of the one that is on: its number, replies so far, replies that it takes."""
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    panel = Panel(table, title=f"federate {recipe.name}", expand=False)
    number, rounds = now[0] if now else seen[-1].round, recipe.server.rounds
    table.add_row("round", f"{number} of {rounds}", ProgressBar(rounds, number - (now is not None), 30))
    if now is not None:
        table.add_row("replies", f"{now[1]} of {now[2]}", ProgressBar(now[2], now[1], 30))
    if not seen:
        return panel
    last = seen[-1]
    accuracies = [one.accuracy for one in seen if one.measured]
    best = f", best {100 * max(accuracies):.1f} %" if accuracies else ""
    known = not math.isnan(last.accuracy)
    table.add_row("accuracy", f"{_percent(last.accuracy if known else None)}{best}", _spark(accuracies))
    surplus = f"{last.clients_surplus} surplus" if last.clients_surplus else ""
    table.add_row("clients", f"{last.clients_trained} trained, {last.clients_dropped} dropped", surplus)
    table.add_row("refused", str(sum(one.replies_refused for one in seen)), "")
    abandoned = [one for one in seen if one.abandoned]
    if abandoned:
        table.add_row("abandoned", str(len(abandoned)), f"the last in round {abandoned[-1].round}")
    sent = sum(one.uplink_bytes for one in seen)
    fp32 = sum(one.fp32_uplink_bytes for one in seen)
    table.add_row("uplink", format_bytes(sent), f"{fp32 / max(1, sent):.1f}x less than fp32")
    if last.virtual_s is not None:
        joules = sum(one.energy_j or 0.0 for one in seen)
        table.add_row("simulated", format_seconds(last.virtual_s), f"{joules:.4g} J")
    table.add_row("this machine", f"{last.round_s:.2f} s a round", "")
    return panel


def _spark(values: list[float]) -> str:
    """The last figures as bars, the lowest empty and the highest full."""
    shown = values[-30:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    width = (high - low) or 1.0
    return "".join(_BARS[round((len(_BARS) - 1) * (value - low) / width)] for value in shown)
