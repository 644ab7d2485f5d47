"""Joining and leaving the group of processes that a launcher started."""

import gc
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from efftrain.errors import ConfigError, PeerError
from efftrain.parallel.backends import Transport
from efftrain.parallel.backends.torch import TorchTransport


@contextmanager
def process_group(*, timeout_s: float = 120.0) -> Iterator[torch.device]:
    """Join the processes started by torchrun; without a launcher, do nothing.

    Jobs and models that use the group must not outlive the block: make them in a function that is called in it.

    Args:
        timeout_s: A collective that takes longer ends the job with an error: no hang.

    Yields:
        The device of this rank.

    Raises:
        ConfigError: The launcher's variables are incomplete.
        PeerError: Inside the block another rank died or did not answer in time.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun or unset WORLD_SIZE")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])  # without the place in gloo's sources
        raise PeerError(
            f"lost another rank, or waited too long for it; see its own message ({reason[:120]})"
        ) from error
    finally:
        # Whatever holds the group (DDP does, in circles of its own) must be gone before: the group ends its threads
        # when the last reference goes. See Note [no Python on gloo threads].
        gc.collect()
        # A thread of gloo that still has to let go of a Python object needs the interpreter, and a caller that kept its
        # job all the same would wait for that thread while holding it: a deadlock. Give them the moment they need.
        time.sleep(0.05)
        dist.destroy_process_group()
        gc.collect()


def world_size() -> int:
    """Number of processes; 1 outside a ``process_group``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process; 0 outside a ``process_group``."""
    return dist.get_rank() if dist.is_initialized() else 0


def transport(device: torch.device) -> Transport:
    """The collectives of all processes; inside a ``process_group`` only.

    Args:
        device: That ``process_group`` gave.
    """
    return TorchTransport(device)
