"""The command line: quick help, one JSON object, and one line for every error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

NET = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, hidden=(16,), dropout=0.0, outputs=10):
        widths = (64, *hidden)
        layers = [nn.Flatten()]
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], outputs))

class Frozen(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 10)
"""

RECIPE = """
name = "own"
[model]
name = "net.py:Net"
[model.options]
hidden = [12, 8]
[data]
name = "digits"
[loop]
epochs = 1
batch_size = 128
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A tiny recipe with a model file of the user's own, in the folder where commands run."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "own.toml").write_text(RECIPE)
    return tmp_path / "own.toml"


Ended = tuple[int, str, str]


class Main:
    """The command line in this process: a new one costs two seconds of imports."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ended:
        """Status, stdout and stderr of ``efftrain ARGUMENTS``."""
        from efftrain.cli.main import main

        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        captured = self._capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    def json(self, *arguments: object) -> dict[str, Any]:
        """The one object that ``--json`` prints."""
        status, out, err = self(*arguments, "--json")
        assert status == 0, err
        assert out.count("\n") == 1, out
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    def error(self, *arguments: object) -> str:
        """The one line of an error."""
        status, out, err = self(*arguments)
        assert (status, out) == (1, ""), (out, err)
        assert err.startswith("efftrain: "), err
        assert err.count("\n") == 1, err
        return err


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    monkeypatch.chdir(tmp_path)
    return Main(capsys)


def test_help_answers_within_a_second(efftrain: Run) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        result = efftrain("--help")
        times.append(time.perf_counter() - started)
    assert result.returncode == 0
    for verb in ("train", "report", "profile", "doctor", "demo"):
        assert verb in result.stdout
    assert min(times) < 1, times


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["report", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from efftrain.cli.main import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "heavy = {'torch', 'flwr', 'horovod', 'matplotlib', 'numpy', 'jinja2', 'unicorn', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_errors_are_one_line(main: Main, recipe: Path, tmp_path: Path) -> None:
    assert "recipe missing.toml does not exist" in main.error("train", "missing.toml")
    assert "unknown key 'loop.epoch'; nearest is 'loop.epochs'" in main.error("train", recipe, "--set", "loop.epoch=1")
    line = main.error("train", recipe, "--set", "parallel.codec=TopQ(0.1)")
    assert "codec 'TopQ' is unknown; nearest is 'TopK'" in line
    assert "own.toml" in line
    assert "Int8 block is 1.5" in main.error("train", recipe, "--set", "parallel.codec=Int8(1.5)")
    assert "batch_size is 128, expected a multiple of 3" in main.error("train", recipe, "--set", "step.micro_batches=3")
    assert "the data set has only 1437 samples" in main.error("train", recipe, "--set", "loop.batch_size=2000")
    assert "start with torchrun --nproc-per-node 2" in main.error("train", recipe, "--set", "parallel.data=2")
    assert "no run called 'own' in runs to resume" in main.error("train", recipe, "--out", "runs", "--resume")
    assert "run nowhere does not exist" in main.error("report", "nowhere")
    assert "has not finished" in main.error("report", tmp_path)
    assert "there is no file none.py" in main.error("train", recipe, "--set", "model.name=none.py:Net")
    assert "has no 'Nut'" in main.error("train", recipe, "--set", "model.name=net.py:Nut")
    assert "Unknown data set 'digit'" in main.error("train", recipe, "--set", "data.name=digit")
    assert "Unknown model 'resnet'" in main.error("profile", "resnet")
    assert "is no plain file name" in main.error("train", recipe, "--set", "name=../up")
    assert list(tmp_path.glob("runs*")) == [], "no error leaves a run folder"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed is -1, expected 0 or more"),
        ("seed=99999999999999999999", "expected 0 or more and less than 2"),
        ("optimizer.lr=nan", "lr is nan"),
        ("optimizer.weight_decay=nan", "weight_decay is nan"),
        ("optimizer.final_lr_ratio=2", "final_lr_ratio is 2.0"),
        ("optimizer.name=adam", "expected one of 'sgd', 'adamw'"),
        ("step.clip_norm=nan", "clip_norm is nan"),
        ("step.micro_batches=0", "micro_batches is 0"),
        ("loop.epochs=0", "must be at least 1"),
        ("parallel.timeout_s=nan", "timeout_s is nan"),
        ("parallel.timeout_s=inf", "timeout_s is inf"),
        ("parallel.bucket_mb=0", "bucket_mb is 0.0"),
        ('distillation={teacher="t", temperature=0}', "temperature is 0"),
        ('distillation={teacher="t", temperature=nan}', "temperature is nan"),
        ('distillation={teacher="t", weight=1.5}', "weight is 1.5"),
        ('distillation={teacher="nowhere"}', "nowhere/config.json: cannot be read"),
        ('parallel={momentum_correction=true, codec="TopK"}\noptimizer.name=adamw', "momentum_correction is for SGD"),
    ],
)
def test_values_out_of_range_are_one_line(main: Main, recipe: Path, override: str, message: str) -> None:
    sets = [word for part in override.split("\n") for word in ("--set", part)]
    assert message in main.error("train", recipe, *sets)


def test_a_model_that_does_not_fit_the_data_is_one_line(main: Main, recipe: Path, tmp_path: Path) -> None:
    line = main.error("train", recipe, "--set", "model={name='watch-cnn'}")
    assert "model 'watch-cnn' does not fit data set 'digits', whose samples are 1x8x8 float32" in line
    line = main.error("train", recipe, "--set", "model.options={outputs=9}")
    assert "it has 9 outputs, expected one for each of 10 classes" in line
    line = main.error("train", recipe, "--set", "model={name='net.py:Frozen'}")
    assert "model Frozen has no trainable parameter" in line
    (tmp_path / "net.py").write_text("from torch import nn\nclass Net(nn.Flatten):\n    pass\n")
    line = main.error("train", recipe, "--set", "model={name='net.py:Net', options={start_dim=0}}")
    assert "for one sample expected logits (1, 'classes'), found (64,)" in line
    (tmp_path / "net.py").write_text("raise ValueError('one\\nand another line')")
    assert "ValueError: one and another line" in main.error("train", recipe), "a line break is no second line"
    assert not (tmp_path / "runs").exists()


def test_weights_that_do_not_fit_are_one_line(main: Main, recipe: Path, tmp_path: Path) -> None:
    from efftrain.models import build_model

    for name, options in (("watch", {}), ("wide", {"hidden": (3,), "num_classes": 12}), ("fits", {"hidden": (3,)})):
        shape = {} if name == "watch" else {"input_shape": (1, 8, 8)}
        model = build_model("watch-cnn" if name == "watch" else "mlp-10m", **options, **shape)
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    sets = ["--set", "model={name='mlp-10m', options={input_shape=[1, 8, 8], hidden=[3]}}"]
    assert "watch does not fit model 'mlp-10m'" in main.error("train", recipe, *sets, "--set", "model.pretrained=watch")
    line = main.error("train", recipe, *sets, "--set", "distillation.teacher=watch")
    assert "teacher 'watch' does not fit data set 'digits'" in line
    line = main.error("train", recipe, *sets, "--set", "distillation.teacher=wide")
    assert "teacher 'wide' has 12 outputs, expected those of the model, 10" in line
    assert not (tmp_path / "runs").exists()
    good = ["--set", "distillation.teacher=fits", "--set", "model.pretrained=fits"]
    assert main.json("train", recipe, *sets, *good)["num_steps"] == 11


def test_places_that_cannot_be_written_are_one_line(main: Main, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file is a file, expected a folder" in main.error("train", recipe, "--out", "file")
    assert "cannot be made" in main.error("train", recipe, "--out", "file/runs")
    assert "cannot be made" in main.error("train", recipe, "--set", f"name={'x' * 300}")
    path = main.json("train", recipe)["path"]
    assert "Is a directory" in main.error("report", path, "--out", tmp_path)
    assert "file" in main.error("report", path, "--out", "file/page.html")
    assert not list(tmp_path.parent.glob("*.partial")), "a failed write leaves nothing behind"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line(main: Main, recipe: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", full], check=True)
    try:
        line = main.error("train", recipe, "--out", full)
        assert "No space left on device" in line
        assert "Older checkpoints are untouched" in line
        assert not list(full.rglob("*.partial")), "what was written of it is gone again"
        (full / "rest").write_bytes(b"x" * 1024)
        with pytest.raises(OSError, match="No space"):
            (full / "rest").write_bytes(b"x" * 32_000)
        assert "No space left on device" in main.error("train", recipe, "--out", full)
    finally:
        subprocess.run(["umount", full], check=True)


def test_one_json_object_each(main: Main, recipe: Path, tmp_path: Path) -> None:
    trained = main.json("train", recipe)
    assert trained["path"] == "runs/own"
    assert trained["num_parameters"] == (64 * 12 + 12) + (12 * 8 + 8) + (8 * 10 + 10)
    assert trained["num_steps"] == 1437 // 128
    assert trained["environment"]["versions"]["torch"]
    report = main.json("report", "runs/own")
    assert report["report"] == "runs/own/report.html"
    assert report["runs"][0]["accuracy"] == trained["accuracy"]
    assert main.json("profile", "net.py:Net", "--input", "1x8x8")["parameters"] > 0
    doctor = main.json("doctor")
    assert {"torch", "flwr", "unicorn"} <= {piece["name"] for piece in doctor["pieces"]}
    assert set(doctor["missing"]) <= {piece["name"] for piece in doctor["pieces"]}


def test_runs_are_numbered_and_the_newest_is_resumed(main: Main, recipe: Path, tmp_path: Path) -> None:
    assert [main.json("train", recipe)["path"] for _ in range(3)] == ["runs/own", "runs/own-2", "runs/own-3"]
    before = (tmp_path / "runs/own-3/metrics.jsonl").read_text()
    resumed = main.json("train", recipe, "--resume")
    assert resumed["path"] == "runs/own-3"
    assert (tmp_path / "runs/own-3/metrics.jsonl").read_text() == before, "a finished run does nothing twice"
    longer = main.json("train", recipe, "--resume", "--set", "loop.epochs=2")
    assert longer["num_steps"] == 2 * resumed["num_steps"]
    rows = [json.loads(line) for line in (tmp_path / "runs/own-3/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["kind"] == "eval"] == [1, 2]


def test_resume_with_another_recipe_is_refused(main: Main, recipe: Path, tmp_path: Path) -> None:
    main.json("train", recipe)
    (tmp_path / "data.py").write_text("from efftrain.data.digits import load_digits as load\n")
    for override, message in (
        ("seed=1", "was started with seed = 0, expected the same, found 1"),
        ("model.options={hidden=[3]}", "was started with model.options.hidden = "),
        ("data.name=data.py:load", "was started with data.name = "),
        ("loop.batch_size=64", "was started with loop.batch_size = 128, expected the same, found 64"),
        ("optimizer.name=adamw", 'was started with optimizer.name = "sgd", expected the same, found "adamw"'),
    ):
        assert message in main.error("train", recipe, "--resume", "--set", override)
    before = (tmp_path / "runs/own/recipe.toml").read_text()
    assert 'name = "sgd"' in before, "a refused resume leaves the run as it was"


def test_a_run_that_diverges_still_ends(main: Main, recipe: Path) -> None:
    status, out, err = main("train", recipe, "--set", "optimizer={lr=3e3, schedule='constant', momentum=0.99}")
    assert (status, out) == (0, ""), err
    assert "Traceback" not in err
    status, _, err = main("train", recipe, "--set", "optimizer.lr=1e30", "--set", "loop.epochs=4")
    assert status == 1
    assert "inf or NaN in 20 steps one after the other" in err


def test_names_with_markup_come_through(main: Main, recipe: Path, tmp_path: Path) -> None:
    main.json("train", recipe)
    (tmp_path / "runs/own").rename(tmp_path / "runs/[red]x")
    status, out, _ = main("report", "runs/[red]x")
    assert status == 0
    assert "[red]x" in out


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m efftrain doctor | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200)
    assert "Traceback" not in result.stderr


def test_wrong_usage_has_a_status_of_its_own(main: Main) -> None:
    status, _, err = main("train")
    assert status == 2
    assert "RECIPE" in err


LABELS = """
import numpy as np

class Data:
    def __init__(self, split):
        self.x = np.zeros((256, 1, 8, 8), np.float32)
    def __len__(self):
        return 256
    def batch(self, indices):
        return self.x[indices], (indices % 18).astype({dtype})
"""


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("np.int64", "labels run from 0 to 17, the model has 10 outputs; expected labels from 0 to 9"),
        ("np.float32", "labels are float32, expected integers"),
    ],
)
def test_wrong_labels_are_one_line(main: Main, recipe: Path, tmp_path: Path, dtype: str, message: str) -> None:
    (tmp_path / "data.py").write_text(LABELS.format(dtype=dtype))
    assert message in main.error("train", recipe, "--set", "data.name=data.py:Data")


def test_an_interrupt_is_said_and_its_checkpoint_is_found(main: Main, recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "efftrain", "train", str(recipe), "--set", "loop.epochs=100000"]
    command += ["--set", "loop.checkpoint_every=5"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs" / "own" / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < deadline, "no checkpoint within a minute"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=200)[1].splitlines()[-1].startswith("efftrain: interrupted; --resume goes on")
    assert process.returncode == 130
    done = max(int(path.name[5:]) for path in (tmp_path / "runs" / "own" / "checkpoints").glob("step-*[0-9]"))
    epochs = done // 11 + 1  # 1,437 samples in batches of 128
    status, _, err = main("train", recipe, "--resume", "--set", f"loop.epochs={epochs}")
    assert status == 0, err
    assert f"resumed after update {done}" in err


def test_the_demo_names_what_is_missing_before_it_starts(tmp_path: Path) -> None:
    code = "import sys; sys.modules['unicorn'] = None; from efftrain.cli.main import main; main(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "the demo needs unicorn, not installed here; run: pip install" in done.stderr
    assert not (tmp_path / "runs").exists()
