"""Strategies by name against rules written out in NumPy, and ours against Flower's where Flower has one."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.errors import ConfigError
from efftrain.federated.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    ErrorCode,
    FedAvg,
    Message,
    MetricRecord,
    RecordDict,
)
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.strategies import STRATEGIES, build_strategy
from efftrain.federated.strategies.rules import geometric_median, norm_bounded_mean

Model = dict[str, np.ndarray]
START: Model = {
    "a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.array([0.5], np.float32),
    "count": np.array(7, np.int64),
}


def models(num: int, seed: int = 0, spread: float = 0.1) -> list[Model]:
    rng = np.random.default_rng(seed)
    return [
        {
            name: (t + rng.normal(0, spread, t.shape)).astype(t.dtype) if name != "count" else t
            for name, t in START.items()
        }
        for _ in range(num)
    ]


def record(model: Model) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(tensor)) for name, tensor in model.items()})


def aggregate(
    name: str,
    clients: Sequence[Model],
    samples: Sequence[int] | None = None,
    number: int = 1,
    **options: int | float | str,
) -> Model:
    """One round through the strategy, from messages out to the model that comes back; one client fails besides."""
    strategy = build_strategy(name, options, seed=3, population=len(clients) + 1)
    grid = InProcessGrid(ClientApp, len(clients) + 1)
    sent = list(strategy.configure_train(number, record(START), ConfigRecord(), grid))
    assert sorted(message.metadata.dst_node_id for message in sent) == sorted(grid.get_node_ids())
    replies = [Message(Error(ErrorCode.UNKNOWN, "asleep"), reply_to=sent[-1])]
    for i, (message, client) in enumerate(zip(sent, clients, strict=False)):
        said = MetricRecord({"num-examples": samples[i] if samples else 10, "loss": float(i)})
        model = ArrayRecord({**message.content.array_records["arrays"], **record(client)})
        replies.append(Message(RecordDict({"arrays": model, "metrics": said}), reply_to=message))
    arrays, metrics = strategy.aggregate_train(number, replies)
    assert arrays is not None
    assert metrics is not None
    assert "loss" in metrics
    return {key: array.numpy() for key, array in arrays.items()}


def rows(clients: Sequence[Model]) -> np.ndarray:
    return np.stack([np.concatenate([c["a"].ravel(), c["b"]]) for c in clients]).astype(np.float64)


def row(model: Model) -> np.ndarray:
    return np.asarray(rows([model])[0])


def expect_mean(clients: list[Model]) -> np.ndarray:
    return np.asarray(rows(clients).mean(0))


def expect_trimmed(clients: list[Model]) -> np.ndarray:
    return np.asarray(np.sort(rows(clients), axis=0)[2:-2].mean(0))


def expect_krum(clients: list[Model], num_selected: int = 1) -> np.ndarray:
    points = rows(clients)
    squares = ((points[:, None] - points[None]) ** 2).sum(2)
    scores = [np.sort(line)[1 : len(points) - 2 - 2 + 1].sum() for line in squares]
    return np.asarray(points[np.argsort(scores)[:num_selected]].mean(0))


def expect_bounded(clients: list[Model]) -> np.ndarray:
    updates = rows(clients) - row(START)
    norms = np.linalg.norm(updates, axis=1)
    return np.asarray(row(START) + (updates * np.minimum(1, np.median(norms) / norms)[:, None]).mean(0))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("fedavg", {}, expect_mean),
        ("fedprox", {"mu": 0.5}, expect_mean),
        ("scaffold", {}, expect_mean),
        ("scaffold", {"lr": 0.5}, lambda c: row(START) + 0.5 * (expect_mean(c) - row(START))),
        ("fedavgm", {"lr": 0.5, "momentum": 0.0}, lambda c: row(START) + 0.5 * (expect_mean(c) - row(START))),
        ("median", {}, lambda c: np.median(rows(c), axis=0)),
        ("trimmed_mean", {"share": 0.2}, expect_trimmed),
        ("krum", {"num_malicious": 2}, expect_krum),
        ("multi_krum", {"num_malicious": 2, "num_selected": 1}, expect_krum),
        ("multi_krum", {"num_malicious": 2, "num_selected": 3}, lambda c: expect_krum(c, 3)),
        ("multi_krum", {"num_malicious": 2}, lambda c: expect_krum(c, 8)),
        ("norm_bounded_mean", {}, expect_bounded),
        ("norm_bounded_mean", {"bound": 1e6}, expect_mean),
        ("bucketing", {"size": 1, "rule": "median"}, lambda c: np.median(rows(c), axis=0)),
        ("bucketing", {"size": 1, "rule": "krum", "num_malicious": 2}, expect_krum),
        ("bucketing", {"size": 10, "rule": "median"}, expect_mean),
    ],
)
def test_rules_are_what_the_papers_say(
    name: str, options: dict[str, int | float | str], expected: Callable[[list[Model]], np.ndarray]
) -> None:
    """fp32 sums of ten numbers below 2 against fp64: a few 2**-24."""
    clients = models(10)
    found = aggregate(name, clients, None, 1, **options)
    np.testing.assert_allclose(row(found), expected(clients), rtol=0, atol=1e-6)


def test_adam_on_the_server() -> None:
    """Reddi et al., algorithm 2, with the bias correction that Flower adds (of step ``round + 1``)."""
    clients = models(5)
    found = aggregate("fedadam", clients, lr=0.02, beta_1=0.9, beta_2=0.99, tau=1e-3)
    delta = expect_mean(clients) - row(START)
    rate = 0.02 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    expected = row(START) + rate * 0.1 * delta / (np.sqrt(0.01 * delta**2) + 1e-3)
    np.testing.assert_allclose(row(found), expected, rtol=0, atol=1e-6)


def test_bulyan_stands_a_quarter_of_liars() -> None:
    clients = models(11, spread=0.01)
    for liar in clients[:2]:
        liar["a"] = liar["a"] * 1000
    honest = rows(clients[2:])
    found = row(aggregate("bulyan", clients, num_malicious=2))
    assert (found >= honest.min(0) - 1e-6).all()
    assert (found <= honest.max(0) + 1e-6).all()


@pytest.mark.parametrize("name", ["norm_bounded_mean", "geometric_median"])
def test_counters_and_types_stay_and_samples_do_not_count(name: str) -> None:
    clients = models(6)
    plain, loud = (aggregate(name, clients, samples) for samples in ([10] * 6, [1, 1000, 10, 10, 10, 10]))
    assert {key: tensor.dtype for key, tensor in plain.items()} == {key: tensor.dtype for key, tensor in START.items()}
    assert plain["count"] == 7
    assert all(np.array_equal(plain[key], loud[key]) for key in START)


@settings(max_examples=50)
@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 10_000), st.sampled_from((1e-6, 1.0, 1e4)))
def test_geometric_median_is_the_minimum(num: int, size: int, seed: int, scale: float) -> None:
    """No point near it, no client's own update and neither mean nor median has a smaller sum of distances."""
    rng = np.random.default_rng(seed)
    points = (scale * rng.normal(size=(num, size))).astype(np.float32)
    found = geometric_median(points, 1000, 1e-9)

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(points.astype(np.float64) - point, axis=1).sum())

    others = [points.mean(0), np.median(points, axis=0), *points, *(found + 1e-2 * scale * rng.normal(size=(50, size)))]
    assert total(found) <= min(total(np.asarray(other)) for other in others) * (1 + 1e-5)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 10_000))
def test_bounded_mean_moves_by_no_more_than_the_bound(num: int, size: int, seed: int) -> None:
    updates = (np.random.default_rng(seed).standard_cauchy((num, size))).astype(np.float32)
    assert np.linalg.norm(norm_bounded_mean(updates, 0.25)) <= 0.25 * (1 + 1e-6)
    assert np.linalg.norm(norm_bounded_mean(updates)) <= np.median(np.linalg.norm(updates, axis=1)) * (1 + 1e-5)
    assert not norm_bounded_mean(np.zeros((3, 2), np.float32)).any()


@pytest.mark.parametrize("name", ["geometric_median", "norm_bounded_mean", "median", "bucketing"])
def test_two_huge_liars_of_ten_move_it_little(name: str) -> None:
    clients = models(10, spread=0.01)
    honest = rows(clients[2:]).mean(0)
    for liar in clients[:2]:
        liar["a"] = liar["a"] + np.float32(1e5)
    assert np.linalg.norm(row(aggregate(name, clients)) - honest) < 0.05
    assert np.linalg.norm(row(aggregate("fedavg", clients)) - honest) > 1e4


def test_buckets_are_drawn_anew_each_round_from_the_seed() -> None:
    clients = models(9)
    first, again, other = (
        row(aggregate("bucketing", clients, number=number, rule="median", size=2)) for number in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    # All samples and metrics are still counted.
    strategy = build_strategy("bucketing", {"rule": "fedavg", "size": 4}, seed=0)
    asked = Message(RecordDict(), 1, "train")
    replies = [
        Message(
            RecordDict({"arrays": record(c), "metrics": MetricRecord({"num-examples": 1 + i, "loss": float(i)})}),
            reply_to=asked,
        )
        for i, c in enumerate(clients)
    ]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["loss"] == pytest.approx(np.average(np.arange(9), weights=np.arange(1, 10)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_takes_one_client_or_says_that_it_cannot(name: str) -> None:
    if name == "bulyan":
        with pytest.raises(AssertionError):
            aggregate(name, models(2))
        return
    found = aggregate(name, models(1))
    assert set(found) == set(START)
    assert all(np.isfinite(tensor).all() for tensor in found.values())


def test_own_rules_take_any_cohort_on_flowers_loop() -> None:
    """The stock driver of Flower, a stock app: ours are strategies like any other."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        moved = {name: array.numpy() + 1 for name, array in message.content.array_records["arrays"].items()}
        metrics = MetricRecord({"num-examples": 5, "loss": 0.5})
        return Message(RecordDict({"arrays": record(moved), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 5, "accuracy": 1.0})}), reply_to=message)

    for name in ("geometric_median", "norm_bounded_mean", "bucketing"):
        result = build_strategy(name, {}, seed=0).start(InProcessGrid(app, 5), record(START), num_rounds=2)
        np.testing.assert_allclose(result.arrays["a"].numpy(), START["a"] + 2, rtol=0, atol=1e-5)
        assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedavgx", {}, r"'fedavgx' is unknown, the nearest is 'fedavg'"),
        ("krum", {"num_maliscious": 1}, r"no option 'num_maliscious', the nearest is 'num_malicious'"),
        ("fedavg", {"lr": 1.0}, r"no option 'lr'; it has none"),
        ("trimmed_mean", {"share": 0.5}, r"share is 0\.5, expected a number of at least 0 and at most 0\.5"),
        ("krum", {"num_malicious": 1.5}, r"num_malicious is 1\.5, expected a whole number"),
        ("fedadam", {"lr": True}, r"lr is True, expected a number"),
        ("fedavgm", {"momentum": float("nan")}, r"momentum is nan, expected a number"),
        ("norm_bounded_mean", {"bound": float("inf")}, r"bound is inf, expected a number"),
        ("scaffold", {"mu": 1.0}, r"scaffold has no option 'mu'.*; it has lr"),
        ("scaffold", {}, r"must know how many clients there are"),
        ("bucketing", {"rule": "scaffold"}, r"rule is 'scaffold', expected one of fedavg"),
        ("bucketing", {"rule": "bucketing"}, r"rule is 'bucketing', expected one of fedavg"),
        ("bucketing", {"size": 0}, r"size is 0, expected a whole number of at least 1"),
        ("bucketing", {"rule": "median", "sise": 2}, r"no option 'sise', the nearest is 'size'"),
    ],
)
def test_wrong_settings_are_named(name: str, options: dict[str, int | float | str | bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_strategy(name, options, seed=0)


def test_mean_strategies_are_flowers_own() -> None:
    """The driver hands those the mean alone, and knows them by their type."""
    assert type(build_strategy("fedavg", {}, seed=0)) is FedAvg
