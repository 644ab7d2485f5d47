"""The demo: its claims are checked, its page is drawn, its folder is safe."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Run

FIGURES = (
    "cluster-loss",
    "cluster-accuracy",
    "cluster-traffic",
    "federated-accuracy",
    "federated-uplink",
    "federated-people",
    "device-accuracy",
    "device-memory",
)


def test_a_folder_that_no_demo_wrote_is_left_alone(efftrain: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    done = efftrain("demo", "--out", tmp_path)
    assert done.returncode == 1
    assert "holds files that no demo wrote; choose an empty or a new folder" in done.stderr
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.timeout(600)
@pytest.mark.browser
@pytest.mark.firmware
def test_the_demo_keeps_its_claims_and_draws_its_report(efftrain: Run, tmp_path: Path) -> None:
    done = efftrain("demo", "--out", tmp_path / "demo", "--json", timeout_s=580)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["claims"]) == 8
    assert all(claim["holds"] for claim in result["claims"])
    assert result["device"]["bit_equal"]
    report = tmp_path / "demo" / "report.html"
    assert result["report"] == str(report)
    _look_at(report, tmp_path)


def _look_at(report: Path, tmp_path: Path) -> None:
    """Every figure is there in a real browser, and none is empty."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt install chromium")
    page = report.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="https?:', page), "the report loads something from outside"
    # The page has no script of its own; a copy measures itself.
    probe = (
        "<script>document.title = JSON.stringify(Object.fromEntries([...document.querySelectorAll('figure')].map("
        "f => [f.id, [f.getBoundingClientRect().width, f.querySelectorAll('svg path').length]])))</script>"
    )
    copy = tmp_path / "probe.html"
    copy.write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found is not None
    sizes = json.loads(found[1])
    assert sorted(sizes) == sorted(FIGURES)
    for name, (width, num_paths) in sizes.items():
        assert width > 300, f"{name} is {width} pixels wide"
        assert num_paths > 5, f"{name} has {num_paths} paths"
