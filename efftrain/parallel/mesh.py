"""Joining and leaving the group of processes that a launcher started."""

import gc
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from efftrain.errors import ConfigError, PeerError
from efftrain.parallel.backends import Transport
from efftrain.parallel.backends.torch import TorchTransport, peer_error
from efftrain.parallel.joining import launch_id as launch_id_in
from efftrain.parallel.joining import meet, refuse_other_devices

_world: Transport | None = None
"""Horovod's, while its group is joined; torch.distributed keeps its own."""

_device: torch.device | None = None
"""Of this rank, while a group of torch is joined."""

_launch: str | None = None
"""See ``launch_id``; while a group is joined."""


def process_group(
    *, timeout_s: float = 120.0, backend: Literal["torch", "horovod"] = "torch"
) -> AbstractContextManager[torch.device]:
    """Join the processes started by torchrun or horovodrun; without a launcher, do nothing.

    Jobs and models that use the group must not outlive the block: make them in a function that is called in it.

    Args:
        timeout_s: A collective that takes longer ends the job with an error: no hang.
        backend: ``torch`` is torch.distributed with gloo or NCCL, started by torchrun; ``horovod`` is started by
            horovodrun.

    Returns:
        A context manager that gives the device of this rank: its own GPU, or the CPU on a machine that has fewer GPUs
        than ranks. Models go there before a plan is applied.

    Raises:
        ConfigError: The processes were started by the other launcher, its variables are incomplete, or only some
            machines have a GPU for each of their ranks.
        ToolError: Horovod is asked for and not installed.
        PeerError: Inside the block another rank died or did not answer in time.
    """
    by_torchrun, by_horovodrun = "WORLD_SIZE" in os.environ, "HOROVOD_SIZE" in os.environ
    if backend not in ("torch", "horovod"):
        raise ConfigError(f"backend is {backend!r}, expected 'torch' or 'horovod'")
    if backend == "torch":
        if by_horovodrun and not by_torchrun:
            raise ConfigError(
                "horovodrun started this process, but the backend is torch; "
                "start it with torchrun --nproc-per-node N or set parallel.backend=horovod"
            )
        return _torch_group(timeout_s)
    if not by_horovodrun and (by_torchrun or "OMPI_COMM_WORLD_SIZE" in os.environ):
        raise ConfigError(
            f"{'torchrun' if by_torchrun else 'mpirun'} started this process, but the backend is Horovod; "
            "start it with horovodrun --gloo -np N python or set parallel.backend=torch"
        )
    return _horovod_group(timeout_s)


@contextmanager
def _torch_group(timeout_s: float) -> Iterator[torch.device]:
    global _device, _launch
    device = _own_device("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun or unset WORLD_SIZE")
    _launch = _join(device, timeout_s)
    _device = device
    try:
        yield device
    except RuntimeError as error:
        lost = peer_error(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        _device = _launch = None
        # Whatever holds the group (DDP does, in circles of its own) must be gone before: the group ends its threads
        # when the last reference goes. See Note [no Python on gloo threads].
        gc.collect()
        # A thread of gloo that still has to let go of a Python object needs the interpreter, and a caller that kept its
        # job all the same would wait for that thread while holding it: a deadlock. Give them the moment they need.
        time.sleep(0.05)
        dist.destroy_process_group()
        gc.collect()


def _join(device: torch.device, timeout_s: float) -> str | None:
    """Make torch's group; returns the id of the launch."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world_size = meet(timeout_s)
        refuse_other_devices(store, rank, world_size, device.type)
        launch = launch_id_in(store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        return launch
    except RuntimeError as error:  # an address is taken, refuses, does not answer: torch has no type for all of them
        raise _peer_error(str(error), "could not join the other ranks") from error


@contextmanager
def _horovod_group(timeout_s: float) -> Iterator[torch.device]:
    global _world
    device = _own_device("HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
    if "HOROVOD_SIZE" not in os.environ:
        yield device
        return
    from efftrain.parallel.backends import horovod

    horovod.join(timeout_s)
    _world = horovod.HorovodTransport(timeout_s)
    try:
        yield device
    except RuntimeError as error:
        reason = horovod.peer_failure(error)
        if reason is None:
            raise
        raise _peer_error(reason) from error
    finally:
        _world = None
        horovod.leave()


def _own_device(rank_variable: str, size_variable: str) -> torch.device:
    """This process's GPU by its number on the machine; the CPU for all of a machine that has not one for each."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        return torch.device("cpu")
    local_rank = int(os.environ.get(rank_variable, "0"))
    local_size = int(os.environ.get(size_variable, local_rank + 1))
    if local_size > num_gpus:
        if local_rank == 0:
            warnings.warn(
                f"{local_size} processes were started on a machine with {num_gpus} GPU{'s' * (num_gpus > 1)}, so all "
                f"of them train on the CPU; start {num_gpus} a machine to use the GPUs",
                stacklevel=4,
            )
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _peer_error(reason: str, what: str = "lost another rank, or waited too long for it") -> PeerError:
    reason = re.sub(r"^\[\S*\] ", "", (reason.splitlines() or ["no reason given"])[0])  # without gloo's source file
    return PeerError(f"{what}; see its own message ({reason[:120]})")


def launch_id() -> str | None:
    """What tells this launch from others, the same after its workers were restarted.

    ``None`` outside a ``process_group``, and if nothing restarts workers.
    """
    return _launch


def launched_size() -> int:
    """Number of processes that the launcher started; known before they meet."""
    size = os.environ.get("HOROVOD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    if not size.isdigit() or int(size) < 1:
        raise ConfigError(f"the launcher's number of processes is {size!r}, expected 1 or more; start with torchrun")
    return int(size)


def world_size() -> int:
    """Number of processes; 1 outside a ``process_group``."""
    if _world is not None:
        return _world.world_size
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process; 0 outside a ``process_group``."""
    if _world is not None:
        return _world.rank
    return dist.get_rank() if dist.is_initialized() else 0


def check_device(device: torch.device) -> None:
    """Refuse a model that is elsewhere than the group's collectives.

    Args:
        device: Of the model.

    Raises:
        ConfigError: It is not that of this rank.
    """
    if _device is not None and device != _device:
        raise ConfigError(
            f"rank {rank()}: the model is on {device}, the ranks exchange on {_device}; move it there before the plan "
            "is applied: with mesh.process_group() as device: ... model.to(device)"
        )


def transport(device: torch.device) -> Transport:
    """The collectives of all processes; inside a ``process_group`` only.

    Args:
        device: That ``process_group`` gave.
    """
    return _world if _world is not None else TorchTransport(device)
