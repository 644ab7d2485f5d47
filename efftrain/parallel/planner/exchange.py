"""How long the data axis keeps a step waiting: the exchange of every bucket played through beside the backward pass.

The same buckets, algorithms and message sizes as ``sync`` and ``collectives`` make, the same order of waiting; only
nothing is sent. See Note [one order] in sync.py.
"""

# W ranks of the data axis

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from efftrain.compression import Codec, Identity
from efftrain.compression.compact import slot_bytes
from efftrain.compression.sparsify import Sparse
from efftrain.parallel.collectives import (
    ALGORITHMS,
    Piece,
    choose,
    cut,
    gather_bytes,
    low_rank,
    ring_bytes,
    share_bytes,
    two_phase,
)
from efftrain.parallel.planner.hardware import CodecSpeed, Hardware, Link
from efftrain.parallel.planner.work import Parameter
from efftrain.parallel.sync import SyncConfig

_DDP_FIRST_BYTES = 1 << 20
_DDP_BYTES = 25 << 20


@dataclass(frozen=True)
class Exchange:
    """What the data axis adds to the backward pass of a step.

    Attributes:
        codec_s: Encoding and decoding, on the thread that computes.
        exposed_s: Waiting for others with nothing to compute.
        wire_bytes: That a rank sends.
        buffer_bytes: Of messages and buckets, which all stay until the end of the step.
    """

    codec_s: float = 0.0
    exposed_s: float = 0.0
    wire_bytes: float = 0.0
    buffer_bytes: int = 0


@dataclass
class _Bucket:
    """One exchange: computing and collectives in turn, computing first and last."""

    ready_s: float
    compute: list[float]
    wire_bytes: list[float]
    messages: list[float]
    links: list[Link]
    buffer_bytes: int
    done: list[float] = field(default_factory=list)


def replicated(
    parameters: Sequence[Parameter],
    ready: Mapping[str, float],
    backward_s: float,
    *,
    codec: Codec,
    sync: SyncConfig,
    by_ddp: bool,
    world_size: int,
    hardware: Hardware,
    slowdown: float,
    link: Link,
    inside: Link,
) -> Exchange:
    """Replicas that average their gradients.

    Args:
        parameters: That the rank trains, in the model's order.
        ready: Parameter -> seconds after the start of the backward pass when its gradient is there.
        backward_s: Length of the backward pass.
        codec: What gradients go through.
        sync: Buckets, algorithm, and neighbors on the data axis that sum up in fp32 first (``node_size``).
        by_ddp: torch's DDP exchanges, which has buckets of its own.
        world_size: ``W``.
        hardware: For codecs and memory.
        slowdown: Of everything that computes.
        link: Of the data axis.
        inside: Of those neighbors.
    """
    if world_size == 1:
        return Exchange()
    buckets = [
        _bucket(group, ready, codec, sync, by_ddp, world_size, hardware, slowdown, link, inside)
        for group in _groups(parameters, sync, by_ddp)
    ]
    clock, codec_s = 0.0, 0.0
    wire_free = {link: 0.0, inside: 0.0}
    # Bytes cost CPU time, too; with no core to spare it is taken from the threads that compute.
    crowded = bool(hardware.cores) and min(world_size, hardware.ranks_per_node) >= hardware.cores
    started = hardware.collective_us / 1e6 * slowdown

    def issue(bucket: _Bucket, number: int) -> None:
        nonlocal clock
        clock += started
        wire = bucket.links[number]
        busy = wire.seconds(bucket.wire_bytes[number], bucket.messages[number])
        slowest = bucket.wire_bytes[number] * wire.cpu_ns_per_byte / 1e9 * slowdown
        wire_free[wire] = max(clock, wire_free[wire]) + max(busy, slowest)
        bucket.done.append(wire_free[wire])

    def advance(bucket: _Bucket) -> bool:
        """Wait for a collective, compute, start the next; whether there is one."""
        nonlocal clock, codec_s
        number = len(bucket.done)
        clock = max(clock, bucket.done[-1]) + bucket.compute[number]
        codec_s += bucket.compute[number]
        if number == len(bucket.wire_bytes):
            return False
        issue(bucket, number)
        return True

    running: list[_Bucket] = []
    computed = 0.0
    for bucket in buckets:
        clock += max(0.0, bucket.ready_s - computed)
        computed = max(computed, bucket.ready_s)
        clock += bucket.compute[0]
        codec_s += bucket.compute[0]
        issue(bucket, 0)
        for other in running:
            if len(other.done) < len(other.wire_bytes):
                advance(other)
        running.append(bucket)
    clock += max(0.0, backward_s - computed)
    while running:
        running = [bucket for bucket in running if advance(bucket)]
    messages = [one for bucket in buckets for one in zip(bucket.wire_bytes, bucket.links, strict=True)]
    stolen = sum(num_bytes * wire.cpu_ns_per_byte for num_bytes, wire in messages) / 1e9 * slowdown if crowded else 0.0
    exposed = max(clock - backward_s - codec_s, stolen)
    # As GradSync counts: what goes between nodes.
    sent = sum(num_bytes for num_bytes, wire in messages if wire is link or sync.node_size == 1)
    return Exchange(codec_s, max(0.0, exposed), sent, sum(bucket.buffer_bytes for bucket in buckets))


def sharded(
    num_parameters: int,
    compute_s: float,
    *,
    num_units: int,
    gathers: int,
    codec: Codec,
    world_size: int,
    copies: int,
    hardware: Hardware,
    slowdown: float,
    link: Link,
    between: Link,
) -> Exchange:
    """``fully_shard``: weights gathered, gradients reduced and scattered.

    Args:
        num_parameters: Of the rank's part before it is divided.
        compute_s: Forward and backward pass, beside which layers are gathered ahead.
        num_units: Layers that are gathered on their own.
        gathers: 1, or 2 if weights are given back after the forward pass.
        codec: Of the gradients.
        world_size: Ranks that share one copy.
        copies: Of the weights; their gradients' shards are all-reduced in fp32.
        hardware: For the codec.
        slowdown: Of everything that computes.
        link: Of the ranks that share a copy.
        between: Of the copies.
    """
    if world_size * copies == 1:
        return Exchange()
    share = (world_size - 1) / world_size
    speed = codec_speed(codec, hardware)
    plain = isinstance(codec, Identity)
    # torch makes a reduce-scatter over gloo of an all-reduce, which sends everything twice.
    twice = 2.0 if hardware.cores else 1.0
    gradient = 4.0 * num_parameters * twice if plain else _slot(codec, num_parameters)
    sent = share * (4.0 * num_parameters * gathers + gradient)
    collectives = num_units * (gathers + 1)
    reduced = ring_bytes(num_parameters, copies) / world_size
    wire = link.seconds(sent, collectives * (world_size - 1))
    wire += between.seconds(reduced, 2.0 * (copies - 1) * num_units)
    cpu = (sent * link.cpu_ns_per_byte + reduced * between.cpu_ns_per_byte) / 1e9 * slowdown
    sent += reduced
    coding = 0.0
    if not plain:
        coding = (speed.encode_ns + speed.decode_ns) * num_parameters / 1e9 * slowdown
        coding += (speed.encode_us + speed.decode_us) * num_units / 1e6 * slowdown
    # The first layer has nothing to hide behind, nor has the last gradient.
    alone = wire / max(1, num_units)
    exposed = alone + max(0.0, max(wire, cpu) - alone - compute_s)
    calls = collectives * hardware.gathered_layer_us / 1e6 * slowdown
    copied = 4.0 * num_parameters * (gathers + 1)
    copying = copied * (2 / hardware.memory_gb_s + hardware.gathered_ns_per_byte) / 1e9 * slowdown
    return Exchange(coding + copying + calls, exposed, sent, 4 * num_parameters // max(1, num_units))


def codec_speed(codec: Codec, hardware: Hardware) -> CodecSpeed:
    """Of a codec; of ``TopK(0.01) >> Int8()`` the second works on what the first lets through."""
    speed = hardware.codec_speed(type(codec).__name__)
    if not isinstance(codec, Sparse) or isinstance(codec.values, Identity):
        return speed
    values, plain = codec_speed(codec.values, hardware), hardware.codec_speed("Identity")
    return CodecSpeed(
        encode_ns=speed.encode_ns + codec.ratio * values.encode_ns,
        decode_ns=speed.decode_ns + codec.ratio * values.decode_ns,
        encode_us=speed.encode_us + max(0.0, values.encode_us - plain.encode_us),
        decode_us=speed.decode_us + max(0.0, values.decode_us - plain.decode_us),
    )


def feedback_bytes(codec: Codec, num_parameters: int, *, momentum: bool) -> int:
    """What a rank keeps for later steps: residuals and, with momentum correction, velocities; each old and new."""
    if codec.combine == "sum":
        return 0
    return 4 * num_parameters * (4 if momentum else 2)


def _groups(parameters: Sequence[Parameter], sync: SyncConfig, by_ddp: bool) -> list[list[Parameter]]:
    """Buckets in the order of the backward pass. DDP closes one before it overflows, GradSync when it is full."""
    limit = sync.bucket_mb * (1 << 20) if sync.bucket_mb is not None else float(_DDP_BYTES)
    groups: list[list[Parameter]] = [[]]
    size, current = 0.0, min(limit, _DDP_FIRST_BYTES) if by_ddp else limit
    for parameter in reversed(parameters):
        if size >= current:
            groups.append([])
            size, current = 0.0, limit
        groups[-1].append(parameter)
        size += 4 * parameter.size
    return [group for group in groups if group]


def _bucket(
    group: Sequence[Parameter],
    ready: Mapping[str, float],
    codec: Codec,
    sync: SyncConfig,
    by_ddp: bool,
    world_size: int,
    hardware: Hardware,
    slowdown: float,
    link: Link,
    inside: Link,
) -> _Bucket:
    num = sum(parameter.size for parameter in group)
    at = max(ready[parameter.name] for parameter in group)
    speed = codec_speed(codec, hardware)

    def encoding(elements: float, tensors: float) -> float:
        return (speed.encode_ns / 1e9 * elements + speed.encode_us / 1e6 * tensors) * slowdown

    def decoding(elements: float, tensors: float) -> float:
        return (speed.decode_ns / 1e9 * elements + speed.decode_us / 1e6 * tensors) * slowdown

    if codec.combine == "sum":
        before, after = encoding(num, len(group)), decoding(num, len(group))
        if by_ddp:  # gradients become views of the buckets
            copy_s = hardware.operator_us / 1e6 * len(group) + 8 * num / (hardware.memory_gb_s * 1e9)
            before = after = copy_s * slowdown
        kept = 0 if by_ddp else 4 * num
        return _Bucket(at, [before, after], [ring_bytes(num, world_size)], [2.0 * (world_size - 1)], [link], kept)
    sizes = [num] if sync.whole_buckets else [parameter.size for parameter in group]
    shapes = [(num,)] if sync.whole_buckets else [parameter.shape for parameter in group]
    fitted = [codec.for_tensor(shape) for shape, _ in zip(shapes, sizes, strict=False)]
    node, whole = sync.node_size, num
    if node > 1:  # of a node, each rank is in charge of a part of the bucket
        share = cut(sizes, node)[0]
        fitted, sizes = [fitted[i] for i, _ in share], [part.stop - part.start for i, part in share]
        num, world_size = sum(sizes), world_size // node
    nothing = np.broadcast_to(np.float32(0), 1)
    pieces = [
        Piece(str(i), one, np.broadcast_to(nothing, (size,)), nothing, 0, size)
        for i, (one, size) in enumerate(zip(fitted, sizes, strict=True))
    ]
    algorithm = choose(pieces, world_size)
    algorithm = algorithm if algorithm is low_rank else ALGORITHMS.get(sync.algorithm, algorithm)
    tensors = len(pieces)
    if algorithm is low_rank:
        sent = [ring_bytes(n, world_size) for n in _factors(pieces)]
        compute = [encoding(num, tensors) / 2] * 2 + [decoding(num, tensors)]
        messages, kept = [2.0 * (world_size - 1)] * 2, 8 * num
    elif algorithm is two_phase:
        shares = cut(sizes, world_size)
        first = [share_bytes(pieces, share, second=False) for share in shares]
        second = max(share_bytes(pieces, share, second=True) for share in shares)
        others = (world_size - 1) / world_size
        parts = sum(len(share) for share in shares)
        second_encoding = encoding(num / world_size, parts / world_size)
        compute = [
            encoding(num * others, parts * others),
            decoding(num * others, parts * others) + second_encoding,
            decoding(num, parts),
        ]
        sent = [sum(first) * others, second * (world_size - 1.0)]
        messages, kept = [1.0, 1.0], sum(first) + second * world_size
    else:
        size = gather_bytes(pieces)
        compute = [encoding(num, tensors), decoding(num * world_size, tensors * world_size)]
        sent, messages, kept = [size * (world_size - 1.0)], [world_size - 1.0], size * (world_size + 1)
    links = [link] * len(sent)
    if node > 1:  # summed up and spread in fp32 inside, over memory once to join, to add up and to copy back
        copy_s = 8 * whole / (hardware.memory_gb_s * 1e9) * slowdown
        moved = 4.0 * (whole - num)
        compute = [copy_s, copy_s + compute[0], *compute[1:], copy_s]
        sent, messages = [moved, *sent, moved], [node - 1.0, *messages, node - 1.0]
        links, kept = [inside, *links, inside], kept + 12 * whole
    return _Bucket(at, compute, sent, messages, links, kept)


def _factors(pieces: Sequence[Piece]) -> tuple[int, int]:
    """Elements of both sums of ``low_rank``."""
    first = second = 0
    for piece in pieces:
        shape = getattr(piece.codec, "matrix_shape", None)
        if shape is None:
            first += piece.size
            continue
        rows, columns = shape(piece.size)
        rank = piece.codec.effective_rank(piece.size)  # type: ignore[attr-defined]
        first += rows * rank
        second += columns * rank
    return first, second


def _slot(codec: Codec, num_elements: int) -> float:
    block = min(num_elements, 1 << 20)
    return slot_bytes(codec.for_tensor((block,)), block) * math.ceil(num_elements / block)
