"""The waterfall of the passes and the picture of a plan: right numbers, and a browser that shows them."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.cli.main import main
from efftrain.models import build_model
from efftrain.ondevice import Program, compile
from efftrain.ondevice.passes import OVERLAP, PASSES
from efftrain.ondevice.waterfall import WaterfallStep, waterfall
from efftrain.report.device import PASS_TITLES, device_page
from efftrain.report.page import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ("none", *PASSES, OVERLAP, "moves")


def plan_of(name: str, scheme: str, *switch_off: str) -> Program:
    torch.manual_seed(0)
    model: Any = build_model(name)
    samples = np.random.default_rng(0).normal(size=(4, *model.input_shape)).astype(np.float32)
    return compile(
        model,
        torch.zeros(1, *model.input_shape),
        scheme=scheme,
        board="nucleo-h743",
        calibration=samples,
        learning_rate=0.01,
        switch_off=switch_off,
    )


@pytest.mark.parametrize(("name", "scheme"), [("watch-cnn", "full"), ("ds-cnn", "last_k=3"), ("resnet8", "bias_only")])
def test_every_row_is_what_compile_plans(name: str, scheme: str) -> None:
    program = plan_of(name, scheme)
    steps = waterfall(program, 0.01)
    assert tuple(step.name for step in steps) == NAMES
    assert set(NAMES) == set(PASS_TITLES)
    for number in range(len(PASSES) + 1):
        other = plan_of(name, scheme, *tuple(PASSES)[number:], OVERLAP)
        assert figures(steps[number]) == figures(other.plan), NAMES[number]
    assert figures(steps[-1]) == figures(program.plan)
    for before, after in itertools.pairwise(steps):
        assert after.arena_bytes <= before.arena_bytes
    for step in steps:
        peak = max(step.max_live_forward_bytes, step.max_live_backward_bytes)
        assert peak == step.arena_lower_bound_bytes <= step.arena_bytes


def test_stochastic_programs_are_counted_with_what_their_biases_need() -> None:
    layers = (nn.Conv2d(3, 256, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 3))
    samples = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    settings: dict[str, Any] = {"scheme": "bias_only", "board": "nucleo-h743", "learning_rate": 0.01}
    example = torch.zeros(1, 3, 2, 2)
    program = compile(nn.Sequential(*layers), example, calibration=samples, rounding="stochastic", **settings)
    steps = waterfall(program, 0.01)
    assert {step.max_live_forward_bytes for step in steps[-2:]} == {steps[-1].max_live_forward_bytes}
    assert steps[-1].max_live_forward_bytes > 256 * 4


def figures(plan: Any) -> tuple[int, ...]:
    return (plan.arena_bytes, plan.arena_lower_bound_bytes, plan.trained_state_bytes, plan.total_ram_bytes)


def test_a_model_that_does_not_learn_has_no_backward_pass() -> None:
    program = plan_of("watch-cnn", "none")
    steps: tuple[WaterfallStep, ...] = waterfall(program, 0.01)
    assert steps[-1].max_live_backward_bytes <= steps[-1].max_live_forward_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``plan --out`` writes."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.raises(SystemExit) as ended:
        main(["ondevice", "plan", "ds-cnn", "--scheme", "last_k=4", "--synthetic", "--json", "--out", str(folder)])
    assert not ended.value.code
    return folder


def test_plan_json_holds_the_picture(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["alive_bytes"]) == len(plan["ops"]) > plan["num_forward_ops"] > 0
    assert max(plan["alive_bytes"]) == plan["arena_lower_bound_bytes"]
    assert [step["name"] for step in plan["waterfall"]] == list(NAMES)
    assert plan["waterfall"][-1]["total_ram_bytes"] == plan["total_ram_bytes"]
    page = (folder / "report.html").read_text()
    assert page.count('<rect class="buffer"') == len(plan["buffers"])
    assert page.count('<rect class="op"') == len(plan["ops"])
    for buffer in plan["buffers"]:
        assert f"<title>{buffer['name']} ({buffer['kind']}), {buffer['num_bytes']:,} B at" in page
    for step in plan["waterfall"]:
        assert f"{step['total_ram_bytes']:,} B" in page
    assert not re.search(r"<script|<img|<link|@import|https?://(?!www\.w3\.org/2000/svg)", page)


HOSTILE = "<script>alert(1)</script>&\"'"


def test_hostile_names_stay_text(tmp_path: Path, folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    for key in ("model", "scheme", "board"):
        plan[key] = HOSTILE
    plan["ops"] = [HOSTILE for _ in plan["ops"]]
    for buffer in plan["buffers"]:
        buffer["name"] = buffer["kind"] = HOSTILE
    for step in plan["waterfall"]:
        step["name"] = HOSTILE
    write_page(device_page(plan, {HOSTILE: HOSTILE}), tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text()


def test_a_plan_that_does_not_fit_says_so(tmp_path: Path, folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {"board_ram_bytes": plan["total_ram_bytes"] - 1, "waterfall": []}
    page = device_page(plan, {})
    assert "It does not fit." in page.lead
    write_page(page, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "end of the board&#x27;s RAM" in text
    assert "What each pass saves" not in text


def test_out_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["ondevice", "plan", "watch-cnn", "--synthetic", "--json", "--out", str(tmp_path / "file")])
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "choose another folder" in captured.err.splitlines()[-1]


MEASURE = """
<script>
addEventListener("load", () => {
  const figures = {};
  for (const svg of document.querySelectorAll("svg[data-figure]")) {
    const b = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    figures[svg.dataset.figure] = {
      width: b.width, height: b.height, rects: svg.querySelectorAll("rect").length, texts: boxes.length,
      outside: boxes.filter(([_, a]) =>
        a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1).map(([t]) => t),
    };
  }
  // Under the mouse lies the buffer, not its label.
  const labels = [...document.querySelectorAll('svg[data-figure="arena"] text[font-weight="600"]')];
  const hit = labels.map(t => t.getBoundingClientRect()).filter(r => r.top >= 0 && r.bottom < innerHeight)
    .map(r => document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2)).filter(e => e).map(e => e.tagName);
  const out = document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify({
    figures, hit, width: document.documentElement.scrollWidth, window: innerWidth, scripts: document.scripts.length,
    resources: performance.getEntriesByType("resource").map(e => e.name),
  });
  document.body.append(out);
});
</script>
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_plan(folder: Path, tmp_path: Path, width: int) -> None:
    copy = tmp_path / "page.html"
    copy.write_text((folder / "report.html").read_text().replace("</body>", MEASURE + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    assert CHROMIUM is not None
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command += [f"--window-size={width},4000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    text = re.findall(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)[0]
    measured = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert list(measured["figures"]) == ["ram", "arena", "waterfall"]
    for name, figure in measured["figures"].items():
        assert figure["outside"] == [], name
        assert figure["width"] >= (1000 if width == 1280 else 600), name
        assert figure["texts"] > 3, name
    assert measured["figures"]["arena"]["height"] > 300
    assert measured["hit"]
    assert "text" not in measured["hit"]
    assert measured["scripts"] == 1
    assert measured["resources"] == []
    assert measured["width"] <= measured["window"], "nothing to scroll sideways"
