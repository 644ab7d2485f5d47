"""The transport over Horovod. Importing this file loads Horovod, so ``mesh`` does it only when a run asks for it."""

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from efftrain.errors import ConfigError, ToolError
from efftrain.parallel.backends import Pending

try:
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
except ImportError as error:
    raise ToolError(
        f"Horovod does not load ({str(error).splitlines()[0]}); build it for this torch: bash launch/horovod.sh"
    ) from error

# Horovod matches the calls of different ranks by name alone. One counter for the process: all ranks make the same calls
# in the same order, and no name is used twice, so a late message of one call can never be taken for another's.
_calls = itertools.count()

# Broadcasts move bits: whatever Horovod has no name for (bool, bfloat16, fp8) travels as an integer of its size.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_POLL_S = 0.0002  # Horovod looks for new calls once a millisecond


def join(timeout_s: float) -> None:
    """``hvd.init`` with the time limit of the run. ``HorovodTransport`` works from here to ``leave``."""
    # Also how long ranks wait for each other at the start, where some import longer than a short limit; then Horovod
    # aborts the process. ``_Pending`` keeps to the limit itself.
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(max(30, math.ceil(timeout_s)))
    # Which small tensors Horovod packs into one all-reduce depends on timing, and with it the order of the additions.
    # Our buckets are large already.
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    # Remembers tensors by name, and our names do not come back.
    os.environ["HOROVOD_CACHE_CAPACITY"] = "0"
    hvd.init()


def leave() -> None:
    """``hvd.shutdown``: calls that other ranks still wait for fail there."""
    hvd.shutdown()


def peer_failure(error: BaseException) -> str | None:
    """Why another rank is lost, if that is what ``error`` says; ``None`` for all other errors."""
    text = str(error).strip()
    if isinstance(error, TimedOut):
        return text
    # "Mismatched" sizes and types are a mistake on this side of the interface.
    if isinstance(error, HorovodInternalError) and "Mismatched" not in text:
        # Its own words name every collective there is.
        ended = not text or text.startswith("Horovod has been shut down")
        return "Horovod was ended by another rank" if ended else text
    return None


class TimedOut(RuntimeError):
    """A collective took longer than the time limit."""


class HorovodTransport:
    """Collectives of all processes. See ``Transport``.

    Its tensors live on the CPU, where codecs write; tensors of a GPU are copied there and back.

    Args:
        timeout_s: A wait that takes longer raises. Horovod itself waits forever for a rank that makes no call.
    """

    def __init__(self, timeout_s: float) -> None:
        self.device = torch.device("cpu")
        self.rank, self.world_size = int(hvd.rank()), int(hvd.size())
        self._timeout_s = timeout_s

    def all_gather(self, message: Tensor) -> Pending:
        """See ``Transport``."""
        handle = hvd.allgather_async(message.cpu(), name=_name("gather"))
        shape = self.world_size, message.numel()
        return self._pending(handle, lambda everyone: everyone.view(shape).to(message.device))

    def all_to_all(self, message: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
        """See ``Transport``."""
        splits = torch.tensor(send_sizes, dtype=torch.int32)
        handle = hvd.alltoall_async(message.cpu(), splits, name=_name("to_all"))

        def finish(result: tuple[Tensor, Tensor]) -> Tensor:
            received, sizes = result
            if sizes.tolist() != list(receive_sizes):
                raise RuntimeError(f"rank {self.rank} got parts of {sizes.tolist()}, expected {list(receive_sizes)}")
            return received.to(message.device)

        return self._pending(handle, finish)

    def all_reduce(self, values: Tensor) -> Pending:
        """See ``Transport``."""
        host = values.detach().cpu()
        return self._pending(
            hvd.allreduce_async_(host, op=hvd.Sum, name=_name("sum")), lambda sums: _into(values, sums)
        )

    def broadcast(self, values: Tensor) -> Pending:
        """See ``Transport``."""
        host = values.detach().cpu().view(-1)
        bits = host.view(_SAME_SIZE.get(host.element_size(), torch.uint8))
        return self._pending(hvd.broadcast_async_(bits, root_rank=0, name=_name("copy")), lambda _: _into(values, host))

    def split(self, node_size: int) -> "tuple[HorovodTransport, HorovodTransport]":
        """Refused: Horovod must know its groups when it starts."""
        raise ConfigError(
            f"Horovod exchanges between all ranks at once, nodes of {node_size} were asked for; "
            "start with torchrun and backend torch, or leave the nodes out"
        )

    def second(self) -> None:
        """Horovod has one thread for all."""

    def _pending(self, handle: int, finish: Callable[[Any], Tensor]) -> "_Pending":
        return _Pending(handle, finish, self._timeout_s)


class _Pending:
    """A handle of Horovod, which keeps what the call reads and writes alive until ``synchronize``."""

    def __init__(self, handle: int, finish: Callable[[Any], Tensor], timeout_s: float) -> None:
        self._handle, self._finish, self._timeout_s = handle, finish, timeout_s

    def wait(self) -> Tensor:
        """See ``Pending``."""
        # Horovod's own wait spins, which takes a core from the rank that is waited for, and it has no limit.
        give_up = time.monotonic() + self._timeout_s
        while not hvd.poll(self._handle):
            if time.monotonic() > give_up:
                raise TimedOut(f"Horovod: a collective took longer than {self._timeout_s:g} s")
            time.sleep(_POLL_S)
        return self._finish(hvd.synchronize(self._handle))


def _name(kind: str) -> str:
    return f"efftrain.{next(_calls)}.{kind}"


def _into(values: Tensor, host: Tensor) -> Tensor:
    """``host`` is the memory of ``values`` itself, but for a GPU."""
    if values.device.type != "cpu":
        values.detach().copy_(host.view_as(values))
    return values
