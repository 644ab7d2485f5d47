"""What the front end takes, and how it refuses the rest."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.errors import CompileError
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.ir import Conv, GlobalAverage
from efftrain.ondevice.quantize import run_float

EXAMPLE_1D = torch.zeros(1, 6, 128)
EXAMPLE_2D = torch.zeros(1, 3, 12, 10)


def assert_same_function(model: nn.Module, example: Tensor) -> None:
    graph = read_module(model, example)
    x = torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    batch = x if x.ndim == 4 else x[:, :, None, :]
    ours = run_float(graph, batch.numpy())[graph.output].flatten(1)
    with torch.no_grad():
        theirs = model.eval()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_watch_cnn_is_read_layer_by_layer() -> None:
    graph = read_module(WatchCNN(), EXAMPLE_1D)
    assert [op.name for op in graph.ops] == ["conv1", "conv2", "conv3", "pool", "head"]
    assert [op.relu for op in graph.ops if isinstance(op, Conv)] == [True, True, True, False]
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


@pytest.mark.parametrize("model", [Spatial(), Mean()])
def test_other_forms_give_the_same_function(model: nn.Module) -> None:
    assert_same_function(model, EXAMPLE_2D)


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


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Tail(torch.sigmoid), ["aten.sigmoid", "test_ondevice_frontend.py:", "Supported: conv1d"]),
        (Tail(F.gelu), ["aten.gelu", "Supported"]),
        (Tail(lambda x: x + 1), ["aten.add", "Supported"]),
        (Tail(F.relu, channels=6, groups=2), ["groups=2", "module conv", "Supported"]),
        (Tail(F.relu, dilation=2), ["dilated", "module conv"]),
        (Tail(nn.AdaptiveAvgPool1d(2)), ["pooling to", "only to 1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 3), nn.Softmax(1)), ["aten.softmax", "module 2"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 3), nn.ReLU()), ["must end in a linear layer"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), ["one output"]),
        (nn.Sequential(nn.Conv1d(6, 4, 5)), ["must end in a linear layer"]),
        (nn.Sequential(nn.Linear(128, 3), nn.Flatten(), nn.Linear(18, 3)), ["linear", "Flatten it first"]),
        (nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(768, 3)), ["relu", "does not follow"]),
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
