"""``efftrain ondevice plan | build | run``: what training a model on a board costs, its C, and a few steps of it.

Without data of the user's, programs are calibrated on noise. Memory, MACs and flash do not depend on it; accuracy does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from efftrain.cli.console import JsonOption, print_json, progress, say
from efftrain.cli.ondevice_choices import compared, refusal, scheme_dict
from efftrain.cli.ondevice_compiler import Compiler, Request, one_model
from efftrain.cli.ondevice_output import (
    print_compared,
    print_plan,
    print_run,
    print_waterfall,
    with_timeline,
    write_report,
)
from efftrain.errors import BudgetError, ClaimError, ConfigError, ToolError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from efftrain.ondevice import BoardEngine, Engine, Program
    from efftrain.ondevice.backends.qemu import QemuEngine
    from efftrain.ondevice.target import CpuName

    Samples = npt.NDArray[np.float32]

app = typer.Typer(no_args_is_help=True, help="Train on a microcontroller: memory plan, C99, emulated runs.")

TARGETS = ("simulator", "host", "unicorn-m7", "unicorn-m4", "unicorn-rv32", "qemu-m7", "qemu-m4")

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A shipped model's name, or path/to/file.py:Class of your own.")
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.")]
SchemeOption = Annotated[
    str,
    typer.Option(
        help="What learns: none, bias_only, last_layer, last_k=K, sparse, full, mcunetv3-49kb ..., or a file."
    ),
]
ClassesOption = Annotated[int | None, typer.Option(help="Outputs of the classifier. Default: the model's.")]
InputOption = Annotated[
    str | None, typer.Option("--input", metavar="3x96x96", help="Shape of one sample. Default: the model's.")
]
BoardOption = Annotated[str, typer.Option(help="A shipped board's name, or a TOML file.")]
RamOption = Annotated[int | None, typer.Option(metavar="BYTES", help="Another amount of RAM than the board's.")]
RoundingOption = Annotated[
    str | None,
    typer.Option(
        help="master keeps 2 bytes of each trained weight, stochastic 1. Default: stochastic for published schemes, "
        "whose weights have 8 bits, else master.",
        metavar="master|stochastic",
    ),
]
LossOption = Annotated[
    str | None,
    typer.Option(
        metavar="cross_entropy|squared_error",
        help="squared_error: the output against the input, for autoencoders. Default: the model's, else cross_entropy.",
    ),
]
InPlaceOption = Annotated[
    bool, typer.Option("--input-in-place", help="Samples are read where they are, in flash or a buffer of their own.")
]
MomentumOption = Annotated[float, typer.Option(help="Of SGD; above 0 it keeps 4 bytes a trained parameter.")]
BatchOption = Annotated[
    int, typer.Option(help="Steps that are summed before one is made; above 1 it keeps 4 bytes a trained parameter.")
]
LrOption = Annotated[float, typer.Option("--lr", help="Learning rate of SGD at batch 1.")]
SeedOption = Annotated[int, typer.Option(help="Of fresh weights, noise and stochastic rounding.")]
WeightsOption = Annotated[
    Path | None, typer.Option(help="A .safetensors file, or a folder that save_pretrained wrote.")
]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="A .npy file of samples, (N, channels, ...), float32, as the model was trained on.")
]
CalibrateOption = Annotated[
    str,
    typer.Option(
        metavar="max|percentile|mse",
        help="How far each tensor reaches: max clips nothing that was seen, percentile the largest 0.05 %, mse what "
        "costs the least error.",
    ),
]
WithoutOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PASS", help="Leave out a compiler pass, to see what it saves; may be given more than once."),
]
SyntheticOption = Annotated[bool, typer.Option("--synthetic", help="Take seeded normal noise as data, and say so.")]


@app.command("plan")
def plan_command(
    model_name: ModelArgument = None,
    model: ModelOption = None,
    scheme: SchemeOption = "sparse",
    classes: ClassesOption = None,
    input_shape: InputOption = None,
    board: BoardOption = "stm32f746",
    ram: RamOption = None,
    rounding: RoundingOption = None,
    loss: LossOption = None,
    input_in_place: InPlaceOption = False,
    momentum: MomentumOption = 0.0,
    batch: BatchOption = 1,
    lr: LrOption = 0.01,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    calibrate: CalibrateOption = "max",
    synthetic: SyntheticOption = False,
    without: WithoutOption = None,
    compare: Annotated[
        bool | None, typer.Option(help="Plan other schemes too: the smallest board of each. Default: unless --json.")
    ] = None,
    show_waterfall: Annotated[
        bool, typer.Option("--waterfall", help="Plan again after each compiler pass: what each of them saves.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, a picture of the plan, and plan.json.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print RAM by part, flash and MACs of training a model, before anything is compiled."""
    request = Request(
        one_model(model_name, model),
        *(scheme, classes, input_shape, board, ram, rounding, loss, input_in_place, momentum, batch, lr, seed),
        *(weights, calibration, calibrate, synthetic, tuple(without or ())),
    )
    if show_waterfall and without:
        raise ConfigError("--waterfall and --without: expected one of them, found both.")
    compiler = Compiler(request)
    refused, program = _plan(compiler)
    plan = program.plan
    rows = compared(compiler, program) if (not as_json if compare is None else compare) else []
    steps = _waterfall(compiler, program) if show_waterfall or out is not None else []
    found = {
        **_header(request, program),
        **plan.to_dict(),
        "fits": refused is None,
        **({"schemes": [scheme_dict(*row) for row in rows]} if rows else {}),
        **({"waterfall": steps} if steps else {}),
    }
    page = None if out is None else write_report(out, with_timeline(found, program), seed)
    if as_json:
        print_json(found if page is None else {**found, "report": str(page)})
    else:
        print_plan(request.model, program, plan)
        if rows:
            print()
            print_compared(rows)
        if show_waterfall:
            print()
            print_waterfall(steps)
        if page is not None:
            say(f"picture of the plan: {page}")
    if refused is not None:
        raise refused


@app.command("build")
def build_command(
    model_name: ModelArgument = None,
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="Folder to write; files of the same names are replaced.")] = Path("build"),
    name: Annotated[str, typer.Option(help="Prefix of the C functions.")] = "model",
    scheme: SchemeOption = "sparse",
    classes: ClassesOption = None,
    input_shape: InputOption = None,
    board: BoardOption = "stm32f746",
    ram: RamOption = None,
    rounding: RoundingOption = None,
    loss: LossOption = None,
    input_in_place: InPlaceOption = False,
    momentum: MomentumOption = 0.0,
    batch: BatchOption = 1,
    lr: LrOption = 0.01,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    calibrate: CalibrateOption = "max",
    synthetic: SyntheticOption = False,
    without: WithoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a folder of C99 that trains the model on the board."""
    request = Request(
        one_model(model_name, model),
        *(scheme, classes, input_shape, board, ram, rounding, loss, input_in_place, momentum, batch, lr, seed),
        *(weights, calibration, calibrate, synthetic, tuple(without or ())),
    )
    compiler = Compiler(request)
    program = _fitting(compiler, name)
    bound = {"stack_bound_bytes": _stack_bound(program)}
    folder = program.write(out)
    planned = {**_header(request, program), **program.plan.to_dict(), **bound}
    planned["waterfall"] = _waterfall(compiler, program)
    page = write_report(folder, with_timeline(planned, program), seed)
    if as_json:
        print_json({**planned, "path": str(folder), "report": str(page)})
    else:
        print_plan(request.model, program, program.plan)
        say(f"C99 in {folder}; README.md says how to build it, report.html shows the plan")


@app.command("run")
def run_command(
    model_name: ModelArgument = None,
    model: ModelOption = None,
    target: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")] = "unicorn-m7",
    steps: Annotated[int, typer.Option(help="Training steps, each on one sample.")] = 3,
    scheme: SchemeOption = "sparse",
    classes: ClassesOption = None,
    input_shape: InputOption = None,
    board: BoardOption = "stm32f746",
    ram: RamOption = None,
    rounding: RoundingOption = None,
    loss: LossOption = None,
    input_in_place: InPlaceOption = False,
    momentum: MomentumOption = 0.0,
    batch: BatchOption = 1,
    lr: LrOption = 0.01,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    calibrate: CalibrateOption = "max",
    synthetic: SyntheticOption = False,
    without: WithoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a few steps on a target, and compare every bit of what it learned with the simulator and the host."""
    request = Request(
        one_model(model_name, model),
        *(scheme, classes, input_shape, board, ram, rounding, loss, input_in_place, momentum, batch, lr, seed),
        *(weights, calibration, calibrate, synthetic, tuple(without or ())),
    )
    if target not in TARGETS:
        raise ConfigError(f"--target: expected one of {', '.join(TARGETS)}, found {target!r}.{_near(target, TARGETS)}")
    if steps < 1:
        raise ConfigError(f"--steps: expected 1 or more, found {steps}.")
    compiler = Compiler(request)
    program = _fitting(compiler)
    found = _run(program, compiler.samples, target, steps, seed)
    result = {**_header(request, program), "target": target, "steps": steps, **program.plan.to_dict(), **found}
    if as_json:
        print_json(result)
    else:
        print_plan(request.model, program, program.plan)
        print_run(found, target, steps)
    if not found["bit_equal"]:
        raise ClaimError(
            f"{target}, simulator and host learned different bits in {steps} steps: {found['state_sha256'][:12]}, "
            f"{found['simulator_state_sha256'][:12]}, {found['host_state_sha256'][:12]}. Please report this program."
        )


def _plan(compiler: Compiler, name: str = "model") -> tuple[BudgetError | None, Program]:
    """The program, and why it does not fit and what would if it does not."""
    try:
        return None, compiler.compile(name=name)
    except BudgetError:
        return refusal(compiler)


def _fitting(compiler: Compiler, name: str = "model") -> Program:
    refused, program = _plan(compiler, name)
    if refused is not None:
        raise refused
    return program


def _stack_bound(program: Program) -> int | None:
    """Most stack that calls can take, if there is a compiler that tells.

    Raises:
        BudgetError: It is more than the board reserves.
    """
    from efftrain.ondevice.backends.toolchain import board_toolchain
    from efftrain.ondevice.target import family_of

    try:
        board_toolchain(program.target.cpu, "gcc")
    except ToolError:
        gcc = family_of(program.target.cpu).gcc
        say(f"stack: what is reserved was not compared with what calls can take; that needs {gcc}")
        return None
    return program.firmware(toolchain="gcc").stack_bound_bytes


def _waterfall(compiler: Compiler, program: Program) -> list[dict[str, Any]]:
    """Empty if a pass is left out: then its rows are not the program's."""
    from efftrain.ondevice.waterfall import waterfall

    if compiler.request.without:
        return []
    return [step.to_dict() for step in waterfall(program, compiler.request.lr)]


def _near(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


# --- running ----------------------------------------------------------------------------------------------------------


def _run(program: Program, samples: Samples, target: str, steps: int, seed: int) -> dict[str, Any]:
    """The same steps on target, simulator and host; on a board the first one is counted, too."""
    import numpy as np

    xs = program.quantize_input(samples[np.arange(steps) % len(samples)])
    labels = np.random.default_rng(seed).integers(program.num_classes, size=steps)
    found: dict[str, Any] = {
        "measured_ram_bytes": None,
        "measured_stack_bytes": None,
        "measured_flash_bytes": None,
        "instructions_per_step": None,
        "instructions_forward": None,
    }
    hashes: dict[str, str] = {}
    with _training(steps, 2 if target in ("simulator", "host") else 3) as advance:
        for name in ("simulator", "host"):
            engine: Engine = program.simulator() if name == "simulator" else program.host()
            for x, label in zip(xs, labels, strict=True):
                engine.train_step(x, int(label))
                advance(name)
            hashes[name] = engine.state_sha256()
        if target not in hashes:
            # On boards of their own: unicorn counts only code that it has not run, and so translated, before.
            found["instructions_forward"] = _board_engine(program, target).count_instructions(xs[0])
            found["instructions_per_step"] = _board_engine(program, target).count_instructions(xs[0], int(labels[0]))
            board = _board_engine(program, target)
            for x, label in zip(xs, labels, strict=True):
                board.train_step(x, int(label))
                advance(target)
            found["measured_ram_bytes"] = board.measured_ram_bytes
            found["measured_stack_bytes"] = board.measured_stack_bytes
            found["measured_flash_bytes"] = board.firmware.flash_bytes
            hashes[target] = board.state_sha256()
    return {
        **found,
        "state_sha256": hashes[target],
        "simulator_state_sha256": hashes["simulator"],
        "host_state_sha256": hashes["host"],
        "bit_equal": len(set(hashes.values())) == 1,
    }


def _board_engine(program: Program, target: str) -> BoardEngine | QemuEngine:
    emulator, _, name = target.partition("-")
    cpu = cast("CpuName", name)
    if emulator == "unicorn":
        return program.board(cpu)
    from efftrain.ondevice.backends.qemu import QemuEngine

    try:
        return QemuEngine.of(program, cpu)
    except ValueError as error:  # more memory than the emulated machine has
        raise ConfigError(f"--target {target}: {error}") from error


@contextmanager
def _training(steps: int, num_engines: int) -> Iterator[Any]:
    done = 0
    with progress("training") as advance:

        def step(name: str) -> None:
            nonlocal done
            done += 1
            advance(done, num_engines * steps, name)

        yield step


def _header(request: Request, program: Program) -> dict[str, Any]:
    return {
        "model": request.model,
        "scheme": program.scheme.name,
        "rounding": program.rounding,
        "loss": program.loss,
        "momentum": request.momentum,
        "batch": request.batch,
        "calibrate": request.calibrate,
        "without": list(request.without),
        "input_in_place": request.input_in_place,
        "input_shape": list(program.input_shape),
        "input_scale": program.input_scale,
        "input_zero_point": program.input_zero_point,
        "num_classes": program.num_classes,
    }
