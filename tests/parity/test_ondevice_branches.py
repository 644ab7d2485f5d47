"""Every operator's backward pass and update against autograd, through whole models with branches.

The reference runs in fp64 on the integer values that the device had (so both see the same point), with autograd's own
derivatives. ``test_ondevice_gradients`` holds chains of convolutions to a bound that rounding explains element by
element; here the whole path is compared, from the loss to what each weight moved, in relative norm.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.ondevice import Program, compile
from efftrain.ondevice.backends.simulator import Simulator
from efftrain.ondevice.constants import MASTER_HIGH, MASTER_LOW, AddConstants, ConvConstants
from efftrain.ondevice.ir import Add, Apply, Concat, Conv, FloatGraph, FloatOp, GlobalAverage, Multiply, Pool
from efftrain.ondevice.reference import apply_function, bordered
from tests.ondevice_models import CLASSIFIERS, Autoencoder, build

RATE = 2.0
"""Large, so that what a weight moves is many units; each sample starts from the same weights."""


class Reference:
    """The float graph in fp64, pulled onto the device's values after every op, differentiated by autograd."""

    def __init__(self, program: Program, engine: Simulator, before: dict[Any, Any]) -> None:
        self.program, self.engine = program, engine
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        for layer in program.layers.values():
            if isinstance(layer, ConvConstants) and layer.trainable:
                weight = torch.from_numpy(before["weight", layer.name] * layer.per_channel(layer.weight_scale)).permute(
                    0, 3, 1, 2
                )
                self.weights[layer.name] = (weight.transpose(0, 1) if layer.depthwise else weight).requires_grad_()
                self.weights[layer.name].retain_grad()
                unit = layer.x_scale * layer.weight_scale
                self.biases[layer.name] = torch.from_numpy(before["bias", layer.name] * unit).requires_grad_()

    def backward(self, label: int) -> None:
        graph: FloatGraph = self.program.float_graph
        values = {graph.input: self.real(graph.input)}
        for op in graph.ops:
            y = self.apply(op, values)
            layer = self.program.layers[op.name]
            if isinstance(layer, ConvConstants | AddConstants) and layer.masked:
                y = y * self.map(f"{op.y}.mask", op.y)
            if op.y == graph.output:
                unit = np.log(2) / 256 if self.program.loss == "cross_entropy" else self.program.input_scale / 64
                exact = torch.from_numpy(self.engine.values[op.y] * unit).reshape(y.shape)
            else:
                exact = self.real(op.y)
            values[op.y] = y + (exact - y).detach()
        outputs = values[graph.output].flatten(1)
        if self.program.loss == "cross_entropy":
            loss = F.cross_entropy(outputs, torch.tensor([label]))
        else:
            loss = F.mse_loss(outputs, values[graph.input].flatten(1))
        loss.backward()  # type: ignore[no-untyped-call]

    def apply(self, op: FloatOp, values: dict[str, Tensor]) -> Tensor:
        x = values[op.x]
        match op:
            case Conv():
                x = bordered(x, op.padding, 0.0)
                return F.conv2d(x, self.weights[op.name], self.biases[op.name], op.stride, groups=op.groups)
            case Add():
                return x + values[op.z]
            case Multiply():
                return x * values[op.z]
            case Concat():
                return torch.cat([values[name] for name in op.reads], 1)
            case Pool(kind="max"):
                return F.max_pool2d(bordered(x, op.padding, -math.inf), op.kernel, op.stride)
            case Pool():
                return F.avg_pool2d(x, op.kernel, op.stride, op.padding[:2])
            case GlobalAverage():
                return x.mean((2, 3), keepdim=True)
            case Apply():
                return apply_function(op.function, x)
        raise AssertionError(op)

    def map(self, name: str, like: str) -> Tensor:
        height, width, channels = self.program.float_graph.tensors[like].shape
        values = self.engine.values[name].reshape(height, width, channels)
        return torch.from_numpy(values.transpose(2, 0, 1)[None].astype(np.float64))

    def real(self, name: str) -> Tensor:
        return self.map(name, name) * self.program.numbers[name].scale


@pytest.mark.parametrize("model", [*CLASSIFIERS, Autoencoder])
@pytest.mark.parametrize("seed", range(3))
def test_what_every_parameter_moves_is_autograds_step(model: type[nn.Module], seed: int) -> None:
    shape = model.shape  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(24, *shape)).astype(np.float32)
    program = compile(
        build(model, seed),
        torch.zeros(1, *shape),
        scheme="full",
        board="stm32f746",
        calibration=data,
        learning_rate=RATE,
        loss="squared_error" if model is Autoencoder else "cross_entropy",
    )
    engine = program.simulator()
    xs = program.quantize_input(data.reshape(24, *shape))
    ours: dict[Any, list[np.ndarray]] = {}
    theirs: dict[Any, list[np.ndarray]] = {}
    for x in xs:
        engine.load_state(program.initial_state)
        before = dict(program.layout.unpack(engine.state()))
        label = int(rng.integers(0, program.num_classes))
        engine.train_step(x, label)
        after = program.layout.unpack(engine.state())
        reference = Reference(program, engine, before)
        reference.backward(label)
        for name, weight in reference.weights.items():
            layer: Any = program.layers[name]
            masters = [256 * s["weight", name] + s["residual", name] for s in (before, after)]
            moved = (masters[1] - masters[0]) * layer.per_channel(layer.weight_scale) / 256
            assert weight.grad is not None
            gradient = (weight.grad.transpose(0, 1) if layer.depthwise else weight.grad).permute(0, 2, 3, 1)
            unit = layer.x_scale * layer.weight_scale
            bias = reference.biases[name].grad
            assert bias is not None
            inside = (masters[1] > MASTER_LOW) & (masters[1] < MASTER_HIGH)
            ours.setdefault(("weight", name), []).append(moved * inside)
            theirs.setdefault(("weight", name), []).append(-RATE * gradient.numpy() * inside)
            ours.setdefault(("bias", name), []).append((after["bias", name] - before["bias", name]) * unit)
            theirs.setdefault(("bias", name), []).append(-RATE * bias.numpy())
    for key, moves in ours.items():
        wanted = np.stack(theirs[key])
        layer = program.layers[key[1]]
        unit = layer.per_channel(layer.weight_scale / 256 if key[0] == "weight" else layer.x_scale * layer.weight_scale)
        rounding = np.linalg.norm(np.broadcast_to(unit if key[0] == "weight" else unit.ravel(), wanted.shape)) / 2
        distance, size = np.linalg.norm(np.stack(moves) - wanted), np.linalg.norm(wanted)
        assert size > 4 * rounding, f"{key} hardly learns: the test would see nothing"
        assert distance < 0.03 * size + rounding, f"{key}: {distance / size:.3f} of the step is not autograd's"
