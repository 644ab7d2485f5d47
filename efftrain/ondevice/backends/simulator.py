"""The program in NumPy: the specification as code, and the proof for each run that no int32 sum overflows.

Sums of products are taken with float64 matrices, which is exact: every product and every partial sum is an integer
below 2^53. Everything else is int64.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from efftrain.ondevice.backends.engine import Engine, Samples
from efftrain.ondevice.ir import (
    AverageForward,
    AverageGrad,
    BiasUpdate,
    ConvForward,
    ConvInputGrad,
    HeadForward,
    SoftmaxLoss,
    StepGraph,
    StepOp,
    WeightUpdate,
)
from efftrain.ondevice.quantize import (
    BIAS_LIMIT,
    MASTER_HIGH,
    MASTER_LOW,
    ConvConstants,
    ConvShape,
    Factors,
    Ints,
    Layers,
    PoolConstants,
    ceil_log2,
)
from efftrain.ondevice.state import Rounding, StateLayout

_INT32 = 1 << 31
_POWERS = np.array([int(65536 * 2.0 ** (-f / 256) + 0.5) for f in range(256)], np.int64)


class Simulator(Engine):
    """Runs a ``StepGraph`` op by op.

    Args:
        graph: The step, after the passes.
        layers: Constants by layer.
        layout: Of the trained state.
        rounding: ``master`` or ``stochastic``.
        initial: The state to start from.
        seed: Of the stochastic rounding.
    """

    def __init__(
        self, graph: StepGraph, layers: Layers, layout: StateLayout, rounding: Rounding, initial: bytes, seed: int
    ) -> None:
        super().__init__(graph.tensors[graph.input].shape, graph.tensors[graph.logits].num_elements, layout.num_bytes)
        self._graph, self._layers, self._layout, self._rounding = graph, layers, layout, rounding
        self._seed = seed & 0xFFFFFFFF
        self._gather = {
            layer.name: _gather_index(layer.shape) for layer in layers.values() if isinstance(layer, ConvConstants)
        }
        self._weights = {layer.name: layer.weight for layer in layers.values() if isinstance(layer, ConvConstants)}
        self._biases = {layer.name: layer.bias for layer in layers.values() if isinstance(layer, ConvConstants)}
        self._arrays: dict[Any, Ints] = {}
        self.values: dict[str, Ints] = {}
        """Every tensor of the last step, by name: activations as stored plus 128 after a ReLU, that is as "
        "quantized values."""
        self.exponents: dict[str, int] = {}
        """Exponent of every gradient of the last step."""
        self._bits: dict[str, int] = {}
        self.load_state(initial)

    def state(self) -> bytes:
        """The trained state."""
        return self._layout.pack(self._arrays)

    def _load_state(self, state: bytes) -> None:
        self._arrays = dict(self._layout.unpack(state))
        for (part, name), array in self._arrays.items():
            if part == "bias":
                self._biases[name] = array
            elif part == "weight":
                weights = self._weights[name].copy()
                weights[..., : array.shape[-1]] = array
                self._weights[name] = weights

    def _set_lr_shift(self, halvings: int) -> None:
        self._lr_shift = halvings

    def _predict(self, x: Samples) -> int:
        self._run(x, None)
        return int(self.values[self._graph.logits].argmax())

    def _train_step(self, x: Samples, label: int) -> int:
        self._run(x, label)
        step = self._arrays["step", ""]
        self._arrays["step", ""] = (step + 1) & 0xFFFFFFFF
        return int(self.values[self._graph.logits].argmax())

    def _run(self, x: Samples, label: int | None) -> None:
        self.values = {self._graph.input: x.reshape(-1, x.shape[-1]).astype(np.int64)}
        self.exponents, self._bits = {}, {}
        for op in self._graph.ops:
            if label is None and not isinstance(op, ConvForward | HeadForward | AverageForward):
                break
            self._op(op, label)

    def _op(self, op: StepOp, label: int | None) -> None:
        values = self.values
        match op:
            case ConvForward():
                layer = self._conv(op.layer)
                value = rsh(self._sums(layer, values[op.x]) * layer.out.multiplier, layer.out.shift)
                low, high = (0, 255) if layer.y_zero_point else (-128, 127)
                values[op.y] = np.clip(value, low, high)
                if op.mask:
                    passes = (value > 0 if layer.y_zero_point else value >= low) & (value <= high)
                    values[op.mask] = passes.astype(np.int64)
            case HeadForward():
                layer = self._conv(op.layer)
                value = rsh(self._sums(layer, values[op.x]) * layer.out.multiplier, layer.out.shift)
                values[op.logits] = np.clip(value, -32768, 32767).ravel()
            case AverageForward():
                pool = self._pool(op.layer)
                low, high = (0, 255) if pool.zero_point else (-128, 127)
                sums = _fits(values[op.x].sum(0, keepdims=True))
                values[op.y] = np.clip(rsh(sums * pool.multiplier, np.int64(pool.shift)), low, high)
            case SoftmaxLoss():
                assert label is not None, "a loss needs a label"
                self._set_gradient(op.g, _softmax_loss(values[op.logits], label)[None], -15)
            case AverageGrad():
                pool = self._pool(op.layer)
                g = np.broadcast_to(values[op.g], (pool.pixels, pool.channels))
                self._set_gradient(op.gx, np.where(values[op.mask] == 1, g, 0) if op.mask else g, self.exponents[op.g])
            case ConvInputGrad():
                self._input_grad(op)
            case WeightUpdate():
                self._update_weights(op)
            case BiasUpdate():
                layer = self._conv(op.layer)
                g, shift = self._cut(op.g, layer, layer.bias_rate)
                step = rsh(_fits(g.sum(0)) * layer.bias_rate.multiplier, shift)
                bias = np.clip(self._biases[op.layer] - ((step + 32768) >> 16), -BIAS_LIMIT, BIAS_LIMIT)
                self._biases[op.layer] = self._arrays["bias", op.layer] = bias

    def _sums(self, layer: ConvConstants, x: Ints) -> Ints:
        columns = self._columns(layer, x)
        weights = self._weights[layer.name].reshape(layer.shape.out_c, -1)
        return _fits(_exact_matmul(columns.reshape(len(columns), -1), weights.T) + self._biases[layer.name])

    def _columns(self, layer: ConvConstants, x: Ints) -> Ints:
        """``(pixels, taps, in_c)``; what lies beyond the input is zero."""
        return np.concatenate([x, np.zeros((1, x.shape[1]), np.int64)])[self._gather[layer.name]]

    def _input_grad(self, op: ConvInputGrad) -> None:
        layer, s = self._conv(op.layer), self._conv(op.layer).shape
        headroom = layer.operand_bits - self._bits[op.g]
        operand = rsh(self.values[op.g] * layer.channel_scale, np.int64(15 - headroom))
        back = _exact_matmul(operand, self._weights[op.layer].reshape(s.out_c, -1))
        sums = np.zeros((s.in_h * s.in_w + 1, s.in_c), np.int64)
        np.add.at(sums, self._gather[op.layer], back.reshape(s.pixels, s.taps, s.in_c))
        g = np.clip(rsh(_fits(sums[:-1]), np.int64(layer.grad_shift)), -32767, 32767)
        if op.mask:
            g = np.where(self.values[op.mask] == 1, g, 0)
        self._set_gradient(op.gx, g, self.exponents[op.g] - headroom + layer.grad_shift)

    def _update_weights(self, op: WeightUpdate) -> None:
        layer, s = self._conv(op.layer), self._conv(op.layer).shape
        g, shift = self._cut(op.g, layer, layer.weight_rate)
        old = self._arrays["weight", op.layer]
        channels = old.shape[-1]
        columns = self._columns(layer, self.values[op.x])[:, :, :channels].reshape(s.pixels, -1)
        sums = _fits(_exact_matmul(g.T, columns)).reshape(old.shape)
        step = rsh(sums * layer.weight_rate.multiplier[:, None, None, None], shift[:, None, None, None])
        if self._rounding == "master":
            master = 256 * old + self._arrays["residual", op.layer] - ((step + 128) >> 8)
            master = np.clip(master, MASTER_LOW, MASTER_HIGH)
            new = (master + 128) >> 8
            self._arrays["residual", op.layer] = master - 256 * new
        else:
            key = hash32((self._seed + int(self._arrays["step", ""][0]) * 0x9E3779B9) & 0xFFFFFFFF)
            index = layer.first_index + np.arange(layer.weight.size).reshape(layer.weight.shape)[..., :channels]
            new = np.clip(old - ((step + (hash32(key ^ (index & 0xFFFFFFFF)) >> 16)) >> 16), -127, 127)
        self._arrays["weight", op.layer] = new
        weights = self._weights[op.layer].copy()
        weights[..., :channels] = new
        self._weights[op.layer] = weights

    def _cut(self, name: str, layer: ConvConstants, rate: Factors) -> tuple[Ints, Ints]:
        """A gradient narrow enough to be summed over all pixels, and the shift of each channel's step."""
        cut = max(0, self._bits[name] - (23 - ceil_log2(layer.shape.pixels)))
        return rsh(self.values[name], np.int64(cut)), rate.shift - (self.exponents[name] + cut) - 16 + self._lr_shift

    def _set_gradient(self, name: str, value: Ints, exponent: int) -> None:
        self.values[name] = value
        self.exponents[name] = exponent
        self._bits[name] = int(np.abs(value).max()).bit_length()

    def _conv(self, name: str) -> ConvConstants:
        layer = self._layers[name]
        assert isinstance(layer, ConvConstants), f"{name} is no convolution"
        return layer

    def _pool(self, name: str) -> PoolConstants:
        layer = self._layers[name]
        assert isinstance(layer, PoolConstants), f"{name} is no pooling"
        return layer


def rsh(value: Ints, shift: Ints | np.int64) -> Ints:
    """``value * 2^-shift``, rounded half up; a left shift saturates beyond 2^38 * 2^24. See arithmetic.md, Notation."""
    shift = np.asarray(shift, np.int64)
    right = (value + (np.int64(1) << np.clip(shift - 1, 0, 61))) >> np.clip(shift, 0, 62)
    if (shift > 0).all():
        return np.where(shift > 62, 0, right)
    left = np.clip(value, -(1 << 38), 1 << 38) * (np.int64(1) << np.clip(-shift, 0, 24))
    return np.where(shift > 62, 0, np.where(shift > 0, right, left))


def hash32(value: int | Ints) -> Ints:
    """The counter-based random numbers of the stochastic rounding: 32 bits each."""
    x = np.asarray(value, np.int64).astype(np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x.astype(np.int64)


def _softmax_loss(logits: Ints, label: int) -> Ints:
    distance = logits.max() - logits
    powers = np.where(distance >> 8 > 31, 0, _POWERS[distance & 255] >> np.minimum(distance >> 8, 31))
    total = powers.sum()
    p = ((powers << 15) + (total >> 1)) // total
    return np.asarray(np.clip(p - 32768 * (np.arange(len(logits)) == label), -32767, 32767), np.int64)


def _gather_index(s: ConvShape) -> npt.NDArray[np.int64]:
    """For each output pixel and tap the input pixel, or the row of zeros behind the last."""
    axes = map(np.arange, (s.out_h, s.out_w, s.kernel_h, s.kernel_w))
    oy, ox, ky, kx = np.meshgrid(*axes, indexing="ij")
    iy, ix = oy * s.stride_h - s.pad_h + ky, ox * s.stride_w - s.pad_w + kx
    inside = (iy >= 0) & (iy < s.in_h) & (ix >= 0) & (ix < s.in_w)
    return np.where(inside, iy * s.in_w + ix, s.in_h * s.in_w).reshape(s.pixels, s.taps)


def _exact_matmul(a: Ints, b: Ints) -> Ints:
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def _fits(sums: Ints) -> Ints:
    assert int(np.abs(sums).max(initial=0)) < _INT32, "an int32 sum overflowed: the bounds of arithmetic.md do not hold"
    return sums
