"""What torchrun adds: its workers, its signals, and the command line on every rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run
from tests.distributed import jobs
from tests.distributed.conftest import StartRanks
from tests.distributed.test_resume import CODECS, last_checkpoint, rows_of, write_recipe

TRAIN = ROOT / "parallel" / "train.py"


def descendants(pid: int) -> Iterator[int]:
    """All processes below ``pid``, which first."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from descendants(int(child))


def start_torchrun(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", TRAIN, *arguments]
    return subprocess.Popen(
        [*map(str, command)],
        env={**os.environ, "TEST_SLEEP_S": "0.01"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_torchrun_resumes_to_the_same_bits(tmp_path: Path, start_ranks: StartRanks, torchrun: Run) -> None:
    """Agent and workers killed at once; what goes on under torchrun ends as a run that never saw torchrun."""
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    whole = start_ranks(jobs.train_recipe, 2, str(recipe), [], str(tmp_path / "whole")).results()[0]
    metrics = tmp_path / "killed" / "r" / "metrics.jsonl"
    process = start_torchrun(recipe, "--out", tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 23:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    family = list(descendants(process.pid))
    assert len(family) == 3, "the agent and two workers"
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (metrics.parent / "result.json").exists(), "killed too late"
    resumed = torchrun(2, TRAIN, recipe, "--out", tmp_path / "killed", "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("\n") == 1, "rank 1 and gloo are silent on stdout"
    result = json.loads(resumed.stdout)
    for figure in ("loss", "accuracy", "num_steps", "wire_bytes"):
        assert result[figure] == whole[figure], figure
    assert rows_of(metrics.parent) == rows_of(tmp_path / "whole" / "r")
    assert last_checkpoint(metrics.parent) == last_checkpoint(tmp_path / "whole" / "r")


def test_an_error_on_one_rank_ends_the_job_and_names_the_rank(tmp_path: Path, torchrun: Run) -> None:
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    started = time.monotonic()
    result = torchrun(2, TRAIN, recipe, "--out", tmp_path, "--json", TEST_FAIL_RANK="1")
    assert time.monotonic() - started < 30, "a collective would have waited for 30 s"
    assert result.returncode != 0
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("efftrain: ")]
    assert "efftrain: rank 1: sample 3 cannot be read" in lines
    assert all(line.startswith("efftrain: rank 0: lost another rank") for line in lines if "rank 1" not in line)
    assert "terminate called" not in result.stderr
    assert "[rank0]: Traceback" not in result.stderr


def test_the_readmes_script_before_and_after(torchrun: Run, tmp_path: Path) -> None:
    (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "parallel" / "README.md").read_text(encoding="utf-8"), re.S)
    lines = block.splitlines()
    for name, other in (("before", "+"), ("after", "-")):
        (tmp_path / f"{name}.py").write_text("\n".join(line[1:] for line in lines if not line.startswith(other)) + "\n")
    alone = subprocess.run(
        [sys.executable, tmp_path / "before.py"], capture_output=True, text=True, timeout=200, check=True
    )
    losses = [
        [float(text.split()[1]) for text in out.splitlines()]
        for out in (alone.stdout, torchrun(1, "after.py").stdout, torchrun(4, "after.py").stdout)
    ]
    assert len(losses[0]) == 50
    assert losses[0][-1] < 0.5 * losses[0][0]
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=1.1e-4), "to the printed digits"
