"""The Horovod back end: every collective under horovodrun, and what happens when a rank is lost.

Nothing is installed here; ``bash launch/horovod.sh`` does that.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from efftrain.errors import ConfigError, ToolError
from efftrain.parallel import mesh

JOB = Path(__file__).parent / "horovod_job.py"


def why_not() -> str | None:
    """Why Horovod cannot be used here; looked up in a process of its own, which it may crash."""
    found = subprocess.run([sys.executable, "-c", "import horovod.torch"], capture_output=True, text=True)
    return found.stderr.strip().splitlines()[-1] if found.returncode else None


@pytest.fixture(scope="module")
def _horovod() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"Horovod does not load ({reason}); bash launch/horovod.sh")


HorovodRun = Callable[..., tuple["subprocess.CompletedProcess[str]", dict[int, Any]]]


@pytest.fixture
def horovodrun(_horovod: None, tmp_path: Path) -> HorovodRun:
    """``horovodrun(2, "collectives", limit_s=20)``: the process, and what each rank wrote."""

    def run(
        num_processes: int, case: str, *, limit_s: float
    ) -> tuple["subprocess.CompletedProcess[str]", dict[int, Any]]:
        launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(num_processes)]
        done = subprocess.run(
            [*launcher, sys.executable, str(JOB), case, str(tmp_path), str(limit_s)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")},
        )
        return done, {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}

    return run


@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_collective_gives_what_each_rank_computes_alone(horovodrun: HorovodRun, num_processes: int) -> None:
    done, facts = horovodrun(num_processes, "collectives", limit_s=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(facts) == list(range(num_processes))
    for rank, fact in facts.items():
        assert fact["wrong"] == []
        assert (fact["rank"], fact["world_size"]) == (rank, num_processes)
        assert "start with torchrun" in fact["split"]
        assert {key: value for key, value in fact.items() if key.startswith("sum")} == {
            key: value for key, value in facts[0].items() if key.startswith("sum")
        }


def test_a_killed_rank_ends_the_others_with_the_reason(horovodrun: HorovodRun) -> None:
    done, facts = horovodrun(2, "lost", limit_s=30)
    assert done.returncode != 0
    assert facts[0]["error"].startswith("PeerError: lost another rank")
    assert facts[0]["seconds"] < 25  # not the limit: the closed connection tells


def test_a_rank_that_does_not_come_is_waited_for_until_the_limit(horovodrun: HorovodRun) -> None:
    _, facts = horovodrun(2, "still", limit_s=2)
    assert facts[0]["error"].startswith("PeerError")
    assert "took longer than 2 s" in facts[0]["error"]
    assert 2 <= facts[0]["seconds"] < 20
    assert "ended by another rank" in facts[1]["error"]


@pytest.mark.slow
def test_a_rank_that_stands_still_is_waited_for_until_the_limit(horovodrun: HorovodRun) -> None:
    _, facts = horovodrun(2, "stopped", limit_s=2)
    assert facts[0]["error"].startswith("PeerError")
    assert "took longer than 2 s" in facts[0]["error"]
    assert "ended by another rank" in facts[1]["error"]


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_by_that_rank_alone(horovodrun: HorovodRun) -> None:
    done, facts = horovodrun(2, "raised", limit_s=30)
    assert done.returncode != 0
    assert "ValueError: a mistake of rank 1" in done.stdout + done.stderr
    assert sorted(facts) == [0]
    assert "ended by another rank" in facts[0]["error"]


def test_the_wrong_launcher_is_refused_with_the_right_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with mesh.process_group(backend="horovod"):  # no launcher: one process, without Horovod
        assert (mesh.rank(), mesh.world_size()) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"torchrun started this process.*horovodrun --gloo -np N python"):
        mesh.process_group(backend="horovod")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"mpirun started this process.*horovodrun --gloo -np N python"):
        mesh.process_group(backend="horovod")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"horovodrun started this process.*torchrun --nproc-per-node"):
        mesh.process_group()
    with pytest.raises(ConfigError, match="backend is 'mpi', expected 'torch' or 'horovod'"):
        mesh.process_group(backend="mpi")  # type: ignore[arg-type]


def test_without_horovod_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.delitem(sys.modules, "efftrain.parallel.backends.horovod", raising=False)
    with pytest.raises(ToolError, match=r"bash launch/horovod\.sh"), mesh.process_group(backend="horovod"):
        pass


def test_horovod_is_loaded_only_when_asked_for() -> None:
    code = "import sys, efftrain.parallel; sys.exit('horovod' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=JOB.parent.parent.parent).returncode == 0
