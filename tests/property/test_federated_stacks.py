"""The ``vmap`` engine: stacked clients are those of the ``torch`` engine, to the same bits in any company."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError, NonFiniteError, PeerError
from efftrain.federated import FederatedRecipe, run_federated
from efftrain.federated.engines import Correction, State, Trained, get_engine, vmap_engine
from efftrain.federated.recipe import ClientConfig, DataConfig, FleetConfig, ModelConfig, RoundsConfig, UplinkConfig

CONFIG = ClientConfig(engine="vmap", epochs=1, batch_size=7, lr=0.05, stack=3)
# Sizes that are multiples of a cache line, and sizes that are not: there places in a stack are not alike by themselves.
MODELS = {
    "even": ModelConfig(name="fashion-cnn"),
    "odd": ModelConfig(name="fashion-cnn", options={"size": 12, "channels": (3, 5), "hidden": 13}),
    "odd linear": ModelConfig(name="mlp-10m", options={"input_shape": (3, 7), "hidden": (13, 5)}),
    "signals": ModelConfig(name="watch-cnn"),
}
SHAPES = {"even": (1, 28, 28), "odd": (1, 12, 12), "odd linear": (3, 7), "signals": (6, 128)}
ODD = MODELS["odd"]


def clients(kind: str, num: int) -> list[ArrayDataset]:
    """With 3, 8, 13, ... samples: one batch and several, the last one full or not."""
    rng = np.random.default_rng(0)
    sizes = [3 + 5 * (i % 5) for i in range(num)]
    inputs = [rng.normal(size=(size, *SHAPES[kind])).astype(np.float32) for size in sizes]
    return [ArrayDataset("noise", x, rng.integers(0, 7, len(x)), num_classes=7) for x in inputs]


def outcome(run: Callable[[], Trained]) -> Trained | NonFiniteError:
    try:
        return run()
    except NonFiniteError as error:
        return error


def train_all(
    kind: str, data: Sequence[ArrayDataset], order: Sequence[int], threads: int, config: ClientConfig = CONFIG
) -> list[Trained | NonFiniteError]:
    """All clients through the engine, in an order and by so many threads; the last one's data are no numbers."""
    engine, model = get_engine("vmap"), MODELS[kind]
    state = engine.initial_state(model, 1)
    broken = ArrayDataset("broken", np.full_like(data[-1].inputs, np.nan), data[-1].targets, num_classes=7)
    given = [*data[:-1], broken]

    def one(i: int) -> Trained | NonFiniteError:
        return outcome(lambda: engine.train(model, state, given[i], config, i))

    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(order, pool.map(one, order), strict=True))
    return [found[i] for i in range(len(data))]


@cache
def alone(kind: str) -> list[Trained | NonFiniteError]:
    return train_all(kind, clients(kind, 5), range(5), 1)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=4)
@given(order=st.permutations(range(5)), threads=st.integers(2, 5))
def test_company_does_not_change_a_bit(kind: str, order: list[int], threads: int) -> None:
    """Whoever is in the stack, wherever: also beside a client that diverges, and beside padding."""
    expected, found = alone(kind), train_all(kind, clients(kind, 5), order, threads)
    assert isinstance(expected[-1], NonFiniteError)
    assert isinstance(found[-1], NonFiniteError)
    for one, two in zip(expected[:-1], found[:-1], strict=True):
        assert isinstance(one, Trained)
        assert isinstance(two, Trained)
        assert one.loss == two.loss
        assert all(np.array_equal(one.state[name], two.state[name]) for name in one.state)


@pytest.mark.parametrize(("momentum", "corrected"), [(0.0, False), (0.9, True)])
@pytest.mark.parametrize("kind", MODELS)
def test_stacked_training_is_the_torch_engines(kind: str, momentum: float, corrected: bool) -> None:
    """Two epochs of up to four steps; values below 1, sums of at most some thousand terms in another order."""
    config, data = replace(CONFIG, momentum=momentum, epochs=2), clients(kind, 5)
    state = get_engine("torch").initial_state(MODELS[kind], 1)
    rng = np.random.default_rng(2)

    def correction() -> Correction | None:
        offset: State = {name: rng.normal(size=t.shape).astype(np.float32) / 10 for name, t in state.items()}
        return Correction(0.5, offset) if corrected else None

    corrections = [correction() for _ in data]

    def one(engine: str, i: int) -> Trained:
        return get_engine(engine).train(MODELS[kind], state, data[i], config, i, corrections[i])

    with ThreadPoolExecutor(5) as pool:
        stacked = list(pool.map(lambda i: one("vmap", i), range(5)))
    for i, found in enumerate(stacked):
        expected = one("torch", i)
        assert list(found.state) == list(expected.state)
        assert found.num_samples == expected.num_samples
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        for name, tensor in expected.state.items():
            np.testing.assert_allclose(found.state[name], tensor, rtol=0, atol=1e-5, err_msg=name)  # type: ignore[arg-type]


def test_rounds_are_the_same_for_any_number_of_workers() -> None:
    recipe = FederatedRecipe(
        model=ModelConfig(name="fashion-cnn", options={"size": 8, "channels": (2, 4), "hidden": 8}),
        data=DataConfig(name="digits", partition="dirichlet", clients=9, samples_per_client=20),
        client=CONFIG,
        server=RoundsConfig(rounds=2, cohort=5, evaluate="server", strategy="scaffold"),
        uplink=UplinkConfig(codec="Identity()"),
    )
    one, five = (run_federated(replace(recipe, fleet=FleetConfig(workers=workers))) for workers in (1, 5))
    assert one.final_sha256 == five.final_sha256
    torch_engine = run_federated(replace(recipe, client=replace(recipe.client, engine="torch")))
    for name, tensor in torch_engine.state.items():
        np.testing.assert_allclose(one.state[name].numpy(), tensor.numpy(), rtol=0, atol=1e-5)


def test_what_cannot_be_stacked_is_named() -> None:
    engine = get_engine("vmap")
    for name, shape, layer in (("resnet8", (3, 32, 32), "BatchNorm2d"), ("fc-autoencoder", (640,), "BatchNorm1d")):
        model = ModelConfig(name=name)
        data = ArrayDataset("noise", np.zeros((3, *shape), np.float32), np.zeros(3, np.int64), num_classes=10)
        with pytest.raises(ConfigError, match=rf'{name} cannot .* vmap engine: its layer {layer} .*engine="torch"'):
            engine.train(model, engine.initial_state(model, 0), data, CONFIG, 0)
    with pytest.raises(ConfigError, match="vmap engine trains every parameter in fp32"):
        engine.train(ODD, engine.initial_state(ODD, 0), clients("odd", 1)[0], replace(CONFIG, scheme="sparse"), 0)


def test_what_is_wrong_with_one_client_is_its_own_problem() -> None:
    engine, data = get_engine("vmap"), clients("odd", 2)
    state = engine.initial_state(ODD, 0)
    strange = Correction(0.0, {"fc1.bias": np.zeros(3, np.float32)})
    wrong: list[tuple[State, ArrayDataset, str, Correction | None]] = [
        ({name: t for name, t in state.items() if name != "fc1.bias"}, data[1], "'fc1.bias' has shape nothing", None),
        (state, data[1], r"correction of 'fc1.bias' has shape \(3,\), expected \(13,\)", strange),
        (
            state,
            clients("even", 1)[0],
            r"samples of shape \(1, 28, 28\), fashion-cnn takes some of shape \(1, 12, 12\)",
            None,
        ),
        (state, data[1].subset(np.arange(0)), "a client has 0 samples", None),
    ]
    with ThreadPoolExecutor(4) as pool:
        good = pool.submit(engine.train, ODD, state, data[0], CONFIG, 0)
        bad = [pool.submit(engine.train, ODD, one, samples, CONFIG, 0, added) for one, samples, _, added in wrong]
        for future, (_, _, message, _) in zip(bad, wrong, strict=True):
            with pytest.raises(ConfigError, match=message):
                future.result(10)
        assert good.result(10).num_samples == 3


@pytest.mark.parametrize("failure", ["crash", "hang"])
def test_nobody_waits_for_ever(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that leads a stack crashes, or hangs: the others end, and the next stack is trained."""
    whole, first, ended = vmap_engine._train, threading.Lock(), threading.Event()

    def train(*arguments: object) -> None:
        if first.acquire(blocking=False):
            if failure == "crash":
                raise MemoryError("no room")
            ended.wait(20)
        whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(vmap_engine, "_train", train)
    engine, data = vmap_engine.VmapEngine(), clients("odd", 3)
    state, config = engine.initial_state(ODD, 0), replace(CONFIG, timeout_s=0.5)
    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(engine.train, ODD, state, one, config, i) for i, one in enumerate(data)]
        ends, _ = wait(futures, 5, return_when="ALL_COMPLETED" if failure == "crash" else "FIRST_EXCEPTION")
        late, _ = wait(futures, 0.5)
        errors = [type(future.exception()) for future in {*ends, *late}]
        ended.set()
        assert errors == [MemoryError] * 3 if failure == "crash" else errors == [PeerError] * 2
        assert time.monotonic() - started < 5
    assert engine.train(ODD, state, data[0], config, 0).num_samples == 3
