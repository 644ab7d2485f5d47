"""What the front end takes, that it keeps the function, and how it refuses the rest.

Parity: every graph, run in fp32 by ``run_float``, gives what PyTorch gives for the module itself, up to the rounding of
other orders of summation and of folded batch norms: 1e-4 of the largest output.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.errors import CompileError
from efftrain.models import build_model
from efftrain.models.pretrained import Pretrained
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.ir import (
    Add,
    Apply,
    Concat,
    Conv,
    FloatGraph,
    GlobalAverage,
    Multiply,
    Pool,
)
from efftrain.ondevice.reference import run_float
from tests.drawn_models import models, randomize

EXAMPLE_1D = torch.zeros(1, 6, 128)
EXAMPLE_2D = torch.zeros(1, 3, 12, 10)


def assert_same_function(model: nn.Module, example: Tensor, batch_size: int = 3) -> FloatGraph:
    graph = read_module(model, example)
    x = torch.randn(batch_size, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    channels = x.shape[1]
    batch = x.reshape(batch_size, channels, *((1, 1) if x.ndim == 2 else (1, -1) if x.ndim == 3 else x.shape[2:]))
    ours = run_float(graph, batch.numpy().copy())[graph.output].flatten(1)
    with torch.no_grad():
        theirs = model.eval()(x.clone()).flatten(1)
    assert torch.isfinite(theirs).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))
    for op in graph.ops:
        assert isinstance(op, Conv | Add | Multiply | Concat | Pool | GlobalAverage | Apply), op
    read = {name for op in graph.ops for name in op.reads} | {graph.output}
    assert read >= set(graph.tensors) - {graph.input}, "a tensor that nobody reads"
    used = {name for op in graph.ops if isinstance(op, Conv) for name in (op.weight, op.bias) if name}
    assert used == set(graph.constants)
    return graph


def test_watch_cnn_is_read_layer_by_layer() -> None:
    graph = read_module(WatchCNN(), EXAMPLE_1D)
    assert [op.name for op in graph.ops] == ["conv1", "conv2", "conv3", "pool", "head"]
    assert [op.activation for op in graph.ops if isinstance(op, Conv)] == ["relu", "relu", "relu", "none"]
    assert isinstance(graph.ops[3], GlobalAverage)
    assert sum(constant.size for constant in graph.constants.values()) == 8471
    assert_same_function(WatchCNN(), EXAMPLE_1D)


class Spatial(nn.Module):
    """Flatten before all positions are gone: the linear layer covers them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0))
        self.mid = nn.Linear(4 * 6 * 9, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        logits: Tensor = self.head(self.drop(F.relu(self.mid(x.flatten(1)))))
        return logits


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.conv(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("kernel", [1, 2, 4, 5])
def test_the_odd_zero_of_same_padding_is_behind(kernel: int) -> None:
    graph = assert_same_function(Tail(nn.Conv1d(4, 4, kernel, padding="same")), EXAMPLE_1D)
    assert isinstance(graph.ops[1], Conv)
    assert graph.ops[1].padding == (0, (kernel - 1) // 2, 0, kernel // 2)


def test_a_border_of_more_than_half_a_window_of_a_max_pool() -> None:
    graph = assert_same_function(Tail(nn.Sequential(nn.ConstantPad1d(2, -math.inf), nn.MaxPool1d(3))), EXAMPLE_1D)
    assert isinstance(graph.ops[1], Pool)
    assert graph.ops[1].padding == (0, 2, 0, 2)


@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (3, 3), (12, 6), (6, 6)])
def test_convolutions_in_groups(channels: int, groups: int) -> None:
    graph = assert_same_function(Tail(F.relu, channels=channels, groups=groups), EXAMPLE_1D)
    assert isinstance(graph.ops[0], Conv)
    assert graph.ops[0].groups == groups


@pytest.mark.parametrize("model", [Spatial(), Mean()])
def test_other_forms_give_the_same_function(model: nn.Module) -> None:
    assert_same_function(model, EXAMPLE_2D)


# --- any small model --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(models())
def test_any_model_of_these_operators_keeps_its_function(drawn: tuple[nn.Module, Tensor]) -> None:
    assert_same_function(*drawn)


ZOO = (
    *("watch-cnn", "fashion-cnn", "resnet8", "ds-cnn", "mobilenet-v1-0.25", "fc-autoencoder"),
    *("mcunet-5fps", "mobilenet-v2-w0.35", "proxyless-w0.3"),
)


@pytest.mark.parametrize("name", ZOO)
def test_the_shipped_models_keep_their_function(name: str) -> None:
    torch.manual_seed(1)
    model = build_model(name)
    assert isinstance(model, Pretrained)
    assert_same_function(randomize(model), model.example_input(), batch_size=2)


# --- what becomes of single operators ---------------------------------------------------------------------------------


class Tail(nn.Module):
    """A convolution, one more operation, and a head."""

    def __init__(self, between: object, channels: int = 4, **conv: object) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, channels, 5, **conv)  # type: ignore[arg-type]
        self.between = between
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.conv(x))  # type: ignore[operator]
        logits: Tensor = self.head(x.mean(2))
        return logits


def kinds(between: object) -> list[str]:
    """What ``between`` becomes: the ops before the head, without an average over everything."""
    graph = assert_same_function(randomize(Tail(between)), EXAMPLE_1D)
    assert isinstance(graph.ops[-1], Conv)
    body = [op for op in graph.ops[:-1] if not isinstance(op, GlobalAverage)]
    return [
        op.activation if isinstance(op, Conv | Add) else op.function if isinstance(op, Apply) else type(op).__name__
        for op in body
    ]


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (F.relu, ["relu"]),
        (nn.ReLU6(), ["relu6"]),
        (nn.Hardtanh(0.0, 6.0), ["relu6"]),
        (lambda x: x.clamp(0, 6), ["relu6"]),
        (lambda x: x.clamp_min(0), ["relu"]),
        (lambda x: F.relu(F.relu6(x)), ["relu6"]),
        (lambda x: F.relu6(F.relu(x)), ["relu6"]),
        (nn.BatchNorm1d(4), ["none"]),
        (nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.ReLU()), ["relu"]),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), ["relu", "none"]),
        (nn.Sequential(nn.MaxPool1d(2), nn.MaxPool1d(3, padding=1), nn.ReLU6()), ["relu6", "Pool", "Pool"]),
        (nn.Sequential(nn.AvgPool1d(2), nn.ReLU()), ["none", "Pool", "relu"]),
        (lambda x: F.relu(F.max_pool1d(x, 1, 2)) + F.max_pool1d(x, 1, 2), ["none", "Pool", "relu", "Pool", "none"]),
        (nn.Sigmoid(), ["none", "sigmoid"]),
        (nn.Hardswish(), ["none", "hard_swish"]),
        (lambda x: x + F.relu(x), ["none", "relu", "none"]),
        (lambda x: F.relu(x + x), ["none", "relu"]),
        (lambda x: sum([x, F.relu6(x)]), ["none", "relu6", "none"]),
        (lambda x: torch.cat([x], 1), ["none"]),
        (lambda x: x.unsqueeze(2).squeeze(2).contiguous().float(), ["none"]),
        (nn.AvgPool1d(4), ["none", "Pool"]),
        (nn.MaxPool1d(2, ceil_mode=True), ["none", "Pool"]),
        (nn.AdaptiveAvgPool1d(31), ["none", "Pool"]),
        (nn.AvgPool1d(124), ["none"]),
        (nn.AdaptiveMaxPool1d(1), ["none", "Pool"]),
        (nn.Sequential(nn.AdaptiveMaxPool1d(4), nn.ReLU()), ["relu", "Pool"]),
        (lambda x: x.amax(2, keepdim=True), ["none", "Pool"]),
        (nn.MaxPool1d(1), ["none"]),
        (nn.MaxPool1d(5, stride=2, padding=2), ["none", "Pool"]),
    ],
)
def test_what_operators_become(between: object, expected: list[str]) -> None:
    assert kinds(between) == expected


class Residual(nn.Module):
    """ReLU folds into the addition, not into the convolution whose output the addition reads too."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm1(self.conv1(x)) if self.early else self.conv1(x)
        x = self.norm2(self.conv2(F.relu(before)))
        x = F.relu(x + (before if self.early else self.norm1(before)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_what_has_another_reader_is_not_folded() -> None:
    graph = assert_same_function(randomize(Residual(early=True)), EXAMPLE_2D)
    found = [(op.name, getattr(op, "activation", "")) for op in graph.ops[:-2]]
    assert found == [("conv1", "none"), ("relu", ""), ("conv2", "none"), ("add", "relu")]
    assert [op.groups for op in graph.ops if isinstance(op, Conv)] == [1, 3, 1]
    graph = assert_same_function(randomize(Residual(early=False)), EXAMPLE_2D)
    assert [op.name for op in graph.ops[:-2]] == ["conv1", "relu", "conv2", "norm1", "add"]
    norm = graph.ops[3]
    assert isinstance(norm, Conv)
    assert norm.groups == 3
    assert graph.constants[norm.weight].shape == (3, 1, 1, 1)


class Dead(nn.Module):
    """An auxiliary head that nobody reads, and a change in place of what was read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.auxiliary, self.head = nn.Conv1d(6, 4, 3), nn.Linear(4, 9), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x.view(x.shape)
        self.auxiliary(x.mean(2))
        z = x.clone()
        y += x.sigmoid()
        x.relu_()
        logits: Tensor = self.head((y + z).mean(2))
        return logits


def test_what_nobody_reads_is_left_out() -> None:
    graph = assert_same_function(Dead(), EXAMPLE_1D)
    assert [op.name for op in graph.ops] == ["conv", "sigmoid", "add", "add#2", "mean#2", "head"]
    assert [op.activation for op in graph.ops if isinstance(op, Add)] == ["relu", "none"]
    assert set(graph.constants) == {"conv.weight", "conv.bias", "head.weight", "head.bias"}


def test_padding_joins_the_convolutions_that_read_it() -> None:
    layers = nn.Sequential(nn.ZeroPad2d(1), nn.ZeroPad2d((2, 0, 0, 3)), nn.Conv2d(3, 2, 3, padding=1))
    model = nn.Sequential(layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    graph = assert_same_function(model, EXAMPLE_2D)
    assert isinstance(graph.ops[0], Conv)
    assert graph.ops[0].padding == (2, 4, 5, 2)


def test_names_of_modules_that_look_like_ours_stay_apart() -> None:
    model = nn.Sequential()
    for name in ("relu#2", "input", "relu", 'x"); system("'):
        model.add_module(name, nn.Conv1d(6, 6, 1))
    model.add_module("act", nn.Sigmoid())
    model.add_module("end", nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2)))
    assert_same_function(model, EXAMPLE_1D)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Tail(F.gelu), ["aten.gelu", "test_ondevice_frontend.py:", "Use ReLU, ReLU6"]),
        (Tail(lambda x: x + 1), ["aten.add", "with a number", "Put scale and offset"]),
        (Tail(lambda x: x.cumsum(2)), ["aten.cumsum", "test_ondevice_frontend.py:", "Supported: conv1d and conv2d"]),
        (Tail(lambda x: 2 * x), ["aten.mul", "with a number"]),
        (Tail(lambda x: x + x.mean(2, keepdim=True)), ["aten.add", "(1, 4, 124) and (1, 4, 1)", "one shape"]),
        (Tail(lambda x: torch.add(x, x, alpha=2)), ["alpha=2"]),
        (Tail(lambda x: x * x.mean(1, keepdim=True)), ["aten.mean", "over [1]", "dim=(2,)"]),
        (Tail(lambda x: x * x[:, :1]), ["aten.slice", "one convolution for each part"]),
        (Tail(lambda x: torch.cat([x, x], 2)), ["aten.cat", "over dimension 2", "over channels"]),
        (Tail(lambda x: x.transpose(1, 2).relu().transpose(1, 2)), ["aten.transpose", "keep that order"]),
        (Tail(lambda x: x.view(4, 124).view(1, 4, 124)), ["aten.view", "a change of the batch"]),
        (Tail(lambda x: x.view(1, 2, 248).view(1, 4, 124)), ["aten.view", "from (1, 4, 124) to (1, 2, 248)"]),
        (Tail(lambda x: x.clamp(-1, 1)), ["aten.clamp", "to [-1, 1]", "Use ReLU6"]),
        (Tail(lambda x: x.detach()), ["aten.detach", "update scheme"]),
        (Tail(lambda x: x.double().float()), ["aten.to", "float64", "float32"]),
        (Tail(nn.LeakyReLU()), ["aten.leaky_relu", "module between", "Use ReLU"]),
        (Tail(nn.GroupNorm(2, 4)), ["aten.group_norm", "Use BatchNorm"]),
        (Tail(nn.BatchNorm1d(4, track_running_stats=False)), ["aten.batch_norm", "without running statistics"]),
        (
            nn.Sequential(nn.Conv1d(6, 4, 128, groups=2), nn.Flatten()),
            ["must end in a linear layer", "ends in 2 groups at"],
        ),
        (Tail(F.relu, dilation=2), ["conv1d", "with dilation", "module conv", "dilation=1"]),
        (Tail(F.relu, padding_mode="circular", padding=1), ["aten.pad", "mode 'circular'", "Pad with zeros"]),
        (Tail(nn.ConstantPad1d(1, 0.0)), ["padding with 0 at", "(module between)", "read by mean", "right before one"]),
        (Tail(nn.ConstantPad1d(1, 0.5)), ["aten.pad", "with value 0.5", "Pad with zeros", "-inf before a max pool"]),
        (
            Tail(nn.Sequential(nn.ConstantPad1d((0, 1), 0.0), nn.MaxPool1d(3, 2))),
            ["padding with 0 at", "(module between.0)", "may be negative", "Pad with -inf", "put a ReLU before"],
        ),
        (
            Tail(nn.Sequential(nn.ConstantPad1d((0, 4), -math.inf), nn.MaxPool1d(3, 2))),
            ["padding with -inf at", "fills whole windows of the max pool between.1", "Pad with less"],
        ),
        (
            Tail(nn.Sequential(nn.ConstantPad1d((0, 1), -math.inf), nn.Conv1d(4, 4, 3))),
            ["padding with -inf at", "read by the convolution between.1", "Pad with zeros"],
        ),
        (
            Tail(nn.Sequential(nn.ConstantPad1d(1, 0.0), nn.ConstantPad1d(1, -math.inf), nn.MaxPool1d(3))),
            ["padding with 0 at", "is padded with -inf at", "Pad with one value"],
        ),
        (Tail(nn.Sequential(nn.ConstantPad1d(1, 0.0), nn.AvgPool1d(3))), ["read by between.1", "not by a convolution"]),
        (Tail(nn.ConstantPad1d(-1, 0.0)), ["aten.pad", "by (-1, -1", "by 0 or more"]),
        (Tail(nn.AdaptiveAvgPool1d(3)), ["aten.adaptive_avg_pool1d", "from (124,) to (3,)", "pooling to 1"]),
        (Tail(nn.AvgPool1d(3, ceil_mode=True)), ["aten.avg_pool1d", "ceil_mode", "(1, 41) to (1, 42)"]),
        (Tail(nn.AvgPool1d(3, padding=1, count_include_pad=False)), ["count_include_pad=False"]),
        (
            nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.AvgPool1d(3, padding=1), nn.Flatten(), nn.Linear(6, 2)),
            ["average pooling at", "acts on one position and its padding", "leave it out"],
        ),
        (Tail(nn.MaxPool1d(3, dilation=2)), ["aten.max_pool1d", "with dilation"]),
        (Tail(lambda x: F.adaptive_max_pool1d(x, 1, return_indices=True)[1].float()), ["aten.to", "with a number"]),
        (Tail(lambda x: F.max_pool1d(x, 2, return_indices=True)[0]), ["max_pool1d_with_indices", "without indices"]),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(768, 3), nn.Softmax(1)),
            ["aten.softmax", "module 2", "return the logits"],
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 3), nn.ReLU()), ["must end in a linear layer", "conv with relu"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), ["one output"]),
        (nn.Sequential(nn.Conv1d(6, 4, 5)), ["must end in a linear layer", "conv of 1 x 124 x 4"]),
        (nn.Sequential(nn.Conv1d(6, 4, 5), nn.AdaptiveAvgPool1d(1)), ["must end in a linear layer", "globalaverage"]),
        (nn.Flatten(), ["must end in a linear layer"]),
        (
            nn.Sequential(nn.Conv1d(6, 4, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(4)),
            ["must end in a linear layer", "a value a channel"],
        ),
        (Tail(F.dropout), ["aten.dropout", "in training mode", "nn.Dropout"]),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 4, 5)),
            ["aten._weight_norm", "remove_parametrizations"],
        ),
        (nn.Sequential(nn.Linear(128, 3), nn.Flatten(), nn.Linear(18, 3)), ["linear", "Flatten it first"]),
        (
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768), nn.ReLU(), nn.Linear(768, 2)),
            ["before flatten", "batch norm"],
        ),
    ],
)
def test_a_refusal_names_operator_place_and_remedy(model: nn.Module, words: list[str]) -> None:
    with pytest.raises(CompileError) as caught:
        read_module(model, EXAMPLE_1D)
    for word in words:
        assert word in str(caught.value), str(caught.value)


class Branch(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 1)
        self.shared = shared
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = F.relu(self.conv(x)) if self.shared else x
        logits: Tensor = self.head(x.mean(2)) if self.shared else self.head(x.mean(2)) - self.head(x.mean(2))
        return logits


@pytest.mark.parametrize(("shared", "words"), [(True, "shares its parameters"), (False, "shares its parameters")])
def test_weight_sharing_is_refused(shared: bool, words: str) -> None:
    with pytest.raises(CompileError, match=words):
        read_module(Branch(shared), EXAMPLE_1D)


class Wrong(nn.Module):
    """One thing at a time that a forward may do and a device program cannot."""

    scale: Tensor

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.again = nn.Conv1d(6, 4, 3, padding=1)
        self.again.bias = self.conv.bias
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(1, 4, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        y: Tensor = self.conv(x)
        match self.what:
            case "tied":
                y = y + self.again(x)
            case "computed":
                y = F.conv1d(x, self.conv.weight.abs())
            case "buffer":
                y = y * self.scale
            case "literal":
                y = y + torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
        logits: Tensor = self.head(y.mean(2))
        return (logits, y) if self.what == "two" else y if self.what == "map" else logits


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("tied", r"module again\) shares its parameters"),
        ("computed", "aten.abs.*is not supported"),
        ("buffer", "aten.mul.*a parameter or a constant"),
        ("literal", "operator aten.* at .*test_ondevice_frontend.py:.* not supported"),
        ("two", "returns 2 tensors"),
        ("map", "must end in a linear layer"),
    ],
)
def test_what_a_device_cannot_do_is_refused(what: str, words: str) -> None:
    with pytest.raises(CompileError, match=words):
        read_module(Wrong(what), EXAMPLE_1D)


class Stale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(6, 4, 3), nn.Linear(504, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        flat = x.flatten(1)
        x.relu_()
        logits: Tensor = self.head(flat)
        return logits


def test_a_view_that_was_changed_through_its_base_is_refused() -> None:
    with pytest.raises(CompileError, match=r"linear at .*reads a view of a tensor that .* changed in place.*inplace="):
        read_module(Stale(), EXAMPLE_1D)


@pytest.mark.parametrize(
    "example", [torch.zeros(6, 128)[0], torch.zeros(0, 6, 128), torch.zeros(1, 1, 1, 6, 128), None]
)
def test_an_example_of_another_shape_is_refused(example: Tensor) -> None:
    with pytest.raises(CompileError, match="the example must be a tensor of shape"):
        read_module(WatchCNN(), example)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_control_flow_on_data_is_refused_in_one_line() -> None:
    with pytest.raises(CompileError, match="cannot trace the model") as caught:
        read_module(DataDependent(), EXAMPLE_1D)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = WatchCNN()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0] = float("nan")
    with pytest.raises(CompileError, match=r"module conv2.*inf or NaN"):
        read_module(model, EXAMPLE_1D)


def test_a_sum_that_could_overflow_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(40_000, 2))
    with pytest.raises(CompileError, match="sums 40000 products"):
        read_module(model, torch.zeros(1, 4, 100, 100))


def test_the_model_is_not_changed() -> None:
    model = WatchCNN().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read_module(model, EXAMPLE_1D)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert np.isfinite(next(iter(model.parameters())).detach().numpy()).all()
