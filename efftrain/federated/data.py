"""Each client's own data, by its number in the population, made when it is asked for."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from efftrain.data import ArrayDataset, by_group, load_dataset, load_watch, standardize
from efftrain.errors import ConfigError
from efftrain.federated.recipe import DataConfig

# The second number of every seed here: two things drawn for one client must not come out the same.
_TRAIN, _TEST, _SHARES, _DEAL = range(4)


@dataclass(frozen=True, eq=False)
class ClientData:
    """What one client holds. It never leaves the client."""

    train: ArrayDataset
    test: ArrayDataset


def client_data(config: DataConfig, partition: int, seed: int = 0) -> ClientData:
    """The data of client ``partition``.

    With the natural partition that is the person ``config.people[partition]``, standardized, or a group of a data set
    of one's own. Otherwise it is a ``Partition`` of the training samples, and as many test samples in the client's own
    mix of classes.

    Args:
        config: Whose data and which parts.
        partition: Number of the client, from 0.
        seed: Of the recipe; what is made up is drawn from it.

    Raises:
        ConfigError: No such client, or its training or test part is empty; or the groups are not as many as clients.
    """
    if config.of_people:
        return _person(config, partition)
    train, test = client_train(config, partition, seed), server_test(config)
    if config.partition != "natural":
        return ClientData(train, test.subset(_partition(config, seed).test_indices(partition)))
    number = _groups(config)[0][partition]
    own = test.subset(np.flatnonzero(test.groups == number))
    if not len(own):
        raise ConfigError(
            f'group {number} of data set {config.name} has no test samples. Set server.evaluate="server", or leave the '
            "group out."
        )
    return ClientData(train, own)


def client_train(config: DataConfig, partition: int, seed: int = 0) -> ArrayDataset:
    """The training half of ``client_data``; the other half is not made."""
    if config.of_people:
        return _person(config, partition).train
    _check_client(config, partition)
    natural = config.partition == "natural"
    indices = _groups(config)[1][partition] if natural else _partition(config, seed).indices(partition)
    return _pools(config)[0].subset(indices)


def server_test(config: DataConfig) -> ArrayDataset:
    """What a server with test data of its own measures the global model on: the whole test set."""
    return _pools(config)[1]


class Partition:
    """Which samples each made-up client holds. Nothing is computed for a client before it is asked for.

    Every client has ``samples_per_client`` training samples. If there are enough for all, no two clients share one:
    ``iid`` and ``shards`` deal them out, and ``dirichlet`` draws each client's samples in turn from what is left. If
    not, each client draws its own, without repeats where the classes last, and clients share samples: that is how
    100,000 clients are made of 60,000 images.

    Args:
        config: Kind and sizes; not ``natural``.
        labels: Class of each training sample, int64, shape ``(N,)``.
        test_labels: The same of the test samples.
        seed: Of everything drawn.

    Source: ``dirichlet`` as in Hsu, Qi, Brown (arXiv:1909.06335): each client's shares of the classes are one draw of
        ``Dirichlet(alpha * prior)``. ``shards`` as in McMahan et al. (arXiv:1602.05629), section 3.
    """

    def __init__(
        self, config: DataConfig, labels: np.ndarray, test_labels: np.ndarray, seed: int, *, num_classes: int
    ) -> None:
        self._config = config
        self._labels, self._test_labels = labels, test_labels
        self._num_classes = num_classes
        self._seed = seed
        self.disjoint = config.clients * config.samples_per_client <= len(labels)
        """Whether no two clients share a training sample."""

    def indices(self, client: int) -> np.ndarray:
        """Training samples of a client, int64 in ``[0, N)``, shape ``(samples_per_client,)``, ascending."""
        size, kind = self._config.samples_per_client, self._config.partition
        if kind == "shards":
            drawn = self._hand(client)
        elif kind == "dirichlet":
            drawn = self._dealt[client] if self.disjoint else self._by_shares(client, self._by_class, size, _TRAIN)
        elif self.disjoint:
            drawn = self._shuffled[client * size : (client + 1) * size]
        else:
            drawn = _choose(self._rng(_TRAIN, client), len(self._labels), size)
        return np.sort(drawn)

    def test_indices(self, client: int) -> np.ndarray:
        """Test samples in the client's mix of classes; clients share them."""
        size = min(self._config.samples_per_client, len(self._test_labels))
        return np.sort(self._by_shares(client, self._test_by_class, size, _TEST))

    def shares(self, client: int) -> np.ndarray:
        """The mix of classes that a client is drawn with, shape ``(classes,)``, sums to 1."""
        prior = np.bincount(self._labels, minlength=self._num_classes) / len(self._labels)
        if self._config.partition == "iid":
            return np.asarray(prior)
        if self._config.partition == "shards":
            counts = np.bincount(self._labels[self._hand(client)], minlength=self._num_classes)
            return np.asarray(counts / counts.sum())
        rng = self._rng(_SHARES, client)
        # A small alpha underflows all its gammas to 0 now and then, and 0 / 0 is no mix: such a client has one class.
        drawn = rng.dirichlet(np.maximum(self._config.alpha * prior * self._num_classes, 1e-12))
        if not np.isfinite(drawn).all() or drawn.sum() <= 0:
            drawn = np.eye(self._num_classes)[rng.integers(self._num_classes)]
        return np.asarray(drawn / drawn.sum())

    # What is shared by all clients and made once ------------------------------------------------------------------

    @cached_property
    def _shuffled(self) -> np.ndarray:
        return np.asarray(self._rng(_DEAL, 0).permutation(len(self._labels)))

    @cached_property
    def _by_class(self) -> list[np.ndarray]:
        return [np.flatnonzero(self._labels == label) for label in range(self._num_classes)]

    @cached_property
    def _test_by_class(self) -> list[np.ndarray]:
        return [np.flatnonzero(self._test_labels == label) for label in range(self._num_classes)]

    @cached_property
    def _sorted(self) -> np.ndarray:
        """Samples by class, shuffled inside each."""
        order = self._shuffled
        if self.disjoint:
            order = order[: self._config.clients * self._config.samples_per_client]
        return order[np.argsort(self._labels[order], kind="stable")]

    @cached_property
    def _deal(self) -> np.ndarray:
        return self._rng(_DEAL, 1).permutation(self._config.clients * self._config.shards_per_client)

    @cached_property
    def _dealt(self) -> list[np.ndarray]:
        """Of all clients, in turn from what is left of each class; at most N samples, so at most N clients."""
        piles = [self._rng(_DEAL, 2 + label).permutation(pile) for label, pile in enumerate(self._by_class)]
        left = np.array([len(pile) for pile in piles])
        hands = []
        for client in range(self._config.clients):
            wanted = self._wanted(client, left, self._config.samples_per_client, _TRAIN)
            hands.append(
                np.concatenate(
                    [
                        pile[rest - count : rest]
                        for pile, rest, count in zip(piles, left.tolist(), wanted.tolist(), strict=True)
                    ]
                )
            )
            left = left - wanted
        return hands

    def _hand(self, client: int) -> np.ndarray:
        """The shards of one client: dealt out if there are enough, else its own draw of places in the sorted order."""
        config = self._config
        size = config.samples_per_client // config.shards_per_client
        if self.disjoint:
            starts = self._deal[client * config.shards_per_client :][: config.shards_per_client] * size
        else:
            starts = self._rng(_TRAIN, client).integers(len(self._sorted), size=config.shards_per_client)
        # A shard drawn at the very end goes on at the start, so that all are of one size.
        return np.asarray(self._sorted[(starts[:, None] + np.arange(size)).reshape(-1) % len(self._sorted)])

    def _by_shares(self, client: int, piles: list[np.ndarray], size: int, what: int) -> np.ndarray:
        rng = self._rng(what, client)
        left = np.array([len(pile) for pile in piles])
        wanted = self._wanted(client, left, size, what)
        return np.concatenate(
            [pile[_choose(rng, len(pile), count)] for pile, count in zip(piles, wanted.tolist(), strict=True) if count]
        )

    def _wanted(self, client: int, left: np.ndarray, size: int, what: int) -> np.ndarray:
        """So many samples of each class: a draw from the client's mix, what a class lacks taken from the others."""
        wanted = np.minimum(self._rng(what, client, 1).multinomial(size, self.shares(client)), left)
        while (missing := size - int(wanted.sum())) > 0:
            room = left - wanted
            if not room.any():
                break
            fullest = int(room.argmax())
            wanted[fullest] += min(missing, int(room[fullest]))
        return np.asarray(wanted)

    def _rng(self, *parts: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(self._seed, *parts))


def seed_of(*parts: int) -> np.random.SeedSequence:
    """``SeedSequence(parts)``; numbers below ``2**32`` are taken as they are, and given so in half the time."""
    return np.random.SeedSequence(np.array(parts, np.uint32) if max(parts) < 1 << 32 else parts)


def _choose(rng: np.random.Generator, num: int, size: int) -> np.ndarray:
    """``size`` of ``num`` without repeats if there are so many. ``Generator.choice`` shuffles all of them for that."""
    if size > num:
        return rng.integers(num, size=size)
    if 8 * size > num:
        return rng.permutation(num)[:size]
    drawn = _distinct(rng.integers(num, size=size))
    while len(drawn) < size:
        drawn = _distinct(np.concatenate([drawn, rng.integers(num, size=size - len(drawn))]))
    return drawn


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """``np.unique`` of a few numbers, in half its time."""
    ascending = np.sort(numbers)
    again = ascending[1:] == ascending[:-1]
    return np.delete(ascending, np.flatnonzero(again)) if again.any() else ascending


def _check_client(config: DataConfig, partition: int) -> None:
    if not 0 <= partition < config.num_clients:
        raise ConfigError(f"there is no client {partition}, the recipe has {config.num_clients} clients")


def _person(config: DataConfig, partition: int) -> ClientData:
    _check_client(config, partition)
    return _people(config)[partition]


@lru_cache(maxsize=4)
def _people(config: DataConfig) -> tuple[ClientData, ...]:
    """Of all clients at once: in one process they share the standardizer, and the whole is a few MB."""
    data = load_watch()
    _, scale = standardize(data.select(config.people, config.scale_part))
    clients = []
    for person in config.people:
        train, test = data.select(person, config.train_part), data.select(person, config.test_part)
        if not len(train) or not len(test):
            raise ConfigError(f"person {person} has {len(train)} windows to train on and {len(test)} to test on")
        clients.append(ClientData(standardize(train, scale)[0], standardize(test, scale)[0]))
    return tuple(clients)


@lru_cache(maxsize=2)
def _pools(config: DataConfig) -> tuple[ArrayDataset, ArrayDataset]:
    """All training and all test samples, once a process."""
    if config.name != "watch":
        return _arrays(config.name, "train"), _arrays(config.name, "test")
    data = load_watch()
    _, scale = standardize(data.select(config.people, config.scale_part))
    train, test = data.select(config.people, config.train_part), data.select(config.people, config.test_part)
    return standardize(train, scale)[0], standardize(test, scale)[0]


@lru_cache(maxsize=4)
def _arrays(name: str, split: str) -> ArrayDataset:
    data = load_dataset(name, split)
    if isinstance(data, ArrayDataset):
        return replace(data, name=name)
    inputs, targets = data.batch(np.arange(len(data)))
    groups = getattr(data, "groups", None)
    return ArrayDataset(
        name, np.asarray(inputs, np.float32), np.asarray(targets), None if groups is None else np.asarray(groups)
    )


@lru_cache(maxsize=2)
def _groups(config: DataConfig) -> tuple[np.ndarray, list[np.ndarray]]:
    """The groups of a data set of one's own, ascending, and the training samples of each."""
    train, test = _pools(config)
    if train.groups is None or test.groups is None:
        raise ConfigError(
            f"data set {config.name} has no groups, which are its natural clients. Give both splits an attribute "
            'groups of shape (N,), a number for each sample, or set data.partition to "iid", "dirichlet" or "shards".'
        )
    parts = by_group(train.groups)
    if len(parts) != config.clients:
        raise ConfigError(
            f"data.clients is {config.clients}, the training samples of {config.name} are of {len(parts)} groups. "
            f"Set data.clients={len(parts)}."
        )
    return np.unique(train.groups), parts


@lru_cache(maxsize=2)
def _partition(config: DataConfig, seed: int) -> Partition:
    train, test = _pools(config)
    return Partition(config, train.targets, test.targets, seed, num_classes=train.num_classes)
