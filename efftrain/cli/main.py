"""Entry point ``efftrain``: the verbs, and how every error ends.

Nothing here or in a verb's module may import torch at the top: ``efftrain --help`` answers at once.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

import efftrain
from efftrain.cli.console import launched_rank
from efftrain.cli.demo import demo_command
from efftrain.cli.doctor import doctor_command
from efftrain.cli.federate import federate_command
from efftrain.cli.launch import launch_command
from efftrain.cli.ondevice import app as ondevice_app
from efftrain.cli.plan import plan_command
from efftrain.cli.profile import profile_command
from efftrain.cli.report import report_command
from efftrain.cli.train import train_command
from efftrain.errors import EfftrainError

app = typer.Typer(
    name="efftrain",
    help="Train neural networks where compute, memory or bandwidth is scarce.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo_command)
app.command("doctor")(doctor_command)
app.command("federate")(federate_command)
app.command("launch")(launch_command)
app.add_typer(ondevice_app, name="ondevice")
app.command("plan")(plan_command)
app.command("profile")(profile_command)
app.command("report")(report_command)
app.command("train")(train_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"efftrain {efftrain.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 only if all that was asked happened, 1 for an error, 2 for wrong usage."""
    try:
        app(arguments)
    except SystemExit as end:
        if end.code == 130:  # typer turns Ctrl-C into this
            print("efftrain: interrupted; --resume goes on after the last checkpoint", file=sys.stderr)
        raise
    except EfftrainError as error:
        _end(str(error))
    except KeyboardInterrupt:
        print("efftrain: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, a folder that may not be written
        if error.strerror is None:
            raise
        file = error.filename2 or error.filename
        _end(f"{file}: {error.strerror}" if file else error.strerror)


def _end(message: str) -> NoReturn:
    rank = launched_rank()
    print(f"efftrain: {'' if rank is None else f'rank {rank}: '}{' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(1) from None
