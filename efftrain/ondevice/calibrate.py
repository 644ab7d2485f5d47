"""How large every tensor gets, from samples of the data that the model was trained on."""

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from efftrain.errors import ConfigError
from efftrain.ondevice.ir import FloatGraph
from efftrain.ondevice.reference import run_float

Method = Literal["max", "percentile", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)
_QUANTILE = 0.9995
_BINS = 2048
_TINY = 1e-4
"""Smallest range, as a share of the largest: a layer that is silent on the calibration data must still have a scale."""


def as_maps(samples: npt.NDArray[np.floating] | Tensor) -> npt.NDArray[np.float32]:
    """Vectors ``(N, F)`` and signals ``(N, C, L)`` as maps ``(N, C, H, W)``; anything else as it is."""
    array = np.asarray(samples, np.float32)
    if array.ndim == 2:
        return array[:, :, None, None]
    return array[:, :, None, :] if array.ndim == 3 else array


def calibrate(graph: FloatGraph, samples: npt.NDArray[np.float32], method: Method = "max") -> dict[str, float]:
    """The largest magnitude that each tensor can store; what is beyond is clipped.

    Args:
        graph: A canonical graph.
        samples: ``(N, F)``, ``(N, C, L)`` or ``(N, C, H, W)``, N >= 1, from the data that the model was trained on.
        method: ``max`` clips nothing that was seen. ``percentile`` clips the largest 0.05 % of each tensor. ``mse``
            takes the range with the least squared error of rounding and clipping together. The input is always
            clipped at its 99.95th percentile.

    Raises:
        ConfigError: The method is not known, or the samples do not fit the model or hold inf or NaN.
    """
    if method not in METHODS:
        raise ConfigError(f"calibration method {method!r} is not known; known are {', '.join(METHODS)}")
    height, width, channels = graph.tensors[graph.input].shape
    given, samples = np.shape(samples), as_maps(samples)
    if samples.ndim != 4 or samples.shape[1:] != (channels, height, width) or not len(samples):
        raise ConfigError(
            f"calibration data has shape {given}; expected (N, {channels}, "
            + (f"{width})" if height == 1 else f"{height}, {width})")
        )
    if not np.isfinite(samples).all():
        raise ConfigError("calibration data holds inf or NaN")
    ranges: dict[str, float] = {}
    for values in _batches(graph, samples):
        for name, value in values.items():
            seen = _quantile(value) if method == "percentile" else float(value.abs().max())
            ranges[name] = max(ranges.get(name, 0.0), seen)
    if method == "mse":
        ranges = _least_error(graph, samples, ranges)
    ranges[graph.input] = float(np.quantile(np.abs(samples), _QUANTILE))
    floor = max(_TINY * max(ranges.values()), 1e-8)
    return {name: max(value, floor) for name, value in ranges.items()}


def _batches(graph: FloatGraph, samples: npt.NDArray[np.float32]) -> Iterator[dict[str, Tensor]]:
    largest = max(tensor.num_elements for tensor in graph.tensors.values())
    batch_size = max(1, min(256, (1 << 24) // largest))
    for batch in np.array_split(samples, -(-len(samples) // batch_size)):
        yield run_float(graph, batch)


def _quantile(values: Tensor) -> float:
    magnitudes = values.abs().flatten()
    rank = max(1, round((1 - _QUANTILE) * magnitudes.numel()))
    return float(torch.topk(magnitudes, rank).values[-1])


def _least_error(graph: FloatGraph, samples: npt.NDArray[np.float32], largest: Mapping[str, float]) -> dict[str, float]:
    """For each tensor the clip with the least mean of (step^2 / 12 within, (|v| - clip)^2 beyond).

    Source: the criterion is the usual one, for example Nagel et al., A White Paper on Neural Network Quantization
    (arXiv:2106.08295), section 3.1. Differs: the error within is that of a uniform value, from a histogram.
    """
    counts = {name: np.zeros(_BINS) for name in largest}
    negative = dict.fromkeys(largest, False)
    for values in _batches(graph, samples):
        for name, value in values.items():
            top = max(largest[name], 1e-30)
            counts[name] += np.histogram(value.abs().numpy(), _BINS, (0, top))[0]
            negative[name] |= bool((value < 0).any())
    ranges: dict[str, float] = {}
    for name, count in counts.items():
        middle = (np.arange(_BINS) + 0.5) / _BINS
        clips = np.linspace(0.3, 1, 71)
        steps = clips / (127 if negative[name] else 255)
        beyond = np.maximum(middle[None] - clips[:, None], 0) ** 2
        error = (count * (beyond + np.where(beyond > 0, 0, steps[:, None] ** 2 / 12))).sum(1)
        ranges[name] = float(clips[error.argmin()]) * largest[name]
    return ranges
