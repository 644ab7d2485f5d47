"""What moves tensors between ranks: one small interface, torch.distributed or Horovod behind it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# W ranks


class Pending(Protocol):
    """A collective on its way. It does not start anything when it is done."""

    def wait(self) -> Tensor:
        """Block until it is done and return its result. Call it once.

        Raises:
            PeerError: Another rank died, or the time limit passed; Horovod has a ``RuntimeError`` for it.
        """


class Transport(Protocol):
    """A group of ranks and the collectives that the gradient exchange needs.

    Each call starts at once and is waited for later. Every rank of the group makes the same calls in the same order,
    from one thread; arguments stay untouched until the wait.
    """

    rank: int
    world_size: int
    device: torch.device
    """Where the tensors of the collectives live."""

    def all_gather(self, message: Tensor) -> Pending:
        """The messages of all ranks.

        Args:
            message: uint8 or float32, shape ``(B,)``, the same ``B`` on all ranks.

        Returns:
            Shape ``(W, B)``, in rank order.
        """

    def all_to_all(self, message: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
        """One part of the message to each rank.

        Args:
            message: uint8 or float32, shape ``(sum(send_sizes),)``; the part of rank 0 first.
            send_sizes: ``W`` of them, 0 or more; what goes to each rank.
            receive_sizes: ``W`` of them; what each rank sends to this one.

        Returns:
            Shape ``(sum(receive_sizes),)``, in rank order.
        """

    def all_reduce(self, values: Tensor) -> Pending:
        """Sum over all ranks, in place, equal on all of them to the bit.

        Args:
            values: float32 or float64, shape ``(N,)``, contiguous.

        Returns:
            ``values``.
        """

    def broadcast(self, values: Tensor) -> Pending:
        """Overwrite ``values``, any dtype, contiguous, with those of rank 0. Returns ``values``."""

    def split(self, node_size: int) -> "tuple[Transport, Transport]":
        """Cut the ranks into nodes of ``node_size`` neighbors.

        Returns:
            The group of this rank's node, and the group of the ranks that have this one's place on the other nodes.

        Raises:
            ConfigError: ``node_size`` does not divide ``W``, or the back end has no groups.
        """

    def second(self) -> "tuple[Transport, ProcessGroup] | None":
        """The same ranks over connections of their own, on the CPU, for another thread; every rank calls it.

        Returns:
            ``None`` if the back end has one thread only.
        """
