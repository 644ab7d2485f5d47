"""The transport over torch.distributed: gloo and NCCL."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efftrain.errors import ConfigError
from efftrain.parallel.backends import Pending

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

    def all_gather(self, message: Tensor) -> Pending:
        """See ``Transport``."""
        everyone = message.new_empty(self.world_size * message.numel())
        work = _all_gather(everyone, message, group=self._group, async_op=True)
        return _Pending(work, everyone.view(self.world_size, -1), message)

    def all_to_all(self, message: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
        """See ``Transport``."""
        received = message.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(
            received, message, list(receive_sizes), list(send_sizes), group=self._group, async_op=True
        )
        return _Pending(work, received, message)

    def all_reduce(self, values: Tensor) -> Pending:
        """See ``Transport``."""
        return _Pending(dist.all_reduce(values, group=self._group, async_op=True), values)

    def broadcast(self, values: Tensor) -> Pending:
        """See ``Transport``."""
        return _Pending(dist.broadcast(values, group=self._group, group_src=0, async_op=True), values)

    def split(self, node_size: int) -> "tuple[TorchTransport, TorchTransport]":
        """See ``Transport``. Every rank of all processes calls it."""
        if node_size < 1 or self.world_size % node_size:
            raise ConfigError(f"nodes of {node_size} ranks do not divide {self.world_size} ranks; choose a divisor")
        ranks = torch.arange(self.world_size).view(-1, node_size)
        enumerate_groups: Any = dist.new_subgroups_by_enumeration
        inside, _ = enumerate_groups(ranks.tolist())
        between, _ = enumerate_groups(ranks.T.tolist())
        return TorchTransport(self.device, inside), TorchTransport(self.device, between)


class _Pending:
    """Keeps what the collective reads and writes alive until it is done."""

    def __init__(self, work: "dist.Work | None", result: Tensor, source: Tensor | None = None) -> None:
        self._work, self._result, self._source = work, result, source

    def wait(self) -> Tensor:
        """See ``Pending``."""
        if self._work is not None:
            self._work.wait()
        self._work = self._source = None
        return self._result
