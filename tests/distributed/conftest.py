"""Ranks without a launcher: processes forked from a server that has torch loaded already.

torchrun takes five seconds to start two workers, this one. They are processes joined by gloo all the same, and a test
may kill them. What torchrun itself adds is tested with torchrun.
"""

import gc
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent

# What DistributedDataParallel imports when it is first made, and what a run imports; three seconds in all.
PRELOAD = ["efftrain.parallel", "efftrain.models.pretrained", "torch._dynamo", "torch.distributed.optim"]

# The ranks import the module of the function that they run.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


class Ranks:
    """``world_size`` processes that run ``function(*arguments)``, each with the environment of its rank."""

    def __init__(self, function: Callable[..., Any], world_size: int, *arguments: Any, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ends = []
        self.processes = []
        for rank in range(world_size):
            names = {
                **environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(theirs, names, function, arguments), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self.processes.append(process)

    def results(self, timeout_s: float = 120) -> list[Any]:
        """What the function returned on each rank; fails with the traceback of the first that raised."""
        found = []
        for rank, end in enumerate(self._ends):
            assert end.poll(timeout_s), f"rank {rank} did not answer"
            try:
                error, result = end.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert error is None, f"rank {rank}: {error}"
            found.append(result)
        self.kill()
        return found

    def kill(self) -> None:
        """SIGKILL to all that still live."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _run(end: "Connection", names: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(names)
    gc.freeze()  # what the server had loaded need not be searched for garbage by each rank
    import torch

    torch.set_num_threads(1)
    try:
        end.send((None, function(*arguments)))
    except BaseException:
        end.send((traceback.format_exc(), None))


StartRanks = Callable[..., Ranks]


@pytest.fixture(scope="session")
def start_ranks() -> Iterator[StartRanks]:
    """``start_ranks(function, 2, argument, NAME="value").results()``."""
    started: list[Ranks] = []

    def start(function: Callable[..., Any], world_size: int, *arguments: Any, **environment: str) -> Ranks:
        started.append(Ranks(function, world_size, *arguments, **environment))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()
