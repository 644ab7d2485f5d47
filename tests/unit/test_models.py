import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from efftrain.errors import CheckpointError, ConfigError
from efftrain.models import MODELS, build_model, load_pretrained
from efftrain.models.char_transformer import CharTransformer
from efftrain.models.pretrained import Pretrained
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.ir import Conv

SMALL: dict[str, dict[str, object]] = {
    "watch-cnn": {},
    "fashion-cnn": {},
    "mlp-10m": {"input_shape": (1, 8, 8), "hidden": (16, 8)},
    "char-transformer": {"context": 16, "width": 16, "depth": 2, "heads": 2},
    "resnet8": {"size": 16, "width": 4},
    "ds-cnn": {"width": 8, "blocks": 2},
    "mobilenet-v1-0.25": {"size": 32},
    "fc-autoencoder": {"features": 20, "width": 16},
    "mcunet-5fps": {"size": 32},
    "mobilenet-v2-w0.35": {"size": 32},
    "proxyless-w0.3": {"size": 32},
}

OUTPUTS = {
    "watch-cnn": (7,),
    "fashion-cnn": (10,),
    "mlp-10m": (10,),
    "char-transformer": (16, 256),
    "resnet8": (10,),
    "ds-cnn": (12,),
    "mobilenet-v1-0.25": (2,),
    "fc-autoencoder": (20,),
    "mcunet-5fps": (10,),
    "mobilenet-v2-w0.35": (10,),
    "proxyless-w0.3": (10,),
}


def small(name: str) -> Pretrained:
    torch.manual_seed(0)
    model = build_model(name, **SMALL[name])
    assert isinstance(model, Pretrained)
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_worked_out_by_hand() -> None:
    watch = (6 * 16 * 5 + 16) + (16 * 32 * 5 + 32) + (32 * 32 * 5 + 32) + (32 * 7 + 7)
    assert num_parameters(build_model("watch-cnn")) == watch == 8_471
    fashion = (1 * 8 * 25 + 8) + (8 * 16 * 25 + 16) + (16 * 7 * 7 * 64 + 64) + (64 * 10 + 10)
    assert num_parameters(build_model("fashion-cnn")) == fashion == 54_314
    mlp = (784 * 1664 + 1664) + 3 * (1664 * 1664 + 1664) + (1664 * 256 + 256) + (256 * 10 + 10)
    assert num_parameters(build_model("mlp-10m")) == mlp == 10_046_730
    width, depth, context = 128, 4, 128
    attention = 4 * (width * width + width)
    block = attention + (width * 4 * width + 4 * width) + (4 * width * width + width) + 2 * 2 * width
    transformer = 256 * width + context * width + depth * block + 2 * width + width * 256
    assert num_parameters(build_model("char-transformer")) == transformer == 875_264
    assert num_parameters(build_model("char-transformer", tied=True)) == transformer - width * 256


@pytest.mark.parametrize(
    ("name", "published", "macs"),
    [
        ("resnet8", 78_666, 12.5e6),
        ("ds-cnn", 24_908, 2.7e6),
        ("mobilenet-v1-0.25", 221_794, 7.5e6),
        ("fc-autoencoder", 269_992, 0.26e6),
    ],
)
def test_mlperf_tiny_models_have_the_published_sizes(name: str, published: int, macs: float) -> None:
    """MLPerf Tiny's counts are those of Keras: parameters and the statistics of batch norms."""
    model = build_model(name)
    statistics = sum(buffer.numel() for key, buffer in model.named_buffers() if "running" in key)
    assert num_parameters(model) + statistics == published
    assert layers(name)[0] == pytest.approx(macs, rel=0.02)


def layers(name: str) -> tuple[int, list[tuple[int, int]], int]:
    """MACs; weights and output pixels of each layer; biases: all after batch norms are folded."""
    model = build_model(name)
    assert isinstance(model, Pretrained)
    graph = read_module(model, model.example_input())
    convs = [op for op in graph.ops if isinstance(op, Conv)]
    found = [(graph.constants[op.weight].size, math.prod(graph.tensors[op.y].shape[:2])) for op in convs]
    biases = sum(graph.constants[op.bias].size for op in convs if op.bias is not None)
    return sum(weights * pixels for weights, pixels in found), found, biases


# The layer table of the reference system's "49kb" model: weights by size of the output map.
MCUNET = {
    64: (432, 144, 128, 256),
    32: (288, 512, 768, 432, 768, 768),
    16: (2352, 1152, 2880, 1080, 2880, 2880),
    8: (1080, 4800, *(6400, 7840, 6400), *(6400, 4000, 7680), *(6912, 1296, 6912), *(9216, 1728, 9216), 11520),
    4: (11760, 23040, *(36864, 9600, 36864), *(36864, 9600, 36864), *(55296, 5184, 92160)),
    1: (1600,),
}


def test_mcunet_is_the_reference_layer_by_layer() -> None:
    macs, found, biases = layers("mcunet-5fps")
    assert found == [(weights, size**2) for size, row in MCUNET.items() for weights in row]
    assert (macs, sum(weights for weights, _ in found), biases) == (22_455_104, 464_816, 6_018)


@pytest.mark.parametrize(
    ("name", "num_layers", "weights", "biases", "macs"),
    [
        ("mobilenet-v2-w0.35", 52, 239_808, 5_770, 16_648_032),
        ("proxyless-w0.3", 61, 321_776, 5_426, 18_620_864),
    ],
)
def test_other_networks_of_the_reference(name: str, num_layers: int, weights: int, biases: int, macs: int) -> None:
    found = layers(name)
    assert (found[0], found[2]) == (macs, biases)
    assert (len(found[1]), sum(size for size, _ in found[1])) == (num_layers, weights)


@pytest.mark.parametrize("name", MODELS)
def test_models_run_and_export(name: str) -> None:
    model = small(name).eval()
    example = model.example_input(3)
    assert example.shape == (3, *model.input_shape)
    output = model(example)
    assert output.shape == (3, *OUTPUTS[name])
    exported = torch.export.export(model, (example,)).module()
    assert torch.equal(exported(example), output)


def test_the_transformer_sees_no_future() -> None:
    model = small("char-transformer").eval()
    tokens = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 9:] = 0
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)
    assert model(tokens[:, :5]).shape == (1, 5, 256)


def test_names_cost_no_torch() -> None:
    code = "import sys, efftrain.models as m; assert 'watch-cnn' in m.MODELS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("watch-cn", {}, r"Unknown model 'watch-cn'. Did you mean 'watch-cnn'\? Known: watch-cnn, fashion-cnn"),
        ("watch-cnn", {"chanels": (1, 2, 3)}, "has no option 'chanels'. Expected: in_channels, steps, channels"),
        ("watch-cnn", {"channels": (1, 2)}, "three channel counts above 0"),
        ("watch-cnn", {"steps": 28}, "steps of at least 29"),
        ("fashion-cnn", {"size": 30}, "a multiple of 4"),
        ("mlp-10m", {"hidden": (0,)}, "sizes above 0"),
        ("char-transformer", {"heads": 3}, "a width that heads divides"),
        ("char-transformer", {"width": 128.0}, r"option width: expected int, found 128\.0"),
        ("char-transformer", {"tied": 1}, "option tied: expected bool, found 1"),
        ("mlp-10m", {"hidden": ("a",)}, "option hidden: expected tuple"),
        ("resnet8", {"size": 30}, "a multiple of 4"),
        ("ds-cnn", {"frames": 8}, "frames of at least 9"),
        ("mobilenet-v1-0.25", {"size": 16}, "a size of at least 17"),
        ("fc-autoencoder", {"code": 0}, "counts above 0"),
        ("mcunet-5fps", {"num_classes": 0}, "counts above 0 and a size of at least 32"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, **options)


def test_a_users_own_module(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, width=3):\n"
        "        super().__init__(width, 2)\n"
        "ready = Net()\n"
        "number = 3\n"
        "def other(): return 3\n"
    )
    model = build_model(f"{path}:Net", width=5)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 5
    assert isinstance(build_model(f"{path}:ready"), nn.Linear)
    for spec, options, message in (
        (f"{path}:Nett", {}, "has no 'Nett'. It has: nn, Net, ready"),
        (f"{path}:number", {}, "expected a class or function, found int"),
        (f"{path}:other", {}, "expected a torch.nn.Module, found int"),
        (f"{path}:Net", {"depth": 1}, "calling Net with .* failed"),
        (f"{path}:ready", {"width": 1}, "takes no options"),
        (f"{tmp_path}/missing.py:Net", {}, "there is no file"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(spec, **options)
    path.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        build_model(f"{path}:Net")


# Saving and loading


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_equal(name: str, tmp_path: Path) -> None:
    model = small(name).eval()
    assert model.save_pretrained(tmp_path / "model") == tmp_path / "model"
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    loaded = load_pretrained(tmp_path / "model").eval()
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert torch.equal(loaded(model.example_input(2)), model(model.example_input(2)))
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == model.state_dict().keys()


def test_a_tied_transformer_is_saved_once(tmp_path: Path) -> None:
    model = build_model("char-transformer", context=8, width=8, depth=1, heads=1, tied=True)
    assert isinstance(model, CharTransformer)
    model.save_pretrained(tmp_path)
    loaded = CharTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(loaded.example_input()), model(model.example_input()))


def test_saving_again_replaces(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = WatchCNN()
        model.save_pretrained(tmp_path)
    assert torch.equal(WatchCNN.from_pretrained(tmp_path).head.weight, model.head.weight)
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.save_pretrained(tmp_path / "config.json")


def rewrite(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**header, **changes}))


def replace_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Weights whose size and checksum are right, so that only the tensors are wrong."""
    import hashlib

    data = save(tensors)
    (folder / "model.safetensors").write_bytes(data)
    rewrite(folder, weights_bytes=len(data), weights_sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return small("watch-cnn").save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, 'expected "format": "efftrain-model"'),
        ({"version": 2}, "expected format version 1, found 2. Load it with the efftrain that wrote it"),
        ({"extra": 1}, r"expected the keys \['config', 'format'"),
        ({"name": "resnet"}, "expected one of the models watch-cnn, .*, found 'resnet'"),
        ({"name": 3}, "expected name of type str, found 3"),
        ({"config": []}, r"expected config of type dict, found \[\]"),
        ({"config": {"width": 3}}, "has no option 'width'"),
        ({"config": {"channels": [1, 2]}}, "three channel counts"),
        (
            {"config": {"channels": [16, 32, 33]}},
            r"'conv3.weight': expected torch.float32 of shape \(33, 32, 5\), found",
        ),
    ],
)
def test_a_wrong_config_is_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"format": "efftrain-model"}', "\x00"])
def test_a_config_that_is_not_ours_is_refused(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: expected"):
        load_pretrained(saved)


def test_missing_and_huge_files_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_pretrained(saved)
    (saved / "config.json").write_text(" " * 2_000_000)
    with pytest.raises(CheckpointError, match="at most 1048576 bytes"):
        load_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_pretrained(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match=f"expected {len(data)} bytes, found {len(data) - 4}"):
        load_pretrained(saved)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expected SHA-256 .* found .* save the model again"):
        load_pretrained(saved)


def test_wrong_tensors_are_named(saved: Path) -> None:
    right = load_file(saved / "model.safetensors")
    without = {key: value for key, value in right.items() if key != "head.bias"}
    for tensors, message in (
        (without, "tensor 'head.bias' is missing"),
        ({**right, "extra": torch.zeros(1)}, "tensor 'extra' is unknown"),
        (
            {**right, "head.bias": torch.zeros(8)},
            r"'head.bias': expected torch.float32 of shape \(7,\), found .*\(8,\)",
        ),
        ({**right, "head.bias": torch.zeros(7, dtype=torch.float64)}, "found torch.float64"),
        ({}, "tensor 'conv1.weight' is missing; found none"),
    ):
        replace_weights(saved, tensors)
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(saved)


def test_weights_that_do_not_parse_are_refused(saved: Path) -> None:
    import hashlib

    data = b"\xff" * 64
    (saved / "model.safetensors").write_bytes(data)
    rewrite(saved, weights_bytes=64, weights_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(CheckpointError, match="bytes that do not parse"):
        load_pretrained(saved)


def test_another_models_folder_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model 'char-transformer', found 'watch-cnn'"):
        CharTransformer.from_pretrained(saved)
