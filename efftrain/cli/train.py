"""``efftrain train RECIPE``: one training run, alone or under torchrun."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from efftrain.cli.console import JsonOption, launched_rank, print_json, progress, say
from efftrain.units import format_bytes, format_seconds


def train_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key. May be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Go on with the newest run of this recipe's name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train from a recipe, alone or under torchrun.

    Under a launcher: torchrun --nproc-per-node 2 parallel/train.py RECIPE
    """
    from efftrain.config import load_recipe
    from efftrain.parallel import ClusterRecipe, train
    from efftrain.training import StepResult

    settings = load_recipe(ClusterRecipe, recipe, overrides or ())
    if launched_rank():
        train(settings, out=out, resume=resume)
        return
    with progress(f"train {settings.name}") as advance:

        def on_step(done: int, total: int, result: StepResult) -> None:
            advance(done, total, f"loss {result.loss:.3f}")

        result = train(settings, out=out, resume=resume, on_step=on_step)
    assert result is not None, "rank 0 got no result"
    if as_json:
        print_json(result)
        return
    loss = "inf or NaN" if result["loss"] is None else f"{result['loss']:.3f}"
    say(f"accuracy {100 * result['accuracy']:.1f} %, loss {loss}, {format_seconds(result['train_s'])}")
    if resume:
        say(f"resumed after update {result['first_step']}" if result["first_step"] else "no checkpoint; started anew")
    if result["num_skipped"]:
        say(f"{result['num_skipped']} of {result['num_steps']} updates skipped for inf or NaN; is it in the data?")
    if result.get("uncompressed_bytes"):
        ratio = result["uncompressed_bytes"] / result["wire_bytes"]
        say(f"sent by each rank {format_bytes(result['wire_bytes'])}, {ratio:.1f}x less than uncompressed")
    say(f"run folder {result['path']}; see it with: efftrain report {shlex.quote(result['path'])}")
