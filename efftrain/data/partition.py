"""Who holds which samples: seeded partitions of a data set over clients, and how different they made the clients.

Every function returns one int64 index array a client; together they hold every sample exactly once, and equal arguments
give equal parts on every machine. Indices are ascending inside a part.
"""

# N samples, K clients, C classes

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from efftrain.errors import ConfigError


def by_group(groups: np.ndarray) -> list[np.ndarray]:
    """The natural partition: one client a person, writer or device.

    Args:
        groups: Group of each sample, integers ``(N,)``.

    Returns:
        One part a group, in ascending order of the group's number.

    Raises:
        ConfigError: There are no samples.
    """
    groups = np.asarray(groups)
    if groups.ndim != 1 or not len(groups):
        raise ConfigError(f"Expected the group of each sample, shape (N,), found shape {groups.shape}.")
    _, client = np.unique(groups, return_inverse=True)
    return _parts_of(client.reshape(-1), int(client.max()) + 1)


def iid(num_samples: int, num_clients: int, seed: int) -> list[np.ndarray]:
    """Shuffle and cut evenly: sizes differ by at most one.

    Raises:
        ConfigError: Fewer samples than clients, or no clients.
    """
    _check_clients(num_samples, num_clients, 1)
    order = np.random.default_rng(seed).permutation(num_samples)
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet(labels: np.ndarray, num_clients: int, alpha: float, seed: int, min_samples: int = 1) -> list[np.ndarray]:
    """Divide each class over the clients in proportions drawn from a Dirichlet distribution.

    Args:
        labels: Class of each sample, integers ``(N,)``.
        num_clients: ``K``.
        alpha: Concentration, in ``[1e-3, 1e6]``: 0.1 leaves most clients one or two classes, 1 is uneven, 100 is nearly
            IID.
        seed: Of the draw.
        min_samples: Every client gets at least so many.

    Returns:
        ``K`` parts.

    Raises:
        ConfigError: ``alpha`` outside its range, or fewer than ``num_clients * min_samples`` samples.

    Source: Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual
        classification" (arXiv:1909.06335).
    Differs: proportions are drawn per class over clients, as most later work does, not per client over classes. A
        client that came out too small is given random samples of the largest clients, instead of drawing everything
        again until it fits, which for a small alpha need not end.
    """
    labels = _check_labels(labels)
    _check_clients(len(labels), num_clients, min_samples)
    if not 1e-3 <= alpha <= 1e6:
        raise ConfigError(f"Expected alpha in [1e-3, 1e6], found {alpha}.")
    rng = np.random.default_rng(seed)
    client = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for number, part in enumerate(np.split(members, np.minimum(cuts, len(members)))):
            client[part] = number
    counts = np.bincount(client, minlength=num_clients)
    for poor in np.flatnonzero(counts < min_samples):
        while counts[poor] < min_samples:
            rich = int(counts.argmax())
            given = rng.choice(np.flatnonzero(client == rich))
            client[given] = poor
            counts[rich] -= 1
            counts[poor] += 1
    return _parts_of(client, num_clients)


def shards(labels: np.ndarray, num_clients: int, num_shards_per_client: int, seed: int) -> list[np.ndarray]:
    """Sort by class, cut into equal shards, deal them out: each client sees about ``num_shards_per_client`` classes.

    Args:
        labels: Class of each sample, integers ``(N,)``.
        num_clients: ``K``.
        num_shards_per_client: 2 is the classic setting; 1 is the hardest.
        seed: Of the order inside a class and of the deal.

    Returns:
        ``K`` parts; shards differ in size by at most one sample.

    Raises:
        ConfigError: Fewer samples than shards, or a count below 1.

    Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data"
        (arXiv:1602.05629), section 3.
    """
    labels = _check_labels(labels)
    if num_shards_per_client < 1:
        raise ConfigError(f"Expected at least 1 shard a client, found {num_shards_per_client}.")
    _check_clients(len(labels), num_clients, num_shards_per_client)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    dealt = rng.permutation(num_clients * num_shards_per_client).reshape(num_clients, num_shards_per_client)
    cut = np.array_split(order, num_clients * num_shards_per_client)
    return [np.sort(np.concatenate([cut[shard] for shard in hand])) for hand in dealt]


@dataclass(frozen=True, kw_only=True)
class Heterogeneity:
    """How different the clients of a partition are. IID clients have distances near 0 and the entropy of the whole."""

    num_clients: int
    num_samples: int
    num_classes: int
    samples_min: int
    samples_mean: float
    samples_max: int
    labels_per_client_mean: float
    """Classes of which a client has at least one sample, mean over clients."""
    labels_per_client_min: int
    label_entropy_bits: float
    """Entropy of a client's label distribution, mean over clients, in bits; 0 when each has one class."""
    global_label_entropy_bits: float
    """The same of all samples together: what a client could have at most."""
    total_variation: float
    """Half the L1 distance of a client's label distribution from the global one, in ``[0, 1]``, mean over clients."""
    jensen_shannon_bits: float
    """Jensen-Shannon divergence from the global distribution, in ``[0, 1]`` bits, mean over clients."""

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers by name, for JSON."""
        return asdict(self)


def heterogeneity(labels: np.ndarray, parts: Sequence[np.ndarray]) -> Heterogeneity:
    """Measure a partition. Clients count equally, whatever their size; empty ones count for their size only.

    Args:
        labels: Class of each sample, integers ``(N,)``.
        parts: Index arrays, as the functions above return them.

    Raises:
        ConfigError: No parts, or all are empty, or an index is outside ``[0, N)``.
    """
    labels = _check_labels(labels)
    sizes = np.array([len(part) for part in parts], np.int64)
    if not sizes.sum():
        raise ConfigError("Expected at least one part with a sample, found none.")
    every = np.concatenate([np.asarray(part, np.int64) for part in parts])
    if every.min() < 0 or every.max() >= len(labels):
        raise ConfigError(f"Expected indices in [0, {len(labels)}), found {every.min()} to {every.max()}.")
    _, label = np.unique(labels[every], return_inverse=True)
    num_classes = int(label.max()) + 1
    owner = np.repeat(np.arange(len(parts)), sizes)
    counts_KC = np.bincount(owner * num_classes + label.reshape(-1), minlength=len(parts) * num_classes)
    counts_KC = counts_KC.reshape(len(parts), num_classes)[sizes > 0]
    share_KC = counts_KC / counts_KC.sum(axis=1, keepdims=True)
    whole_C = counts_KC.sum(axis=0) / counts_KC.sum()
    entropy = _entropy_bits(share_KC)
    # JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2; rounding may leave it a hair below 0.
    divergence = _entropy_bits((share_KC + whole_C) / 2) - (entropy + _entropy_bits(whole_C)) / 2
    return Heterogeneity(
        num_clients=len(parts),
        num_samples=int(sizes.sum()),
        num_classes=num_classes,
        samples_min=int(sizes.min()),
        samples_mean=float(sizes.mean()),
        samples_max=int(sizes.max()),
        labels_per_client_mean=float((counts_KC > 0).sum(axis=1).mean()),
        labels_per_client_min=int((counts_KC > 0).sum(axis=1).min()),
        label_entropy_bits=float(entropy.mean()),
        global_label_entropy_bits=float(_entropy_bits(whole_C)),
        total_variation=float(np.abs(share_KC - whole_C).sum(axis=1).mean() / 2),
        jensen_shannon_bits=float(np.maximum(divergence, 0).mean()),
    )


def _entropy_bits(shares: np.ndarray) -> np.ndarray:
    """Entropy in bits along the last dim; 0 log 0 is 0."""
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.asarray(-(shares * logs).sum(axis=-1) + 0.0)


def _parts_of(client: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Client of each sample -> samples of each client, ascending."""
    order = np.argsort(client, kind="stable")
    counts = np.bincount(client, minlength=num_clients)
    return np.split(order, np.cumsum(counts)[:-1])


def _check_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"Expected the class of each sample, integers of shape (N,), found {labels.dtype} of shape {labels.shape}."
        )
    return labels


def _check_clients(num_samples: int, num_clients: int, min_samples: int) -> None:
    if num_clients < 1 or min_samples < 0:
        raise ConfigError(
            f"Expected at least 1 client and 0 samples each, found {num_clients} clients and {min_samples} samples."
        )
    if num_samples < num_clients * min_samples:
        raise ConfigError(
            f"{num_samples} samples cannot give {num_clients} clients {min_samples} each. "
            "Ask for fewer clients or fewer samples per client."
        )
