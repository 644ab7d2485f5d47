"""Client engines: what they agree on, what they refuse, and that threads and earlier clients leave no trace."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError, NonFiniteError
from efftrain.federated.data import client_data, client_train
from efftrain.federated.engines import ENGINES, State, Trained, get_engine
from efftrain.federated.recipe import ClientConfig, DataConfig, ModelConfig
from efftrain.models import build_model
from efftrain.ondevice import Board
from efftrain.ondevice.backends.toolchain import WARNINGS
from efftrain.ondevice.emit.f32_plan import plan_host
from efftrain.ondevice.emit.f32_source import host_f32_sources
from efftrain.ondevice.frontend import read_module

WATCH = ModelConfig(name="watch-cnn")
SMALL_FASHION = ModelConfig(name="fashion-cnn", options={"size": 12, "channels": (4, 6), "hidden": 10})
DENSE = ClientConfig(engine="device", epochs=2, batch_size=8, lr=0.05, momentum=0.5)
SPARSE = ClientConfig(engine="device", scheme="sparse", epochs=1, lr=0.02)
PEOPLE = DataConfig(people=(1, 2, 3, 4))


def images(num_samples: int, seed: int = 0) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_samples, 1, 12, 12)).astype(np.float32)
    return ArrayDataset("noise", inputs, rng.integers(0, 10, num_samples), num_classes=10)


def same(one: State, two: State) -> bool:
    return set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)


def floats(tensor: np.ndarray) -> npt.NDArray[np.float32]:
    return np.asarray(tensor, np.float32)


@pytest.fixture(scope="module")
def started() -> State:
    """A watch-cnn that knows a little: trained for a moment on the early parts."""
    data = client_data(replace(PEOPLE, train_part="early"), 0).train
    others = [client_data(replace(PEOPLE, train_part="early"), i).train for i in range(1, 4)]
    inputs = np.concatenate([data.inputs, *(other.inputs for other in others)])
    targets = np.concatenate([data.targets, *(other.targets for other in others)])
    engine, config = get_engine("device"), ClientConfig(engine="device", epochs=12, lr=0.05, momentum=0.8)
    state = engine.initial_state(WATCH, 0)
    return engine.train(WATCH, state, ArrayDataset("early", inputs, targets, num_classes=7), config, 0).state


@pytest.mark.parametrize("model", [SMALL_FASHION, WATCH], ids=lambda model: model.name)
def test_device_is_torch_up_to_rounding(model: ModelConfig) -> None:
    """The same shuffles, batches (the last one smaller) and momentum; a few ulp a step."""
    data = images(21) if model is SMALL_FASHION else client_data(PEOPLE, 1).train.subset(np.arange(21))
    state = get_engine("torch").initial_state(model, 3)
    assert same(state, get_engine("device").initial_state(model, 3))
    expected, found = (get_engine(name).train(model, state, data, DENSE, 5) for name in ("torch", "device"))
    assert list(found.state) == list(expected.state)
    for name, tensor in expected.state.items():
        assert found.state[name].dtype == np.float32
        np.testing.assert_allclose(floats(found.state[name]), floats(tensor), rtol=0, atol=2e-6, err_msg=name)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.num_samples == 21
    assert found.trained is None
    assert found.ram_bytes is not None
    measured = [get_engine(name).evaluate(model, expected.state, data, DENSE) for name in ("torch", "device")]
    assert measured[0].accuracy == measured[1].accuracy
    assert measured[0].loss == pytest.approx(measured[1].loss, rel=1e-5)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=lambda config: config.scheme)
def test_any_number_of_threads_gives_the_same_bits(config: ClientConfig, started: State) -> None:
    clients = [(started, client_data(PEOPLE, i % 4).train.subset(np.arange(5 + i)), i) for i in range(12)]
    engine = get_engine("device")

    def run(client: tuple[State, ArrayDataset, int]) -> Trained:
        return engine.train(WATCH, client[0], client[1], config, client[2])

    alone = [run(client) for client in clients]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, reversed(clients)))[::-1]
    for one, two in zip(alone, together, strict=True):
        assert same(one.state, two.state)
        assert (one.loss, one.ram_bytes) == (two.loss, two.ram_bytes)


def test_a_client_that_diverges_leaves_no_trace() -> None:
    engine, data = get_engine("device"), images(17)
    state = engine.initial_state(SMALL_FASHION, 1)
    before = engine.train(SMALL_FASHION, state, data, DENSE, 2)
    broken = {name: np.full_like(tensor, np.nan) for name, tensor in state.items()}
    for bad_state, bad_config in ((broken, DENSE), (state, replace(DENSE, lr=1e30))):
        with pytest.raises(NonFiniteError, match=r"local training diverged.*Lower client\.lr"):
            engine.train(SMALL_FASHION, bad_state, data, bad_config, 2)
    assert same(engine.train(SMALL_FASHION, state, data, DENSE, 2).state, before.state)


@pytest.mark.parametrize(
    ("name", "shape", "operator"),
    [
        ("resnet8", (3, 32, 32), "operator add "),
        ("ds-cnn", (1, 49, 10), "operator depthwise convolution"),
        ("fc-autoencoder", (640,), r"operator batch norm \(layers\.0\.1\)"),
    ],
)
def test_what_the_compiler_cannot_take_is_named(name: str, shape: tuple[int, ...], operator: str) -> None:
    engine, model = get_engine("device"), ModelConfig(name=name)
    data = ArrayDataset("noise", np.zeros((3, *shape), np.float32), np.zeros(3, np.int64), num_classes=10)
    with pytest.raises(
        ConfigError, match=rf'{name} cannot be trained by the device engine.*{operator}.*engine="torch"'
    ):
        engine.train(model, engine.initial_state(model, 0), data, DENSE, 0)


def test_what_does_not_fit_is_refused(started: State) -> None:
    device, torch_engine, data = get_engine("device"), get_engine("torch"), client_data(PEOPLE, 0).train
    few = data.subset(np.arange(3))
    with pytest.raises(ConfigError, match=r"tensor 'conv1\.bias' has shape nothing, the model's has \(16,\)"):
        device.train(WATCH, {name: t for name, t in started.items() if name != "conv1.bias"}, few, DENSE, 0)
    with pytest.raises(ConfigError, match=r"tensor 'head\.bias' has shape \(6,\), the model's has \(7,\)"):
        device.evaluate(WATCH, {**started, "head.bias": np.zeros(6, np.float32)}, few, DENSE)
    strange = ArrayDataset("strange", few.inputs, np.array([1, 2, 9]), num_classes=10)
    with pytest.raises(ConfigError, match=r"targets run from 1 to 9; they must be in \[0, 7\)"):
        device.train(WATCH, started, strange, DENSE, 0)
    with pytest.raises(ConfigError, match=r'client\.scheme is "fp32", but a microcontroller trains in integers'):
        get_engine("board").train(WATCH, started, few, replace(DENSE, engine="board"), 0)
    with pytest.raises(ConfigError, match="torch engine trains every parameter in fp32"):
        torch_engine.train(WATCH, started, few, replace(SPARSE, engine="torch"), 0)
    with pytest.raises(ConfigError, match=r"scheme 'spars' is not known.*Did you mean 'sparse'"):
        device.train(WATCH, started, few, replace(SPARSE, scheme="spars"), 0)
    with pytest.raises(ConfigError, match="board 'zx81' is not known"):
        device.train(WATCH, started, few, replace(SPARSE, board="zx81"), 0)
    with pytest.raises(ConfigError, match=r"no samples of data set 'strange' to calibrate.*known are watch, fashion"):
        device.train(WATCH, started, replace(few, name="strange"), SPARSE, 0)
    with pytest.raises(ConfigError, match=r"engine 'devise' is unknown, expected one of torch, vmap, device, board"):
        get_engine("devise")
    assert ENGINES == ("torch", "vmap", "device", "board")


def test_integers_of_any_model_are_calibrated_on_what_is_public_of_the_data() -> None:
    model = ModelConfig(name="fashion-cnn", options={"size": 8, "channels": (2, 4), "hidden": 8})
    digits = DataConfig(name="digits", partition="iid", clients=20, samples_per_client=50)
    device = get_engine("device")
    config = ClientConfig(engine="device", scheme="last_k=1", epochs=1, lr=0.02)
    result = device.train(model, device.initial_state(model, 0), client_train(digits, 3, 0), config, 1)
    assert result.trained is not None
    assert set(result.trained) == {"fc2.weight", "fc2.bias"}
    assert all(np.isfinite(tensor).all() for tensor in result.state.values())


def test_integers_of_a_convolution_in_groups_go_back_to_its_filters(tmp_path: Path) -> None:
    file = tmp_path / "grouped.py"
    file.write_text(
        "from torch import nn\n"
        "def Net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(96, 10))\n"
    )
    model = ModelConfig(name=f"{file}:Net")
    digits = DataConfig(name="digits", partition="iid", clients=20, samples_per_client=50)
    device = get_engine("device")
    before = device.initial_state(model, 0)
    config = ClientConfig(engine="device", scheme="last_k=2", epochs=1, lr=0.02)
    result = device.train(model, before, client_train(digits, 3, 0), config, 1)
    assert result.trained is not None
    assert set(result.trained) == {"2.weight", "2.bias", "5.weight", "5.bias"}
    expected = get_engine("torch").train(
        model, before, client_train(digits, 3, 0), replace(config, scheme="fp32", batch_size=1), 1
    )
    moved, wanted = (floats(one.state["2.weight"]) - floats(before["2.weight"]) for one in (result, expected))
    assert moved.shape == (6, 2, 3, 3)
    assert np.corrcoef(moved.ravel(), wanted.ravel())[0, 1] > 0.9


def test_sparse_integers_train_what_they_say_and_nothing_else(started: State) -> None:
    result = get_engine("device").train(WATCH, started, client_data(PEOPLE, 2).train, SPARSE, 1)
    assert result.trained is not None
    assert set(result.trained) == {"conv2.bias", "conv3.bias", "conv3.weight", "head.weight", "head.bias"}
    mask = result.trained["conv3.weight"]
    assert mask is not None
    assert mask[:, :16].all()
    assert not mask[:, 16:].any()
    for name, tensor in started.items():
        moved = result.state[name] != tensor
        if name not in result.trained:
            assert not moved.any(), name
        elif name == "conv3.weight":
            assert not moved[~mask].any()
            assert moved[mask].mean() > 0.3
        else:
            assert moved.any(), name
    # What the plan of the board counts, its stack included.
    assert result.ram_bytes is not None
    assert result.ram_bytes < 16_384 < Board.named("stm32f746").ram_bytes


def test_a_few_rounds_of_sparse_integers_help(started: State) -> None:
    engine, state = get_engine("device"), started
    clients = [client_data(PEOPLE, i) for i in range(4)]

    def accuracy() -> float:
        return float(np.mean([engine.evaluate(WATCH, state, client.test, SPARSE).accuracy for client in clients]))

    before = accuracy()
    for number in range(3):
        results = [engine.train(WATCH, state, c.train, SPARSE, 10 * number + i) for i, c in enumerate(clients)]
        state = {name: np.mean([floats(one.state[name]) for one in results], axis=0) for name in state}
    assert accuracy() > before + 0.02


@pytest.mark.firmware
def test_the_board_gives_the_same_update_bytes(started: State) -> None:
    data = client_data(PEOPLE, 3).train.subset(np.arange(10))
    results = [
        get_engine(name).train(WATCH, started, data, replace(SPARSE, engine=name), 4) for name in ("device", "board")
    ]
    assert all(results[0].state[name].tobytes() == results[1].state[name].tobytes() for name in started)
    assert results[0].ram_bytes == results[1].ram_bytes
    measured = [get_engine(name).evaluate(WATCH, results[0].state, data, SPARSE) for name in ("device", "board")]
    assert measured[0] == measured[1]


HARNESS = """
#include <stdio.h>
#include <stdlib.h>
#include <stdint.h>
double eft_train(float *a, const float *const *state, float *const *result, const float *samples,
                 const int64_t *targets, const int64_t *order, int64_t count, int64_t epochs, float rate,
                 float momentum);
double eft_evaluate(float *a, const float *const *state, const float *samples, const int64_t *targets, int64_t count,
                    int64_t *right);
int64_t eft_arena_floats(void);
static float *noise(size_t count) {
    float *values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++) { values[i] = (float)(rand() % 2001 - 1000) / 4000.0F; }
    return values;
}
int main(void) {
    const size_t sizes[] = {SIZES};
    const size_t tensors = sizeof sizes / sizeof *sizes;
    const float *state[sizeof sizes / sizeof *sizes];
    float *result[sizeof sizes / sizeof *sizes];
    int64_t targets[COUNT], order[2 * COUNT], right = 0;
    for (size_t i = 0; i < tensors; i++) { state[i] = noise(sizes[i]); result[i] = noise(sizes[i]); }
    for (int i = 0; i < 2 * COUNT; i++) { order[i] = (7 * i) % COUNT; targets[i % COUNT] = i % CLASSES; }
    float *arena = calloc((size_t)eft_arena_floats(), sizeof *arena);
    float *samples = noise((size_t)COUNT * SAMPLE);
    const double loss = eft_train(arena, state, result, samples, targets, order, COUNT, 2, 0.05F, 0.5F);
    const float *const *after = (const float *const *)result;
    printf("%g %g\\n", loss, eft_evaluate(arena, after, samples, targets, COUNT, &right));
    for (size_t i = 0; i < tensors; i++) { free((void *)(uintptr_t)state[i]); free(result[i]); }
    free(arena); free(samples);
    return loss > 0 ? 0 : 1;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
@pytest.mark.parametrize(("model", "classes"), [(SMALL_FASHION, 10), (WATCH, 7)], ids=["images", "signals"])
def test_generated_code_keeps_to_its_arena(model: ModelConfig, classes: int, tmp_path: Path) -> None:
    """Clean under all warnings; address and undefined-behavior sanitizers report nothing."""
    module = build_model(model.name, **model.options)
    shape: tuple[int, ...] = module.input_shape  # type: ignore[assignment]
    plan = plan_host(read_module(module, torch.zeros(1, *shape)), 4)
    sizes = ", ".join(str(int(np.prod(parameter.shape))) for parameter in plan.parameters)
    numbers = {"SIZES": sizes, "COUNT": 7, "CLASSES": classes, "SAMPLE": int(np.prod(shape))}
    for name, text in {**host_f32_sources(plan), "main.c": HARNESS}.items():
        (tmp_path / name).write_text(text)
    defines = [f"-D{name}={value}" for name, value in numbers.items()]
    flags = ["-std=c99", *WARNINGS, "-Wno-psabi", "-fno-strict-aliasing"]
    checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, *checks, "-c", "client.c"], cwd=tmp_path, check=True)
    subprocess.run(["gcc", *checks, *defines, "main.c", "client.o", "-lm", "-o", "harness"], cwd=tmp_path, check=True)
    ran = subprocess.run(["./harness"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (ran.returncode, ran.stderr) == (0, "")
