"""Each client's own data, by its number in the population."""

from dataclasses import dataclass
from functools import lru_cache

from efftrain.data import ArrayDataset, load_watch, standardize
from efftrain.errors import ConfigError
from efftrain.federated.recipe import DataConfig


@dataclass(frozen=True, eq=False)
class ClientData:
    """What one client holds. It never leaves the client."""

    train: ArrayDataset
    test: ArrayDataset


def client_data(config: DataConfig, partition: int) -> ClientData:
    """The data of client ``partition``: person ``config.people[partition]``, standardized.

    Args:
        config: Whose data and which parts.
        partition: Number of the client, from 0.

    Raises:
        ConfigError: No such client, or its training or test part is empty.
    """
    if not 0 <= partition < len(config.people):
        raise ConfigError(f"there is no client {partition}, the recipe has {len(config.people)} people")
    return _watch_data(config)[partition]


@lru_cache(maxsize=4)
def _watch_data(config: DataConfig) -> tuple[ClientData, ...]:
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
