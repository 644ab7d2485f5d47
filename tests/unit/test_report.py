"""Run folders, and the page that compares them, in a real browser."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efftrain.errors import ConfigError, DataError
from efftrain.report.compare import comparison_page, comparison_table, read_run
from efftrain.report.figures import Series, bar_plot, line_plot, memory_map
from efftrain.report.page import Page, Section, Table, write_page
from efftrain.report.run import RunFolder, claim_run, next_run_number, read_metrics, run_path, write_atomic

HOSTILE = '</title><script>document.title="owned"</script><img src=x onerror=alert(1)> &amp; "\' {{ 7*7 }} $x_{$'


def make_run(path: Path, *, accuracy: float = 0.9, wire_bytes: float | None = 1e5, **more: Any) -> Path:
    """A finished run of three epochs."""
    with RunFolder(path) as run:
        for step in range(1, 31):
            run.log("step", step=step, loss=2 / step, lr=0.1, skipped=False)
            if step % 10 == 0:
                sent = {} if wire_bytes is None else {"wire_bytes": wire_bytes * step / 30}
                run.log("eval", step=step, epoch=step // 10, loss=1 / step, accuracy=accuracy * step / 30, **sent)
        sent = {} if wire_bytes is None else {"wire_bytes": wire_bytes, "uncompressed_bytes": 30 * wire_bytes}
        run.finish(
            {
                "codec": "TopK()",
                "world_size": 2,
                "accuracy": accuracy,
                "loss": 0.1,
                "train_s": 75,
                "seed": 3,
                **sent,
                **more,
            }
        )
    return path


# Run folders


def test_rows_are_strict_json(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        run.log("step", step=1, loss=math.nan, norm=math.inf, nested={"a": (1, -math.inf)}, text="é\u2028\n")
        assert (tmp_path / "run" / "metrics.jsonl").read_text().endswith("\n"), "flushed line by line"
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row == {
        "kind": "step", "step": 1, "loss": None, "norm": None, "nested": {"a": [1, None]}, "text": "é\u2028\n",
    }  # fmt: skip
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [row]
    with RunFolder(tmp_path / "run") as run:
        whole = json.loads(json.dumps(run.finish({"loss": math.nan})))
    assert whole["loss"] is None
    assert {"efftrain", "torch", "python"} <= set(whole["environment"]["versions"])


def test_a_last_line_cut_by_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"kind": "step", "step": 1}\n'
    for tail in ('{"kind": "st', "{", "\0\0\0", '{"kind": "step", "st\xff'):
        path.write_text(good + tail, encoding="latin-1")
        assert [row["step"] for row in read_metrics(path, partial=True)] == [1]
        with pytest.raises(DataError, match="line 2 is not JSON"):
            read_metrics(path)
    path.write_text("{\n" + good)
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_metrics(path, partial=True)
    path.write_text("3\n")
    with pytest.raises(DataError, match="line 1 is a int, expected a JSON object"):
        read_metrics(path)
    assert read_metrics(tmp_path / "missing") == []
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path)


@given(st.lists(st.integers(0, 50), max_size=30).map(sorted), st.integers(0, 60), st.binary(max_size=5))
def test_rewind_forgets_what_comes_again(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], step: int, tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with RunFolder(folder) as run:
        run.log("start")
        for number in steps:
            run.log("step", step=number)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"cut": ' + tail.replace(b"\n", b"").replace(b"\r", b""))
    with RunFolder(folder) as run:
        run.rewind(step)
        run.log("step", step=99)
    kept = [row.get("step") for row in read_metrics(folder / "metrics.jsonl")]
    assert kept == [None, *(number for number in steps if number <= step), 99]
    shutil.rmtree(folder)


def test_folders_are_numbered(tmp_path: Path) -> None:
    assert next_run_number(tmp_path / "missing", "a") == 1
    assert [claim_run(tmp_path, "a") for _ in range(3)] == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a-2", "a-3"]
    shutil.rmtree(tmp_path / "a-2")
    assert claim_run(tmp_path, "a") == 4, "a number is not used again while a higher one is there"
    for name in ("a.b", "a+", "b", "a-x"):
        (tmp_path / name).mkdir()
    assert next_run_number(tmp_path, "a") == 5
    assert next_run_number(tmp_path, "a.b") == 2
    for name in ("", ".", "..", "a/b", "/a", "-a", "a b", "a\n", "ü"):
        with pytest.raises(ConfigError, match="is no plain file name"):
            run_path(tmp_path, name, 1)


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    """Many at once: each number is given once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(lambda _: claim_run(tmp_path, "a"), range(64)))
    assert sorted(numbers) == list(range(1, 65))


def test_a_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new\ud800")
    assert path.read_text() == "old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_atomic(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("file.")) == ["file", "folder"]


# Reading runs


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", None, "has not finished"),
        ("result.json", "{", "cannot be read as JSON"),
        ("result.json", "[" * 100_000, "cannot be read as JSON"),
        ("result.json", "\ud83d", "cannot be read as JSON"),
        ("result.json", "[1]", "holds a list, expected a JSON object"),
        ("result.json", '{"accuracy": "high"}', "accuracy is 'high', expected a number or null"),
        ("result.json", '{"train_s": []}', r"train_s is \[\], expected a number or null"),
        ("metrics.jsonl", '{"kind": "eval"', "line 1 is not JSON"),
        ("metrics.jsonl", '{"kind": "eval", "step": "x", "accuracy": 1}', "step is 'x', expected a number or null"),
        ("metrics.jsonl", '{"kind": "step", "step": 1}', "no evaluations to plot"),
        ("metrics.jsonl", "", "no evaluations to plot"),
    ],
)
def test_damaged_runs_are_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = make_run(tmp_path / "run")
    if text is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=message) as error:
        comparison_page([read_run(path)])
    assert str(path) in str(error.value)


def test_a_result_of_few_figures_is_no_error(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    for text in ("{}", '{"environment": 3}', '{"accuracy": null, "loss": null, "environment": {"versions": []}}'):
        (path / "result.json").write_text(text)
        assert comparison_table([read_run(path)]).rows[0][3] == "-"
        comparison_page([read_run(path)])


def test_the_table_by_hand(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", wire_bytes=None, accuracy=0.5))]
    table = comparison_table(runs)
    assert list(table.rows) == [
        ("a", "TopK()", "2", "90.0 %", "0.100", "97.7 KiB", "30.0x", "1 min 15 s"),
        ("b", "TopK()", "2", "50.0 %", "0.100", "none", "-", "1 min 15 s"),
    ]
    page = comparison_page(runs)
    assert page.lead == "Best accuracy 90.0 % by a."
    assert [figure.name for figure in page.sections[0].figures] == ["loss", "accuracy", "traffic"]
    alone = comparison_page([runs[1]])
    assert [figure.name for figure in alone.sections[0].figures] == ["loss", "accuracy"], "nothing was sent"


@pytest.mark.parametrize(
    ("axes", "shown"),
    [
        ({"data": 8, "tensor": 1, "pipeline": 1, "shard": "none"}, "8"),
        ({"data": 8, "tensor": 1, "pipeline": 1, "shard": "full"}, "8, sharded"),
        ({"data": 2, "tensor": 2, "pipeline": 2, "shard": "none"}, "8: 2 data x 2 tensor x 2 pipeline"),
        ({"data": 1, "tensor": 8, "pipeline": 1, "shard": "none"}, "8: 8 tensor"),
        ("text", "8"),
    ],
)
def test_the_axes_are_shown(axes: object, shown: str, tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", world_size=8, axes=axes))
    assert comparison_table([run]).rows[0][2] == shown


def test_the_exchange_by_hand(tmp_path: Path) -> None:
    """Means over the steps of the run; a run that sent nothing has no such section."""
    path = make_run(tmp_path / "a")
    result = json.loads((path / "result.json").read_text())
    result.update(num_steps=100, encode_s=0.5, exchange_s=0.25, decode_s=0.125)
    (path / "result.json").write_text(json.dumps(result))
    rows = [{"kind": "step", "step": i, "step_s": i / 100, "wire_bytes": 10, "residual_norm": i} for i in (1, 2, 9)]
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    section = comparison_page([read_run(path)]).sections[1]
    table = section.tables[0]
    steps = ("5.00 ms", "2.50 ms", "1.25 ms", "20.00 ms")
    assert list(table.rows) == [("a", "29.3 KiB", "1000 B", "-", *steps)]
    assert [figure.name for figure in section.figures] == ["sent", "owed"]
    silent = comparison_page([read_run(make_run(tmp_path / "b", wire_bytes=None))])
    assert len(silent.sections) == 1


def test_a_run_is_called_by_its_folder_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_run(tmp_path / "run"))
    assert read_run(Path()).label == "run"


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    for name in ("one.html", "two.html"):
        write_page(comparison_page([run]), tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


# Pages


class Elements(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_page(folder: Path) -> Path:
    """A page in which every text tries to be something else."""
    names = ["_hidden", "$x$ and $", "a<b>&", "[red]"]
    runs = [read_run(make_run(folder / name, codec=HOSTILE, seed=HOSTILE)) for name in names]
    page = comparison_page(runs)
    table = Table((HOSTILE,), [(HOSTILE,)], HOSTILE)
    plan = {
        "buffers": [
            {"name": HOSTILE, "kind": HOSTILE, "offset": 0, "num_bytes": 100, "first_op": 0, "last_op": 2},
            {"name": "b", "kind": "_x", "offset": 100, "num_bytes": 50, "first_op": 1, "last_op": 3},
        ],
        "ops": ["a", "b", "c", "d"],
        "arena_bytes": 150,
        "arena_lower_bound_bytes": 120,
    }
    figures = [
        *page.sections[0].figures,
        bar_plot("bars", {"first": [0.5, 1.0], "second": [0.2, 0.3]}, ["x", "y"], y_label="share (%)", caption=HOSTILE),
        line_plot("one", [Series("alone", [1, 2], [3, 4], dashed=True)], x_label="x", y_label="y", caption="c"),
        memory_map("memory", plan, caption="c"),
    ]
    section = Section(HOSTILE, HOSTILE, [comparison_table(runs), table], figures)
    path = folder / "page.html"
    write_page(Page(HOSTILE, HOSTILE, [section], {HOSTILE: HOSTILE}), path)
    return path


FIGURES = ["loss", "accuracy", "traffic", "bars", "one", "memory"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_page(tmp_path_factory.mktemp("page"))


def test_texts_stay_texts(page: Path) -> None:
    found = Elements(page)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "embed", "form", "base", "b"}
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    for text in (HOSTILE, "_hidden", "$x$ and $", "a<b>&", "[red]"):
        assert text in found.text


def test_nothing_is_loaded_from_elsewhere(page: Path) -> None:
    found = Elements(page)
    loading = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    for tag, attrs in found.tags:
        for name in loading:
            value = attrs.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    text = page.read_text()
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_references_lead_somewhere(page: Path) -> None:
    found = Elements(page)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(FIGURES) <= set(ids)
    text = page.read_text()
    references = re.findall(r"url\(#([^)]*)\)", text) + re.findall(r'href="#([^"]*)"', text)
    assert references
    assert set(references) <= set(ids)


def test_a_legend_names_every_run(page: Path) -> None:
    text = page.read_text()
    for figure in ("loss", "accuracy", "traffic"):
        svg = text[text.index(f'data-figure="{figure}"') :]
        svg = svg[: svg.index("</svg>")]
        labels = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
        for label in ("_hidden", "$x$ and $", "a&lt;b&gt;&amp;", "[red]"):
            assert label in labels, (figure, labels)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.browser
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

MEASURE = """
<script>
addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
  const figures = {};
  for (const svg of document.querySelectorAll("svg[data-figure]")) {
    const inner = svg.getBBox();
    figures[svg.dataset.figure] = {
      box: box(svg), inner: [inner.width, inner.height], paths: svg.querySelectorAll("path").length,
      texts: [...svg.querySelectorAll("text")].filter(t => t.getBoundingClientRect().width > 0).length,
      outside: [...svg.querySelectorAll("text")].filter(t => {
        const a = t.getBoundingClientRect(), b = svg.getBoundingClientRect();
        return a.left < b.left - 2 || a.right > b.right + 2 || a.top < b.top - 2 || a.bottom > b.bottom + 2;
      }).map(t => t.textContent),
    };
  }
  const out = document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify({
    figures, title: document.title, width: document.documentElement.scrollWidth, window: innerWidth,
    resources: performance.getEntriesByType("resource").map(e => e.name), scripts: document.scripts.length,
  });
  document.body.append(out);
});
</script>
"""


def chromium(folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *arguments,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout


@browser
@needs_chromium
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_every_figure(page: Path, tmp_path: Path, width: int) -> None:
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    dom = chromium(tmp_path, f"--window-size={width},900", "--dump-dom", copy.as_uri())
    text = re.findall(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[0]
    measured = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert list(measured["figures"]) == FIGURES
    for name, figure in measured["figures"].items():
        _, _, figure_width, height = figure["box"]
        assert figure_width > 200, name
        assert height > 80, name
        assert min(figure["inner"]) > 50, name
        assert figure["paths"] > 5, name
        assert figure["texts"] > 5, name
        if name != "memory":  # whose hostile kind is longer than the picture
            assert figure["outside"] == [], name
    assert measured["title"] == " ".join(HOSTILE.split()), "no text ran as a script"
    assert measured["scripts"] == 1, "only the one that measures"
    assert measured["resources"] == []
    assert measured["width"] <= measured["window"], "nothing to scroll sideways"


@browser
@needs_chromium
def test_a_screenshot_is_not_blank(tmp_path: Path) -> None:
    from PIL import Image

    page = tmp_path / "page.html"
    write_page(
        comparison_page([read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", accuracy=0.5))]), page
    )
    shot = tmp_path / "shot.png"
    chromium(tmp_path, "--window-size=1000,1100", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        picture = image.convert("RGB")
    assert picture.size == (1000, 1100)
    colors: Any = picture.getcolors(1 << 24)
    counts: dict[tuple[int, ...], int] = {color: count for count, color in colors}
    assert 0.5 < counts[(255, 255, 255)] / (1000 * 1100) < 0.99, "a white page with something on it"
    for line in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # of both runs, with softened edges
        near = [n for color, n in counts.items() if max(abs(a - b) for a, b in zip(color, line, strict=True)) < 60]
        assert sum(near) > 200, line
