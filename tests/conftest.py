"""What all tests share: one thread a process, real worker processes, and no unseen skips."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch, and for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TP_SOCKET_IFNAME", "lo")

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import settings

    # In a shell's background interrupts are ignored, and so they would be in every process that a test interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A slow moment of a shared machine is no failure, and a failure must come back.
    settings.register_profile("efftrain", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("efftrain")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With EFFTRAIN_NO_SKIPS=1 (CI) a skipped test fails: a skip that nobody sees is a defect."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("EFFTRAIN_NO_SKIPS") == "1" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def efftrain(tmp_path: Path) -> Run:
    """``efftrain("profile", "watch-cnn")``: the command line in a process of its own."""

    def run(*arguments: object, timeout_s: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "efftrain", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=tmp_path,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture
def torchrun(tmp_path: Path) -> Run:
    """``torchrun(2, "script.py", "argument")``: real processes joined by gloo."""

    def run(
        num_processes: int, *arguments: object, timeout_s: float = 200, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        return subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=tmp_path,
            env={**os.environ, **environment},
        )

    return run
