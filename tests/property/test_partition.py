"""Partitions: every sample exactly once, the same for the same seed, whatever is asked."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.data import by_group, dirichlet, heterogeneity, iid, shards

labels = st.lists(st.integers(0, 9), min_size=1, max_size=200).map(np.array)
seeds = st.integers(0, 2**32 - 1)


def check(parts: list[np.ndarray], num_samples: int, num_clients: int) -> None:
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_samples))


@given(labels)
def test_by_group_gives_each_group_its_samples(groups: np.ndarray) -> None:
    parts = by_group(groups)
    check(parts, len(groups), len(np.unique(groups)))
    for part, group in zip(parts, np.unique(groups), strict=True):
        assert (groups[part] == group).all()


@given(st.data(), st.integers(1, 300), seeds)
def test_iid_sizes_differ_by_at_most_one(data: st.DataObject, num_samples: int, seed: int) -> None:
    num_clients = data.draw(st.integers(1, num_samples))
    parts = iid(num_samples, num_clients, seed)
    check(parts, num_samples, num_clients)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.data(), labels, st.floats(1e-3, 1e6), seeds)
def test_dirichlet_keeps_the_minimum(data: st.DataObject, labels: np.ndarray, alpha: float, seed: int) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    min_samples = data.draw(st.integers(0, len(labels) // num_clients))
    parts = dirichlet(labels, num_clients, alpha, seed, min_samples)
    check(parts, len(labels), num_clients)
    assert min(len(part) for part in parts) >= min_samples


@given(st.data(), labels, seeds)
def test_shards_limit_the_classes_of_a_client(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    num_shards = data.draw(st.integers(1, min(5, len(labels))))
    num_clients = data.draw(st.integers(1, len(labels) // num_shards))
    parts = shards(labels, num_clients, num_shards, seed)
    check(parts, len(labels), num_clients)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= num_shards


@given(st.data(), labels, seeds)
def test_heterogeneity_stays_in_its_ranges(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    report = heterogeneity(labels, dirichlet(labels, num_clients, 0.3, seed, 0))
    assert 0 <= report.total_variation <= 1
    assert 0 <= report.jensen_shannon_bits <= 1
    assert -1e-9 <= report.label_entropy_bits <= np.log2(max(2, report.num_classes)) + 1e-9
    assert report.num_samples == len(labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: iid(100, 7, seed),
        lambda seed: dirichlet(np.arange(100) % 10, 7, 0.5, seed),
        lambda seed: shards(np.arange(100) % 10, 7, 2, seed),
    ],
)
def test_the_seed_decides(make: Callable[[int], list[np.ndarray]]) -> None:
    for one, other in zip(make(3), make(3), strict=True):
        assert np.array_equal(one, other)
    assert any(not np.array_equal(one, other) for one, other in zip(make(3), make(4), strict=True))
