"""Who holds what: lazy partitions of one data set over any number of clients."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efftrain.errors import ConfigError
from efftrain.federated.data import Partition, client_data, client_train, server_test
from efftrain.federated.recipe import DataConfig

KINDS = ("iid", "dirichlet", "shards")
RNG = np.random.default_rng(0)
LABELS, TEST_LABELS = RNG.integers(10, size=2000), RNG.integers(10, size=400)


def config(kind: str, clients: int = 40, **knobs: Any) -> DataConfig:
    return DataConfig(name="digits", partition=kind, clients=clients, **knobs)  # type: ignore[arg-type]


def partition(kind: str, clients: int = 40, seed: int = 0, **knobs: Any) -> Partition:
    return Partition(config(kind, clients, **knobs), LABELS, TEST_LABELS, seed, num_classes=10)


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_has_two_owners_while_there_are_enough(kind: str) -> None:
    whole = partition(kind)
    assert whole.disjoint
    parts = [whole.indices(client) for client in range(40)]
    assert {len(part) for part in parts} == {50}
    assert len(np.unique(np.concatenate(parts))) == 2000


@pytest.mark.parametrize("kind", KINDS)
def test_a_crowd_shares_samples_and_each_has_its_own_draw(kind: str) -> None:
    whole = partition(kind, 100_000)
    assert not whole.disjoint
    parts = [whole.indices(client) for client in (0, 1, 99_999)]
    assert {len(np.unique(part)) for part in parts} == {50}
    assert not np.array_equal(parts[0], parts[1])
    np.testing.assert_array_equal(parts[2], partition(kind, 100_000).indices(99_999))
    assert not np.array_equal(parts[2], partition(kind, 100_000, seed=1).indices(99_999))


def test_a_population_costs_nothing_before_it_is_used() -> None:
    started = time.perf_counter()
    whole = partition("dirichlet", 10_000_000)
    whole.indices(9_999_999)
    assert time.perf_counter() - started < 0.5


def test_alpha_says_how_uneven_the_classes_are() -> None:
    def classes(alpha: float) -> float:
        whole = partition("dirichlet", 100_000, alpha=alpha)
        return float(np.mean([len(np.unique(LABELS[whole.indices(client)])) for client in range(50)]))

    assert classes(0.01) < 2.5 < 4 < classes(0.5) < 9 < classes(100)


def test_shards_give_few_classes() -> None:
    whole = partition("shards")
    assert max(len(np.unique(LABELS[whole.indices(client)])) for client in range(40)) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_is_tested_on_its_own_mix(kind: str) -> None:
    whole = partition(kind, 100_000, alpha=0.1)
    for client in range(5):
        trained, tested = LABELS[whole.indices(client)], TEST_LABELS[whole.test_indices(client)]
        assert np.bincount(trained, minlength=10)[np.unique(tested)].sum() >= 25
        np.testing.assert_allclose(whole.shares(client).sum(), 1)


def test_client_data_of_each_kind() -> None:
    for kind in KINDS:
        data = client_data(config(kind, 1000), 7, seed=3)
        assert (len(data.train), len(data.test)) == (50, 50)
        np.testing.assert_array_equal(client_train(config(kind, 1000), 7, seed=3).inputs, data.train.inputs)
    watch = DataConfig(partition="iid", clients=20)
    assert client_data(watch, 0).train.input_shape == (6, 128)
    assert len(server_test(config("iid"))) == 360
    assert len(server_test(DataConfig())) == sum(len(client_data(DataConfig(), person).test) for person in range(8))


def test_no_such_client() -> None:
    for number in (-1, 40):
        with pytest.raises(ConfigError, match="the recipe has 40 clients"):
            client_train(config("iid"), number)


WRITERS = """
import numpy as np

class Data:
    def __init__(self, split):
        rng = np.random.default_rng(len(split))
        size = {"train": 90, "test": 40}[split]
        self.groups = rng.choice([3, 5, 1000, 7], size)
        self.x = np.stack([self.groups, np.arange(size)], 1).astype(np.float32)
        if split == "test":
            self.groups = np.where(self.groups == 7, 3, self.groups)
    def __len__(self):
        return len(self.x)
    def batch(self, indices):
        return self.x[indices], indices % 2

class Without(Data):
    groups = property(lambda self: None, lambda self, value: None)
    def __init__(self, split):
        self.x = np.zeros((90, 2), np.float32)
"""


def test_groups_of_ones_own_data_are_its_natural_clients(tmp_path: Path) -> None:
    (tmp_path / "writers.py").write_text(WRITERS)
    own = DataConfig(name=f"{tmp_path / 'writers.py'}:Data", partition="natural", clients=4)
    seen = []
    for client, writer in enumerate([3, 5, 7, 1000]):
        train = client_train(own, client, seed=client)
        assert set(train.inputs[:, 0]) == {writer}
        assert (np.diff(train.inputs[:, 1]) > 0).all()
        seen += train.inputs[:, 1].tolist()
        if writer != 7:
            data = client_data(own, client)
            np.testing.assert_array_equal(data.train.inputs, train.inputs)
            assert {writer} <= set(data.test.inputs[:, 0]) <= {writer, 7}
    assert sorted(seen) == list(range(90))
    with pytest.raises(ConfigError, match=r"group 7 of data set .* has no test samples.*server.evaluate"):
        client_data(own, 2)
    with pytest.raises(ConfigError, match=r"are of 4 groups. Set data.clients=4"):
        client_train(replace(own, clients=5), 0)
    with pytest.raises(ConfigError, match=r"has no groups.*attribute groups"):
        client_train(replace(own, name=own.name.replace(":Data", ":Without")), 0)
    with pytest.raises(ValueError, match="clients is 0"):
        replace(own, clients=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "digits", "partition": "natural"}, "no natural partition"),
        ({"clients": 3}, "one client a person"),
        ({"partition": "iid"}, "clients is 0"),
        ({"partition": "iid", "clients": 9, "samples_per_client": 0}, "samples_per_client is 0"),
        ({"partition": "shards", "clients": 9, "samples_per_client": 5}, "a multiple of shards_per_client"),
        ({"partition": "dirichlet", "clients": 9, "alpha": 0.0}, "alpha is 0"),
    ],
)
def test_wrong_data_sections_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DataConfig(), **change)
