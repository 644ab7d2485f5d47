"""``efftrain launch JOB``: print or start what a job file comes down to."""

from pathlib import Path
from typing import Annotated

import typer

from efftrain.cli.console import JsonOption, print_json
from efftrain.errors import ConfigError


def launch_command(
    file: Annotated[Path, typer.Argument(metavar="JOB", help="Job file, TOML.")],
    only_print: Annotated[bool, typer.Option("--print", help="Show the command, script or manifest.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key. May be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a job with torchrun, horovodrun, Slurm or Kubernetes, or show what would be started.

    Local jobs run here, on several machines on each of them; Slurm and Kubernetes are asked to.
    """
    from efftrain.config import load_recipe
    from efftrain.launch import Job, prepare, start

    job = load_recipe(Job, file, overrides or (), what="job file")
    if as_json and not only_print:
        raise ConfigError("--json shows what would be started and needs --print")
    if not only_print:
        start(job, file)
        return
    prepared = prepare(job)
    if as_json:
        print_json(
            {"launcher": job.launcher, "words": prepared.words, "variables": prepared.variables, "text": prepared.text}
        )
    else:
        print(prepared.text, end="")
