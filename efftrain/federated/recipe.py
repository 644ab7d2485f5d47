"""What a federated run is made of: the recipe. Loads without Flower and without torch.

One recipe configures both ends: the server sends it along with every training message, so a client needs nothing but
its data and this package.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from efftrain.compression import Codec, Fp8, Half, Identity, Int8, IntN, Mx, parse_codec
from efftrain.federated.checks import check_recipe
from efftrain.federated.local import SCAFFOLD, check_local_strategy
from efftrain.models import MODELS

DATASETS = ("watch", "fashion-mnist", "digits")
PartName = Literal["all", "first30", "rest70", "early", "middle", "late"]
MAX_CLIENTS = 10_000_000
MAX_THREADS = 1024
"""Of one operator, and of workers: with many more PyTorch dies without a word."""
MAX_SEED = 2**63 - 1
"""What a TOML file holds, and every generator takes."""
_MODEL_CODECS = (Identity, Half, Fp8, Mx, Int8, IntN)
DEVICES = tuple(sorted(path.stem for path in (Path(__file__).parent / "devices").glob("*.toml")))
"""Names of the device profiles; see ``efftrain.federated.devices``."""
Options = dict[str, int | float | str | bool]


def is_own(name: str) -> bool:
    """Whether a name is a user's own ``file.py:name``."""
    return ".py:" in name


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model that all clients train."""

    name: str = "watch-cnn"
    """One of ``efftrain.models.MODELS``; or, in one process only, ``path/to/file.py:Class``, a classifier of your own.
    See Note [own code] in ``own_code``."""
    options: dict[str, int | float | str | bool | tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Fields of the model's config, such as ``hidden`` of ``fashion-cnn``. Left out of the hash, for a dict has none;
    equality sees them."""

    def __post_init__(self) -> None:
        if self.name not in MODELS and not is_own(self.name):
            raise ValueError(f"name is {self.name!r}, expected one of {', '.join(MODELS)}, or path/to/file.py:Class")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Whose data each client holds."""

    name: str = "watch"
    """``watch``, ``fashion-mnist`` or ``digits``; or, in one process only, ``path/to/file.py:name``, a ``Dataset`` of
    your own, or something to call with ``split`` ("train", "test") that returns one. It is read into memory whole."""
    partition: Literal["natural", "iid", "dirichlet", "shards"] = "natural"
    """``natural``: client ``i`` of ``watch`` is the person ``people[i]``; of a data set of your own, it has the samples
    of the ``i``-th number in ``groups``, which both splits have as ``ArrayDataset`` does. The others divide one data
    set over ``clients`` made-up clients; see ``efftrain.federated.data.Partition``."""
    clients: int = 0
    """Size of the population; 0 for the people of ``watch``, and the number of groups with groups of your own."""
    samples_per_client: int = 50
    """Training samples of each client. Ignored by ``natural``."""
    alpha: float = 0.3
    """Concentration of ``dirichlet``, in ``[1e-3, 1e6]``: 0.1 leaves a client one or two classes, 100 is nearly IID."""
    shards_per_client: int = 2
    """Of ``shards``: about so many classes a client."""
    people: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """The people of ``efftrain.data.load_watch`` that take part, each once."""
    train_part: PartName = "middle"
    """Part of each recording that a client trains on; it never leaves the client."""
    test_part: PartName = "late"
    """Part of each recording that the global model is measured on."""
    scale_part: PartName = "early"
    """Part that the channels are standardized by, over all ``people``: what the server saw when it pretrained."""

    def __post_init__(self) -> None:
        if self.name not in DATASETS and not is_own(self.name):
            raise ValueError(f"name is {self.name!r}, expected one of {', '.join(DATASETS)}, or path/to/file.py:name")
        if not self.people or len(set(self.people)) != len(self.people):
            raise ValueError(f"people is {list(self.people)}, expected at least one person and none twice")
        if self.train_part == self.test_part:
            raise ValueError(f"train_part and test_part are both {self.train_part!r}; the test would measure memory")
        if self.partition == "natural" and self.name in DATASETS:
            if self.name != "watch":
                raise ValueError(f"{self.name} has no natural partition, expected iid, dirichlet or shards")
            if self.clients:
                raise ValueError(f"clients is {self.clients}, but a natural partition has one client a person; use 0")
            return
        if not 1 <= self.clients <= MAX_CLIENTS:
            raise ValueError(f"clients is {self.clients}, expected 1 to {MAX_CLIENTS} with partition {self.partition}")
        if self.samples_per_client < 1:
            raise ValueError(f"samples_per_client is {self.samples_per_client}, expected at least 1")
        if self.partition == "shards" and self.samples_per_client % max(1, self.shards_per_client):
            raise ValueError(
                f"samples_per_client is {self.samples_per_client}, expected a multiple of shards_per_client "
                f"({self.shards_per_client})"
            )
        if self.shards_per_client < 1:
            raise ValueError(f"shards_per_client is {self.shards_per_client}, expected at least 1")
        if not 1e-3 <= self.alpha <= 1e6:
            raise ValueError(f"alpha is {self.alpha}, expected a number in [1e-3, 1e6]")

    @property
    def of_people(self) -> bool:
        """Whether the clients are the people of ``watch``."""
        return self.partition == "natural" and self.name == "watch"

    @property
    def num_clients(self) -> int:
        """Clients of the whole population."""
        return self.clients or len(self.people)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """Local training of one client in one round: plain SGD, new momentum every round."""

    engine: Literal["torch", "vmap", "device", "board"] = "torch"
    """What computes; see ``efftrain.federated.engines``."""
    scheme: str = "fp32"
    """What the ``device`` and ``board`` engines train: ``fp32`` is every parameter in floating point, anything else an
    update scheme in int8 as ``efftrain.ondevice.Scheme.parse`` reads it. ``torch`` and ``vmap`` know only ``fp32``."""
    board: str = "stm32f746"
    """The board that an int8 scheme is planned for, see ``efftrain.ondevice.Board``; a device of ``fleet.devices`` is
    one of its own. The ``board`` engine emulates this one where the device is none that it knows."""
    epochs: int = 2
    batch_size: int = 16
    lr: float = 0.1
    momentum: float = 0.0
    threads: int = 1
    """Threads of one operator. Part of the recipe: sums split over threads round differently."""
    stack: int = 16
    """Clients that the ``vmap`` engine trains at a time; part of the recipe for the same reason. It takes as many
    ``fleet.workers`` to fill a stack, and what is not filled is computed all the same."""
    timeout_s: float = 600.0
    """In process: a client that computes for longer is given up, and counts as dropped."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "threads", "stack"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.threads > MAX_THREADS:
            raise ValueError(f"threads is {self.threads}, expected at most {MAX_THREADS}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}, expected a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, expected a number in [0, 1)")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, expected a positive number of seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundsConfig:
    """The server's side: how many rounds, with whom, aggregated how."""

    rounds: int = 25
    """Rounds; with ``[fedbuff]``, updates of the global model."""
    fraction: float = 1.0
    """Share of the clients that a round takes replies of, at least one; drawn from the recipe's seed."""
    cohort: int = 0
    """The same as a number; 0 leaves it to ``fraction``."""
    over_select: bool = False
    """Ask more clients than a round takes replies of, by the share that dropped out lately: the round ends with the
    reply that completes it, and the work of those that were slower is lost."""
    strategy: str = "fedavg"
    """How updates become a model; see ``efftrain.federated.strategies``. ``fedavg``: mean of the clients' models
    weighted by samples (McMahan et al., arXiv:1602.05629)."""
    strategy_options: Options = field(default_factory=dict, hash=False)
    """Knobs of the strategy."""
    min_replies: int = 1
    """Quorum: a round with fewer accepted replies is abandoned, and the model stays as it was."""
    max_abandoned: int = 3
    """So many rounds may be abandoned one after the other; one more ends the run with ``RoundError``."""
    timeout_s: float = 600.0
    """Deadline of a round: virtual seconds where ``[fleet]`` gives clients a device, else seconds on the wall."""
    pace_s: float = 0.0
    """Pace steering: a client that took part is asked again no sooner than after so long."""
    evaluate: Literal["clients", "server"] = "clients"
    """Who measures the global model: every client on its own test data, or the server on the whole test set."""
    evaluate_every: int = 1
    """Rounds between two measurements; the last round is always measured."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, expected at least 1")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}, expected a share in (0, 1]")
        for name in ("min_replies", "max_abandoned", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.cohort < 0:
            raise ValueError(f"cohort is {self.cohort}, expected a number of clients, or 0")
        if not 0 <= self.pace_s < float("inf"):
            raise ValueError(f"pace_s is {self.pace_s}, expected 0 or more seconds")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, expected a positive number of seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class UplinkConfig:
    """What clients send: the update of every parameter through a codec."""

    codec: str = "TopK(0.1) >> Int8(block=64)"
    """As for ``efftrain.compression.parse_codec``; ``"Identity()"`` is plain fp32."""
    feedback: bool = True
    """Whether a client keeps what the codec left out and adds it to its next update."""

    def __post_init__(self) -> None:
        parse_codec(self.codec)

    def build(self) -> Codec:
        """The codec itself."""
        return parse_codec(self.codec)


@dataclass(frozen=True, kw_only=True, slots=True)
class DownlinkConfig:
    """What clients are sent: the model through a codec."""

    codec: str = "Identity()"
    """A codec that keeps something of every element, such as ``Half()``, ``Int8(block=64)`` or ``Mx()``: clients train
    from what it leaves of the model, and the server's own model stays exact."""

    def __post_init__(self) -> None:
        if not isinstance(self.build(), _MODEL_CODECS):
            raise ValueError(
                f"codec is {self.codec!r}, which is for updates: too little of a model is left. Expected one of "
                f"{', '.join(codec.__name__ for codec in _MODEL_CODECS)}"
            )

    def build(self) -> Codec:
        """The codec itself."""
        return parse_codec(self.codec)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """What a reply may hold at most; beyond it is refused. See ``efftrain.federated.gate``."""

    max_samples: int = 1000
    """Largest number of samples a client may claim. It is that client's weight in the mean, so keep it tight."""
    max_update_norm: float = 20.0
    """Largest Euclidean norm of an update over all parameters."""

    def __post_init__(self) -> None:
        if self.max_samples < 1:
            raise ValueError(f"max_samples is {self.max_samples}, expected at least 1")
        if not self.max_update_norm > 0:
            raise ValueError(f"max_update_norm is {self.max_update_norm}, expected a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """Simulation only: what devices the clients are. Without it every client answers at once."""

    devices: dict[str, float] = field(default_factory=dict, hash=False)
    """Device profile -> share of the population; the profiles are ``efftrain.federated.devices.DEVICES``."""
    schemes: dict[str, str] = field(default_factory=dict, hash=False)
    """Device profile -> update scheme that these devices train with, instead of ``client.scheme``."""
    drop_out: float = 0.0
    """Share of the trainings that end without a reply: battery empty, network gone, app closed."""
    availability: bool = False
    """Whether a device can only be asked when its profile has it switched on and charging; otherwise always."""
    workers: int = 1
    """Threads that run clients. The results are the same for any number."""

    def __post_init__(self) -> None:
        if any(not share > 0 for share in self.devices.values()):
            raise ValueError(f"devices is {self.devices}, expected positive shares")
        unknown = sorted(set(self.devices) - set(DEVICES))
        if unknown:
            raise ValueError(f"devices names {unknown[0]!r}, expected some of {', '.join(DEVICES)}")
        if set(self.schemes) - set(self.devices):
            raise ValueError(f"schemes is {self.schemes}, expected only devices of the fleet: {list(self.devices)}")
        if not 0 <= self.drop_out < 1:
            raise ValueError(f"drop_out is {self.drop_out}, expected a share in [0, 1)")
        if not 1 <= self.workers <= MAX_THREADS:
            raise ValueError(f"workers is {self.workers}, expected 1 to {MAX_THREADS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FedBuffConfig:
    """Buffered asynchronous updates instead of rounds.

    Source: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation (arXiv:2106.06639).
    """

    buffer: int = 0
    """``K``: the model moves on with every ``K`` updates. 0: synchronous rounds."""
    concurrency: int = 0
    """``M``: so many clients train at any time. 0: as many as a synchronous round takes."""
    lr: float = 1.0
    """Server learning rate: factor of the mean update."""

    def __post_init__(self) -> None:
        if self.buffer < 0 or self.concurrency < 0:
            raise ValueError(f"buffer is {self.buffer} and concurrency {self.concurrency}, expected 0 or more")
        if self.concurrency and not self.buffer:
            raise ValueError(f"concurrency is {self.concurrency}, but buffer is 0: rounds are synchronous")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}, expected a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackConfig:
    """Simulation only: clients that send what harms. To find out what a strategy stands."""

    kind: Literal["none", "sign_flip", "scale", "label_flip", "alie"] = "none"
    """``sign_flip``: the update backwards. ``scale``: the update ``factor`` times. ``label_flip``: honest training on
    labels ``classes - 1 - label``. ``alie``: a little is enough (Baruch et al., arXiv:1902.06156), all attackers
    together."""
    share: float = 0.2
    """Share of the population that attacks, drawn from the recipe's seed."""
    factor: float = 100.0
    """Of ``scale``."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}, expected a share in (0, 1)")
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"factor is {self.factor}, expected a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class FederatedRecipe:
    """A whole federated run. ``efftrain.config.load_recipe(FederatedRecipe, path)`` reads one.

    The defaults are those of ``federated/recipes/watch_people.toml``, whose claim ``benchmarks/federated_watch.py``
    checks.
    """

    name: str = "federated"
    seed: int = 0
    """Seeds the first model (if none is given), the cohorts, the shuffling and stochastic rounding."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    server: RoundsConfig = field(default_factory=RoundsConfig)
    uplink: UplinkConfig = field(default_factory=UplinkConfig)
    downlink: DownlinkConfig = field(default_factory=DownlinkConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    fedbuff: FedBuffConfig = field(default_factory=FedBuffConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}, expected 0 to {MAX_SEED}")
        for name in ("min_replies", "cohort"):
            if getattr(self.server, name) > self.num_clients:
                raise ValueError(
                    f"server.{name} is {getattr(self.server, name)}, but there are {self.num_clients} clients"
                )
        if self.data.samples_per_client > self.gate.max_samples and self.data.partition != "natural":
            raise ValueError(
                f"every client has {self.data.samples_per_client} samples, but gate.max_samples refuses more than "
                f"{self.gate.max_samples}"
            )
        check_local_strategy(self)
        check_recipe(self)

    @property
    def clients_remember(self) -> bool:
        """Whether clients keep something for later rounds, and so must be told which of their replies were taken."""
        return self.uplink.feedback or self.server.strategy == SCAFFOLD

    @property
    def num_clients(self) -> int:
        """Clients of the whole population."""
        return self.data.num_clients

    @property
    def cohort(self) -> int:
        """Replies that a round takes, at most."""
        return self.server.cohort or max(1, round(self.server.fraction * self.num_clients))
