"""The program in NumPy: the specification as code, and the proof for each run that no int32 sum overflows.

Sums of products are taken with float64 matrices, which is exact: every product and every partial sum is an integer
below 2^53. Everything else is int64.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from efftrain.ondevice.backends.engine import Engine, Samples
from efftrain.ondevice.constants import (
    BIAS_LIMIT,
    KEPT_BIAS_DROP,
    KEPT_WEIGHT_DROP,
    MASTER_HIGH,
    MASTER_LOW,
    AddConstants,
    ConvConstants,
    ConvShape,
    Factors,
    Ints,
    Layers,
    Loss,
    MaxPoolConstants,
    Optimizer,
    PoolConstants,
    ProductConstants,
    TableConstants,
    ceil_log2,
    layer_of,
)
from efftrain.ondevice.ir import (
    AddForward,
    AverageForward,
    AverageGrad,
    BiasUpdate,
    ChannelTiles,
    ConcatForward,
    ConcatGrad,
    ConvForward,
    ConvInputGrad,
    GradientSum,
    HeadForward,
    MaxPoolForward,
    MaxPoolGrad,
    Move,
    MultiplyForward,
    MultiplyGrad,
    RowStream,
    SoftmaxLoss,
    SquaredLoss,
    StepGraph,
    StepOp,
    TableForward,
    TableGrad,
    WeightUpdate,
    inner_ops,
)
from efftrain.ondevice.state import Part, Rounding, StateLayout

_SGD = Optimizer()
_INT32 = 1 << 31
_POWERS = np.array([int(65536 * 2.0 ** (-f / 256) + 0.5) for f in range(256)], np.int64)


class Simulator(Engine):
    """Runs a ``StepGraph`` op by op, each one whole: rows, tiles and places in memory are not its business.

    Args:
        graph: The step, after the passes.
        layers: Constants by layer.
        layout: Of the trained state.
        rounding: ``master`` or ``stochastic``.
        initial: The state to start from.
        seed: Of the stochastic rounding.
        loss: What a call returns: the predicted class, or the squared error.
        optimizer: How steps become moves.
    """

    def __init__(
        self,
        graph: StepGraph,
        layers: Layers,
        layout: StateLayout,
        rounding: Rounding,
        initial: bytes,
        seed: int,
        loss: Loss = "cross_entropy",
        optimizer: Optimizer = _SGD,
    ) -> None:
        super().__init__(graph.tensors[graph.input].shape, graph.tensors[graph.logits].num_elements, layout.num_bytes)
        self._graph, self._layers, self._layout, self._rounding = graph, layers, layout, rounding
        self._loss, self._seed, self._optimizer = loss, seed & 0xFFFFFFFF, optimizer
        convs = [layer for layer in layers.values() if isinstance(layer, ConvConstants)]
        pools = [layer for layer in layers.values() if isinstance(layer, MaxPoolConstants)]
        self._gather = {layer.name: _gather_index(layer.shape) for layer in convs}
        self._gather |= {pool.name: _gather_index(pool.shape) for pool in pools}
        self._weights = {layer.name: layer.weight for layer in convs}
        self._biases = {layer.name: layer.bias for layer in convs}
        self._arrays: dict[Any, Ints] = {}
        self.values: dict[str, Ints] = {}
        """Every tensor of the last step, by name: activations as quantized values, ``(pixels, channels)``."""
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
            elif part == "moved_bias":
                self._biases[name] = self._moved(layer_of(self._layers, name, ConvConstants), array)
            elif part == "weight":
                weights = self._weights[name].copy()
                weights[..., : array.shape[-1]] = array
                self._weights[name] = weights

    def _set_lr_shift(self, halvings: int) -> None:
        self._lr_shift = halvings

    def _predict(self, x: Samples) -> int:
        self._run(x, None)
        return self._result()

    def _train_step(self, x: Samples, label: int) -> int:
        self._run(x, label)
        step = self._arrays["step", ""]
        self._arrays["step", ""] = (step + 1) & 0xFFFFFFFF
        return self._result()

    def _result(self) -> int:
        """The class with the largest logit, or the squared error of an autoencoder."""
        outputs = self.values[self._graph.logits]
        if self._loss == "cross_entropy":
            return int(outputs.argmax())
        difference = outputs - 64 * self.values[self._graph.input].ravel()
        return int((difference**2 >> 12).sum() // len(outputs))

    def _run(self, x: Samples, label: int | None) -> None:
        self.values = {self._graph.input: x.reshape(-1, x.shape[-1]).astype(np.int64)}
        self.exponents, self._bits = {}, {}
        ops = self._graph.ops if label is not None else self._graph.ops[: self._graph.num_predict]
        for op in ops:
            for inner in inner_ops(op):
                self._op(inner, label)

    def _op(self, op: StepOp, label: int | None) -> None:
        values = self.values
        match op:
            case ConvForward():
                layer = layer_of(self._layers, op.layer, ConvConstants)
                value = rsh(self._sums(layer, values[op.x]) * layer.out.multiplier, layer.out.shift)
                self._store(op, value, layer.y_zero_point, layer.minimum)
            case AddForward():
                add = layer_of(self._layers, op.layer, AddConstants)
                total = _fits(values[op.x] * add.x_multiplier + values[op.z] * add.z_multiplier)
                self._store(op, rsh(total, np.int64(add.shift)), add.zero_point, add.minimum)
            case MaxPoolForward():
                pool = layer_of(self._layers, op.layer, MaxPoolConstants)
                values[op.y] = self._windows(pool, values[op.x]).max(1)
            case TableForward():
                table = layer_of(self._layers, op.layer, TableConstants)
                values[op.y] = table.table[values[op.x] + table.x_zero_point + 128] - table.zero_point
            case AverageForward():
                average = layer_of(self._layers, op.layer, PoolConstants)
                low, high = (0, 255) if average.zero_point else (-128, 127)
                sums = _fits(values[op.x].sum(0, keepdims=True))
                values[op.y] = np.clip(rsh(sums * average.multiplier, np.int64(average.shift)), low, high)
            case MultiplyForward():
                product = layer_of(self._layers, op.layer, ProductConstants)
                value = rsh(values[op.x] * values[op.z] * product.multiplier, np.int64(product.shift))
                values[op.y] = np.clip(value, -128 - product.zero_point, 127 - product.zero_point)
            case ConcatForward():
                values[op.y] = np.concatenate([values[x] for x in op.xs], 1)
            case HeadForward():
                layer = layer_of(self._layers, op.layer, ConvConstants)
                value = rsh(self._sums(layer, values[op.x]) * layer.out.multiplier, layer.out.shift)
                values[op.logits] = np.clip(value, -32768, 32767).ravel()
            case SoftmaxLoss():
                assert label is not None, "a loss needs a label"
                self._set_gradient(op.g, _softmax_loss(values[op.logits], label)[None], -15, None)
            case SquaredLoss():
                g = np.clip(values[op.logits] - 64 * values[op.target].ravel(), -32767, 32767)
                self._set_gradient(op.g, g[None], 0, None)
            case MultiplyGrad():
                self._multiply_grad(op)
            case ConcatGrad():
                channels = self._graph.tensors[op.gx].shape[2]
                g = values[op.g][:, op.first : op.first + channels]
                self._set_gradient(op.gx, g, self.exponents[op.g], op.mask)
            case AverageGrad():
                average = layer_of(self._layers, op.layer, PoolConstants)
                g = np.broadcast_to(values[op.g], (average.pixels, average.channels))
                self._set_gradient(op.gx, g, self.exponents[op.g], op.mask)
            case ConvInputGrad():
                self._input_grad(op)
            case MaxPoolGrad():
                self._max_pool_grad(op)
            case TableGrad():
                table = layer_of(self._layers, op.layer, TableConstants)
                slope = table.slope[values[op.x] + table.x_zero_point + 128]
                bits = self._bits[op.g]
                g = np.clip(rsh(values[op.g] * slope, np.int64(bits)), -32767, 32767)
                self._set_gradient(op.gx, g, self.exponents[op.g] + bits - 15, op.mask)
            case GradientSum():
                self._gradient_sum(op)
            case Move():
                values[op.y] = values[op.x]
                if op.x in self.exponents:
                    self.exponents[op.y], self._bits[op.y] = self.exponents[op.x], self._bits[op.x]
            case WeightUpdate():
                self._update_weights(op)
            case BiasUpdate():
                layer = layer_of(self._layers, op.layer, ConvConstants)
                g, shift = self._cut(op.g, layer, layer.bias_rate)
                step = self._optimized("kept_bias", op.layer, rsh(_fits(g.sum(0)) * layer.bias_rate.multiplier, shift))
                if ("moved_bias", op.layer) in self._arrays:
                    self._move_biases(layer, step)
                    return
                bias = np.clip(self._biases[op.layer] - ((step + 32768) >> 16), -BIAS_LIMIT, BIAS_LIMIT)
                self._biases[op.layer] = self._arrays["bias", op.layer] = bias
            case RowStream() | ChannelTiles():
                raise AssertionError(f"{op.name} is inside another")

    def _store(self, op: ConvForward | AddForward, value: Ints, zero_point: int, minimum: int) -> None:
        """Clamp as quantized values, and keep where a gradient passes."""
        low, high = minimum - zero_point, 127 - zero_point
        self.values[op.y] = np.clip(value, low, high)
        if op.mask:
            self.values[op.mask] = ((value > low) & (value <= high)).astype(np.int64)

    def _sums(self, layer: ConvConstants, x: Ints) -> Ints:
        columns = self._columns(layer, x)
        weights, bias = self._weights[layer.name], self._biases[layer.name]
        if layer.depthwise:
            return _fits((columns * weights.reshape(layer.shape.taps, -1)).sum(1) + bias)
        sums = _exact_matmul(_by_group(columns, layer.groups), _filters(weights, layer.groups).transpose(0, 2, 1))
        return _fits(sums.transpose(1, 0, 2).reshape(len(columns), -1) + bias)

    def _columns(self, layer: ConvConstants, x: Ints) -> Ints:
        """``(pixels, taps, in_c)``; what lies beyond the input is zero."""
        return np.concatenate([x, np.zeros((1, x.shape[1]), np.int64)])[self._gather[layer.name]]

    def _windows(self, pool: MaxPoolConstants, x: Ints) -> Ints:
        """``(pixels, taps, channels)``; what lies beyond the input is less than everything."""
        return np.concatenate([x, np.full((1, x.shape[1]), -(1 << 20))])[self._gather[pool.name]]

    def _input_grad(self, op: ConvInputGrad) -> None:
        layer = layer_of(self._layers, op.layer, ConvConstants)
        s, weights = layer.shape, self._weights[op.layer]
        headroom = layer.operand_bits - self._bits[op.g]
        operand = rsh(self.values[op.g] * layer.channel_scale, np.int64(15 - headroom))
        if layer.depthwise:
            back = operand[:, None, :] * weights.reshape(1, s.taps, s.in_c)
        else:
            back = _exact_matmul(_by_group(operand[:, None], layer.groups), _filters(weights, layer.groups))
            back = back.reshape(layer.groups, s.pixels, s.taps, -1).transpose(1, 2, 0, 3).reshape(-1, s.taps, s.in_c)
        sums = self._scatter(op.layer, s, back)
        g = np.clip(rsh(sums, np.int64(layer.grad_shift)), -32767, 32767)
        self._set_gradient(op.gx, g, self.exponents[op.g] - headroom + layer.grad_shift, op.mask)

    def _scatter(self, layer: str, s: ConvShape, back: Ints) -> Ints:
        """What each input pixel receives of ``(pixels, taps, in_c)``."""
        sums = np.zeros((s.in_h * s.in_w + 1, s.in_c), np.int64)
        index = self._gather[layer]
        for tap in range(s.taps):  # no output pixel reads an input pixel twice through one tap
            inside = index[:, tap] < s.in_h * s.in_w
            sums[index[inside, tap]] += back[inside, tap]
        return _fits(sums[:-1])

    def _max_pool_grad(self, op: MaxPoolGrad) -> None:
        pool = layer_of(self._layers, op.layer, MaxPoolConstants)
        first = self._windows(pool, self.values[op.x]).argmax(1)
        wins = np.arange(pool.shape.taps)[None, :, None] == first[:, None, :]
        sums = self._scatter(op.layer, pool.shape, wins * self.values[op.g][:, None, :])
        g = np.clip(rsh(sums, np.int64(pool.grad_shift)), -32767, 32767)
        self._set_gradient(op.gx, g, self.exponents[op.g] + pool.grad_shift, op.mask)

    def _multiply_grad(self, op: MultiplyGrad) -> None:
        g, other, exponent = self.values[op.g], self.values[op.other], self.exponents[op.g]
        if op.scratch is None:
            shift = max(0, self._bits[op.g] - 7)
            gx = np.clip(rsh(g * other, np.int64(shift)), -32767, 32767)
            self._set_gradient(op.gx, gx, exponent + shift, op.mask)
            return
        cut = max(0, self._bits[op.g] - (23 - ceil_log2(len(g))))
        sums = _fits((rsh(g, np.int64(cut)) * other).sum(0, keepdims=True))
        shift = max(0, int(np.abs(sums).max()).bit_length() - 15)
        gz = np.clip(rsh(sums, np.int64(shift)), -32767, 32767)
        self._set_gradient(op.gx, gz, exponent + cut + shift, op.mask)

    def _gradient_sum(self, op: GradientSum) -> None:
        exponent = self.exponents[op.a]
        tops = [exponent + self._bits[op.a]] if self._bits[op.a] else []
        if op.b and self._bits[op.b]:
            tops.append(self.exponents[op.b] + self._bits[op.b] + 31 - op.shift)
        result = max(tops) - 14 if tops else exponent
        g = rsh(self.values[op.a], np.int64(result - exponent))
        if op.b:
            g = g + rsh(self.values[op.b] * op.multiplier, np.int64(result - self.exponents[op.b] + op.shift))
        self._set_gradient(op.g, np.clip(g, -32767, 32767), result, op.mask)

    def _update_weights(self, op: WeightUpdate) -> None:
        layer = layer_of(self._layers, op.layer, ConvConstants)
        g, shift = self._cut(op.g, layer, layer.weight_rate)
        old = self._arrays["weight", op.layer]
        channels = old.shape[-1]
        columns = self._columns(layer, self.values[op.x])
        if layer.depthwise:
            sums = _fits((columns[:, :, :channels] * g[:, None, :channels]).sum(0)).reshape(old.shape)
            multiplier, shift = layer.weight_rate.multiplier[:channels], shift[:channels]
        else:
            seen = _by_group(columns, layer.groups, channels)
            sums = _fits(_exact_matmul(_by_group(g[:, None], layer.groups).transpose(0, 2, 1), seen)).reshape(old.shape)
            multiplier, shift = (layer.per_channel(a) for a in (layer.weight_rate.multiplier, shift))
        step = self._optimized("kept_weight", op.layer, rsh(sums * multiplier, shift))
        if self._rounding == "master":
            master = 256 * old + self._arrays["residual", op.layer] - ((step + 128) >> 8)
            master = np.clip(master, MASTER_LOW, MASTER_HIGH)
            new = (master + 128) >> 8
            self._arrays["residual", op.layer] = master - 256 * new
        else:
            key = hash32((self._seed + int(self._arrays["step", ""][0]) * 0x9E3779B9) & 0xFFFFFFFF)
            index = layer.first_index + np.arange(layer.master.size).reshape(layer.master.shape)[..., :channels]
            new = np.clip(old - ((step + (hash32(key ^ (index & 0xFFFFFFFF)) >> 16)) >> 16), -127, 127)
        self._arrays["weight", op.layer] = new
        weights = self._weights[op.layer].copy()
        weights[..., :channels] = new
        self._weights[op.layer] = weights

    def _moved(self, layer: ConvConstants, moved: Ints) -> Ints:
        """The biases of a layer, of which the state holds how far they have moved."""
        return np.clip(layer.bias + (moved << layer.bias_unit), -BIAS_LIMIT, BIAS_LIMIT)

    def _move_biases(self, layer: ConvConstants, step: Ints) -> None:
        unit = 16 + layer.bias_unit
        moved = self._arrays["moved_bias", layer.name] - ((step + (1 << (unit - 1))) >> unit)
        moved = self._arrays["moved_bias", layer.name] = np.clip(moved, -32768, 32767)
        self._biases[layer.name] = self._moved(layer, moved)

    def _optimized(self, part: Part, layer: str, step: Ints) -> Ints:
        """What the parameters move: the steps, or what the optimizer makes of them and of those before."""
        rule, limit = self._optimizer, 1 << 30
        if not rule.keeps:
            return step
        kept = self._arrays[part, layer]
        if rule.momentum:
            kept = rsh(kept * rule.decay, np.int64(15))
        drop = KEPT_BIAS_DROP if part == "kept_bias" else KEPT_WEIGHT_DROP
        kept = np.clip(kept + np.clip(rsh(step, np.int64(drop)), -limit, limit), -limit, limit)
        last = (int(self._arrays["step", ""][0]) + 1) % rule.batch == 0
        self._arrays[part, layer] = kept if rule.momentum or not last else np.zeros_like(kept)
        if rule.momentum:
            return kept << drop
        return rsh(kept << drop, np.int64(rule.batch_shift)) if last else np.zeros_like(kept)

    def _cut(self, name: str, layer: ConvConstants, rate: Factors) -> tuple[Ints, Ints]:
        """A gradient narrow enough to be summed over all pixels, and the shift of each channel's step."""
        cut = max(0, self._bits[name] - (23 - ceil_log2(layer.shape.pixels)))
        return rsh(self.values[name], np.int64(cut)), rate.shift - (self.exponents[name] + cut) - 16 + self._lr_shift

    def _set_gradient(self, name: str, value: Ints, exponent: int, mask: str | None) -> None:
        self.values[name] = value if mask is None else np.where(self.values[mask] == 1, value, 0)
        self.exponents[name] = exponent
        self._bits[name] = int(np.abs(self.values[name]).max()).bit_length()


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


def _by_group(columns: Ints, groups: int, channels: int | None = None) -> Ints:
    """``(pixels, taps, channels)`` as ``(groups, pixels, taps * channels)``, of each group the first so many."""
    pixels, taps, _ = columns.shape
    parts = columns.reshape(pixels, taps, groups, -1)[..., :channels]
    return parts.transpose(2, 0, 1, 3).reshape(groups, pixels, -1)


def _filters(weights: Ints, groups: int) -> Ints:
    """One row an output channel, by group."""
    return weights.reshape(groups, len(weights) // groups, -1)


def _exact_matmul(a: Ints, b: Ints) -> Ints:
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def _fits(sums: Ints) -> Ints:
    assert int(np.abs(sums).max(initial=0)) < _INT32, "an int32 sum overflowed: the bounds of arithmetic.md do not hold"
    return sums
