"""The server: a Flower ``ServerApp``, the same in process, under ``flwr run`` and on a SuperLink.

Its settings are Flower's run config: the recipe's keys with dots (``server.rounds = 10``), as
``federated/pyproject.toml`` lists them. Flower's config knows no lists, so these are written as text:
``data.people = "[1, 2, 3]"``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efftrain.config import from_dict
from efftrain.errors import ConfigError
from efftrain.federated.flower import ArrayRecord, ConfigRecord, Context, Grid, ServerApp
from efftrain.federated.own_code import check
from efftrain.federated.recipe import FederatedRecipe
from efftrain.federated.rounds import RoundResult, drive_rounds
from efftrain.federated.run import peak_rss_bytes
from efftrain.report.run import clean

OUTPUT = "output"
"""Run-config key beside the recipe's: a file on the server that the result is written to as JSON; "" writes none."""
JOURNAL = "journal"
"""The same: a folder on the server. Every round is written down there, and a run that finds rounds in it goes on after
the last one; "" writes none."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds of the recipe in ``context.run_config``.

    Leaves the final model (``"arrays"``) and the figures as JSON (``"result"``, key ``"json"``) in ``context.state``.

    Raises:
        ConfigError: The run config is no recipe, or there is no folder to write ``output`` to.
        RoundError: As ``drive_rounds``.
    """
    recipe = recipe_from_run_config(context.run_config)
    output = str(context.run_config.get(OUTPUT, ""))
    if output and not Path(output).parent.is_dir():  # found now, not when the last round is done
        raise ConfigError(f"run config output = {output!r} is in no folder of the server; make {Path(output).parent}")
    journal = str(context.run_config.get(JOURNAL, ""))
    result = drive_rounds(grid, recipe, on_round=_print_round, journal=Path(journal) if journal else None)
    text = json.dumps(clean({**result.to_dict(), "peak_rss_bytes": peak_rss_bytes()}))
    context.state["arrays"] = ArrayRecord(result.state)
    context.state["result"] = ConfigRecord({"json": text})
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")


def recipe_from_run_config(run_config: Mapping[str, bool | float | int | str]) -> FederatedRecipe:
    """The recipe that Flower's flat run config spells out.

    Args:
        run_config: ``"section.key"`` -> value. A text that starts with ``[`` is a list in JSON.

    Raises:
        ConfigError: An unknown key, a wrong type, a value out of its range, or a file of code.
    """
    table: dict[str, Any] = {}
    for path, value in run_config.items():
        if path in (OUTPUT, JOURNAL):
            continue
        *sections, key = path.split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"run config {path}: {section!r} is given as {place!r}, expected a section")
        place[key] = _list(path, value) if isinstance(value, str) and value.startswith("[") else value
    recipe = from_dict(FederatedRecipe, table)
    check(recipe)
    return recipe


def _list(path: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"run config {path} = {text!r} starts like a list but is no JSON: {error}") from error


def _print_round(result: RoundResult) -> None:
    print(
        f"round {result.round}: accuracy {result.accuracy:.4f}, uplink {result.uplink_bytes} bytes, "
        f"{result.clients_trained} trained, {result.clients_dropped} dropped, {result.replies_refused} refused"
        + (f", ABANDONED: {result.reasons[0]}" if result.abandoned else ""),
        flush=True,
    )
