"""GradSync: gradients averaged over ranks through a codec, beside the backward pass, in one order on all ranks.

The path of a gradient: autograd writes ``.grad`` -> when the last of a bucket's gradients is there, and all earlier
buckets have started, the bucket's exchange starts (``collectives``): ``Feedback`` adds what earlier steps left unsent
and the codec encodes -> the bytes travel while autograd goes on -> ``finish`` waits and decodes the mean into
``.grad``.

Note [one order]
    Collectives of one group must be issued in the same order on all ranks, or they hang. Buckets start in a fixed
    order, whatever order autograd finds; and an exchange of several collectives issues its next one at a fixed place:
    when the following bucket has started, or in ``finish``, oldest first. Nothing is issued from a callback, whose time
    depends on the network.

Note [no Python on gloo threads]
    A thread of gloo that lets go of a Python object while the interpreter ends aborts the process. So all waiting and
    decoding is on the thread that trains. And nothing keeps the process group alive past ``mesh.process_group``, whose
    end waits for its threads.
"""

import itertools
import math
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from efftrain.compression import Codec, Feedback, LowRank, redistribute
from efftrain.compression.entries import Entries
from efftrain.compression.sparsify import Sparse
from efftrain.compression.wire import Floats
from efftrain.errors import CheckpointError, ConfigError
from efftrain.parallel.backends import Pending, Transport
from efftrain.parallel.collectives import (
    ALGORITHMS,
    Algorithm,
    Link,
    Piece,
    Steps,
    choose,
    count_all_reduce,
    cut,
    gather,
    hierarchical,
    low_rank,
    num_collectives,
    refuse_deflate,
    ring_bytes,
)
from efftrain.parallel.feedback import AXES, of_replicas
from efftrain.parallel.local import local, local_grad
from efftrain.parallel.replicas import Replicas, count_ranks, start_equal

SPARSE_SHARE = 8
"""A mean of at most one in so many entries stays sparse: places take more time an entry than a whole tensor does."""


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """How gradients are exchanged. The defaults are right for most runs."""

    momentum: float = 0.0
    """Of the feedback's momentum correction; the optimizer then runs without."""
    masking: bool = False
    """Momentum factor masking (see ``compression.Feedback``)."""
    local_clip: float | None = None
    """Largest norm of a parameter's gradient, as if clipped after averaging: each rank clips at ``c / sqrt(W)``."""
    warm_up_steps: int = 0
    """Steps in which a sparse codec sends more, falling to its ratio (``Codec.warmed_up``)."""
    bucket_mb: float | None = None
    """MiB of gradients that fill a bucket; ``None`` is 25. Smaller buckets start earlier and cost more latency."""
    whole_buckets: bool = False
    """A bucket is one tensor to the codec: a sparse one chooses where the entries are largest, in whatever parameter.
    Costs a copy of the gradient; ``local_clip`` is then of a bucket's norm, and ``dense_below`` of its size."""
    node_size: int = 1
    """Ranks of a node, neighbors in number: they sum up in fp32, and only nodes talk through the codec."""
    algorithm: str = "auto"
    """``gather``, ``two_phase``, or ``auto``: what sends fewer bytes. Codecs that sum up have one of their own."""
    seed: int = 0
    """Of stochastic rounding and random places."""

    def __post_init__(self) -> None:
        if self.algorithm not in ("auto", *ALGORITHMS):
            raise ConfigError(f"algorithm is {self.algorithm!r}, expected 'auto', 'gather' or 'two_phase'")
        if self.bucket_mb is not None and not 0 < self.bucket_mb <= 4096:
            raise ConfigError(f"bucket_mb is {self.bucket_mb}, expected more than 0 and at most 4096")
        if self.local_clip is not None and not self.local_clip > 0:
            raise ConfigError(f"local_clip is {self.local_clip}, expected more than 0")
        if self.warm_up_steps < 0 or self.node_size < 1:
            raise ConfigError(
                f"warm_up_steps is {self.warm_up_steps} and node_size {self.node_size}, expected at least 0 and 1"
            )


class GradSync(Replicas):
    """Averages gradients over a group of ranks; an ``Exchange`` of the training step.

    The model stays as it is: hooks on its parameters start the exchanges. A parameter without a gradient on some ranks
    counts as zero there; one without any on all ranks has none (``leave_out``). Running statistics stay each rank's own
    until ``sync_buffers``.

    Where ``is_entrywise`` and a sparse codec leaves few entries, the mean stays sparse: ``descend`` moves those weights
    and ``.grad`` is ``None``. (Zeros, norm and update of whole tensors take a sixth of a step of a perceptron.)

    Args:
        codec: Encodes the gradients. One whose payloads combine by ``sum`` (``Identity``) is a plain fp32 all-reduce.
        transport: The ranks.
        config: See ``SyncConfig``.

    Raises:
        ConfigError: See ``refuse_deflate``; codec and ``node_size`` do not go together, or the nodes do not divide the
            ranks.
    """

    is_divided = False

    def __init__(self, codec: Codec, transport: Transport, config: SyncConfig | None = None) -> None:
        refuse_deflate(codec)
        super().__init__(transport)
        self.codec, self.config = codec, config or SyncConfig()
        if self.config.whole_buckets and codec.combine in ("sum", "low_rank"):
            raise ConfigError(f"{codec} sends matrices one by one, leave out whole_buckets")
        inside, between = None, transport
        if self.config.node_size > 1:
            if isinstance(codec, LowRank) or codec.combine == "sum":
                raise ConfigError(f"{codec} sums up whole tensors, node_size needs a codec whose payloads are gathered")
            inside, between = transport.split(self.config.node_size)
        clip = self.config.local_clip
        feedback = Feedback(
            momentum=self.config.momentum,
            masking=self.config.masking,
            clip_norm=None if clip is None else clip / self.world_size**0.5,
        )
        self._feedback = feedback
        self._link = Link(between, feedback, 1 / self.world_size)
        self._inside = None if inside is None else Link(inside, feedback, 1.0, stats=self._link.stats)
        self._buckets: list[_Bucket] = []
        self._running: list[_Running] = []
        self._num_started = 0
        self._num_steps = 0
        self._suspended = False
        self._sparse: dict[str, tuple[Tensor, Entries]] = {}
        """Parameters whose mean of this step is sparse."""
        self._absent: set[str] = set()
        """Parameters that autograd gave no gradient on this rank in this step."""

    # Exchange -----------------------------------------------------------------------------------------------------

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give all ranks the weights of rank 0 and set the hooks. Returns the model itself.

        Raises:
            ConfigError: The ranks' models differ in names or shapes.
        """
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
        start_equal(self._transport, model)
        limit = (25.0 if self.config.bucket_mb is None else self.config.bucket_mb) * (1 << 20)
        self._buckets = [_Bucket(some, self.config.whole_buckets) for some in _fill_buckets(trained[::-1], limit)]
        this = weakref.ref(self)  # a hook is kept by its parameter, which we keep
        for bucket in self._buckets:
            for parameter in bucket.parameters.values():
                hook = partial(_on_gradient, this, bucket)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return model

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """Gradients inside are summed up in ``.grad`` and not sent."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    def finish(self) -> bool:
        """Start what has not started, wait for all, and leave the mean of all ranks in ``.grad``, or for ``descend``.

        Returns:
            False after a gradient with inf or NaN on some rank; zeros were sent in its place. All ranks know, but with
            nodes: there those in charge of that part of the bucket.
        """
        while self._num_started < len(self._buckets):
            self._start_next()
        while self._running:
            for running in list(self._running):
                self._advance(running)
        num_elements = sum(bucket.num_elements for bucket in self._buckets)
        self._link.count("uncompressed_bytes", ring_bytes(num_elements, self.world_size))
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._num_started = 0
        return self._link.healthy

    @property
    def lacks_gradients(self) -> bool:
        """See ``Exchange``."""
        return bool(self._absent)

    def leave_out(self) -> None:
        """See ``Exchange``. What was sent of them were zeros and what they owed."""
        buckets = {name: bucket for bucket in self._buckets for name in bucket.parameters}
        counts = count_ranks(self._transport, list(buckets), self._absent)
        for (name, bucket), count in zip(buckets.items(), counts, strict=True):
            if not count:
                bucket.parameters[name].grad = None
                self._sparse.pop(name, None)
                self._feedback.restore(*bucket.place(name))

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Of what is in ``.grad``, and of the sparse means."""
        dense = super().grad_norm(model)
        if not self._sparse:
            return dense
        return torch.tensor(math.sqrt(float(dense) ** 2 + sum(e.square() for _, e in self._sparse.values())))

    @torch.no_grad()
    def descend(self, lr: float) -> None:
        """See ``Exchange``."""
        for parameter, entries in self._sparse.values():
            entries.add_to(parameter.detach().view(-1).numpy(), -lr)
        self._sparse.clear()

    def settle(self, ok: bool) -> None:
        """Keep the residuals of this step, or go back to those before it."""
        self._feedback.settle(ok)
        if not ok:
            self._sparse.clear()
        self._absent.clear()
        self._link.healthy = True
        self._num_steps += 1

    def stats(self) -> dict[str, float]:
        """Of the steps since the last call, on this rank.

        ``wire_bytes``: bytes this rank sends to others, encoded (between nodes; ``node_bytes``: inside them).
        ``uncompressed_bytes``: what a ring all-reduce of the same gradients in fp32 sends. ``encode_s``, ``decode_s``:
        seconds in the codec. ``exchange_s``: seconds in which this rank did nothing but wait for others.
        """
        names = ["wire_bytes", "uncompressed_bytes", "encode_s", "exchange_s", "decode_s"]
        names += ["node_bytes"] if self._inside is not None else []
        found = {name: self._link.stats.get(name, 0.0) for name in names}
        self._link.stats.clear()
        return found

    def residual_norm(self) -> float:
        """Euclidean norm of what this rank has not sent yet."""
        return self._feedback.norm()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's feedback by parameter, how many steps seeded the rounding, and the ranks of a node."""
        state = self._feedback.state_dict()
        if self.config.whole_buckets:
            state = {key: part for bucket in self._buckets for key, part in bucket.by_parameter(state)}
        feedback = {name: torch.from_numpy(value) for name, value in state.items()}
        return {
            **feedback,
            "num_steps": torch.tensor(self._num_steps),
            "node_size": torch.tensor(self.config.node_size),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take this rank's feedback back, or a fair share of all if the ranks or nodes are others now.

        Raises:
            CheckpointError: The feedback is of another model.
        """
        if AXES in states[0]:
            states = of_replicas(states, tensor=1, place=0) or [{}]
        numbers = ("num_steps", "node_size")
        feedback = [{k: v.numpy() for k, v in state.items() if k not in numbers} for state in states]
        node_size = int(states[0].get("node_size", torch.tensor(1)))
        self._num_steps = int(states[0].get("num_steps", torch.tensor(0)))
        sizes = {name: size for bucket in self._buckets for name, size in bucket.sizes.items()}
        for state in feedback:
            for key, value in state.items():
                kind, _, name = key.partition("/")
                if name not in sizes or (kind != "factor" and value.size != sizes[name]):
                    raise CheckpointError(f"feedback {key!r} of {value.size} elements fits no parameter here")
        if len(states) == self.world_size and node_size == self.config.node_size:
            own = feedback[self.rank]
        else:
            # Of a node, one rank alone is in charge of an element: it has to take the others' share of it, too.
            scale = np.float32(self.config.node_size)
            own = {
                key: value if key.startswith("factor/") else self._in_charge(key.partition("/")[2], value * scale)
                for key, value in redistribute(feedback).items()
            }
        if self.config.whole_buckets:
            own = {key: whole for bucket in self._buckets for key, whole in bucket.joined(own)}
        self._feedback.load_state_dict(own)

    # Exchanges ----------------------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        """Start the exchange of the next bucket. See Note [one order]."""
        bucket = self._buckets[self._num_started]
        self._num_started += 1
        self._absent.update(name for name, parameter in bucket.parameters.items() if parameter.grad is None)
        self._link.seed = zlib.crc32(f"{self.config.seed}:{self._num_steps}".encode())
        steps, collectives = self._exchange(bucket)
        self._running.append(_Running(steps, next(steps), collectives))
        for running in self._running[:-1]:
            if running.left > 1:  # the last one has nothing to issue, it waits for finish
                self._advance(running)

    def _advance(self, running: "_Running") -> None:
        """Wait for a collective and let its exchange go on to the next."""
        with self._link.timed("exchange_s"):
            result = running.pending.wait()
        running.left -= 1
        try:
            running.pending = running.steps.send(result)
        except StopIteration:
            self._running.remove(running)

    def _exchange(self, bucket: "_Bucket") -> tuple[Steps, int]:
        if self.codec.combine == "sum":
            return self._all_reduce(bucket), 1
        warm = self.config.warm_up_steps
        codec = self.codec.warmed_up(self._num_steps / warm) if warm else self.codec
        pieces = bucket.pieces(codec)
        algorithm = self._algorithm(bucket, codec, pieces)
        if self.is_entrywise and algorithm is gather and not self._inside and not self.config.whole_buckets:
            pieces = [self._apart(bucket.parameters[piece.name], piece) for piece in pieces]
        return self._coded(bucket, pieces, algorithm), num_collectives(algorithm) + (2 if self._inside else 0)

    def _algorithm(self, bucket: "_Bucket", codec: Codec, pieces: Sequence[Piece]) -> Algorithm:
        if codec not in bucket.algorithms:
            found = choose(pieces, self._link.transport.world_size)
            bucket.algorithms[codec] = found if found is low_rank else ALGORITHMS.get(self.config.algorithm, found)
        return bucket.algorithms[codec]

    def _apart(self, parameter: Tensor, piece: Piece) -> Piece:
        """A piece whose mean stays sparse, if that is less work."""
        codec, size = piece.codec, piece.size
        plain = type(parameter.data) is Tensor and parameter.dtype == torch.float32 and parameter.device.type == "cpu"
        if not (plain and parameter.is_contiguous() and isinstance(codec, Sparse)):
            return piece
        few = SPARSE_SHARE * codec.most_sent(size) * self.world_size <= size
        return replace(piece, entries=Entries(size)) if few else piece

    def _coded(self, bucket: "_Bucket", pieces: Sequence[Piece], algorithm: Algorithm) -> Steps:
        if self._inside is None:
            yield from algorithm(pieces, self._link)
        else:
            yield from hierarchical(pieces, self._inside, self._link, algorithm)
        bucket.write([piece for piece in pieces if piece.entries is None])
        for piece in pieces:
            if piece.entries is not None:
                parameter = bucket.parameters[piece.name]
                parameter.grad = None
                self._sparse[piece.name] = parameter, piece.entries

    def _all_reduce(self, bucket: "_Bucket") -> Steps:
        """The sum of plain fp32 gradients, on their device."""
        grads = [local_grad(parameter) for parameter in bucket.parameters.values()]
        flat = torch.cat([grad.reshape(-1).float() for grad in grads])
        count_all_reduce(self._link, flat.numel())
        total = yield self._link.transport.all_reduce(flat.to(self._link.transport.device))
        total *= self._link.weight
        for grad, mean in zip(grads, torch.split(total, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        self._link.healthy &= bool(torch.isfinite(total).all())

    def _in_charge(self, name: str, value: Floats) -> Floats:
        """Zeros where another rank of the node is in charge."""
        if self._inside is None:
            return value
        kept = np.zeros_like(value)
        for bucket in self._buckets:
            names = list(bucket.parameters)
            if name in names:
                shares = cut(list(bucket.sizes.values()), self._inside.transport.world_size)
                for i, part in shares[self._inside.transport.rank]:
                    if names[i] == name:
                        kept[part] = value[part]
        return kept


class _Bucket:
    """Parameters that share an exchange; with ``whole`` they are one tensor to it, of the name of the first."""

    def __init__(self, parameters: dict[str, Tensor], whole: bool) -> None:
        self.parameters = parameters
        self.shapes = {name: tuple(local(p).shape) for name, p in parameters.items()}
        self.sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.num_elements = sum(self.sizes.values())
        self.missing = len(parameters)
        self.algorithms: dict[Codec, Algorithm] = {}
        self._whole = whole
        self._first = next(iter(parameters))
        self._fitted: dict[Codec, list[Codec]] = {}

    def pieces(self, codec: Codec) -> list[Piece]:
        """The gradients of this step, and the memory for their mean: the same, where NumPy can have it."""
        if codec not in self._fitted:
            shapes = [(self.num_elements,)] if self._whole else list(self.shapes.values())
            self._fitted[codec] = [codec.for_tensor(shape) for shape in shapes]
        gradients = {}
        for name, parameter in self.parameters.items():
            gradients[name] = local_grad(parameter).detach().reshape(-1).float().cpu().numpy()
        if self._whole:
            gradients = {self._first: np.concatenate(list(gradients.values()))}
        return [
            Piece(name, fitted, values, values, 0, values.size)
            for (name, values), fitted in zip(gradients.items(), self._fitted[codec], strict=True)
        ]

    def write(self, pieces: Sequence[Piece]) -> None:
        """The mean into ``.grad``, unless it is there already."""
        means = self._split(pieces[0].out) if self._whole else {piece.name: piece.out for piece in pieces}
        for name, mean in means.items():
            source, grad = torch.from_numpy(mean), local_grad(self.parameters[name])
            if source.data_ptr() != grad.data_ptr():
                grad.copy_(source.view_as(grad))

    def place(self, name: str) -> tuple[str, slice | None]:
        """Where the feedback keeps a parameter: under which name, and which part of that."""
        if not self._whole:
            return name, None
        first = sum(size for _, size in itertools.takewhile(lambda item: item[0] != name, self.sizes.items()))
        return self._first, slice(first, first + self.sizes[name])

    def by_parameter(self, state: Mapping[str, Floats]) -> Iterator[tuple[str, Floats]]:
        """What a feedback keeps of this bucket as a whole, cut into its parameters."""
        for kind in ("residual", "velocity"):
            if f"{kind}/{self._first}" in state:
                for name, part in self._split(state[f"{kind}/{self._first}"]).items():
                    yield f"{kind}/{name}", part

    def joined(self, state: Mapping[str, Floats]) -> Iterator[tuple[str, Floats]]:
        """Inverse of ``by_parameter``. A parameter that owes nothing has zeros."""
        for kind in ("residual", "velocity"):
            if any(f"{kind}/{name}" in state for name in self.parameters):
                parts = [state.get(f"{kind}/{name}", np.zeros(size, np.float32)) for name, size in self.sizes.items()]
                yield f"{kind}/{self._first}", np.concatenate(parts)

    def _split(self, whole: Floats) -> dict[str, Floats]:
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.parameters, np.split(whole, ends[:-1]), strict=True))


@dataclass
class _Running:
    """An exchange on its way, and how many collectives it has left, the pending one included."""

    steps: Steps
    pending: Pending
    left: int


def _on_gradient(sync: "weakref.ref[GradSync]", bucket: _Bucket, _: Tensor) -> None:
    this = sync()
    if this is None or this._suspended:
        return
    bucket.missing -= 1
    while this._num_started < len(this._buckets) and this._buckets[this._num_started].missing <= 0:
        this._start_next()


def _fill_buckets(parameters: Sequence[tuple[str, Tensor]], limit_bytes: float) -> Iterator[dict[str, Tensor]]:
    """In the order given; a bucket is full once it has reached the limit.

    So a bias that comes before a large matrix shares its exchange, and has none of its own.
    """
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, parameter in parameters:
        bucket[name] = parameter
        size += 4 * local(parameter).numel()
        if size >= limit_bytes:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket
