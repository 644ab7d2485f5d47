"""``efftrain profile MODEL``: what a model costs, per layer and in total."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, cast

import typer

from efftrain.cli.console import JsonOption, print_json
from efftrain.errors import ConfigError
from efftrain.units import format_bytes, format_count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from efftrain.profile import ModelProfile, NumberFormat

_LARGEST_INPUT = 1 << 30


def profile_command(
    model: Annotated[str, typer.Argument(help="A shipped model's name, or path/to/file.py:Class of your own.")],
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="1x28x28", help="Shape of one sample, without the batch. Default: the model's."
        ),
    ] = None,
    as_json: JsonOption = False,
    dtype: Annotated[
        str, typer.Option(metavar="FORMAT", help="Count bytes and energy in fp32, fp16 or int8.")
    ] = "fp32",
) -> None:
    """Count parameters, MACs, activations, memory and energy of a model, for one sample."""
    from efftrain.models import build_model
    from efftrain.profile import profile_model
    from efftrain.profile.energy import check_number_format

    check_number_format(dtype)
    shape = None if input_shape is None else parse_shape(input_shape)
    built = build_model(model)
    profile = profile_model(built, _example(model, built, shape), cast("NumberFormat", dtype))
    if as_json:
        print_json(profile.to_dict())
    else:
        _print_table(profile)


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1x28x28"`` -> ``(1, 28, 28)``.

    Raises:
        ConfigError: Not whole numbers above 0 with ``x`` between them, or a billion elements and more.
    """
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() and len(part) < 12 and int(part) > 0 for part in parts):
        raise ConfigError(f"--input: expected sizes above 0 with x between them, such as 1x28x28, found {text!r}.")
    shape = tuple(int(part) for part in parts)
    if math.prod(shape) >= _LARGEST_INPUT:
        raise ConfigError(f"--input: expected fewer than {_LARGEST_INPUT} elements, found {text!r}.")
    return shape


def _example(name: str, model: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    import torch

    if shape is None:
        shape = getattr(model, "input_shape", None)
        if not isinstance(shape, tuple):
            raise ConfigError(
                f"Model {name!r} does not say what its input is. Give the shape of one sample with --input, such as "
                "--input 1x28x28, or set input_shape in the class."
            )
    dtype = getattr(model, "input_dtype", torch.float32)
    return torch.zeros((1, *shape), dtype=dtype)


def _print_table(profile: ModelProfile) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "type", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "MACs", "MACs backward", "activations", "kept for backward", "MACs/byte", "energy"):
        table.add_column(heading, justify="right")
    for layer in profile.layers:
        table.add_row(
            layer.name,
            layer.type,
            "x".join(map(str, layer.output_shape[1:])),
            format_count(layer.parameters),
            format_count(layer.macs),
            format_count(layer.backward_macs),
            format_bytes(layer.activation_bytes),
            format_bytes(layer.saved_bytes),
            f"{layer.macs_per_byte:.2f}",
            _format_energy(layer.energy_uj),
        )
    sizes = ", ".join(f"{bits} bit {format_bytes(size)}" for bits, size in profile.model_bytes.items())
    training = _format_energy(profile.training_energy_uj)
    lines = [
        ("parameters", f"{profile.parameters} ({profile.trainable_parameters} trained)"),
        ("model size", sizes),
        ("MACs", f"{profile.macs} forward, {profile.backward_macs} backward"),
        ("peak activations, inference", f"{format_bytes(profile.peak_inference_bytes)} besides the weights"),
        ("kept for backward", f"{format_bytes(profile.saved_for_backward_bytes)} besides the weights"),
        ("training with plain SGD", f"{format_bytes(profile.training_bytes)}: weights, gradients, kept for backward"),
        ("energy, 45 nm estimate", f"{_format_energy(profile.energy_uj)} forward, {training} forward and backward"),
    ]
    if profile.uncounted_operators:
        lines.append(("not counted", ", ".join(profile.uncounted_operators)))
    console = Console()
    # A pipe has no width; a table cut to 80 columns would lose its figures.
    if not console.is_terminal:
        console = Console(width=200)
    console.print(f"{profile.model}, one sample, {profile.number_format}\n", highlight=False)
    console.print(table)
    console.print()
    for title, text in lines:
        console.print(f"{title:<29}{text}", highlight=False)


def _format_energy(microjoules: float) -> str:
    if microjoules < 1:
        return f"{1000 * microjoules:.0f} nJ"
    if microjoules < 1000:
        return f"{microjoules:.1f} µJ"
    return f"{microjoules / 1000:.1f} mJ"
