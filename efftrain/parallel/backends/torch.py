"""The transport over torch.distributed: gloo and NCCL.

Note [receive first]
    gloo sends a message once its receiver has said that it is ready, and says so on the connection that carries its own
    messages. A collective of gloo sends first: the rank that comes to it last finds the other one ready, fills the
    connection with its message, and its own "ready" waits behind that. So one direction of the link is idle until the
    other is done. On gloo, messages go point to point, and every rank is ready before it sends. (Two nodes at
    100 Mbit/s, 5 MB each way: 130 ms of 1050 without.) What is gathered in small messages stays a collective, which has
    a thread of its own: the thread that trains may lose its core while it holds the connection, and gloo's loop spins
    until it is back (11 ms of CPU a step on two busy cores).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efftrain.errors import ConfigError, PeerError
from efftrain.parallel.backends import Pending

_SMALL_BYTES = 1 << 18

# torch 2.13 renamed them and warns about the old names; the versions before know only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchTransport:
    """Collectives of a process group. See ``Transport``.

    Args:
        device: That the backend of the group works on: the CPU for gloo, this rank's GPU for NCCL.
        group: ``None`` takes all processes.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.device = device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._point_to_point = dist.get_backend(group) == "gloo"
        self._num_calls = 0

    def all_gather(self, message: Tensor) -> Pending:
        """See ``Transport``."""
        everyone = message.new_empty(self.world_size, message.numel())
        if self._point_to_point and message.numel() * message.element_size() >= _SMALL_BYTES:
            works = self._swap([message] * self.world_size, list(everyone))
        else:
            works = [_all_gather(everyone.view(-1), message, group=self._group, async_op=True)]
        return _Pending(works, everyone, message, group=self._group)

    def all_to_all(self, message: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
        """See ``Transport``."""
        received = message.new_empty(sum(receive_sizes))
        to_send, to_receive = list(send_sizes), list(receive_sizes)
        if self._point_to_point:
            works = self._swap(torch.split(message, to_send), torch.split(received, to_receive))
        else:
            works = [dist.all_to_all_single(received, message, to_receive, to_send, group=self._group, async_op=True)]
        return _Pending(works, received, message, group=self._group)

    def all_reduce(self, values: Tensor) -> Pending:
        """See ``Transport``."""
        return _Pending([dist.all_reduce(values, group=self._group, async_op=True)], values, group=self._group)

    def broadcast(self, values: Tensor) -> Pending:
        """See ``Transport``."""
        works = [dist.broadcast(values, group=self._group, group_src=0, async_op=True)]
        return _Pending(works, values, group=self._group)

    def split(self, node_size: int) -> "tuple[TorchTransport, TorchTransport]":
        """See ``Transport``. Every rank of the group calls it."""
        if node_size < 1 or self.world_size % node_size:
            raise ConfigError(f"nodes of {node_size} ranks do not divide {self.world_size} ranks; choose a divisor")
        ranks = torch.arange(self.world_size).view(-1, node_size)
        node, place = divmod(self.rank, node_size)
        return self.some(ranks[node].tolist()), self.some(ranks[:, place].tolist())

    def some(self, ranks: Sequence[int]) -> "TorchTransport":
        """Some ranks of the group as one of their own; they call it, in the same order if they belong to several."""
        own = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        make: Any = dist.new_group
        # Other ranks, and other groups of the same axis, take no part.
        return TorchTransport(self.device, make([own[rank] for rank in ranks], use_local_synchronization=True))

    def second(self) -> "tuple[TorchTransport, dist.ProcessGroup]":
        """See ``Transport``."""
        ranks = None if self._group is None else dist.get_process_group_ranks(self._group)
        group: Any = dist.new_group(ranks, backend="gloo")
        return TorchTransport(torch.device("cpu"), group), group

    def _swap(self, to_send: Sequence[Tensor], to_receive: Sequence[Tensor]) -> "list[dist.Work | None]":
        """Send a part to each rank and receive one from each; empty parts take no message. See Note [receive first]."""
        self._num_calls += 1
        tag = self._num_calls % (1 << 30)
        to_receive[self.rank].copy_(to_send[self.rank])
        works = []
        # Each rank begins with its neighbor, so that not all send to rank 0 first.
        for peer in self._others(-1):
            if to_receive[peer].numel():
                works.append(dist.irecv(to_receive[peer], group=self._group, group_src=peer, tag=tag))
        for peer in self._others(1):
            if to_send[peer].numel():
                works.append(dist.isend(to_send[peer], group=self._group, group_dst=peer, tag=tag))
        return works

    def _others(self, direction: int) -> Iterator[int]:
        return ((self.rank + direction * i) % self.world_size for i in range(1, self.world_size))


def peer_error(error: RuntimeError, group: dist.ProcessGroup | None = None) -> PeerError | None:
    """What a failed collective says of another rank; ``None`` if it says something else.

    Args:
        error: As torch raised it.
        group: Of the collective, if that is known: an axis of a plan, or all ranks.
    """
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return None
    reason = re.sub(r"^\[\S*\] ", "", (str(error).splitlines() or ["no reason given"])[0])  # without gloo's source file
    axis = "" if group is None else group.group_desc.removeprefix("mesh_")
    where = ""
    if group is not None and axis != group.group_desc:
        ranks = ", ".join(map(str, dist.get_process_group_ranks(group)[:8]))
        where = f" of the {axis} axis (ranks {ranks}{', ...' * (dist.get_world_size(group) > 8)})"
    return PeerError(
        f"lost another rank{where}, or waited too long for it, on rank {dist.get_rank()}; see its own message "
        f"({reason[:120]})"
    )


class _Pending:
    """Keeps what the collective reads and writes alive until it is done."""

    def __init__(
        self,
        works: "Sequence[dist.Work | None]",
        result: Tensor,
        source: Tensor | None = None,
        *,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._works, self._result, self._source, self._group = works, result, source, group

    def wait(self) -> Tensor:
        """See ``Pending``."""
        try:
            for work in self._works:
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            lost = peer_error(error, self._group)
            if lost is None:
                raise
            raise lost from error
        self._works, self._source = [], None
        return self._result
