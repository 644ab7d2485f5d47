"""Which parameters a scheme trains: addresses of layers, presets, and the published counts."""

import functools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efftrain.errors import ConfigError
from efftrain.models import build_model
from efftrain.models.pretrained import Pretrained
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.ir import Conv
from efftrain.ondevice.scheme import PRESETS, PUBLISHED, Layer, LayerShare, Scheme, Trained, resolve

SCHEMES = Path(__file__).parents[2] / "ondevice" / "schemes"


def layers(count: int) -> list[Layer]:
    return [Layer(f"conv{i}", 8 * (i + 1), 8 * (i + 2), True) for i in range(count - 1)] + [Layer("head", 40, 10, True)]


@functools.cache
def mcunet() -> dict[Layer, tuple[int, int]]:
    """Weights and biases of each layer of mcunet-5fps."""
    model = build_model("mcunet-5fps")
    assert isinstance(model, Pretrained)
    graph = read_module(model, model.example_input())
    return {
        Layer(op.name, graph.tensors[op.x].shape[2], graph.tensors[op.y].shape[2], op.bias is not None): (
            graph.constants[op.weight].size,
            0 if op.bias is None else graph.constants[op.bias].size,
        )
        for op in graph.ops
        if isinstance(op, Conv)
    }


def counts(scheme: Scheme) -> tuple[int, int]:
    """Trained weights and biases of mcunet-5fps."""
    trained = resolve(scheme, list(mcunet()))
    weights = sum(sizes[0] * trained[layer.name].channels // layer.in_channels for layer, sizes in mcunet().items())
    return weights, sum(sizes[1] for layer, sizes in mcunet().items() if trained[layer.name].bias)


@pytest.mark.parametrize(
    ("name", "weights", "biases"),
    [
        ("mcunetv3-49kb", 13_696, 4_602),
        ("mcunetv3-74kb", 6_400 + 6_912 + 4_608 + 11_520 + 1_600, 4_602 + 160),
        ("mcunetv3-99kb", 6_400 + 6_912 + 9_216 + 11_520 + 36_864 // 8 + 55_296 // 4 + 1_600, 4_602 + 160 + 40),
        ("mcunetv3-124kb", 1_600 + 6_912 + 9_216 + 11_520 + 18_432 + 27_648 + 1_600, 4_602 + 160 + 40 + 160 + 160),
        ("mcunetv3-148kb", 6_400 + 6_912 + 9_216 + 11_520 + 36_864 + 27_648 + 1_600, 4_602 + 160 + 40 + 160),
        ("full", 464_816, 6_018),
        ("bias_only", 0, 6_018),
        ("last_k=1", 1_600, 10),
        ("last_k=3", 1_600 + 92_160 + 5_184, 10 + 160 + 576),
        ("last_k=43", 464_816, 6_018),
    ],
)
def test_what_mcunet_trains(name: str, weights: int, biases: int) -> None:
    """Of "49kb", the totals that the reference system states; of the others, sums over its layer table."""
    assert counts(Scheme.parse(name)) == (weights, biases)


def test_the_published_schemes_train_1x1_convolutions_by_input_channel() -> None:
    trained = resolve(PUBLISHED["mcunetv3-49kb"], list(mcunet()))
    assert [(name, found.channels) for name, found in trained.items() if found.channels] == [
        ("blocks.8.expand.0", 12),
        ("blocks.9.expand.0", 24),
        ("blocks.10.expand.0", 24),
        ("head", 160),
    ]


@pytest.mark.parametrize("name", [*PRESETS, *PUBLISHED])
def test_each_preset_is_a_file_too(name: str) -> None:
    path = SCHEMES / f"{name}.toml"
    assert Scheme.parse(str(path)) == Scheme.parse(name) == {**PRESETS, **PUBLISHED}[name]


@given(st.integers(2, 12), st.data())
def test_addresses_agree(count: int, data: st.DataObject) -> None:
    """A layer by its position from the input, from the end and by name is the same layer."""
    position, share = data.draw(st.integers(0, count - 2)), data.draw(st.floats(0.001, 1))
    model = layers(count)
    addresses = (f"#{position}", f"-{count - 1 - position}", model[position].name)
    found = [
        resolve(Scheme(name="s", weights=(LayerShare(layer=address, share=share),)), model) for address in addresses
    ]
    assert found[0] == found[1] == found[2]
    channels = found[0][model[position].name].channels
    assert 1 <= channels <= model[position].in_channels
    assert abs(channels - share * model[position].in_channels) <= max(0.5, 1 - share * model[position].in_channels)
    assert sum(one.channels > 0 for one in found[0].values()) == 1


@given(st.integers(1, 12), st.data())
def test_last_k_is_the_last_k(count: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, count))
    model = layers(count)
    trained = resolve(Scheme.parse(f"last_k={k}"), model)
    for i, layer in enumerate(model):
        assert trained[layer.name] == (Trained(layer.in_channels, True) if i >= count - k else Trained())
    assert resolve(Scheme.parse(f"last_k={count}"), model) == resolve(PRESETS["full"], model)
    assert resolve(Scheme.parse("last_k=1"), model) == resolve(PRESETS["last_layer"], model)


def test_sparse_trains_what_a_small_model_has() -> None:
    sparse = PRESETS["sparse"]
    assert resolve(sparse, layers(1)) == {"head": Trained(40, True)}
    assert resolve(sparse, layers(2)) == {"conv0": Trained(4, True), "head": Trained(40, True)}
    assert resolve(sparse, layers(3)) == {
        "conv0": Trained(0, True),
        "conv1": Trained(8, True),
        "head": Trained(40, True),
    }
    for count in (0, 1):
        with pytest.raises(ConfigError, match=f"biases of 2 convolutions, the model has {count}. Use last_biases = -1"):
            resolve(Scheme(name="s", last_biases=2), layers(count + 1))


def test_the_head_can_be_addressed_by_position() -> None:
    scheme = Scheme(name="s", last_biases=-1, weights=(LayerShare(layer="#3", share=0.5),))
    assert resolve(scheme, layers(4))["head"] == Trained(20, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ful", r"scheme 'ful' is not known; presets are none, bias_only.*last_k=K.*Did you mean 'full'\?"),
        ("mcunetv3-49", "Did you mean 'mcunetv3-49kb'"),
        ("last_k", "is not known.*write last_k=K"),
        ("last_k=0", "last_k must be the number of layers to train, 1 or more"),
        ("last_k=-1", "1 or more"),
        ("last_k=x", "1 or more"),
        ("last_k=" + "9" * 30, "1 or more"),
        ("nope.toml", "scheme file nope.toml does not exist"),
    ],
)
def test_wrong_names_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(name="s", weights=(LayerShare(layer="#4"),)), "names layer '#4'.*from #0 to #3"),
        (Scheme(name="s", weights=(LayerShare(layer="#-1"),)), "names layer '#-1'"),
        (Scheme(name="s", weights=(LayerShare(layer="-4"),)), "names layer '-4'"),
        (Scheme(name="s", weights=(LayerShare(layer="#2"), LayerShare(layer="-1"))), "'conv2' twice"),
        (Scheme(name="s", last_k=2, weights=(LayerShare(layer="#2"),)), "'conv2' twice"),
        (Scheme(name="s", last_k=5), "trains the last 5 layers, the model has 4"),
    ],
)
def test_a_scheme_that_does_not_fit_the_model_is_refused(scheme: Scheme, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(scheme, layers(4))


def test_a_long_list_of_layers_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"has 'conv0'.*'conv5', \.\.\., 'conv37'.*'head'\. Use one"):
        resolve(Scheme(name="s", weights=(LayerShare(layer="x"),)), layers(43))


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('name = "s"\nlast_k = -1\n')
    with pytest.raises(ConfigError, match="last_k is -1"):
        Scheme.parse(str(tmp_path / "s.toml"))
    (tmp_path / "s.toml").write_text('name = "s"\n[[weights]]\nlayer = "#1"\nshare = 1.5\n')
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        Scheme.parse(str(tmp_path / "s.toml"))
