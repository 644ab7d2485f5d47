"""What ``efftrain ondevice`` was asked for: a model, a board and samples, loaded and checked, ready to compile."""

from __future__ import annotations

import copy
import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from efftrain.cli.console import say
from efftrain.cli.profile import parse_shape
from efftrain.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from efftrain.ondevice import Board, Program, Scheme

    Samples = npt.NDArray[np.float32]

_NUM_SAMPLES = 16
_LARGEST_INPUT = 1 << 24


@dataclass(frozen=True)
class Request:
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
    calibrate: str
    synthetic: bool
    without: tuple[str, ...]


def one_model(argument: str | None, option: str | None) -> str:
    """The model, which is given as an argument or as an option.

    Raises:
        ConfigError: It is given twice or not at all, or it is a file without a class.
    """
    if (argument is None) == (option is None):
        found = "none" if argument is None else "both"
        raise ConfigError(f"Name one model, as MODEL or with --model; found {found}.")
    name = cast(str, option if argument is None else argument)
    if name.endswith(".py"):
        raise ConfigError(f"Model {name!r}: name the class too, as in {name}:Net.")
    return name


class Compiler:
    """Everything that was asked for, loaded and checked, ready to compile."""

    def __init__(self, request: Request) -> None:
        from efftrain.ondevice import Scheme
        from efftrain.ondevice.calibrate import METHODS
        from efftrain.ondevice.constants import LOSSES, Optimizer

        self.request = request
        if request.rounding not in (None, "master", "stochastic"):
            raise ConfigError(f"--rounding: expected master or stochastic, found {request.rounding!r}.")
        if not 0 <= request.seed < 1 << 32:
            raise ConfigError(f"--seed: expected 0 or more and less than 2^32, found {request.seed}.")
        if request.calibration is not None and request.synthetic:
            raise ConfigError("--synthetic and --calibration: expected one of them, found both.")
        if request.calibrate not in METHODS:
            raise ConfigError(f"--calibrate: expected {', '.join(METHODS)}, found {request.calibrate!r}.")
        if request.loss not in (None, *LOSSES):
            raise ConfigError(f"--loss: expected cross_entropy or squared_error, found {request.loss!r}.")
        try:
            self.optimizer = Optimizer(momentum=request.momentum, batch=request.batch)
        except ValueError as error:
            raise ConfigError(f"--momentum, --batch: {error}.") from error
        self.scheme = Scheme.parse(request.scheme)
        self.board = _board(request.board, request.ram)
        self.model = _model(request)
        self.loss = request.loss or _own_loss(request.model, self.model)
        self.example = _example(request, self.model)
        self.samples = self._samples()

    def compile(
        self, scheme: Scheme | None = None, board: Board | None = None, name: str = "model", *, must_fit: bool = True
    ) -> Program:
        """The program, for another scheme or board than asked for if given."""
        from efftrain.ondevice import compile
        from efftrain.ondevice.calibrate import Method
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
                calibration_method=cast("Method", self.request.calibrate),
                switch_off=self.request.without,
                must_fit=must_fit,
            )

    def but(self, **changes: object) -> Compiler:
        """The same with other fields of the request: ``scheme``, ``rounding`` or ``input_in_place``."""
        from efftrain.ondevice import Scheme

        other = copy.copy(self)
        other.request = replace(self.request, **changes)  # type: ignore[arg-type]
        other.scheme = Scheme.parse(other.request.scheme)
        return other

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


def _board(name: str, ram: int | None) -> Board:
    from efftrain.ondevice import Board
    from efftrain.ondevice.fitting import UNLIMITED_BYTES

    board = Board.load(name) if name.endswith(".toml") else Board.named(name)
    if ram is None:
        return board
    if not 0 < ram < UNLIMITED_BYTES:
        raise ConfigError(f"--ram: expected bytes above 0, found {ram}.")
    return replace(board, ram_bytes=ram)


def _model(request: Request) -> nn.Module:
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


def _own_loss(name: str, model: nn.Module) -> str:
    """What a model says with a string ``loss``; a method or a module of that name is the user's own business."""
    from efftrain.ondevice.constants import LOSSES

    own = getattr(model, "loss", LOSSES[0])
    if not isinstance(own, str):
        return LOSSES[0]
    if own not in LOSSES:
        raise ConfigError(
            f"Model {name!r}: its attribute loss is {own!r}; expected {' or '.join(LOSSES)}. Rename it, or choose with "
            "--loss."
        )
    return own


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    path = path / "model.safetensors" if path.is_dir() else path  # as save_pretrained writes it
    if not path.is_file():
        raise ConfigError(f"--weights: there is no file {path}.")
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # the parser has its own exceptions, load_state_dict raises RuntimeError
        raise ConfigError(f"--weights: {path} does not fit the model ({error}).") from error


def _example(request: Request, model: nn.Module) -> Tensor:
    import torch

    shape = parse_shape(request.input_shape) if request.input_shape is not None else getattr(model, "input_shape", None)
    if not isinstance(shape, tuple):
        raise ConfigError(
            f"Model {request.model!r} does not say what its input is. Give the shape of one sample with --input, such "
            "as --input 3x96x96, or set input_shape in the class."
        )
    if not all(type(size) is int and size > 0 for size in shape):
        raise ConfigError(
            f"Model {request.model!r}: input_shape is {shape!r}; expected whole numbers above 0, such as (3, 96, 96)."
        )
    if math.prod(shape) > _LARGEST_INPUT:
        found = "x".join(map(str, shape))
        raise ConfigError(f"--input: expected at most {_LARGEST_INPUT} elements, found {found!r}.")
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
    except Exception as error:  # numpy lets parsers' own exceptions through, and advises to load objects unsafely
        raise ConfigError(
            f"--calibration: {path} is no .npy file of numbers. Write one with numpy.save(path, samples), float32."
        ) from error
    if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f" or samples.shape[1:] != shape:
        found = f"{samples.dtype} {samples.shape}" if isinstance(samples, np.ndarray) else "an archive"
        raise ConfigError(f"--calibration: {path}: expected real numbers of shape (N, {str(shape)[1:]}, found {found}.")
    return samples.astype(np.float32)
