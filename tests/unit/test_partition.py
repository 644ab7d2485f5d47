import json
import math

import numpy as np
import pytest

from efftrain.data import by_group, dirichlet, heterogeneity, iid, load_watch, shards
from efftrain.errors import ConfigError

LABELS = np.repeat(np.arange(10), 100)
GOLDEN_DIRICHLET = [201, 201, 195, 240, 163]
GOLDEN_IID = [0, 4, 7, 8]


def test_people_are_the_natural_clients_of_the_watch_data() -> None:
    data = load_watch().select([1, 2, 3])
    assert data.groups is not None
    parts = by_group(data.groups)
    assert [len(part) for part in parts] == [433, 418, 234]


def test_known_figures_of_two_clients() -> None:
    """One client has class 0 only, the other class 1 only, half of the samples each."""
    report = heterogeneity(np.array([0, 0, 1, 1]), [np.array([0, 1]), np.array([2, 3])])
    assert report.label_entropy_bits == 0
    assert report.global_label_entropy_bits == 1
    assert report.total_variation == 0.5  # |1 - 1/2| / 2 + |0 - 1/2| / 2
    # H(3/4, 1/4) - (0 + 1) / 2
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert report.jensen_shannon_bits == pytest.approx(expected)
    assert (report.labels_per_client_mean, report.labels_per_client_min) == (1, 1)
    assert (report.samples_min, report.samples_mean, report.samples_max) == (2, 2, 2)
    assert json.loads(json.dumps(report.to_dict()))["num_clients"] == 2


def test_equal_clients_are_not_heterogeneous() -> None:
    report = heterogeneity(np.array([0, 1, 0, 1]), [np.array([0, 1]), np.array([2, 3])])
    assert report.total_variation == 0
    assert report.jensen_shannon_bits == 0
    assert report.label_entropy_bits == report.global_label_entropy_bits == 1


def test_a_smaller_alpha_is_more_heterogeneous() -> None:
    distances = [
        heterogeneity(LABELS, dirichlet(LABELS, 20, alpha, seed=0)).total_variation
        for alpha in (0.01, 0.1, 1, 10, 1000)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.7
    assert distances[-1] < 0.1
    assert heterogeneity(LABELS, iid(1000, 20, 0)).total_variation < 0.2


def test_one_shard_a_client_is_one_class_a_client() -> None:
    parts = shards(LABELS, 10, 1, seed=0)
    assert heterogeneity(LABELS, parts).labels_per_client_mean == 1
    assert heterogeneity(LABELS, shards(LABELS, 50, 2, seed=0)).labels_per_client_mean <= 2


def test_a_partition_is_the_same_on_every_machine() -> None:
    """Golden: a changed draw would change every federated run that is repeated."""
    assert [len(part) for part in dirichlet(LABELS, 5, 0.5, seed=1)] == GOLDEN_DIRICHLET
    assert iid(10, 3, seed=1)[0].tolist() == GOLDEN_IID


def test_impossible_asks_name_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"3 samples cannot give 4 clients 1 each\. Ask for fewer clients"):
        iid(3, 4, 0)
    with pytest.raises(ConfigError, match="1000 samples cannot give 20 clients 51 each"):
        dirichlet(LABELS, 20, 1.0, 0, min_samples=51)
    with pytest.raises(ConfigError, match="1000 samples cannot give 501 clients 2 each"):
        shards(LABELS, 501, 2, 0)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="alpha in"):
            dirichlet(LABELS, 2, alpha, 0)
    with pytest.raises(ConfigError, match="at least 1 client"):
        iid(3, 0, 0)
    with pytest.raises(ConfigError, match="at least 1 shard"):
        shards(LABELS, 2, 0, 0)
    with pytest.raises(ConfigError, match="the group of each sample"):
        by_group(np.array([]))
    with pytest.raises(ConfigError, match="integers of shape"):
        dirichlet(np.array([0.5, 1.0]), 1, 1.0, 0)
    with pytest.raises(ConfigError, match="at least one part with a sample"):
        heterogeneity(LABELS, [])
    with pytest.raises(ConfigError, match=r"indices in \[0, 1000\)"):
        heterogeneity(LABELS, [np.array([1000])])
