"""``efftrain plan RECIPE``: which plan for which cluster, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efftrain.cli.console import JsonOption, print_json, print_table, say
from efftrain.errors import ConfigError
from efftrain.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from efftrain.parallel.planner import Prediction


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a TOML file.")],
    world: Annotated[int, typer.Option(min=1, max=65536, help="Processes of the run.")],
    hardware: Annotated[
        str, typer.Option(help="A shipped cluster's name or a TOML file; see efftrain/parallel/planner/clusters.")
    ] = "laptop_2core",
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Measure this machine first, 2 s; under torchrun also links and axes between its ranks, some more."
        ),
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Write the calibrated hardware file here.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key. May be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Plans shown.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Rank every plan of a recipe on a cluster by predicted step time and memory; say why others cannot run."""
    from efftrain.config import dump_toml, load_recipe
    from efftrain.parallel import ClusterRecipe
    from efftrain.parallel.planner import Planner, enumerate_plans, load_hardware, reasons, setting_of

    if write is not None and not calibrate:
        raise ConfigError("--write saves what --calibrate measured; give both")
    settings = load_recipe(ClusterRecipe, recipe, overrides or ())
    cluster = load_hardware(hardware)
    setting = setting_of(settings)
    if calibrate:
        from efftrain.parallel import mesh
        from efftrain.parallel.planner.calibrate import calibrate as measure

        with mesh.process_group() as device:
            cluster = measure(cluster, setting, mesh.transport(device) if mesh.world_size() > 1 else None)
            if mesh.rank():
                return  # the first one speaks
        if write is not None:
            write.write_text(dump_toml(cluster), encoding="utf-8")
            say(f"wrote {write}; use it with --hardware {write}")
    planner = Planner(setting, cluster)
    plans = list(enumerate_plans(settings.parallel.plan(), world, node_size=cluster.ranks_per_node))
    found, refused = planner.rank(world, plans)
    if as_json:
        print_json(
            {
                "recipe": str(recipe),
                "world": world,
                "hardware": cluster.name,
                "plans": [prediction.to_dict() for prediction in found],
                "refused": [{**refusal.plan, "reason": refusal.reason} for refusal in refused],
            }
        )
    else:
        _show(found[:top], len(found))
        _show_refused(reasons(refused))
    if not found:
        raise ConfigError(f"no plan of {world} processes can run {recipe} on {cluster.name}; see the reasons")


def _show(found: Sequence[Prediction], num: int) -> None:
    from rich.table import Table

    from efftrain.parallel.planner import describe

    table = Table(box=None, pad_edge=False)
    for heading in ("", "plan"):
        table.add_column(heading, overflow="fold")
    for heading in ("step", "compute", "bubble", "tensor", "exchange", "codec", "update", "memory a rank", "sent"):
        table.add_column(heading, justify="right")
    for place, prediction in enumerate(found, 1):
        axes = describe(prediction.plan)
        words = " ".join(f"{name}={value}" for name, value in axes.items() if value != 1 or name == "data")
        time = prediction.time
        parts = (time.total, time.compute, time.bubble, time.tensor, time.exchange, time.codec, time.update)
        table.add_row(
            str(place),
            words,
            *(format_seconds(part) if part else "-" for part in parts),
            format_bytes(prediction.memory.total),
            format_bytes(prediction.wire_bytes),
        )
    print_table(table)
    if num > len(found):
        say(f"{num - len(found)} more plans can run; --top {num} shows all")


def _show_refused(counted: Sequence[tuple[str, int]]) -> None:
    for reason, num in counted[:8]:
        say(f"{num} refused: {reason}")
    if len(counted) > 8:
        say(f"{len(counted) - 8} more reasons; --json has all")
