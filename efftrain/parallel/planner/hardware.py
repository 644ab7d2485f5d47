"""What a cluster can do, in the few figures that the planner computes with. Read from TOML; several files ship."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from efftrain.config import load_recipe
from efftrain.errors import ConfigError

FOLDER = Path(__file__).parent / "clusters"


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank sends to others: alpha seconds a message, and so many bytes a second."""

    latency_us: float
    """Of a message, from one rank's call to the other's; of a collective, for each message that waits for another."""
    gbit_s: float
    """Of payload that one rank sends while the others do the same, in 1e9 bits."""
    cpu_ns_per_byte: float = 0.0
    """CPU time of a byte sent, received and added up: a socket has some, a GPU's own network none."""

    def __post_init__(self) -> None:
        if self.latency_us < 0 or self.cpu_ns_per_byte < 0 or not self.gbit_s > 0:
            raise ValueError("latency_us and cpu_ns_per_byte must not be negative, gbit_s must be more than 0")

    def seconds(self, num_bytes: float, messages: float = 1.0) -> float:
        """Time of ``num_bytes`` in ``messages`` that wait for each other."""
        return messages * self.latency_us / 1e6 + num_bytes * 8 / (self.gbit_s * 1e9)


@dataclass(frozen=True, kw_only=True)
class CodecSpeed:
    """What a gradient costs: nanoseconds an element, and microseconds a tensor, however small."""

    encode_ns: float
    """Adding the residual, encoding, keeping what is left."""
    decode_ns: float
    """Decoding one payload and adding it up."""
    encode_us: float = 40.0
    decode_us: float = 15.0

    def __post_init__(self) -> None:
        if min(self.encode_ns, self.decode_ns, self.encode_us, self.decode_us) < 0:
            raise ValueError("encode_ns, decode_ns, encode_us and decode_us must not be negative")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal machines."""

    name: str
    ranks_per_node: int
    """Processes of one machine: one a GPU, or one a core."""
    memory_gib: float
    """Of one rank."""
    gflops: float
    """fp32 matrix products of one rank, in 1e9 FLOP/s that are reached, not promised."""
    gflops_bf16: float
    memory_gb_s: float
    """What one rank reads and writes of its own memory, in 1e9 bytes/s."""
    operator_us: float
    """Of the smallest operator: calling it from Python, starting a kernel."""
    autograd_us: float = 0.0
    """What modules and autograd add to an operator of a forward or backward pass."""
    collective_us: float = 0.0
    """Of starting a collective and taking its result, besides what its bytes take."""
    gathered_layer_us: float = 0.0
    """Of gathering the weights of one layer, or scattering its gradients, besides the bytes."""
    gathered_ns_per_byte: float = 0.0
    """Of copying the bytes of such a layer into place."""
    divided_operator_us: float = 0.0
    """What torch adds to an operator whose tensors are divided over a mesh."""
    handover_us: float = 0.0
    """Of giving one micro-batch to one stage of a pipeline, forward and backward, besides the bytes."""
    split_operator_us: float = 0.0
    """What it adds to an operator to compute the gradients of inputs and of weights apart."""
    inside: Link
    """Between ranks of a machine."""
    between: Link
    """Between machines, for one rank while the others of its machine send too."""
    cores: int = 0
    """Cores that the ranks of a machine share; more ranks than that compute in turn. 0: each has its own device."""
    crowding: float = 1.0
    """How much slower a rank computes while all cores work: they share caches and memory."""
    efficiency: float = 1.0
    """Measured over modelled time of the model that the file was calibrated with."""
    step_overhead_ms: float = 0.0
    """Of one update, whatever its size."""
    codecs: dict[str, CodecSpeed] = field(default_factory=dict)
    """By the codec's first name (``Int8``, ``TopK``); of a chain the sum counts. ``Identity``: a plain exchange."""

    def __post_init__(self) -> None:
        positive = ("memory_gib", "gflops", "gflops_bf16", "memory_gb_s", "efficiency")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.ranks_per_node < 1 or self.cores < 0:
            raise ValueError("ranks_per_node must be at least 1, cores 0 or more")
        times = [getattr(self, one.name) for one in fields(self) if one.name.endswith(("_us", "_ms", "_ns_per_byte"))]
        if min(times) < 0 or self.crowding < 1:
            raise ValueError("times must not be negative, crowding must be at least 1")

    def slowdown(self, num_ranks: int) -> float:
        """How much slower each of so many ranks computes than one alone on a machine."""
        if not self.cores:
            return 1.0
        here = min(num_ranks, self.ranks_per_node)
        busy = min(1.0, (here - 1) / max(1, self.cores - 1)) if self.cores > 1 else 1.0
        return self.ranks_a_core(num_ranks) * (1 + (self.crowding - 1) * busy if here > 1 else 1.0)

    def ranks_a_core(self, num_ranks: int) -> float:
        """How many of so many ranks take turns on a core; at least 1."""
        return max(1.0, min(num_ranks, self.ranks_per_node) / self.cores) if self.cores else 1.0

    def link(self, ranks_together: int) -> Link:
        """What connects ranks of which so many neighbors are in one group."""
        return self.inside if ranks_together <= self.ranks_per_node else self.between

    def codec_speed(self, name: str) -> CodecSpeed:
        """Of one codec without its chain; what nobody measured costs as much as the slowest known."""
        if name in self.codecs:
            return self.codecs[name]
        if name == "Identity":
            return CodecSpeed(encode_ns=0.0, decode_ns=0.0, encode_us=0.0, decode_us=0.0)
        known = self.codecs.values()
        return CodecSpeed(
            encode_ns=max((speed.encode_ns for speed in known), default=10.0),
            decode_ns=max((speed.decode_ns for speed in known), default=5.0),
        )


def shipped_hardware() -> list[str]:
    """Names of the files that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_hardware(name: str) -> Hardware:
    """A shipped cluster by its name, or a file of the user's.

    Raises:
        ConfigError: Neither; or the file is wrong.
    """
    if name in shipped_hardware():
        return load_recipe(Hardware, FOLDER / f"{name}.toml", what="hardware file")
    if not Path(name).is_file():
        raise ConfigError(f"--hardware {name!r} is no file and none of {', '.join(shipped_hardware())}")
    return load_recipe(Hardware, name, what="hardware file")
