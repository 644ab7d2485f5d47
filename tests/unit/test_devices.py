"""Which device a process trains on, on machines that are not here: only what torch says of their GPUs is made up."""

import os
import subprocess
import sys
import threading
import warnings
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from efftrain.errors import ConfigError
from efftrain.parallel import mesh
from efftrain.parallel.joining import refuse_other_devices
from tests.conftest import ROOT


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two of them; those that were chosen."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def device_of(local_rank: int, local_size: int | None, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if local_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    with mesh.process_group() as device:  # WORLD_SIZE is not set: one process
        return device


@pytest.mark.parametrize("local_size", [2, None])
def test_each_process_has_its_own_gpu(
    local_size: int | None, gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_of(1, local_size, monkeypatch) == torch.device("cuda", 1)
    assert gpus == [torch.device("cuda", 1)]


def test_with_fewer_gpus_than_processes_all_take_the_cpu(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=r"3 processes were started on a machine with 2 GPUs, .* start 2 a machine"):
        assert device_of(0, 3, monkeypatch) == torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one of them says it
        assert device_of(1, 3, monkeypatch) == device_of(2, 3, monkeypatch) == torch.device("cpu")
    assert gpus == []


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["cpu"] * 3, None),
        (["cuda"] * 3, None),
        (["cuda", "cuda", "cpu"], "rank 2 trains on cpu, rank 0 on cuda; start"),
    ],
)
def test_machines_without_gpus_beside_others_are_refused_on_all_ranks(kinds: list[str], message: str | None) -> None:
    store = TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=20))
    found: list[str | None] = [""] * len(kinds)

    def ask(rank: int) -> None:
        own = TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=20))
        try:
            refuse_other_devices(own, rank, len(kinds), kinds[rank])
            found[rank] = None
        except ConfigError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if message is None:
        assert found == [None] * len(kinds)
    else:
        assert len(set(found)) == 1
        assert str(found[0]).startswith(message)


def test_the_benchmark_for_a_gpu_says_that_there_is_none() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_lm.py"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks/gpu_lm.py needs a CUDA GPU, which torch does not see here\n"
