"""MACs against torch's own counter, which counts two operations for each."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from efftrain.models import MODELS, build_model
from efftrain.models.pretrained import Pretrained
from efftrain.profile import profile_model


def torch_macs(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Forward and backward."""
    with FlopCounterMode(display=False) as counter:
        output = model(inputs)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    return forward // 2, counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_equal_torchs_counter(name: str) -> None:
    model = build_model(name)
    assert isinstance(model, Pretrained)
    # torch has no formula for the fused attention of CPUs, so both count the one of plain matrix products.
    with sdpa_kernel(SDPBackend.MATH):
        profile = profile_model(model, model.example_input(2))
        forward, backward = torch_macs(model, model.example_input(2))
    assert profile.macs == forward
    # torch counts the backward pass of a depthwise convolution as if it were dense. By hand: see below.
    if all(getattr(module, "groups", 1) == 1 for module in model.modules()):
        assert profile.backward_macs == backward


def test_fused_attention_equals_plain_attention_forward() -> None:
    model = build_model("char-transformer")
    assert isinstance(model, Pretrained)
    fused = profile_model(model, model.example_input())
    with sdpa_kernel(SDPBackend.MATH):
        plain = profile_model(model, model.example_input())
    assert fused.macs == plain.macs
    # Backward, the fused kernel recomputes the scores: one product of T x T x D more in each of 4 layers.
    assert fused.backward_macs == plain.backward_macs + 4 * 128 * 128 * 128


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
        (nn.GRU(8, 16, batch_first=True), (2, 5, 8)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, dilation=2)), (2, 4, 17, 11)),
        (nn.Conv3d(2, 3, 3), (1, 2, 5, 6, 7)),
    ],
    ids=["encoder", "gru", "conv2d", "conv3d"],
)
def test_other_layers_equal_torchs_counter(model: nn.Module, shape: tuple[int, ...]) -> None:
    class First(nn.Module):
        """A GRU returns a tuple."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            first: Tensor = y[0] if isinstance(y, tuple) else y
            return first

    inputs = torch.zeros(shape)
    with sdpa_kernel(SDPBackend.MATH):
        profile = profile_model(First(), inputs)
        assert (profile.macs, profile.backward_macs) == torch_macs(First(), inputs)
    assert profile.uncounted_operators == ()


def test_an_lstm_and_grouped_convolutions_by_hand() -> None:
    """torch's counter does not see the fused LSTM, and counts the backward pass of grouped convolutions too high."""
    lstm = profile_model(nn.LSTM(8, 16, batch_first=True), torch.zeros(2, 5, 8))
    # Four gates, from 8 inputs and 16 states, for 2 sequences of 5 steps.
    assert lstm.macs == 2 * 5 * 4 * 16 * (8 + 16)
    # Twice that, without the gradients of the input and of the first state.
    assert lstm.backward_macs == 2 * lstm.macs - 2 * 5 * 4 * 16 * 8 - 2 * 4 * 16 * 16
    model: nn.Module = nn.Sequential(nn.Conv1d(4, 8, 3, groups=4), nn.Conv1d(8, 6, 1))
    depthwise = profile_model(model, torch.zeros(3, 4, 11))
    first, second = 3 * 9 * 8 * 3, 3 * 9 * 6 * 8
    assert depthwise.macs == first + second
    assert depthwise.backward_macs == first + 2 * second
    model = nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)
    transposed = profile_model(model, torch.zeros(1, 8, 7, 7))
    # Each of 8 x 7 x 7 inputs meets a filter of 3 x 3 in each of 4 / 2 outputs.
    assert transposed.macs == transposed.backward_macs == 8 * 7 * 7 * 2 * 9


def test_saved_memory_is_what_autograd_holds() -> None:
    """The sum equals what torch's hooks report for a plain forward pass."""
    model = build_model("fashion-cnn")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.zeros(2, 1, 28, 28))
    assert output.requires_grad
    assert profile_model(model, torch.zeros(2, 1, 28, 28)).saved_for_backward_bytes == sum(seen.values())
