"""``efftrain ondevice plan | build | run``: what training a model on a board costs, its C, and a few steps of it.

Without data of the user's, programs are calibrated on noise. Memory, MACs and flash do not depend on it; accuracy does.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from efftrain.cli.console import JsonOption, print_json, progress, say
from efftrain.cli.ondevice_output import (
    SchemeRow,
    print_compared,
    print_plan,
    print_run,
    print_waterfall,
    with_timeline,
    write_report,
)
from efftrain.cli.profile import parse_shape
from efftrain.errors import BudgetError, ClaimError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from efftrain.ondevice import Board, BoardEngine, Engine, Program, Scheme
    from efftrain.ondevice.backends.qemu import QemuEngine
    from efftrain.ondevice.memory import MemoryPlan

    Samples = npt.NDArray[np.float32]

app = typer.Typer(no_args_is_help=True, help="Train on a microcontroller: memory plan, C99, emulated runs.")

TARGETS = ("simulator", "host", "unicorn-m7", "unicorn-m4", "qemu-m7", "qemu-m4")
_NUM_SAMPLES = 16
_LARGEST_INPUT = 1 << 24
_UNLIMITED_BYTES = 1 << 40
_COMPARED = ("last_layer", "bias_only", "sparse", "last_k=3", "full")

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
SyntheticOption = Annotated[bool, typer.Option("--synthetic", help="Take seeded normal noise as data, and say so.")]


@dataclass(frozen=True)
class _Request:
    """What all three verbs are told."""

    model: str
    scheme: str
    classes: int | None
    input_shape: str | None
    board: str
    ram: int | None
    rounding: str | None
    loss: str | None
    input_in_place: bool
    momentum: float
    batch: int
    lr: float
    seed: int
    weights: Path | None
    calibration: Path | None
    synthetic: bool


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
    synthetic: SyntheticOption = False,
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
    request = _Request(
        _one_model(model_name, model),
        *(scheme, classes, input_shape, board, ram, rounding, loss, input_in_place, momentum, batch, lr, seed),
        *(weights, calibration, synthetic),
    )
    compiler = _Compiler(request)
    refusal, program = _plan(compiler)
    plan = program.plan
    rows = _compared(compiler, plan) if (not as_json if compare is None else compare) else []
    steps = _waterfall(compiler, program) if show_waterfall or out is not None else []
    found = {
        **_header(request, program),
        **plan.to_dict(),
        "fits": refusal is None,
        **({"schemes": [_scheme_dict(*row) for row in rows]} if rows else {}),
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
    if refusal is not None:
        raise refusal


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
    synthetic: SyntheticOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a folder of C99 that trains the model on the board."""
    request = _Request(
        _one_model(model_name, model),
        *(scheme, classes, input_shape, board, ram, rounding, loss, input_in_place, momentum, batch, lr, seed),
        *(weights, calibration, synthetic),
    )
    compiler = _Compiler(request)
    program = compiler.compile(name=name)
    folder = program.write(out)
    planned = {**_header(request, program), **program.plan.to_dict(), "waterfall": _waterfall(compiler, program)}
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
    synthetic: SyntheticOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a few steps on a target, and compare every bit of what it learned with the simulator and the host."""
    request = _Request(
        _one_model(model_name, model),
        *(scheme, classes, input_shape, board, ram, rounding, loss, input_in_place, momentum, batch, lr, seed),
        *(weights, calibration, synthetic),
    )
    if target not in TARGETS:
        raise ConfigError(f"--target: expected one of {', '.join(TARGETS)}, found {target!r}.{_near(target, TARGETS)}")
    if steps < 1:
        raise ConfigError(f"--steps: expected 1 or more, found {steps}.")
    compiler = _Compiler(request)
    program = compiler.compile()
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


# --- compiling --------------------------------------------------------------------------------------------------------


class _Compiler:
    """Everything that was asked for, loaded and checked, ready to compile."""

    def __init__(self, request: _Request) -> None:
        from efftrain.ondevice import Scheme
        from efftrain.ondevice.constants import Optimizer

        self.request = request
        if request.rounding not in (None, "master", "stochastic"):
            raise ConfigError(f"--rounding: expected master or stochastic, found {request.rounding!r}.")
        if not 0 <= request.seed < 1 << 32:
            raise ConfigError(f"--seed: expected 0 or more and less than 2^32, found {request.seed}.")
        if request.calibration is not None and request.synthetic:
            raise ConfigError("--synthetic and --calibration: expected one of them, found both.")
        if request.loss not in (None, "cross_entropy", "squared_error"):
            raise ConfigError(f"--loss: expected cross_entropy or squared_error, found {request.loss!r}.")
        try:
            self.optimizer = Optimizer(momentum=request.momentum, batch=request.batch)
        except ValueError as error:
            raise ConfigError(f"--momentum, --batch: {error}.") from error
        self.scheme = Scheme.parse(request.scheme)
        self.board = _board(request.board, request.ram)
        self.model = _model(request)
        own = getattr(self.model, "loss", None)
        self.loss = request.loss or (own if isinstance(own, str) else "cross_entropy")
        self.example = _example(request, self.model)
        self.samples = self._samples()

    def compile(
        self, scheme: Scheme | None = None, board: Board | None = None, name: str = "model", *, must_fit: bool = True
    ) -> Program:
        """The program, for another scheme or board than asked for if given."""
        from efftrain.ondevice import compile
        from efftrain.ondevice.constants import Loss
        from efftrain.ondevice.scheme import PUBLISHED
        from efftrain.ondevice.state import Rounding

        scheme = scheme or self.scheme
        usual = "stochastic" if scheme.name in PUBLISHED else "master"
        with redirect_stdout(sys.stderr):
            return compile(
                self.model,
                self.example,
                scheme=scheme,
                board=board or self.board,
                calibration=self.samples,
                learning_rate=self.request.lr,
                seed=self.request.seed,
                rounding=cast("Rounding", self.request.rounding or usual),
                name=name,
                loss=cast("Loss", self.loss),
                optimizer=self.optimizer,
                copy_input=not self.request.input_in_place,
                must_fit=must_fit,
            )

    def _samples(self) -> Samples:
        import numpy as np

        shape = tuple(self.example.shape[1:])
        if self.request.calibration is not None:
            samples = _load_samples(self.request.calibration, shape)
        else:
            why = "--synthetic" if self.request.synthetic else "no --calibration given"
            say(f"data: seeded normal noise ({why}); memory and MACs do not depend on it, accuracy does")
            samples = np.random.default_rng(self.request.seed).normal(size=(_NUM_SAMPLES, *shape)).astype(np.float32)
        return samples.reshape(*samples.shape, 1, 1) if samples.ndim == 2 else samples


def _plan(compiler: _Compiler) -> tuple[BudgetError | None, Program]:
    """The program, and why it does not fit if it does not."""
    try:
        return None, compiler.compile()
    except BudgetError as error:
        return error, compiler.compile(must_fit=False)


def _waterfall(compiler: _Compiler, program: Program) -> list[dict[str, Any]]:
    from efftrain.ondevice.waterfall import waterfall

    return [step.to_dict() for step in waterfall(program, compiler.request.lr)]


def _unlimited(board: Board) -> Board:
    return replace(board, ram_bytes=_UNLIMITED_BYTES, flash_bytes=_UNLIMITED_BYTES)


def _one_model(argument: str | None, option: str | None) -> str:
    if (argument is None) == (option is None):
        found = "none" if argument is None else "both"
        raise ConfigError(f"Name one model, as MODEL or with --model; found {found}.")
    name = cast(str, option if argument is None else argument)
    if name.endswith(".py"):
        raise ConfigError(f"Model {name!r}: name the class too, as in {name}:Net.")
    return name


def _board(name: str, ram: int | None) -> Board:
    from efftrain.ondevice import Board

    board = Board.load(name) if name.endswith(".toml") else Board.named(name)
    if ram is None:
        return board
    if not 0 < ram < _UNLIMITED_BYTES:
        raise ConfigError(f"--ram: expected bytes above 0, found {ram}.")
    return replace(board, ram_bytes=ram)


def _model(request: _Request) -> nn.Module:
    """Weights from the seed, or from a file."""
    import torch

    from efftrain.models import build_model

    options = {} if request.classes is None else {"num_classes": request.classes}
    # What a user's file prints is not our output: stdout may be read as JSON.
    with torch.random.fork_rng(devices=[]), redirect_stdout(sys.stderr):
        torch.manual_seed(request.seed)
        model = build_model(request.model, **options)
    if request.weights is None:
        say(f"weights: random, from seed {request.seed}; give --weights file.safetensors for trained ones")
    else:
        _load_weights(model, request.weights)
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    path = path / "model.safetensors" if path.is_dir() else path  # as save_pretrained writes it
    if not path.is_file():
        raise ConfigError(f"--weights: there is no file {path}.")
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # the parser has its own exceptions, load_state_dict raises RuntimeError
        raise ConfigError(f"--weights: {path} does not fit the model ({error}).") from error


def _example(request: _Request, model: nn.Module) -> Tensor:
    import torch

    shape = parse_shape(request.input_shape) if request.input_shape is not None else getattr(model, "input_shape", None)
    if not isinstance(shape, tuple):
        raise ConfigError(
            f"Model {request.model!r} does not say what its input is. Give the shape of one sample with --input, such "
            "as --input 3x96x96, or set input_shape in the class."
        )
    if math.prod(shape) > _LARGEST_INPUT:
        raise ConfigError(f"--input: expected at most {_LARGEST_INPUT} elements, found {request.input_shape!r}.")
    dtype = getattr(model, "input_dtype", torch.float32)
    if dtype != torch.float32:
        raise ConfigError(f"Model {request.model!r} takes {dtype}; a device program takes real numbers.")
    return torch.zeros((1, *shape))


def _load_samples(path: Path, shape: tuple[int, ...]) -> Samples:
    import numpy as np

    if not path.is_file():
        raise ConfigError(f"--calibration: there is no file {path}.")
    try:
        samples = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy lets parsers' own exceptions through
        raise ConfigError(f"--calibration: {path} is no .npy file of numbers ({error}).") from error
    if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f" or samples.shape[1:] != shape:
        found = f"{samples.dtype} {samples.shape}" if isinstance(samples, np.ndarray) else "an archive"
        raise ConfigError(f"--calibration: {path}: expected real numbers of shape (N, {str(shape)[1:]}, found {found}.")
    return samples.astype(np.float32)


def _near(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


# --- the table of schemes ---------------------------------------------------------------------------------------------


def _compared(compiler: _Compiler, asked: MemoryPlan) -> list[SchemeRow]:
    """Plans of the usual schemes, of the published ones if they are for this model, and of the one asked for."""
    from efftrain.ondevice import Scheme
    from efftrain.ondevice.scheme import PUBLISHED

    names = [*_COMPARED, *(PUBLISHED if compiler.request.model == "mcunet-5fps" else ())]
    rows: list[SchemeRow] = [(compiler.scheme.name, asked, _smallest_board(asked))]
    with progress("planning other schemes") as advance:
        for done, name in enumerate(names):
            advance(done, len(names), name)
            if name == compiler.scheme.name:
                continue
            try:
                plan = compiler.compile(Scheme.parse(name), _unlimited(compiler.board)).plan
            except ConfigError:  # a scheme for more layers than this model has
                continue
            rows.append((name, plan, _smallest_board(plan)))
        advance(len(names), len(names))
    return sorted(rows, key=lambda row: row[1].total_ram_bytes)


def _smallest_board(plan: MemoryPlan) -> str | None:
    from efftrain.ondevice import Board

    boards = sorted(map(Board.named, Board.names()), key=lambda board: (board.ram_bytes, board.flash_bytes, board.name))
    for board in boards:
        if plan.total_ram_bytes <= board.ram_bytes and plan.flash_bytes <= board.flash_bytes:
            return board.name
    return None


def _scheme_dict(name: str, plan: MemoryPlan, board: str | None) -> dict[str, Any]:
    keys = ("total_ram_bytes", "arena_bytes", "trained_state_bytes", "flash_bytes", "macs_forward", "macs_backward")
    return {"scheme": name, **{key: getattr(plan, key) for key in keys}, "smallest_board": board}


# --- running ----------------------------------------------------------------------------------------------------------


def _run(program: Program, samples: Samples, target: str, steps: int, seed: int) -> dict[str, Any]:
    """The same steps on target, simulator and host; on a board the first one is counted, too."""
    import numpy as np

    xs = program.quantize_input(samples[np.arange(steps) % len(samples)])
    labels = np.random.default_rng(seed).integers(program.num_classes, size=steps)
    found: dict[str, Any] = {
        "measured_ram_bytes": None,
        "measured_stack_bytes": None,
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
    cpu = cast('Literal["m4", "m7"]', name)
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


def _header(request: _Request, program: Program) -> dict[str, Any]:
    return {
        "model": request.model,
        "scheme": program.scheme.name,
        "rounding": program.rounding,
        "loss": program.loss,
        "momentum": request.momentum,
        "batch": request.batch,
        "input_in_place": request.input_in_place,
        "input_shape": list(program.input_shape),
        "num_classes": program.num_classes,
    }
