"""A share of the largest channels or of the outputs: the same function written otherwise, and one result everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.errors import ConfigError
from efftrain.ondevice import LayerShare, Program, Scheme, compile
from efftrain.ondevice.choose import largest_first
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.ir import Conv
from efftrain.ondevice.reference import run_float
from tests.ondevice_models import CLASSIFIERS, Groups, InvertedResiduals, Pools, Residuals, SqueezeExcite, build

RNG = np.random.default_rng(0)


def compiled(model: nn.Module, shape: tuple[int, ...], *weights: LayerShare, **settings: Any) -> Program:
    data = np.random.default_rng(1).normal(size=(8, *shape)).astype(np.float32)
    options = {"board": "nucleo-h743", "calibration": data, "learning_rate": 0.02, **settings}
    return compile(model, torch.zeros(1, *shape), scheme=Scheme(name="s", head=True, weights=weights), **options)


def norms(weight: np.ndarray) -> np.ndarray:
    """Of the weights by input channel, or of a depthwise layer by channel; for ``(O, H, W, I)``."""
    squares = weight.astype(np.float64) ** 2
    return np.asarray(np.sqrt(squares.sum((1, 2, 3) if weight.shape[3] == 1 else (0, 1, 2))))


def check_back_ends(program: Program, shape: tuple[int, ...]) -> None:
    """Twelve steps on random samples end in one state on all of them, and not where they began."""
    xs = program.quantize_input(RNG.normal(size=(12, *shape)))
    labels = RNG.integers(0, program.num_classes, 12)
    engines = [program.simulator(), program.host(), program.board("m4")]
    for engine in engines:
        engine.train(xs, labels)
    assert len({engine.state() for engine in engines}) == 1
    assert engines[0].state() != program.initial_state


@pytest.mark.parametrize("model", CLASSIFIERS)
def test_any_layer_may_choose_and_the_function_stays(model: type[nn.Module]) -> None:
    """Each layer alone: what reads the input, a concatenation or groups is refused, the others are in order."""
    shape = model.shape  # type: ignore[attr-defined]
    graph = read_module(build(model), torch.zeros(1, *shape))
    batch = RNG.normal(size=(4, *shape)).astype(np.float32)
    expected = run_float(graph, batch)[graph.output].numpy()
    chosen = 0
    for op in [op for op in graph.ops if isinstance(op, Conv)]:
        try:
            ordered = largest_first(graph, {op.name: False})
        except ConfigError:
            continue
        chosen += 1
        found = run_float(ordered, batch)[ordered.output].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        sizes = norms(next(ordered.constants[each.weight] for each in ordered.ops if each.name == op.name))  # type: ignore[attr-defined]
        assert (np.diff(sizes) <= 1e-6).all(), op.name
    assert chosen or model is Groups, "in each of the others some layer can choose"


def test_what_learns_are_the_largest_of_the_module() -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(16, 4, 3, padding=1)
    layers = (nn.Conv2d(3, 16, 1), nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = nn.Sequential(*layers)
    largest = np.sort(norms(second.weight.detach().permute(0, 2, 3, 1).numpy()))[::-1]
    share = LayerShare(layer="-1", share=0.25, choose="largest")
    program = compiled(model, (3, 6, 6), share)
    assert program.trained["2"].channels == 4
    assert compiled(model, (3, 6, 6), LayerShare(layer="-1", share=0.25)).plan.total_ram_bytes == (
        program.plan.total_ram_bytes
    ), "which channels costs nothing"
    weight = program.float_graph.constants["2.weight.chosen"]
    np.testing.assert_allclose(norms(weight)[:4], largest[:4], rtol=1e-6)
    engine = program.simulator()
    before = engine.state()
    engine.train_step(program.quantize_input(RNG.normal(size=(1, 3, 6, 6)))[0], 1)
    assert engine.state() != before


def test_layers_behind_an_addition_choose_together() -> None:
    graph = read_module(build(Residuals), torch.zeros(1, *Residuals.shape))
    readers: dict[str, list[str]] = {}
    for op in graph.ops:
        if isinstance(op, Conv) and op.groups == 1:
            readers.setdefault(op.x, []).append(op.name)
    shared = next(names for names in readers.values() if len(names) > 1)
    result = largest_first(graph, dict.fromkeys(shared, False))
    ordered, constants = {op.name: op for op in result.ops if isinstance(op, Conv)}, result.constants
    together = sum(norms(constants[ordered[name].weight]) ** 2 for name in shared)
    assert (np.diff(together) <= 1e-5).all()


@pytest.mark.parametrize("model", [Groups, InvertedResiduals, Pools])
def test_any_layer_may_train_some_of_its_outputs(model: type[nn.Module]) -> None:
    """Each layer alone: not one bit of a prediction changes, and what learns is a prefix of the rows."""
    shape = model.shape  # type: ignore[attr-defined]
    whole = compiled(build(model), shape)
    xs = whole.quantize_input(RNG.normal(size=(4, *shape)))
    expected = [whole.simulator().predict(x) for x in xs]
    parted = 0
    for op in [op for op in whole.float_graph.ops if isinstance(op, Conv)][:-1]:
        share, depthwise = LayerShare(layer=op.name, share=0.5, of="outputs"), whole.layers[op.name].depthwise  # type: ignore[union-attr]
        if op.groups > 1 and not depthwise:
            with pytest.raises(ConfigError, match=f"is a convolution in {op.groups} groups"):
                compiled(build(model), shape, share)
            continue
        program = compiled(build(model), shape, share)
        engine = program.simulator()
        np.testing.assert_array_equal([engine.predict(x) for x in xs], expected)
        if depthwise:
            assert program.trained[op.name].channels == round(0.5 * whole.layers[op.name].shape.out_c)  # type: ignore[union-attr]
            continue
        parted += 1
        assert program.trained[f"{op.name}.learns"].channels
        assert not program.trained[f"{op.name}.rest"].channels
        assert program.layers[f"{op.name}.learns"].shape.out_c == round(0.5 * whole.layers[op.name].shape.out_c)  # type: ignore[union-attr]
    assert parted or model is Groups


def test_outputs_learn_what_they_learn_in_the_whole_layer() -> None:
    """After one step, where nothing before it learns: up to the rounding of the gradient that the rest does not see."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    model, image = nn.Sequential(*layers), RNG.normal(size=(1, 3, 6, 6))
    moved = {}
    for of, name in (("inputs", "2"), ("outputs", "2.learns")):
        share = LayerShare(layer="2", share=1.0 if of == "inputs" else 0.5, of=of)  # type: ignore[arg-type]
        program = compiled(model, (3, 6, 6), share, learning_rate=0.5)
        engine = program.simulator()
        engine.train_step(program.quantize_input(image)[0], 1)
        before, after = (program.layout.unpack(state) for state in (program.initial_state, engine.state()))
        step = {part: after[part, name] - before[part, name] for part in ("weight", "residual")}
        moved[of] = 256 * step["weight"] + step["residual"]
    assert np.abs(moved["inputs"][:3]).max() > 1000
    np.testing.assert_allclose(moved["outputs"], moved["inputs"][:3], rtol=0.01, atol=2)


def test_the_largest_outputs_learn() -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(4, 16, 1)
    layers = (nn.Conv2d(3, 4, 1), nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    share = LayerShare(layer="-1", share=0.25, of="outputs", choose="largest")
    program = compiled(nn.Sequential(*layers), (3, 6, 6), share)
    sizes = np.sort(np.sqrt((second.weight.detach().numpy().astype(np.float64) ** 2).sum((1, 2, 3))))[::-1]
    learns = program.float_graph.constants["2.learns.weight"].astype(np.float64)
    np.testing.assert_allclose(np.sqrt((learns**2).sum((1, 2, 3))), sizes[:4], rtol=1e-6)


@pytest.mark.firmware
@pytest.mark.parametrize("choose", ["first", "largest"])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("model", [InvertedResiduals, SqueezeExcite])
def test_outputs_learn_alike_on_three_back_ends(model: type[nn.Module], rounding: str, choose: Any) -> None:
    shape = model.shape  # type: ignore[attr-defined]
    share = LayerShare(layer="-1", share=0.4, of="outputs", choose=choose)
    deeper = LayerShare(layer="-3", share=0.5, of="outputs")
    program = compiled(build(model), shape, share, deeper, rounding=rounding)
    assert sum(name.endswith(".learns") for name in program.layers) >= 1
    check_back_ends(program, shape)


@pytest.mark.firmware
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("model", [InvertedResiduals, SqueezeExcite])
def test_three_back_ends_are_one(model: type[nn.Module], rounding: str) -> None:
    shape = model.shape  # type: ignore[attr-defined]
    share = LayerShare(layer="-1", share=0.4, choose="largest")
    program = compiled(build(model), shape, share, rounding=rounding)
    assert any(name.endswith(".chosen") for name in program.float_graph.constants)
    check_back_ends(program, shape)


def test_the_first_stay_the_first_where_another_layer_chooses() -> None:
    layers = (nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    largest = LayerShare(layer="2", share=0.25, choose="largest")
    with pytest.raises(ConfigError, match=r"layer '2' cannot choose .* another layer learns the first of them"):
        compiled(model, (3, 6, 6), LayerShare(layer="0", share=0.25, of="outputs"), largest)
    whole = LayerShare(layer="0", share=0.9, choose="largest")
    assert compiled(model, (3, 6, 6), whole, largest).trained["0"].channels == 3, "of three inputs 0.9 is all"


def test_what_cannot_be_ordered_is_refused(tmp_path: Path) -> None:
    model, shape = build(Pools), Pools.shape
    for layer in ("stem", "join"):
        with pytest.raises(ConfigError, match=f"layer '{layer}' cannot choose the largest of its channels"):
            compiled(model, shape, LayerShare(layer=layer, share=0.5, choose="largest"))
    whole = LayerShare(layer="join", choose="largest")
    assert "join.weight" in compiled(model, shape, whole).float_graph.constants, "all of them need no order"
    (tmp_path / "s.toml").write_text('name = "s"\n[[weights]]\nlayer = "-1"\nshare = 0.5\nchoose = "largest"\n')
    assert Scheme.load(tmp_path / "s.toml").weights == (LayerShare(layer="-1", share=0.5, choose="largest"),)
    (tmp_path / "s.toml").write_text('name = "s"\n[[weights]]\nlayer = "-1"\nchoose = "best"\n')
    with pytest.raises(ConfigError, match="best"):
        Scheme.load(tmp_path / "s.toml")
    (tmp_path / "s.toml").write_text('name = "s"\n[[weights]]\nlayer = "-1"\nof = "both"\n')
    with pytest.raises(ConfigError, match="both"):
        Scheme.load(tmp_path / "s.toml")
    with pytest.raises(ConfigError, match="which is the head, whose outputs are the classes"):
        compiled(model, shape, LayerShare(layer="head", share=0.5, of="outputs"))
