"""What keeps replicas equal, over any transport: one start, and a look from time to time whether they still are."""

import hashlib
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from efftrain.errors import ConfigError, ReplicaError
from efftrain.parallel.backends import Pending, Transport
from efftrain.parallel.local import local
from efftrain.training.exchange import Agreement, local_grad_norm


def broadcast(transport: Transport, value: Tensor) -> None:
    """Overwrite a tensor of any device with that of rank 0."""
    own = local(value.detach())
    own.copy_(transport.broadcast(own.to(transport.device).contiguous()).wait())


def sum_numbers(transport: Transport, values: Sequence[float]) -> list[float]:
    """Each value added up over all ranks in their order, in float64.

    Gathered, since a ring takes ``2 (W - 1)`` messages one after the other, and few bytes cost nothing but time.
    """
    return _total(_send(transport, values))


def _send(transport: Transport, values: Sequence[float]) -> Pending:
    """Start ``sum_numbers``; ``_total`` waits for it."""
    return transport.all_gather(torch.from_numpy(np.array(values, np.float64).view(np.uint8)).to(transport.device))


def _total(pending: Pending) -> list[float]:
    return [float(total) for total in pending.wait().cpu().numpy().view(np.float64).sum(axis=0)]


def count_ranks(transport: Transport, names: Sequence[str], absent: Iterable[str]) -> list[int]:
    """On how many ranks each of ``names``, equal on all of them, is not ``absent``."""
    absent = set(absent)
    return [int(count) for count in sum_numbers(transport, [name not in absent for name in names])]


def start_equal(transport: Transport, model: nn.Module) -> None:
    """Give all ranks the weights and buffers of rank 0.

    Raises:
        ConfigError: See ``refuse_other_models``.
    """
    refuse_other_models(transport, model)
    for value in (*model.parameters(), *model.buffers()):
        broadcast(transport, value)


class TransportLine:
    """Numbers over a transport: a ``Line``, and what each ``Exchange`` has of one."""

    is_entrywise = False

    def __init__(self, transport: Transport) -> None:
        self.rank, self.world_size = transport.rank, transport.world_size
        self._transport = transport

    def sum(self, values: Sequence[float]) -> list[float]:
        """See ``sum_numbers``."""
        return sum_numbers(self._transport, values)

    def descend(self, lr: float) -> None:
        """See ``Exchange``. Nothing: all means are in ``.grad``."""

    def second_line(self) -> "tuple[TransportLine, ProcessGroup] | None":
        """See ``Exchange``."""
        found = self._transport.second()
        return None if found is None else (TransportLine(found[0]), found[1])


class Replicas(TransportLine, ABC):
    """The data axis: what its exchanges have in common, whatever they do with gradients.

    Args:
        transport: The data axis.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.replica, self.num_replicas = transport.rank, transport.world_size
        self.axes = f"pipeline=1 data={self.num_replicas} tensor=1"

    def agree(self, model: nn.Module, loss: Tensor, *, took_part: bool) -> Agreement:
        """See ``Exchange``. All ranks hold the whole average: its norm needs no question, and is taken meanwhile."""
        own = float(loss)
        healthy = took_part and math.isfinite(own)
        asked = _send(self._transport, [healthy, own if healthy else 0.0, self.lacks_gradients])
        norm = self.grad_norm(model)
        num_healthy, total, lacking = _total(asked)
        healthy = num_healthy == self.world_size
        if lacking and healthy:
            self.leave_out()
            norm = self.grad_norm(model)
        return Agreement(healthy and bool(torch.isfinite(norm)), total / self.num_replicas, norm)

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Euclidean norm of the whole average, a scalar."""
        return local_grad_norm(model)

    @property
    @abstractmethod
    def lacks_gradients(self) -> bool:
        """See ``Exchange``."""

    @abstractmethod
    def leave_out(self) -> None:
        """See ``Exchange``."""

    def sync_buffers(self, model: nn.Module) -> None:
        """One broadcast a buffer, as DDP does before each forward pass."""
        for buffer in model.buffers():
            broadcast(self._transport, buffer)

    def check_replicas(self, model: nn.Module) -> None:
        """See ``check_replicas``."""
        check_replicas(self._transport, model.parameters(), "data")


def refuse_other_models(transport: Transport, model: nn.Module) -> None:
    """Compare names and shapes before the first exchange hangs on them.

    Raises:
        ConfigError: They differ; on some rank.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    text = ";".join(f"{name}:{tuple(local(value).shape)}:{value.requires_grad}" for name, value in tensors)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    others = [rank for rank, found in enumerate(_gather(transport, digest)) if found != digest]
    if others:
        raise ConfigError(
            f"the model of rank {transport.rank} has other parameters than that of rank {others[0]}; "
            "build the same model on all ranks"
        )


def check_replicas(transport: Transport, parameters: Iterable[Tensor], axis: str) -> None:
    """Compare weights that the ranks of an axis all hold by their CRC-32.

    Raises:
        ReplicaError: They differ; on all ranks.
    """
    crc = 0
    for parameter in parameters:
        data = local(parameter.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data.data, crc)
    found = _gather(transport, crc)
    if len(set(found)) > 1:
        common = max(found, key=found.count)  # of a tie, the first: rank 0's
        others = [str(rank) for rank, value in enumerate(found) if value != common]
        raise ReplicaError(
            f"the weights of rank {', '.join(others)} of the {axis} axis differ from those of the other "
            f"{found.count(common)}: something "
            "outside the exchange changes them on some ranks only; resume from the last checkpoint"
        )


def _gather(transport: Transport, value: int) -> list[int]:
    message = torch.from_numpy(np.frombuffer(value.to_bytes(8, "little"), np.uint8).copy())
    rows = transport.all_gather(message.to(transport.device)).wait().cpu().numpy()
    return [int.from_bytes(row.tobytes(), "little") for row in rows]
