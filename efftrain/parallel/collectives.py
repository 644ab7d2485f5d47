"""How a bucket of gradients becomes its mean over the ranks: one generator for each algorithm.

A generator yields collectives that it has started and gets their results; between two yields it only computes. So
whoever runs it (``GradSync``, the DDP hook, the FSDP2 object) decides when to wait, and is the one place that issues
collectives in one order on all ranks.

Every message ends with a byte that says whether its sender's gradient was finite. The senders of a second phase pass it
on, so that after an exchange all ranks agree.
"""

import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from efftrain.compression import Codec, Deflate, Feedback, LowRank, Payload, orthonormalize, start_factor
from efftrain.compression.compact import add_slot, fill_slot, slot_bytes
from efftrain.compression.entries import Entries
from efftrain.compression.feedback import Owed
from efftrain.compression.lowrank import expand
from efftrain.compression.wire import Bytes, Floats
from efftrain.errors import ConfigError, NonFiniteError
from efftrain.parallel.backends import Pending, Transport

# W ranks; B bytes of a message

Steps: TypeAlias = Generator[Pending, Tensor, None]
"""An exchange on its way."""


@dataclass(frozen=True)
class Piece:
    """A parameter, or the part of it that this rank is in charge of, in one exchange.

    Attributes:
        name: Of the parameter.
        codec: Fitted to the whole parameter (``Codec.for_tensor``).
        values: This step's gradient, float32, shape ``(N,)``, on the host.
        out: Gets the mean over all ranks; same shape. May be the memory of ``values``.
        first: Where the part begins in the parameter.
        size: Elements of the whole parameter.
        entries: Gets the mean in place of ``out``, of a sparse codec that is gathered.
    """

    name: str
    codec: Codec
    values: Floats
    out: Floats
    first: int
    size: int
    entries: Entries | None = None


@dataclass
class Link:
    """One group of ranks, and what encodes for it on this rank.

    Attributes:
        transport: Moves the bytes.
        feedback: Of this rank.
        weight: Of the sum over all ranks in the result: one over their number.
        seed: Of this step: keys of stochastic rounding and random places come from it.
        healthy: False once some rank had to send zeros in place of a gradient with inf or NaN.
        stats: Seconds and bytes; see ``GradSync.stats``.
    """

    transport: Transport
    feedback: Feedback
    weight: float
    seed: int = 0
    healthy: bool = True
    stats: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a figure."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.count(name, time.perf_counter() - started)

    def count(self, name: str, value: float) -> None:
        """Add to a figure."""
        self.stats[name] = self.stats.get(name, 0.0) + value

    def open(self, pieces: Sequence[Piece]) -> list[Owed]:
        """What each piece owes."""
        return [self.feedback.open(p.name, p.values, first=p.first, size=p.size) for p in pieces]

    def encode(self, owed: Owed, piece: Piece, part: slice) -> Payload:
        """A part of what is owed; zeros, and the link is no longer healthy, if that is not finite."""
        key = self.key(piece, part, phase=1)
        try:
            return owed.encode(piece.codec, part, key=key)
        except NonFiniteError:
            self.healthy = False
            return piece.codec.encode(np.zeros(owed.values[part].size, np.float32), key=key)

    def encode_sum(self, total: Floats, owed: Owed, piece: Piece, part: slice) -> Payload:
        """The second phase's payload of a sum over ranks; the feedback keeps what that does not say."""
        codec, key = piece.codec.second_phase(), self.key(piece, part, phase=2)
        try:
            payload, _ = codec.encode_with_residual(total, None, key=key, out=owed.left[part])
        except NonFiniteError:
            self.healthy = False
            return codec.encode(np.zeros_like(total), key=key)
        owed.mask(part, total)
        return payload

    def key(self, piece: Piece, part: slice, phase: int) -> int:
        """Of a payload's random numbers: another one for each step, rank, phase and part, unless they are shared."""
        own = "" if piece.codec.shared_key else f":{self.transport.rank}:{phase}"
        return zlib.crc32(f"{self.seed}:{piece.name}:{piece.first + (part.start or 0)}{own}".encode())

    def message(self, payloads: Sequence[tuple[Codec, int, Payload]], num_bytes: int) -> Tensor:
        """Slots one after the other, padded, and the byte of health; uint8, shape ``(num_bytes,)``."""
        message = torch.empty(num_bytes, dtype=torch.uint8)
        data, first = message.numpy(), 0
        for codec, num_elements, payload in payloads:
            last = first + slot_bytes(codec, num_elements)
            fill_slot(data[first:last], codec, payload)
            first = last
        data[first:] = 0
        data[-1] = self.healthy
        return message

    def add(self, message: Bytes, outs: Sequence[tuple[Codec, Floats | Entries]], weight: float) -> None:
        """Decode the slots of a message and add them up."""
        first = 0
        for codec, out in outs:
            last = first + slot_bytes(codec, out.size)
            add_slot(message[first:last], codec, out, weight)
            first = last
        self.healthy &= bool(message[-1])


Algorithm: TypeAlias = Callable[[Sequence[Piece], Link], Steps]


def refuse_deflate(codec: Codec) -> None:
    """Ranks send each other slots of the largest size, which DEFLATE does not make smaller.

    Raises:
        ConfigError: ``codec`` is a ``Deflate``.
    """
    if isinstance(codec, Deflate):
        raise ConfigError(f"ranks exchange slots of one size, in which Deflate saves nothing; take {codec.codec}")


def gather(pieces: Sequence[Piece], link: Link) -> Steps:
    """All ranks get all payloads, decode and add them in rank order. Sends ``(W - 1) B``; one collective."""
    others = link.transport.world_size - 1
    with link.timed("encode_s"):
        payloads = [
            (piece.codec, piece.values.size, link.encode(owed, piece, slice(0, piece.values.size)))
            for piece, owed in zip(pieces, link.open(pieces), strict=True)
        ]
        message = link.message(payloads, gather_bytes(pieces)).to(link.transport.device)
    link.count("wire_bytes", others * message.numel())
    everyone = yield link.transport.all_gather(message)
    with link.timed("decode_s"):
        outs: list[tuple[Codec, Floats | Entries]] = []
        for piece in pieces:
            if piece.entries is None:
                piece.out.fill(0)
            outs.append((piece.codec, piece.out if piece.entries is None else piece.entries))
        for row in everyone.cpu().numpy():
            link.add(row, outs, link.weight)


def two_phase(pieces: Sequence[Piece], link: Link) -> Steps:
    """Reduce-scatter, encode again, all-gather: ``2 (W - 1) / W B`` whatever ``W`` is; two collectives.

    Each rank is in charge of a part of the bucket. It adds up what the others send of that part (its own share needs
    no codec), encodes the sum and sends it to all. What either phase does not say stays in feedback: the first phase's
    with the sender, the second's with the rank in charge.

    Source: error compensation on both sides as in Tang et al., DoubleSqueeze (arXiv:1905.05957).
    """
    rank, world_size = link.transport.rank, link.transport.world_size
    shares = cut([piece.values.size for piece in pieces], world_size)
    sizes = [share_bytes(pieces, share, second=False) for share in shares]
    with link.timed("encode_s"):
        all_owed = link.open(pieces)
        messages = [
            link.message(
                [
                    (pieces[i].codec, part.stop - part.start, link.encode(all_owed[i], pieces[i], part))
                    for i, part in share
                ],
                sizes[owner],
            )
            for owner, share in enumerate(shares)
            if owner != rank
        ]
        message = torch.cat([torch.empty(0, dtype=torch.uint8), *messages]).to(link.transport.device)
    send_sizes = [0 if owner == rank else size for owner, size in enumerate(sizes)]
    receive_sizes = [0 if sender == rank else sizes[rank] for sender in range(world_size)]
    link.count("wire_bytes", message.numel())
    received = yield link.transport.all_to_all(message, send_sizes, receive_sizes)
    with link.timed("decode_s"):
        totals = [(pieces[i].codec, all_owed[i].total(part)) for i, part in shares[rank]]
        data = received.cpu().numpy()
        for sender in range(world_size - 1):
            link.add(data[sender * sizes[rank] : (sender + 1) * sizes[rank]], totals, 1.0)
    with link.timed("encode_s"):
        payloads = [
            (pieces[i].codec.second_phase(), total.size, link.encode_sum(total, all_owed[i], pieces[i], part))
            for (_, total), (i, part) in zip(totals, shares[rank], strict=True)
        ]
        largest = max(share_bytes(pieces, share, second=True) for share in shares)
        message = link.message(payloads, largest).to(link.transport.device)
    link.count("wire_bytes", (world_size - 1) * largest)
    everyone = yield link.transport.all_gather(message)
    with link.timed("decode_s"):
        for piece in pieces:
            piece.out.fill(0)
        for row, share in zip(everyone.cpu().numpy(), shares, strict=True):
            link.add(row, [(pieces[i].codec.second_phase(), pieces[i].out[part]) for i, part in share], link.weight)


def reduce_scatter(piece: Piece, link: Link) -> Steps:
    """The first of the two phases alone: ``piece.out``, shape ``(N / W,)``, gets the sum of this rank's shard.

    All shards are of equal length. A rank's own share is exact, and it owes nothing of it.
    """
    rank, world_size = link.transport.rank, link.transport.world_size
    size = piece.values.size // world_size
    num_bytes = slot_bytes(piece.codec, size) + 1
    with link.timed("encode_s"):
        (owed,) = link.open([piece])
        parts = [slice(shard * size, (shard + 1) * size) for shard in range(world_size)]
        messages = [
            link.message([(piece.codec, size, link.encode(owed, piece, part))], num_bytes)
            for shard, part in enumerate(parts)
            if shard != rank
        ]
        owed.total(parts[rank], out=piece.out)
        owed.left[parts[rank]] = 0
        link.healthy &= bool(np.isfinite(piece.out).all())
        message = torch.cat([torch.empty(0, dtype=torch.uint8), *messages]).to(link.transport.device)
    sizes = [0 if other == rank else num_bytes for other in range(world_size)]
    link.count("wire_bytes", message.numel())
    received = yield link.transport.all_to_all(message, sizes, sizes)
    with link.timed("decode_s"):
        for row in received.cpu().numpy().reshape(-1, num_bytes):
            link.add(row, [(piece.codec, piece.out)], 1.0)


def low_rank(pieces: Sequence[Piece], link: Link) -> Steps:
    """PowerSGD: the sum of ``M Q``, made orthonormal to ``P``, and the sum of ``M^T P``; two small all-reduces.

    Pieces whose codec is no ``LowRank`` (biases) travel as fp32 with the first.

    Source: Vogels et al., PowerSGD (arXiv:1905.13727), algorithms 1 and 2, with warm start.
    """
    with link.timed("encode_s"):
        matrices = [
            _Matrix(piece, owed, piece.codec, link)
            for piece, owed in zip(pieces, link.open(pieces), strict=True)
            if isinstance(piece.codec, LowRank)
        ]
        plain = [piece for piece in pieces if not isinstance(piece.codec, LowRank)]
        first = [matrix.m @ matrix.q for matrix in matrices]
        values = _join([*first, *(piece.values for piece in plain)]).to(link.transport.device)
    count_all_reduce(link, values.numel())
    total = (yield link.transport.all_reduce(values)).cpu().numpy()
    link.healthy &= bool(np.isfinite(total).all())
    with link.timed("encode_s"):
        sums = iter(_split(total, [*(p.size for p in first), *(piece.values.size for piece in plain)]))
        for p in first:
            p[:] = next(sums).reshape(p.shape)
            # A column's length says nothing, its bits must be those of all ranks.
            orthonormalize(p)
        for piece, part in zip(plain, sums, strict=True):
            np.multiply(part, np.float32(link.weight), out=piece.out)
        second = [matrix.m.T @ p for matrix, p in zip(matrices, first, strict=True)]
        values = _join(second).to(link.transport.device)
    count_all_reduce(link, values.numel())
    total = (yield link.transport.all_reduce(values)).cpu().numpy()
    with link.timed("decode_s"):
        for matrix, p, part in zip(matrices, first, _split(total, [q.size for q in second]), strict=True):
            matrix.finish(p, part * np.float32(link.weight), link)
    link.healthy &= bool(np.isfinite(total).all())


class _Matrix:
    """A parameter's debt as a matrix, in the memory where what is left of it will be."""

    def __init__(self, piece: Piece, owed: Owed, codec: LowRank, link: Link) -> None:
        self.piece = piece
        shape = codec.matrix_shape(piece.values.size)
        self.m = owed.total(out=owed.left).reshape(shape)
        rank = codec.effective_rank(piece.values.size)
        warm = link.feedback.factor(piece.name)
        start = start_factor(shape[1], rank, zlib.crc32(piece.name.encode()))
        self.q = start if warm is None else warm.reshape(start.shape)

    def finish(self, p: Floats, q: Floats, link: Link) -> None:
        """Write the mean, and what this rank's matrix has beyond it."""
        q = q.reshape(self.q.shape)
        mean = self.piece.out.reshape(self.m.shape)
        mean[:] = expand(p, q)
        self.m -= mean
        link.feedback.stage_factor(self.piece.name, q)


ALGORITHMS: dict[str, Algorithm] = {"gather": gather, "two_phase": two_phase}
"""Those that serve any codec."""


def hierarchical(pieces: Sequence[Piece], inside: Link, between: Link, algorithm: Algorithm) -> Steps:
    """Sum in fp32 inside a node, compressed between nodes, spread in fp32 inside again.

    Each rank of a node is in charge of one part of the bucket, and talks to the ranks of that place on other nodes.
    """
    local = inside.transport
    shares = cut([piece.values.size for piece in pieces], local.world_size)
    sizes = [sum(part.stop - part.start for _, part in share) for share in shares]
    own = sizes[local.rank]
    values = _join([piece.values for piece in pieces]).to(local.device)
    inside.count("node_bytes", 4 * (values.numel() - own))
    received = yield local.all_to_all(values, sizes, [own] * local.world_size)
    total = received.view(local.world_size, own).sum(0).cpu().numpy()
    largest = max(sizes)
    result = torch.zeros(largest)
    mean = result.numpy()[:own]
    mine, first = [], 0
    for i, part in shares[local.rank]:
        last, piece = first + part.stop - part.start, pieces[i]
        start = piece.first + part.start
        mine.append(replace(piece, values=total[first:last], out=mean[first:last], first=start))
        first = last
    yield from algorithm(mine, between)
    inside.count("node_bytes", 4 * (local.world_size - 1) * largest)
    everyone = (yield local.all_gather(result.to(local.device))).cpu().numpy()
    for row, share in zip(everyone, shares, strict=True):
        first = 0
        for i, part in share:
            last = first + part.stop - part.start
            pieces[i].out[part] = row[first:last]
            first = last


def cut(sizes: Sequence[int], num_shares: int) -> list[list[tuple[int, slice]]]:
    """Cut a row of tensors into shares of equal length (to one element).

    Returns:
        For each share, the tensors that it touches and which part of each.
    """
    total = sum(sizes)
    bounds = [total * share // num_shares for share in range(num_shares + 1)]
    shares: list[list[tuple[int, slice]]] = [[] for _ in range(num_shares)]
    begin = 0
    for i, size in enumerate(sizes):
        for share in range(num_shares):
            first, last = max(bounds[share], begin), min(bounds[share + 1], begin + size)
            if first < last:
                shares[share].append((i, slice(first - begin, last - begin)))
        begin += size
    return shares


def gather_bytes(pieces: Sequence[Piece]) -> int:
    """Of the message of ``gather``."""
    return sum(slot_bytes(piece.codec, piece.values.size) for piece in pieces) + 1


def share_bytes(pieces: Sequence[Piece], share: Sequence[tuple[int, slice]], *, second: bool) -> int:
    """Of one message of ``two_phase``."""
    codecs = [pieces[i].codec.second_phase() if second else pieces[i].codec for i, _ in share]
    return sum(slot_bytes(codec, part.stop - part.start) for codec, (_, part) in zip(codecs, share, strict=True)) + 1


def choose(pieces: Sequence[Piece], world_size: int) -> Algorithm:
    """The algorithm whose codec asks for it, or that sends fewer bytes.

    A gather grows with the number of ranks, two phases do not: there the rank in charge of a part cuts the union of
    what all sent back to a fixed size.
    """
    if any(isinstance(piece.codec, LowRank) for piece in pieces):
        return low_rank
    shares = cut([piece.values.size for piece in pieces], world_size)
    first = sum(share_bytes(pieces, share, second=False) for share in shares) * (world_size - 1) / world_size
    second = max(share_bytes(pieces, share, second=True) for share in shares) * (world_size - 1)
    return two_phase if first + second < (world_size - 1) * gather_bytes(pieces) else gather


def num_collectives(algorithm: Algorithm) -> int:
    """That the generator of an algorithm starts."""
    return 1 if algorithm is gather else 2


def count_all_reduce(link: Link, num_elements: int) -> None:
    """A ring all-reduce in fp32 sends ``2 (W - 1) / W`` times its buffer."""
    link.count("wire_bytes", ring_bytes(num_elements, link.transport.world_size))


def ring_bytes(num_elements: int, world_size: int) -> float:
    """That one rank sends in a ring all-reduce of fp32."""
    return 2 * (world_size - 1) / world_size * 4 * num_elements


def _join(arrays: Sequence[Floats]) -> Tensor:
    joined = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0, np.float32)
    return torch.from_numpy(joined)


def _split(array: Floats, sizes: Sequence[int]) -> list[Floats]:
    return np.split(array, np.cumsum(sizes)[:-1]) if sizes else []
