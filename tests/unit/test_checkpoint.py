"""Checkpoints: whole or not at all, and every damage has a name."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from efftrain.data.digits import load_digits
from efftrain.errors import CheckpointError, ConfigError
from efftrain.training import Job, LoopConfig, OptimizerConfig, fit
from efftrain.training.checkpoint import Saver, complete_checkpoints, load_checkpoint, save_checkpoint


def make_job(width: int = 8, *, name: str = "sgd", frozen: bool = False, seed: int = 0) -> Job:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 3))
    if frozen:
        model[0].requires_grad_(False)
    return Job(model, optimizer=OptimizerConfig(name=name, lr=0.1), total_steps=100)  # type: ignore[arg-type]


def steps(job: Job, num_steps: int) -> None:
    for _ in range(num_steps):
        x = torch.randn(8, 4)
        job.step(x, (x.sum(dim=1) > 0).long())


def state_of(job: Job) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in job.state_dict()[0].items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 5."""
    job = make_job()
    for num_steps in (3, 2):
        steps(job, num_steps)
        save_checkpoint(tmp_path / "checkpoints", job, extra={"best": 0.1 + 0.2})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_job_comes_back(tmp_path: Path, name: str) -> None:
    job = make_job(name=name)
    steps(job, 3)
    bad = torch.full((8, 4), float("nan")), torch.zeros(8, dtype=torch.int64)
    for _ in range(18):
        job.step(*bad)
    saved = save_checkpoint(tmp_path, job, extra={"best": 0.1 + 0.2, "nested": {"a": [1, None]}})
    steps(job, 4)
    expected = state_of(job)
    other = make_job(name=name, seed=7)
    torch.manual_seed(123)
    restored = load_checkpoint(tmp_path, other, seed=0)
    assert restored is not None
    assert (restored.path, restored.step) == (saved, 21)
    assert restored.extra == {"best": 0.1 + 0.2, "nested": {"a": [1, None]}}
    assert (other.num_steps, other.num_skipped) == (21, 18)
    steps(other, 4)  # dropout and data are drawn from torch's generator
    found = state_of(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_the_optimizer_state_of_a_scalar_is_like_the_scalar(tmp_path: Path) -> None:
    """Its dtype here; on a GPU its device by the same line."""

    def make() -> Job:
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
        model.register_parameter("scale", nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
        model.register_forward_hook(lambda module, _, output: output * module.scale)
        return Job(model, optimizer=OptimizerConfig(name="adamw", lr=0.1))

    job, other = make(), make()
    x = torch.randn(8, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    job.step(*x)
    job.save(tmp_path)
    assert other.load(tmp_path)
    found = other.state_dict()[0]
    assert found["optimizer/scale/exp_avg"].dtype == torch.float64
    assert found["optimizer/scale/step"].dtype == torch.float32
    assert other.step(*x).loss == job.step(*x).loss


def test_the_count_of_skips_in_a_row_goes_on(tmp_path: Path) -> None:
    from efftrain.errors import NonFiniteError

    job = make_job()
    bad = torch.full((8, 4), float("nan")), torch.zeros(8, dtype=torch.int64)
    for _ in range(19):
        job.step(*bad)
    save_checkpoint(tmp_path, job)
    other = make_job()
    load_checkpoint(tmp_path, other, seed=0)
    with pytest.raises(NonFiniteError):
        other.step(*bad)


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    job = make_job()
    assert load_checkpoint(tmp_path / "missing", job, seed=0) is None
    assert load_checkpoint(tmp_path, job, seed=0) is None


def test_two_are_kept_and_leftovers_go(folder: Path) -> None:
    for name in ("step-00000009.partial", "step-00000001.old.partial"):
        (folder / name).mkdir()
        (folder / name / "rank-0.safetensors").write_bytes(b"half")
    (folder / "step-of-mine").mkdir()
    assert [path.name for path in complete_checkpoints(folder)] == ["step-00000003", "step-00000005"]
    job = make_job()
    restored = load_checkpoint(folder, job, seed=0)
    assert restored is not None
    assert restored.step == 5
    steps(job, 1)
    save_checkpoint(folder, job)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000006", "step-of-mine"]


def test_the_newest_is_the_one_of_most_steps(folder: Path) -> None:
    job = make_job()
    for step in (99_999_999, 100_000_000, 100_000_001):
        job.num_steps = step
        save_checkpoint(folder, job)
    assert [path.name for path in complete_checkpoints(folder)] == ["step-100000000", "step-100000001"]
    restored = load_checkpoint(folder, job, seed=0)
    assert restored is not None
    assert restored.step == 100_000_001


def test_the_same_step_twice_replaces(folder: Path) -> None:
    job = make_job(seed=1)
    job.num_steps = 5
    save_checkpoint(folder, job)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000005"]
    other = make_job(seed=2)
    load_checkpoint(folder, other, seed=0)
    assert torch.equal(state_of(other)["model/0.weight"], state_of(job)["model/0.weight"])


# Damage

FILES = ["state/shared.safetensors", "rank-0.safetensors", "meta.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_an_error_with_file_and_remedy(folder: Path, name: str) -> None:
    path = folder / "step-00000005" / name
    whole = path.read_bytes()
    rng = random.Random(name)
    flips = [(rng.randrange(len(whole)), rng.randrange(8)) for _ in range(200)]
    cuts = [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]
    damaged = [bytes(byte ^ (1 << bit) if i == at else byte for i, byte in enumerate(whole)) for at, bit in flips]
    damaged += [whole[:cut] for cut in cuts] + [whole + b"x", b"\0" * len(whole)]
    job = make_job()
    before = state_of(job)
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(folder, job, seed=0)
        assert str(path) in str(error.value) or "format version" in str(error.value)
        assert "older checkpoint" in str(error.value) or "format version" in str(error.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"step-00000005.*older checkpoint"):
        load_checkpoint(folder, job, seed=0)
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000005.*older checkpoint"):
        load_checkpoint(folder, job, seed=0)
    after = state_of(job)
    assert all(torch.equal(after[key], before[key]) for key in before), "a refused checkpoint changes nothing"
    shutil.rmtree(folder / "step-00000005")
    restored = load_checkpoint(folder, job, seed=0)
    assert restored is not None, "and the remedy works"
    assert restored.step == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"x"', "{}", "[" * 100_000, '{"format_version": 1}', "\x00", '{"format_version": []}'],
)
def test_a_meta_file_that_is_not_ours(folder: Path, text: str) -> None:
    (folder / "step-00000005" / "meta.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-00000005"):
        load_checkpoint(folder, make_job(), seed=0)


@pytest.mark.parametrize("key", ["world_size", "numbers", "extra", "files", "format_version"])
@pytest.mark.parametrize("value", [None, -1, 0, 3, [], {}, "x"])
def test_a_changed_meta_file(folder: Path, key: str, value: object) -> None:
    path = folder / "step-00000005" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=r"checksum does not match|format version"):
        load_checkpoint(folder, make_job(), seed=0)


def test_a_newer_format_is_named(folder: Path) -> None:
    path = folder / "step-00000005" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 3}))
    with pytest.raises(CheckpointError, match=r"has format version 3, expected 2; resume it with the efftrain that"):
        load_checkpoint(folder, make_job(), seed=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make_job(width=9), r"step-00000005: checkpoint tensor '0\.bias': expected \(9,\), found \(8,\)"),
        (lambda: Job(nn.Linear(4, 8)), r"checkpoint tensor '0\.bias': expected no such tensor, found \(8,\)"),
        (lambda: make_job(name="adamw"), "was written with optimizer 'sgd', this run has 'adamw'"),
        (lambda: make_job(frozen=True), "fits no trained parameter here; are other layers frozen"),
    ],
)
def test_another_jobs_checkpoint_is_refused(folder: Path, other: Callable[[], Job], message: str) -> None:
    job = other()
    before = state_of(job)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, job, seed=0)
    after = state_of(job)
    assert all(torch.equal(after[key], before[key]) for key in before), "a refused checkpoint changes nothing"


def test_a_new_run_does_not_mix_with_old_checkpoints(folder: Path) -> None:
    digits = load_digits("test")
    job = Job(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        fit(job, digits, digits, LoopConfig(epochs=1), seed=0, checkpoints=folder)


# Writing


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match=r"could not be written: .*untouched"):
        save_checkpoint(tmp_path / "checkpoints", make_job())
    assert (tmp_path / "checkpoints").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("option", ["size=64k", "ro"])
def test_a_full_or_read_only_disk_leaves_the_older_ones(tmp_path: Path, option: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        job = make_job()
        steps(job, 1)
        save_checkpoint(disk / "checkpoints", job)
        if option == "ro":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:
            free = os.statvfs(disk)
            (disk / "other").write_bytes(b"x" * (free.f_bavail * free.f_bsize - 4096))
        before = contents(disk)
        steps(job, 1)
        with pytest.raises(
            CheckpointError, match=r"step-00000002 could not be written: .*(No space|Read-only).*unlock"
        ):
            save_checkpoint(disk / "checkpoints", job)
        assert contents(disk) == before, "nothing half-written stays on a full disk"
        restored = load_checkpoint(disk / "checkpoints", make_job(), seed=0)
        assert restored is not None
        assert restored.step == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_checkpoint_in_the_background_is_of_its_own_step(tmp_path: Path) -> None:
    job, totals = make_job(), {"a": 1.0}
    steps(job, 1)
    save_checkpoint(tmp_path / "now", job, extra=totals)
    saver = Saver(tmp_path / "later", job, background=True)
    saver.save(totals)
    totals["a"] = 2.0
    steps(job, 1)
    saver.finish()
    assert contents(tmp_path / "later") == contents(tmp_path / "now")
    for _ in range(3):  # one at a time, the newest two are kept
        steps(job, 1)
        saver.save(totals)
    saver.finish()
    assert [path.name for path in complete_checkpoints(tmp_path / "later")] == ["step-00000004", "step-00000005"]


def test_a_failure_in_the_background_is_told_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    job = make_job()
    for next_call in ("finish", "save"):
        saver = Saver(tmp_path / "checkpoints", job, background=True)
        saver.save()
        with pytest.raises(CheckpointError, match=r"could not be written: .*untouched"):
            getattr(saver, next_call)()
        saver.finish()


SAVE_FOR_EVER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from tests.unit.test_checkpoint import make_job, steps
from efftrain.training.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint

folder, rng, newest = Path(sys.argv[1]), random.Random(0), 0
for attempt in range(15):
    child = os.fork()
    if child == 0:
        job = make_job(width=400)
        load_checkpoint(folder, job, seed=0)
        while True:
            steps(job, 1)
            save_checkpoint(folder, job)
    deadline = time.monotonic() + 60
    while len([p for p in complete_checkpoints(folder) if p.name > f"step-{newest:08d}"]) == 0:
        assert time.monotonic() < deadline, "nothing is saved any more"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    restored = load_checkpoint(folder, make_job(width=400), seed=0)
    assert restored is not None and restored.step > newest, (restored, newest)
    newest = restored.step
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    result = subprocess.run(
        [sys.executable, "-c", SAVE_FOR_EVER, tmp_path / "checkpoints", root], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
