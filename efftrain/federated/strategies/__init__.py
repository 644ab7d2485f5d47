"""How updates become a model: strategies by name, Flower's where there is one.

All take the whole cohort that they are shown; who trains is the driver's business. ``fedprox`` and ``scaffold`` change
how clients train: see ``efftrain.federated.local``.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from efftrain.errors import ConfigError
from efftrain.federated.flower import FedAvg, Strategy
from efftrain.federated.local import FEDPROX, SCAFFOLD
from efftrain.federated.strategies.robust import AllButLiars, Bucketing, Ruled
from efftrain.federated.strategies.rules import geometric_median, norm_bounded_mean
from efftrain.federated.strategies.scaffold import Scaffold

# isort: split
# After the adapter, which checks Flower's version and sets its environment before anything of Flower is imported.
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)

Options = Mapping[str, int | float | str | bool]
_EVERYBODY: Mapping[str, Any] = {
    "fraction_train": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}
_INFINITY = float("inf")


@dataclass(frozen=True)
class _Option:
    """A number, its default and its range."""

    default: int | float
    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True)
class _Entry:
    make: Callable[..., Strategy]
    options: Mapping[str, _Option]


_LR = _Option(1.0, 1e-12, _INFINITY)
_BETA = _Option(0.9, 0.0, 1 - 1e-12)
_ADAPTIVE = {"lr": _Option(0.01, 1e-12, _INFINITY), "tau": _Option(1e-3, 1e-12, _INFINITY)}
_MALICIOUS = _Option(0, 0, _INFINITY, whole=True)


def _proximal(*, mu: float) -> Strategy:
    return FedProx(**_EVERYBODY, proximal_mu=float(mu))


def _average_with_momentum(*, lr: float, momentum: float) -> Strategy:
    return FedAvgM(**_EVERYBODY, server_learning_rate=lr, server_momentum=momentum)


def _adaptive(kind: type[Any], *, lr: float, **options: float) -> Strategy:
    strategy: Strategy = kind(**_EVERYBODY, eta=lr, **options)
    return strategy


def _trimmed(*, share: float) -> Strategy:
    return FedTrimmedAvg(**_EVERYBODY, beta=share)


def _selecting(kind: type[Any], *, num_malicious: int) -> Strategy:
    strategy: Strategy = kind(**_EVERYBODY, num_malicious_nodes=num_malicious)
    return strategy


def _several(*, num_malicious: int, num_selected: int) -> Strategy:
    inner = MultiKrum(**_EVERYBODY, num_malicious_nodes=num_malicious, num_nodes_to_select=max(1, num_selected))
    return inner if num_selected else AllButLiars(inner)


def _bounded(*, bound: float) -> Strategy:
    return Ruled(FedAvg(**_EVERYBODY), partial(norm_bounded_mean, bound=bound))


def _geometric(*, iterations: int) -> Strategy:
    return Ruled(FedAvg(**_EVERYBODY), partial(geometric_median, iterations=iterations))


_MOMENTS = {"beta_1": _BETA, "beta_2": _Option(0.99, 0.0, 1 - 1e-12)}
_BUCKETING = "bucketing"
_ENTRIES: Mapping[str, _Entry] = {
    # McMahan et al. (arXiv:1602.05629): the mean, weighted by samples.
    "fedavg": _Entry(lambda: FedAvg(**_EVERYBODY), {}),
    # Li et al. (arXiv:1812.06127): the mean too, of clients that are drawn back to where they started.
    FEDPROX: _Entry(_proximal, {"mu": _Option(0.1, 0.0, _INFINITY)}),
    # Hsu et al. (arXiv:1909.06335).
    "fedavgm": _Entry(_average_with_momentum, {"lr": _LR, "momentum": _BETA}),
    # Reddi et al. (arXiv:2003.00295).
    "fedadam": _Entry(partial(_adaptive, FedAdam), {**_ADAPTIVE, **_MOMENTS}),
    "fedyogi": _Entry(partial(_adaptive, FedYogi), {**_ADAPTIVE, **_MOMENTS}),
    "fedadagrad": _Entry(partial(_adaptive, FedAdagrad), _ADAPTIVE),
    # Yin et al. (arXiv:1803.01498): of every parameter by itself; ``share`` is cut off at either end.
    "median": _Entry(lambda: FedMedian(**_EVERYBODY), {}),
    "trimmed_mean": _Entry(_trimmed, {"share": _Option(0.2, 0.0, 0.5 - 1e-12)}),
    # Blanchard et al. (arXiv:1703.02757), and El Mhamdi et al. (arXiv:1802.07927), who need 4 f + 3 clients.
    "krum": _Entry(partial(_selecting, Krum), {"num_malicious": _MALICIOUS}),
    "multi_krum": _Entry(
        _several,
        {"num_malicious": _MALICIOUS, "num_selected": _Option(0, 0, _INFINITY, whole=True)},
    ),
    "bulyan": _Entry(partial(_selecting, Bulyan), {"num_malicious": _MALICIOUS}),
    "norm_bounded_mean": _Entry(_bounded, {"bound": _Option(0.0, 0.0, _INFINITY)}),
    "geometric_median": _Entry(_geometric, {"iterations": _Option(50, 1, 10_000, whole=True)}),
}

STRATEGIES: tuple[str, ...] = (*_ENTRIES, _BUCKETING, SCAFFOLD)
"""Names that ``build_strategy`` knows."""


def build_strategy(name: str, options: Options, *, seed: int, population: int = 0) -> Strategy:
    """A strategy that takes everybody it is shown.

    Args:
        name: One of ``STRATEGIES``.
        options: Its knobs. ``fedprox``: ``mu``, the weight of the proximal term; ``scaffold``: ``lr``; ``fedavgm``:
            ``lr``, ``momentum``; ``fedadam``, ``fedyogi``: ``lr``, ``beta_1``, ``beta_2``, ``tau``; ``fedadagrad``:
            ``lr``, ``tau``; ``trimmed_mean``: ``share``; ``krum``, ``bulyan``: ``num_malicious``; ``multi_krum``:
            ``num_malicious``, ``num_selected`` (0: all but ``num_malicious``); ``norm_bounded_mean``: ``bound``;
            ``geometric_median``: ``iterations``; ``bucketing``: ``size`` (2), ``rule`` (``geometric_median``), and
            the knobs of that rule.
        seed: Of what a strategy draws.
        population: Number of all clients, which ``scaffold`` needs to know.

    Raises:
        ConfigError: Unknown name or option, or a value out of its range.
    """
    if name == SCAFFOLD:
        [lr] = _values(SCAFFOLD, {"lr": _LR}, options).values()
        if population < 1:
            raise ConfigError(f"strategy {SCAFFOLD} must know how many clients there are, population is {population}")
        return Scaffold(FedAvg(**_EVERYBODY), lr, population)
    if name == _BUCKETING:
        rest = dict(options)
        rule, size = rest.pop("rule", "geometric_median"), rest.pop("size", 2)
        if not isinstance(rule, str) or rule not in _ENTRIES:
            raise ConfigError(f"strategy bucketing: rule is {rule!r}, expected one of {', '.join(_ENTRIES)}")
        size = _number(_BUCKETING, "size", size, _Option(2, 1, _INFINITY, whole=True))
        return Bucketing(_build(rule, rest, extra=("rule", "size")), int(size), seed)
    if name not in _ENTRIES:
        raise ConfigError(
            f"strategy {name!r} is unknown{_nearest(name, STRATEGIES)}; expected one of {', '.join(STRATEGIES)}"
        )
    return _build(name, options)


def _build(name: str, options: Options, extra: tuple[str, ...] = ()) -> Strategy:
    entry = _ENTRIES[name]
    return entry.make(**_values(name, entry.options, options, extra))


def _values(
    name: str, known: Mapping[str, _Option], options: Options, extra: tuple[str, ...] = ()
) -> dict[str, int | float]:
    """The knobs of a strategy, defaults included."""
    names = (*extra, *known)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"strategy {name} has no option {option!r}{_nearest(option, names)}; it has "
                f"{', '.join(names) or 'none'}"
            )
    return {option: _number(name, option, options.get(option, kind.default), kind) for option, kind in known.items()}


def _number(strategy: str, option: str, value: object, kind: _Option) -> int | float:
    known = isinstance(value, int) if kind.whole else isinstance(value, int | float)
    if isinstance(value, bool) or not known or not kind.low <= value < _INFINITY or value > kind.high:  # type: ignore[operator]
        expected = "a whole number" if kind.whole else "a number"
        upper = "" if kind.high == _INFINITY else f" and at most {kind.high:.4g}"
        raise ConfigError(
            f"strategy {strategy}: {option} is {value!r}, expected {expected} of at least {kind.low:g}{upper}"
        )
    return value  # type: ignore[return-value]


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", the nearest is {near[0]!r}" if near else ""


__all__ = ["STRATEGIES", "build_strategy"]
