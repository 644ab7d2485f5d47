"""Figures of the profiler against arithmetic done by hand."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.errors import ConfigError
from efftrain.models import build_model
from efftrain.models.pretrained import Pretrained
from efftrain.profile import ModelProfile, profile_model
from efftrain.profile.energy import ARITHMETIC, BYTE_PJ, OPERATION_PJ, estimate_pj, memory_level


def profile(name: str, **options: object) -> ModelProfile:
    model = build_model(name, **options)
    assert isinstance(model, Pretrained)
    return profile_model(model, model.example_input())


def layer(profile: ModelProfile, name: str) -> dict[str, object]:
    return next(vars(row) for row in profile.layers if row.name == name)


# Lengths: 128 -> (128 - 5) // 2 + 1 = 62 -> (62 - 5) // 2 + 1 = 29 -> (29 - 5) // 2 + 1 = 13
WATCH_MACS = [62 * 16 * 6 * 5, 29 * 32 * 16 * 5, 13 * 32 * 32 * 5, 32 * 7]


def test_watch_cnn_by_hand() -> None:
    watch = profile("watch-cnn")
    assert WATCH_MACS == [29_760, 74_240, 66_560, 224]
    assert watch.macs == sum(WATCH_MACS) == 170_784
    # Backward: a weight gradient costs the forward MACs, an input gradient once more; the first layer needs none.
    assert watch.backward_macs == 2 * sum(WATCH_MACS) - WATCH_MACS[0]
    assert watch.parameters == watch.trainable_parameters == 8_471
    assert watch.model_bytes == {32: 4 * 8_471, 16: 2 * 8_471, 8: 8_471, 4: 4_236}
    # Two tensors of 16 x 62 around the first ReLU are the peak; before it the input, 6 x 128, and one of them.
    assert watch.peak_inference_bytes == max(6 * 128 + 16 * 62, 2 * 16 * 62) * 4 == 7_936
    # Kept: the input, the three ReLU outputs (each is the next layer's input too) and the pooled features.
    assert watch.saved_for_backward_bytes == (6 * 128 + 16 * 62 + 32 * 29 + 32 * 13 + 32) * 4 == 12_544
    assert watch.training_bytes == 2 * 4 * 8_471 + 12_544
    assert watch.activations == 2 * (16 * 62 + 32 * 29 + 32 * 13) + 32 + 7
    assert watch.uncounted_operators == ()


def test_watch_cnn_first_layer_by_hand() -> None:
    row = layer(profile("watch-cnn"), "conv1")
    moved = (6 * 128 + 496 + 16 * 62) * 4
    assert row["type"] == "Conv1d"
    assert row["output_shape"] == (1, 16, 62)
    assert (row["parameters"], row["macs"], row["backward_macs"]) == (496, 29_760, 29_760)
    assert (row["activations"], row["activation_bytes"], row["saved_bytes"]) == (992, 3_968, 6 * 128 * 4)
    assert row["moved_bytes"] == moved == 9_024
    assert row["macs_per_byte"] == pytest.approx(29_760 / 9_024)
    # 9,024 bytes are more than 8 KiB, so they come from the 32 KiB memory: 20 pJ for 8 bytes.
    assert row["energy_uj"] == pytest.approx((29_760 * (0.9 + 3.7) + 9_024 * 20 / 8) / 1e6)


def test_fashion_cnn_by_hand() -> None:
    fashion = profile("fashion-cnn")
    macs = [28 * 28 * 8 * 25, 14 * 14 * 16 * 8 * 25, 784 * 64, 64 * 10]
    assert macs == [156_800, 627_200, 50_176, 640]
    assert fashion.macs == sum(macs) == 834_816
    assert fashion.backward_macs == 2 * sum(macs) - macs[0]
    assert fashion.parameters == 54_314
    assert fashion.peak_inference_bytes == 2 * 8 * 28 * 28 * 4
    # Input, ReLU 1, pool 1, ReLU 2, pool 2, ReLU 3, and the indices of both pools, 8 bytes each.
    floats = 784 + 8 * 784 + 8 * 196 + 16 * 196 + 784 + 64
    assert fashion.saved_for_backward_bytes == 4 * floats + 8 * (8 * 196 + 784) == 69_248


def test_mlp_by_hand() -> None:
    mlp = profile("mlp-10m", hidden=(32, 16))
    macs = [784 * 32, 32 * 16, 16 * 10]
    assert mlp.macs == sum(macs)
    assert mlp.backward_macs == 2 * sum(macs) - macs[0]
    assert mlp.saved_for_backward_bytes == (784 + 32 + 16) * 4


def test_char_transformer_by_hand() -> None:
    width, depth, context, vocab = 16, 2, 8, 256
    transformer = profile("char-transformer", width=width, depth=depth, context=context, heads=2)
    linear = context * (4 * width * width + 2 * 4 * width * width)
    attention = 2 * context * context * width  # scores, and the mean of the values
    assert transformer.macs == depth * (linear + attention) + context * width * vocab
    # Attention's backward recomputes the scores, so it is five products where forward has two; the layer norms and
    # embeddings below the first linear layers want gradients, so every linear layer costs twice.
    assert transformer.backward_macs == depth * (2 * linear + 5 * attention // 2) + 2 * context * width * vocab
    assert layer(transformer, "blocks.0.attention")["macs"] == attention


def test_a_batch_multiplies_what_it_should() -> None:
    model = build_model("watch-cnn")
    one, four = (profile_model(model, torch.zeros(size, 6, 128)) for size in (1, 4))
    assert four.macs == 4 * one.macs
    assert four.backward_macs == 4 * one.backward_macs
    assert four.peak_inference_bytes == 4 * one.peak_inference_bytes
    assert four.saved_for_backward_bytes == 4 * one.saved_for_backward_bytes
    assert four.parameters == one.parameters


def test_frozen_layers_cost_no_backward() -> None:
    model = build_model("watch-cnn")
    assert isinstance(model, Pretrained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("head")
    last = profile_model(model, model.example_input())
    assert last.backward_macs == 32 * 7
    assert last.trainable_parameters == 231
    assert last.saved_for_backward_bytes == 32 * 4
    model.requires_grad_(False)
    none = profile_model(model, model.example_input())
    assert (none.backward_macs, none.saved_for_backward_bytes) == (0, 0)
    assert none.training_energy_uj == pytest.approx(none.energy_uj)


def test_number_formats_scale_floats_and_not_integers() -> None:
    model = build_model("watch-cnn")
    fp32, fp16, int8 = (profile_model(model, torch.zeros(1, 6, 128), kind) for kind in ("fp32", "fp16", "int8"))
    assert fp32.peak_inference_bytes == 2 * fp16.peak_inference_bytes == 4 * int8.peak_inference_bytes
    assert fp32.weight_bytes == 4 * int8.weight_bytes
    assert fp32.energy_uj > fp16.energy_uj > int8.energy_uj
    assert fp32.macs == int8.macs
    fashion = build_model("fashion-cnn")
    indices = 8 * (8 * 196 + 784)
    small = profile_model(fashion, torch.zeros(1, 1, 28, 28), "int8").saved_for_backward_bytes
    assert small == (69_248 - indices) // 4 + indices
    with pytest.raises(ConfigError, match=r"Unknown number format 'fp8'\. Expected one of: fp32, fp16, int8"):
        profile_model(model, torch.zeros(1, 6, 128), "fp8")  # type: ignore[arg-type]


class Odd(nn.Module):
    """What a counter that looks at layers only would miss: products by hand, a shared layer, state, randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.shared = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.same = self.shared

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        x = self.drop(self.norm(self.same(self.shared(x))))
        return torch.einsum("bi,bj->ij", x, x) @ self.weight


def test_products_by_hand_and_shared_layers_count() -> None:
    odd = profile_model(Odd(), torch.ones(3, 4))
    own = layer(odd, "(model)")
    assert own["parameters"] == 16
    assert own["macs"] == 3 * 4 * 4 + 3 * 4 * 4 + 4 * 4 * 4
    assert layer(odd, "shared")["macs"] == 2 * 3 * 4 * 4
    assert layer(odd, "shared")["parameters"] == 20
    assert odd.parameters == 16 + 20 + 8
    assert odd.buffers == 9  # mean, variance, and a counter
    # Dropout keeps its mask in training only.
    assert "drop" in [row.name for row in odd.layers]


def test_the_model_is_left_as_it_was() -> None:
    model = Odd()
    model(torch.randn(3, 4)).sum().backward()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    profile_model(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert grad is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


class InPlace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(10, 100), nn.ReLU(inplace), nn.Linear(100, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.relu(self.first(x)))
        return y


def test_work_done_in_place_takes_no_memory() -> None:
    apart, inside = (profile_model(InPlace(inplace), torch.zeros(1, 10)) for inplace in (False, True))
    assert apart.peak_inference_bytes == 200 * 4
    assert inside.peak_inference_bytes == 110 * 4


class Branches(nn.Module):
    """The input lives until the sum at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(F.relu(x))


def test_a_residual_is_alive_until_it_is_added() -> None:
    assert profile_model(Branches(), torch.zeros(1, 100)).peak_inference_bytes == 3 * 400


def test_an_operator_without_a_formula_is_reported() -> None:
    odd = profile_model(nn.Bilinear(3, 4, 5), (torch.ones(2, 3), torch.ones(2, 4)))
    assert odd.uncounted_operators == ("aten._trilinear",)


def test_a_wrong_input_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"WatchCNN does not run on an input of shape \(1, 5, 128\) torch.float32"):
        profile_model(build_model("watch-cnn"), torch.zeros(1, 5, 128))


def test_the_profile_is_json() -> None:
    plain = json.loads(json.dumps(profile("watch-cnn").to_dict()))
    assert plain["macs"] == 170_784
    assert plain["model_bytes"]["8"] == 8_471
    assert [row["name"] for row in plain["layers"]][:2] == ["conv1", "relu1"]
    for total in ("macs", "backward_macs", "activations", "moved_bytes", "parameters"):
        assert sum(row[total] for row in plain["layers"]) == plain[total]
    assert sum(row["saved_bytes"] for row in plain["layers"]) == plain["saved_for_backward_bytes"]


def test_the_energy_table_is_the_sources() -> None:
    assert OPERATION_PJ["int8 add"] == 0.03
    assert ARITHMETIC["fp32"].mac_pj == pytest.approx(0.9 + 3.7)
    assert ARITHMETIC["fp16"].mac_pj == pytest.approx(0.4 + 1.1)
    assert ARITHMETIC["int8"].mac_pj == pytest.approx(0.1 + 0.2)
    assert BYTE_PJ["sram-8k"] == 10 / 8
    assert BYTE_PJ["dram"] == (1300 + 2600) / 2 / 8
    assert [memory_level(size) for size in (8192, 8193, 32769, 1048577)] == ["sram-8k", "sram-32k", "sram-1m", "dram"]
    assert estimate_pj(1000, 80, "int8", "sram-32k") == pytest.approx(1000 * 0.3 + 80 * 2.5)
    with pytest.raises(ConfigError, match="Unknown memory level"):
        estimate_pj(1, 1, "int8", "tape")  # type: ignore[arg-type]


# Command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    from efftrain.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["profile", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "watch-cnn", "--json")
    assert status == 0
    assert out.count("\n") == 1
    assert json.loads(out)["macs"] == 170_784


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "fashion-cnn", "--dtype", "int8")
    assert status == 0
    assert "FashionCNN, one sample, int8" in out
    assert "834816 forward, 1512832 backward" in out


def test_the_command_profiles_a_users_own_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\ndef net(): return nn.Linear(8, 2)\n")
    status, out, _ = run(capsys, f"{path}:net", "--input", "5x8", "--json")
    assert status == 0
    assert json.loads(out)["macs"] == 5 * 8 * 2
    status, out, err = run(capsys, f"{path}:net", "--json")
    assert (status, out) == (1, "")
    assert "Give the shape of one sample with --input" in err


@pytest.mark.parametrize("text", ["", "3xa", "0x3", "-1", "1x", "99999x99999", "1 x 2", "²"])
def test_a_wrong_shape_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "watch-cnn", f"--input={text}")
    assert status == 1
    assert "--input: expected" in err


def test_a_batch_norm_over_one_vector_is_profiled() -> None:
    profile = profile_model(build_model("fc-autoencoder"), torch.zeros(1, 640))
    assert profile.macs == 264_192
    assert profile.backward_macs > profile.macs
