"""Integer gradients and one-step updates against torch's autograd on the same quantized network.

The float network has the dequantized weights, and every activation is set to the value that the integers gave (straight
through), so the two differ by the rounding of the backward pass alone. That is bounded element by element, and the
bound is carried along with the gradient:

- loss: a probability is off by at most (1.5 (n + 1) + 1) 2^-16 (see ``test_ondevice_kernels``);
- input gradient: what comes in times the absolute weights; half a unit for the rounding of each operand, and half a
unit
  of 1/32767 for the scale of its channel, both times the absolute weights; half a unit of the result;
- weight step: what comes in times the absolute inputs, half a unit of each gradient where it was cut; half of 1/256
of a
  weight for the rounding of the step. A bias: the same with an input of 1 and half a unit.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Program, compile
from efftrain.ondevice.backends.simulator import Simulator
from efftrain.ondevice.constants import ConvConstants, ceil_log2
from efftrain.ondevice.ir import AverageForward, AverageGrad, ConvForward, ConvInputGrad, HeadForward

RATE = 0.02
SLACK = 1 + 1e-6
"""fp64 arithmetic of the test itself."""


class Plain2d(nn.Module):
    """Padding, two dimensions, a stride of (2, 1), a layer without ReLU and a linear layer over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=(2, 1), padding=1)
        self.b = nn.Conv2d(8, 6, (1, 3), padding=(0, 1))
        self.c = nn.Linear(6 * 5 * 6, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        logits: Tensor = self.head(F.relu(self.c(x.flatten(1))))
        return logits


CASES: list[tuple[nn.Module, tuple[int, ...]]] = [(WatchCNN(), (6, 128)), (Plain2d(), (3, 9, 6))]


def nchw(values: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Simulator's ``(pixels, channels)`` as fp64 ``(1, C, H, W)``."""
    height, width, channels = shape
    return torch.from_numpy(values.reshape(height, width, channels).transpose(2, 0, 1)[None].astype(np.float64))


def activation_scale(program: Program, name: str) -> float:
    """Real value of a unit of a tensor: what the layer that reads it was compiled with."""
    for op in program.graph.ops:
        layer = program.layers.get(getattr(op, "layer", ""))
        if isinstance(op, ConvForward | HeadForward) and op.x == name:
            assert isinstance(layer, ConvConstants)
            return layer.x_scale
        if isinstance(op, AverageForward) and op.x == name:
            # x_scale = multiplier 2^-shift * pixels * y_scale
            assert not isinstance(layer, ConvConstants)
            pool: Any = layer
            return float(pool.multiplier * 2.0**-pool.shift * pool.pixels * activation_scale(program, op.y))
    raise AssertionError(name)


class Backward:
    """Autograd's gradient of every tensor, of one simulated step."""

    def __init__(self, program: Program, engine: Simulator, before: dict[Any, np.ndarray], label: int) -> None:
        self.program = program
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        graph = program.graph
        current = nchw(engine.values[graph.input], graph.tensors[graph.input].shape) * program.input_scale
        for op in graph.ops:
            layer: Any = program.layers.get(getattr(op, "layer", ""))
            if isinstance(op, AverageForward):
                y = gated = current.mean((2, 3), keepdim=True)
                unit = activation_scale(program, op.y)
                real = nchw(engine.values[op.y], graph.tensors[op.y].shape) * unit
            elif isinstance(op, ConvForward | HeadForward):
                s = layer.shape
                scale = torch.from_numpy(layer.weight_scale)
                weight = torch.from_numpy(before["weight", op.layer].astype(np.float64)) * scale[:, None, None, None]
                bias = torch.from_numpy(before["bias", op.layer] * layer.x_scale * layer.weight_scale)
                self.weights[op.layer] = weight.permute(0, 3, 1, 2).contiguous().requires_grad_()
                self.biases[op.layer] = bias.requires_grad_()
                stride, pad = (s.stride_h, s.stride_w), (s.pad_h, s.pad_w)
                y = gated = F.conv2d(current, self.weights[op.layer], self.biases[op.layer], stride, pad)
                if isinstance(op, HeadForward):
                    real = torch.from_numpy(engine.values[op.logits] * (np.log(2) / 256))[None, :, None, None]
                else:
                    if op.mask:
                        gated = y * nchw(engine.values[op.mask], graph.tensors[op.mask].shape)
                    unit = activation_scale(program, op.y)
                    real = nchw(engine.values[op.y], graph.tensors[op.y].shape) * unit
            else:
                break
            # The gradient that a device keeps is the one before the mask of the tensor.
            self.tensors[op.writes[0]] = y
            y.retain_grad()
            current = gated + (real - gated).detach()
        F.cross_entropy(current.flatten(1), torch.tensor([label])).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("model", "shape"), CASES)
@pytest.mark.parametrize("trained_steps", [0, 60])
def test_gradients_and_updates_match_autograd(model: nn.Module, shape: tuple[int, ...], trained_steps: int) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.5 / max(1, parameter[0].numel()) ** 0.5)
    rng = np.random.default_rng(1)
    data = rng.normal(size=(40, *shape)).astype(np.float32)
    program = compile(
        model, torch.zeros(1, *shape), scheme="full", board="stm32f746", calibration=data, learning_rate=RATE
    )
    samples, labels = program.quantize_input(data), rng.integers(0, program.num_classes, 40)
    engine = program.simulator()
    engine.train(samples, labels, rng.integers(0, 40, trained_steps))
    checked = 0
    for index in range(8):
        before = dict(program.layout.unpack(engine.state()))
        engine.train_step(samples[index], int(labels[index]))
        after = program.layout.unpack(engine.state())
        checked += compare(program, engine, before, after, int(labels[index]))
    assert checked > 8 * 200


def compare(program: Program, engine: Simulator, before: dict[Any, Any], after: dict[Any, Any], label: int) -> int:
    """Assert every bound; return how many gradient elements were not zero."""
    reference = Backward(program, engine, before, label)
    graph, sigma = program.graph, {"loss.grad": 1.0}
    head = next(op for op in graph.ops if isinstance(op, HeadForward))
    of = {"loss.grad": reference.tensors[head.logits]}
    n = program.num_classes
    error = {"loss.grad": torch.full((1, n, 1, 1), (1.5 * (n + 1) + 1) * 2.0**-16, dtype=torch.float64)}
    nonzero = 0

    def check(name: str, shape: tuple[int, int, int]) -> None:
        unit = 2.0 ** engine.exponents[name] * sigma[name]
        ours = nchw(engine.values[name], shape) * unit
        theirs = of[name].grad
        assert theirs is not None
        assert np.abs(engine.values[name]).max() < 32767, "a saturated gradient has no bound"
        assert ((ours - theirs).abs() <= error[name] * SLACK).all(), f"{name}: {(ours - theirs).abs().max()}"

    check("loss.grad", graph.tensors["loss.grad"].shape)
    for op in graph.ops:
        if isinstance(op, AverageGrad):
            pool: Any = program.layers[op.layer]
            height, width, _ = graph.tensors[op.gx].shape
            sigma[op.gx] = sigma[op.g] / pool.pixels
            mask = nchw(engine.values[op.mask], graph.tensors[op.gx].shape) if op.mask else 1.0
            error[op.gx] = error[op.g].expand(-1, -1, height, width) / pool.pixels * mask
        elif isinstance(op, ConvInputGrad):
            layer: Any = program.layers[op.layer]
            s = layer.shape
            w = torch.from_numpy(np.abs(before["weight", op.layer]).transpose(0, 3, 1, 2).astype(np.float64))
            scale = torch.from_numpy(layer.weight_scale)[:, None, None, None]
            largest = float(layer.weight_scale.max())
            sigma[op.gx] = sigma[op.g] * largest
            bits = int(np.abs(engine.values[op.g]).max()).bit_length()
            headroom = layer.operand_bits - bits
            unit = 2.0 ** (engine.exponents[op.g] - headroom) * sigma[op.gx]
            g = nchw(np.abs(engine.values[op.g]), graph.tensors[op.g].shape)
            # 32767 units are the largest scale, and 32768 the power of two that stands for it.
            operand = 0.5 * unit + g * 2.0 ** engine.exponents[op.g] * sigma[op.gx] * (0.5 + 1.0) / 32767

            def back(values: Tensor, by: Tensor, s: Any = s) -> Tensor:
                rest_h = s.in_h - ((s.out_h - 1) * s.stride_h - 2 * s.pad_h + s.kernel_h)
                rest_w = s.in_w - ((s.out_w - 1) * s.stride_w - 2 * s.pad_w + s.kernel_w)
                stride, pad = (s.stride_h, s.stride_w), (s.pad_h, s.pad_w)
                return F.conv_transpose2d(values, by, None, stride, pad, (rest_h, rest_w))

            rounding = 0.5 * 2.0 ** engine.exponents[op.gx] * sigma[op.gx]
            error[op.gx] = back(error[op.g], w * scale) + back(operand, w) + rounding
        else:
            continue
        of[op.gx] = reference.tensors[op.gx.removesuffix(".grad")]
        check(op.gx, graph.tensors[op.gx].shape)
        nonzero += int((engine.values[op.gx] != 0).sum())

    gradient_of = {getattr(op, "layer", ""): op.g for op in graph.ops if hasattr(op, "g") and hasattr(op, "layer")}
    for name, layer in program.layers.items():
        if isinstance(layer, ConvConstants):
            _check_update(program, engine, reference, layer, gradient_of[name], error, before, after, sigma)
    return nonzero


def _check_update(
    program: Program,
    engine: Simulator,
    reference: Backward,
    layer: ConvConstants,
    gradient: str,
    error: dict[str, Tensor],
    before: dict[Any, Any],
    after: dict[Any, Any],
    sigma: dict[str, float],
) -> None:
    s, name = layer.shape, layer.name
    bits = int(np.abs(engine.values[gradient]).max()).bit_length()
    cut = max(0, bits - (23 - ceil_log2(s.pixels)))
    incoming = error[gradient] + (0.5 * 2.0 ** (engine.exponents[gradient] + cut) * sigma[gradient] if cut else 0.0)
    op = next(op for op in program.graph.ops if isinstance(op, ConvForward | HeadForward) and op.layer == name)
    x = nchw(np.abs(engine.values[op.x]), program.graph.tensors[op.x].shape) * layer.x_scale
    columns = F.unfold(x, (s.kernel_h, s.kernel_w), 1, (s.pad_h, s.pad_w), (s.stride_h, s.stride_w))[0]
    bound = (incoming.flatten(2)[0] @ columns.T).reshape(s.out_c, s.in_c, s.kernel_h, s.kernel_w).permute(0, 2, 3, 1)
    scale = layer.weight_scale[:, None, None, None]
    masters = [256 * state["weight", name] + state["residual", name] for state in (before, after)]
    inside = (masters[1] > -32640) & (masters[1] < 32639)
    moved = (masters[1] - masters[0]) * scale / 256
    wanted = reference.weights[name].grad
    assert wanted is not None
    difference = np.abs(moved + RATE * wanted.permute(0, 2, 3, 1).numpy())
    assert (difference <= (RATE * bound.numpy() + 0.51 / 256 * scale) * SLACK)[inside].all(), name
    unit = layer.x_scale * layer.weight_scale
    moved = (after["bias", name] - before["bias", name]) * unit
    wanted = reference.biases[name].grad
    assert wanted is not None
    bound_b = RATE * incoming.sum((0, 2, 3)).numpy() + 0.51 * unit
    assert (np.abs(moved + RATE * wanted.numpy()) <= bound_b * SLACK).all(), name


def test_the_bound_is_a_small_part_of_the_gradient() -> None:
    """The bound above would be worth nothing if it allowed anything: the real error is below 1 % in norm."""
    torch.manual_seed(0)
    data = np.random.default_rng(0).normal(size=(16, 6, 128)).astype(np.float32)
    model = WatchCNN()
    program = compile(
        model, torch.zeros(1, 6, 128), scheme="full", board="stm32f746", calibration=data, learning_rate=RATE
    )
    engine = program.simulator()
    before = dict(program.layout.unpack(engine.state()))
    engine.train_step(program.quantize_input(data[:1])[0], 2)
    reference = Backward(program, engine, before, 2)
    sigma = 1.0
    for op in program.graph.ops:
        if isinstance(op, AverageGrad | ConvInputGrad):
            layer: Any = program.layers[op.layer]
            sigma *= 1 / layer.pixels if isinstance(op, AverageGrad) else float(layer.weight_scale.max())
            ours = nchw(engine.values[op.gx], program.graph.tensors[op.gx].shape) * 2.0 ** engine.exponents[op.gx]
            theirs = reference.tensors[op.gx.removesuffix(".grad")].grad
            assert theirs is not None
            assert (ours * sigma - theirs).norm() <= 0.01 * theirs.norm()
