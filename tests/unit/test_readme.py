"""What the README promises: its figures are those of the reports, its files exist, its example runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, Run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_reports() -> None:
    command = [sys.executable, str(ROOT / "tools" / "readme_figures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_links_and_files_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"(?:parallel|federated|ondevice)/[\w/.]+\.(?:py|toml)", README
    )
    missing = [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()]
    assert missing == []


def test_your_own_model_and_data_as_printed(efftrain: Run, tmp_path: Path) -> None:
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "# mine.py" in code)
    (tmp_path / "mine.py").write_text(block, encoding="utf-8")
    lines = [text.split() for text in README.splitlines() if "model.name=mine.py:Net" in text]
    short = {"train": ["--set", "loop.epochs=2"], "federate": ["--set", "server.rounds=1"]}
    assert [line[1] for line in lines] == list(short)
    for _, verb, recipe, *changes in lines:
        done = efftrain(verb, ROOT / recipe, *changes, "--json", *short[verb])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["accuracy"] > 0.5
    assert set(load_file(tmp_path / "runs" / "mine" / "model" / "model.safetensors")) == {
        "1.weight", "1.bias", "3.weight", "3.bias"
    }  # fmt: skip
    assert efftrain("profile", "mine.py:Net", "--json").returncode == 0


def test_your_own_script_as_printed(torchrun: Run, tmp_path: Path) -> None:
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "# script.py" in code)
    (tmp_path / "script.py").write_text(block, encoding="utf-8")
    done = torchrun(2, "script.py")
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 100
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_the_tolerances_of_the_demo_are_those_of_the_reports() -> None:
    """Each is a spread that a benchmark measured, rounded up to a tenth of a point."""
    from efftrain.cli.demo_acts import CLUSTER_SPREAD, FEDERATED_SPREAD

    reports = {
        theme: json.loads(sorted((ROOT / "benchmarks" / "reports").glob(f"{theme}_*.json"))[-1].read_text())
        for theme in ("cluster_watch", "federated_watch")
    }
    federated = reports["federated_watch"]
    pairs = zip(federated["accuracy_compressed"], federated["accuracy_control"], strict=True)
    assert pytest.approx(2 * stdev(a - b for a, b in pairs), abs=0.0005) == FEDERATED_SPREAD
    assert pytest.approx(reports["cluster_watch"]["control_spread"], abs=0.0005) == CLUSTER_SPREAD
