"""``efftrain ondevice``: the keys that scripts rely on, what people read, and one line for every error."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from efftrain.models import build_model
from efftrain.ondevice import Board, Scheme, compile
from efftrain.ondevice.scheme import PRESETS
from efftrain.ondevice.target import family_of

PLAN_KEYS = {
    *("arena_bytes", "arena_lower_bound_bytes", "trained_state_bytes", "scratch_bytes", "stack_bytes", "static_bytes"),
    *("total_ram_bytes", "flash_bytes", "macs_forward", "macs_backward"),
}
RUN_KEYS = PLAN_KEYS | {
    *("measured_ram_bytes", "measured_stack_bytes", "measured_flash_bytes", "instructions_per_step"),
    *("instructions_forward", "state_sha256", "simulator_state_sha256", "host_state_sha256", "bit_equal"),
}

NET = """
from torch import nn

print("a user's file may print")

class Net(nn.Sequential):
    def __init__(self, num_classes=3):
        layers = [nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU6()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

class Gelu(nn.Sequential):
    input_shape = (3, 8, 8)
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 2))

class Ce(Net):
    input_shape = (3, 8, 8)
    loss = "ce"

class Wide(nn.Sequential):
    input_shape = (3, 16, 16)
    def __init__(self):
        block = [nn.Conv2d(8, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1, groups=128), nn.Conv2d(128, 8, 1)]
        super().__init__(nn.Conv2d(3, 8, 1), *block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

class Real(Net):
    input_shape = (3, 8.0, 8)

class Negative(Net):
    input_shape = (3, -8, 8)

class Empty(Net):
    input_shape = ()

class Depends(Net):
    input_shape = (3, 8, 8)
    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return super().forward(x)

class Small(nn.Sequential):
    input_shape = (1, 8, 8)
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

class Broken(nn.Module):
    def __init__(self):
        raise KeyError("no such thing")
"""

Ended = tuple[int, str, str]
Command = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Status, stdout and stderr of ``efftrain ondevice ARGUMENTS``, in a folder with ``net.py``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)

    def command(*arguments: object) -> Ended:
        from efftrain.cli.main import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["ondevice", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


def object_of(ended: Ended) -> dict[str, Any]:
    """The one object on stdout."""
    status, out, err = ended
    assert status == 0, err
    assert out.count("\n") == 1, out
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def error_of(ended: Ended) -> str:
    """The one line of an error, the last on stderr."""
    status, out, err = ended
    assert (status, out) == (1, ""), (status, out, err)
    lines = [
        line for line in err.splitlines() if not line.startswith(("data:", "weights:", "training:", "a user's file"))
    ]
    assert len(lines) == 1, err
    assert lines[0].startswith("efftrain: "), err
    return lines[0]


def test_plan_says_what_compile_plans(run: Command) -> None:
    found = object_of(run("plan", "--model", "watch-cnn", "--scheme", "last_k=2", "--seed", 3, "--synthetic", "--json"))
    assert found.keys() >= PLAN_KEYS
    torch.manual_seed(3)
    samples = np.random.default_rng(3).normal(size=(16, 6, 128)).astype(np.float32)
    program = compile(
        build_model("watch-cnn"),
        torch.zeros(1, 6, 128),
        scheme=Scheme.parse("last_k=2"),
        board="stm32f746",
        calibration=samples,
        learning_rate=0.01,
    )
    assert {key: found[key] for key in PLAN_KEYS} == {key: getattr(program.plan, key) for key in PLAN_KEYS}
    assert (found["model"], found["scheme"], found["num_classes"], found["fits"]) == ("watch-cnn", "last_k=2", 7, True)
    assert found["total_ram_bytes"] <= found["board_ram_bytes"] == Board.named("stm32f746").ram_bytes
    assert "schemes" not in found


def test_a_sample_in_place_and_the_memory_of_optimizers(run: Command) -> None:
    arguments = ("plan", "--model", "watch-cnn", "--scheme", "full", "--synthetic", "--json")
    plain, placed = object_of(run(*arguments)), object_of(run(*arguments, "--input-in-place"))
    assert placed["arena_bytes"] < plain["arena_bytes"]
    assert (plain["input_in_place"], placed["input_in_place"]) == (False, True)
    assert "input" not in {buffer["kind"] for buffer in placed["buffers"]}
    momentum, batch = (object_of(run(*arguments, *more)) for more in (("--momentum", 0.9), ("--batch", 8)))
    assert momentum["trained_state_bytes"] == batch["trained_state_bytes"] > plain["trained_state_bytes"]


def test_the_waterfall_of_passes(run: Command) -> None:
    status, out, _ = run("plan", "watch-cnn", "--scheme", "full", "--waterfall", "--no-compare", "--synthetic")
    assert status == 0
    rows = [line for line in out.partition("max live backward")[2].splitlines()[1:] if line.strip()]
    assert [row[:9] for row in rows[:2]] == ["no pass  ", "+ dead gr"]
    assert len(rows) == 7
    found = object_of(run("plan", "watch-cnn", "--scheme", "full", "--waterfall", "--synthetic", "--json"))
    totals = [step["total_ram_bytes"] for step in found["waterfall"]]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == found["total_ram_bytes"]
    assert rows[-1].split()[-1] == f"{totals[-1]:,}"


def test_the_default_scheme_takes_a_small_model(run: Command) -> None:
    found = object_of(run("run", "net.py:Small", "--target", "host", "--json"))
    assert (found["scheme"], found["bit_equal"]) == ("sparse", True)
    # The image has one channel, so that its share is all of it.
    assert found["trained_state_bytes"] == 4 + 2 * (64 * 32 + 32 * 4) + 4 * (32 + 4)


def test_ranges_and_passes_can_be_chosen(run: Command, tmp_path: Path) -> None:
    learned = {
        object_of(run("run", "watch-cnn", "--target", "host", "--calibrate", method, "--json"))["state_sha256"]
        for method in ("max", "percentile", "mse")
    }
    assert len(learned) == 3
    arguments = ("plan", "net.py:Wide", "--scheme", "bias_only", "--board", "stm32l433", "--json")
    whole = object_of(run(*arguments, "--rounding", "stochastic"))
    status, out, _ = run(*arguments, "--rounding", "stochastic", "--without", "tile_channels", "--without", "overlap")
    found = json.loads(out)
    assert (status, found["tiled_blocks"], found["without"]) == (1, [], ["tile_channels", "overlap"])
    assert found["arena_bytes"] > whole["arena_bytes"]
    folder = object_of(run("build", "watch-cnn", "--without", "overlap", "--out", "c", "--json"))
    assert (folder["waterfall"], folder["without"]) == ([], ["overlap"])


def test_names_of_files_stay_text_in_the_readme(run: Command, tmp_path: Path) -> None:
    hostile = "a`b|<script>"
    (tmp_path / "s.toml").write_text(f'name = "{hostile}"\nhead = true\n')
    board = f'name = "{hostile}"\ncpu = "cortex-m7"\nclock_hz = 1_000_000\n'
    (tmp_path / "b.toml").write_text(f"{board}ram_bytes = 65_536\nflash_bytes = 131_072\n")
    object_of(run("build", "watch-cnn", "--scheme", "s.toml", "--board", "b.toml", "--out", "c", "--json"))
    readme = (tmp_path / "c" / "README.md").read_text()
    assert hostile not in readme
    assert "scheme `a_b__script_`" in readme
    assert "trains on a_b__script_" in readme


def test_noise_is_never_taken_in_silence(run: Command) -> None:
    _, out, err = run("plan", "watch-cnn", "--synthetic", "--no-compare")
    assert "seeded normal noise (--synthetic)" in err
    assert "weights: random, from seed 0" in err
    assert "noise" not in out
    assert "seeded normal noise (no --calibration given)" in run("plan", "watch-cnn", "--json")[2]


def test_the_table_of_schemes(run: Command) -> None:
    status, out, _ = run("plan", "watch-cnn", "--scheme", "none")
    assert status == 0
    assert "smallest board that can run it" in out
    rows = [line.split()[0] for line in out.partition("smallest board")[2].splitlines()[1:]]
    assert sorted(rows) == sorted(["none", "last_layer", "bias_only", "sparse", "last_k=3", "full"])
    found = object_of(run("plan", "net.py:Net", "--input", "3x12x12", "--scheme", "full", "--compare", "--json"))
    assert [row["scheme"] for row in found["schemes"]].count("full") == 1
    assert "last_k=3" not in {row["scheme"] for row in found["schemes"]}, "this model has 2 layers"
    sizes = [row["total_ram_bytes"] for row in found["schemes"]]
    assert sizes == sorted(sizes)
    assert {row["smallest_board"] for row in found["schemes"]} <= {*Board.names(), None}


def test_the_smallest_board_is_one_that_needs_tiles(run: Command) -> None:
    """Planned for much RAM it takes more than that board has, but there the compiler makes do with less."""
    settings = ("--rounding", "stochastic", "--json")
    found = object_of(run("plan", "net.py:Wide", "--scheme", "bias_only", *settings, "--compare"))
    rows = {row["scheme"]: row for row in found["schemes"]}
    for name in ("bias_only", "full"):
        smallest = Board.named(rows[name]["smallest_board"])
        for board in map(Board.named, Board.names()):
            if board.ram_bytes < smallest.ram_bytes or board.name == smallest.name:
                _, out, _ = run("plan", "net.py:Wide", "--scheme", name, *settings, "--board", board.name)
                there = json.loads(out)
                assert there["fits"] == (board.name == smallest.name), (name, board.name)
                if there["fits"] and there["total_ram_bytes"] < rows[name]["total_ram_bytes"]:
                    assert there["tiled_blocks"]
                    assert there["total_ram_bytes"] == rows[name]["smallest_board_total_ram_bytes"]
    smallest = Board.named(rows["bias_only"]["smallest_board"])
    assert rows["bias_only"]["total_ram_bytes"] > smallest.ram_bytes
    page = run("plan", "net.py:Wide", "--scheme", "bias_only", *settings[:2])[1]
    assert f"{smallest.name}, in tiles: " in page


def test_a_plan_that_does_not_fit_is_printed_and_refused(run: Command) -> None:
    total = object_of(run("plan", "watch-cnn", "--json"))["total_ram_bytes"]
    assert object_of(run("plan", "watch-cnn", "--ram", total, "--json"))["fits"]
    status, out, err = run("plan", "watch-cnn", "--ram", total - 1, "--json")
    found = json.loads(out)
    assert (status, found["fits"], found["total_ram_bytes"]) == (1, False, total)
    assert found["board_ram_bytes"] == total - 1
    assert f"the plan needs {total} B of RAM" in err.splitlines()[-1]
    assert f"has {total - 1} B" in err.splitlines()[-1]
    status, out, _ = run("plan", "watch-cnn", "--ram", total - 1, "--no-compare")
    assert status == 1
    assert f"of {total - 1:,} B of stm32f746" in out
    assert "the plan needs" in error_of(run("build", "watch-cnn", "--ram", total - 1))


def test_a_refusal_names_options_that_fit(run: Command) -> None:
    """Each of them is tried, and what it says that it needs is what its plan needs."""
    asked = ("plan", "watch-cnn", "--scheme", "full", "--no-compare", "--json")

    def needed(*options: str) -> int:
        return int(object_of(run(*asked, *options))["total_ram_bytes"])

    whole, halved, last = needed(), needed("--rounding", "stochastic"), needed("--scheme", "last_layer")
    line = run(*asked, "--ram", halved)[2].splitlines()[-1]
    assert f"needs {whole} B of RAM" in line
    fitting = (
        f"These fit: --rounding stochastic ({halved} B), --scheme last_layer ({last} B). Or choose a larger board."
    )
    assert line.endswith(fitting)
    line = run(*asked, "--ram", halved - 1)[2].splitlines()[-1]
    assert line.endswith(f"These fit: --scheme last_layer ({last} B). Or choose a larger board.")
    options = ("--input-in-place", "--rounding", "stochastic", "--scheme", "last_layer")
    least = needed(*options)
    line = run(*asked, "--ram", least)[2].splitlines()[-1]
    assert line.endswith(f"These fit: {' '.join(options)} ({least} B). Or choose a larger board.")
    line = error_of(run("build", "watch-cnn", "--scheme", "full", "--ram", least - 1))
    assert line.endswith(f"a larger board: {' '.join(options)} ({least} B) is too much as well.")
    line = error_of(run("build", "watch-cnn", *options, "--ram", least - 1))
    assert line.endswith("Choose a smaller model or a larger board.")
    assert "rounding=" not in line


def test_too_little_flash_needs_another_model_or_board(run: Command, tmp_path: Path) -> None:
    board = 'name = "mine"\ncpu = "cortex-m7"\nclock_hz = 1_000_000\nram_bytes = 65_536\nflash_bytes = 8_192\n'
    (tmp_path / "mine.toml").write_text(board)
    line = error_of(run("build", "watch-cnn", "--board", "mine.toml"))
    assert "B of flash" in line
    assert line.endswith("mine has 8192 B. Choose a smaller model or a larger board.")


def test_own_models_weights_and_data(run: Command, tmp_path: Path) -> None:
    arguments = ("plan", "net.py:Net", "--input", "3x12x10", "--classes", 5, "--scheme", "full", "--json")
    found = object_of(run(*arguments))
    assert (found["input_shape"], found["num_classes"]) == ([12, 10, 3], 5)
    model = build_model(f"{tmp_path}/net.py:Net", num_classes=5)
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    np.save(tmp_path / "x.npy", np.ones((4, 3, 12, 10), np.float32))
    status, out, err = run(*arguments, "--weights", "net.safetensors", "--calibration", "x.npy")
    assert (status, err) == (0, "a user's file may print\n"), "with weights and data there is nothing to say"
    assert {key: json.loads(out)[key] for key in PLAN_KEYS} == {key: found[key] for key in PLAN_KEYS}


def test_weights_from_a_saved_model(run: Command, tmp_path: Path) -> None:
    build_model("watch-cnn").save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    status, _, err = run("plan", "watch-cnn", "--weights", "saved", "--synthetic", "--json")
    assert status == 0
    assert "weights: random" not in err


def test_build_writes_a_project(run: Command, tmp_path: Path) -> None:
    found = object_of(run("build", "watch-cnn", "--out", "c", "--name", "watch", "--json"))
    assert found["path"] == "c"
    assert found.keys() >= PLAN_KEYS
    files = {path.name for path in (tmp_path / "c").iterdir()}
    assert {"watch.c", "watch.h", "main.c", "README.md", "report.html", "plan.json", "CMakeLists.txt"} <= files
    assert found["report"] == "c/report.html"
    assert found["input_zero_point"] == 0
    assert json.loads((tmp_path / "c" / "plan.json").read_text())["input_scale"] == found["input_scale"] > 0
    assert f"scale = {found['input_scale']!r}" in (tmp_path / "c" / "watch.h").read_text()
    assert f"real value / {found['input_scale']:.6g}" in (tmp_path / "c" / "report.html").read_text()
    status, out, err = run("build", "watch-cnn", "--out", "d")
    assert status == 0
    assert "RAM in all" in out
    assert "C99 in d" in err


@pytest.mark.firmware
def test_build_compares_the_stack_with_a_bound(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ncpu = "cortex-m4"\nclock_hz = 1_000_000\n'
        "ram_bytes = 65_536\nflash_bytes = 131_072\nstack_bytes = 64\n"
    )
    if shutil.which("arm-none-eabi-gcc"):
        found = object_of(run("build", "watch-cnn", "--board", "stm32l433", "--out", "c", "--json"))
        assert 64 < found["stack_bound_bytes"] <= found["stack_bytes"]
        line = error_of(run("build", "watch-cnn", "--board", "mine.toml", "--out", "d"))
        assert f"calls can take {found['stack_bound_bytes']} B of stack; 64 B are reserved" in line
        assert not (tmp_path / "d").exists()
    monkeypatch.setenv("PATH", "")
    status, out, err = run("build", "watch-cnn", "--board", "mine.toml", "--out", "d", "--json")
    assert (status, json.loads(out)["stack_bound_bytes"]) == (0, None)
    assert "stack: what is reserved was not compared with what calls can take; that needs arm-none-eabi-gcc" in err
    err = run("build", "watch-cnn", "--board", "gd32vf103", "--out", "e", "--json")[2]
    assert "stack: what is reserved was not compared with what calls can take; that needs riscv" in err


STRICT = "-Wall -Wextra -Wconversion -Wshadow -Wdouble-promotion -Wvla -Werror"


def train_with_the_library(include: Path, library: Path, folder: Path) -> None:
    (folder / "app.c").write_text(
        '#include "test.h"\nstatic test_context model;\n'
        "int main(void) { return test_init(&model, 1u) < 0 || test_train_step(&model, test_input(&model), "
        "TEST_INPUT_BYTES, 0) < 0; }\n"
    )
    command = ["cc", "-std=c99", f"-I{include}", "app.c", str(library), "-o", "app"]
    subprocess.run(command, cwd=folder, check=True, timeout=200)
    assert subprocess.run([folder / "app"], timeout=200).returncode == 0


@pytest.mark.firmware
@pytest.mark.parametrize(("board", "more"), [("stm32f746", ()), ("rp2040", ("--input-in-place",)), ("gd32vf103", ())])
def test_cmake_builds_the_project(run: Command, tmp_path: Path, board: str, more: tuple[str, ...]) -> None:
    cpu = Board.named(board).cpu
    family = family_of(cpu)
    tools = family.gcc.removesuffix("-gcc")
    if shutil.which("cmake") is None or shutil.which(family.gcc) is None:
        pytest.skip(f"needs cmake and {family.gcc}: apt install cmake {family.package}")
    out = tmp_path / "with space"
    arguments = ("build", "watch-cnn", "--out", out, "--name", "test", "--scheme", "full", "--board", board, "--json")
    found = object_of(run(*arguments, *more))

    def build(folder: str, *options: str) -> str:
        where = tmp_path / folder
        configure = ["cmake", "-S", str(out), "-B", str(where), f"-DCMAKE_C_FLAGS={STRICT}", *options]
        printed = ""
        for command in (configure, ["cmake", "--build", str(where), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stdout + done.stderr
            printed += done.stdout + done.stderr
        assert "warning" not in printed.lower(), printed
        return printed

    if board == "stm32f746":
        build("host")
        train_with_the_library(out, tmp_path / "host" / "libeft_test.a", tmp_path)
    printed = build("board", f"-DCMAKE_TOOLCHAIN_FILE={tools}.cmake")
    (used,) = (line.split()[1] for line in printed.splitlines() if line.split()[:1] == ["RAM:"])
    assert int(used) == found["total_ram_bytes"], "the linker places what was planned"
    names = subprocess.run(
        [f"{tools}-nm", tmp_path / "board" / "test.elf"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"test_train_step", "test_predict", "eft_softmax_loss_s16"} <= set(names), "the example trains"
    (flash,) = (line.split()[1] for line in printed.splitlines() if line.split()[:1] == ["FLASH:"])
    assert (0.8 if family.name == "Cortex-M" else 0.7) * found["flash_bytes"] < int(flash) <= found["flash_bytes"]
    commands = (tmp_path / "board" / "CMakeFiles" / "eft_test.dir" / "flags.make").read_text()
    assert f"{family.gcc_flags(cpu)[0]} " in commands
    assert "-O2" in commands
    assert "-O3" not in commands


@pytest.mark.firmware
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_run_compares_every_bit(run: Command, tmp_path: Path, rounding: str) -> None:
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ncpu = "cortex-m7"\nclock_hz = 1_000_000\n'
        "ram_bytes = 65_536\nflash_bytes = 131_072\nstack_bytes = 4096\n"
    )
    arguments: tuple[object, ...] = ("run", "--model", "watch-cnn", "--steps", 4, "--rounding", rounding, "--synthetic")
    arguments += ("--board", "mine.toml", "--json")
    found = object_of(run(*arguments, "--target", "unicorn-m7"))
    assert found.keys() >= RUN_KEYS
    assert (found["bit_equal"], found["board"]) == (True, "mine")
    assert found["state_sha256"] == found["simulator_state_sha256"] == found["host_state_sha256"]
    assert found["measured_stack_bytes"] <= found["stack_bytes"]
    linked = found["total_ram_bytes"] - found["stack_bytes"]
    assert found["measured_ram_bytes"] == linked + found["measured_stack_bytes"]
    assert 0.8 * found["flash_bytes"] < found["measured_flash_bytes"] <= found["flash_bytes"]
    assert found["instructions_per_step"] > found["instructions_forward"] > found["macs_forward"] / 4
    m4 = object_of(run(*arguments, "--target", "unicorn-m4"))
    assert m4["state_sha256"] == found["state_sha256"]
    if shutil.which("qemu-system-arm"):
        qemu = object_of(run(*arguments, "--target", "qemu-m7"))
        assert qemu["state_sha256"] == found["state_sha256"]
        assert qemu["instructions_per_step"] == pytest.approx(found["instructions_per_step"], rel=0.02)
        line = error_of(run("run", "watch-cnn", "--ram", 1 << 30, "--target", "qemu-m4"))
        assert "--target qemu-m4" in line
        assert "Use the unicorn target" in line
    other = object_of(run(*arguments, "--target", "host", "--seed", 1))
    assert other["state_sha256"] != found["state_sha256"]


def test_run_without_a_board_measures_no_board(run: Command) -> None:
    for target in ("simulator", "host"):
        found = object_of(run("run", "watch-cnn", "--target", target, "--steps", 2, "--json"))
        assert found.keys() >= RUN_KEYS
        assert found["bit_equal"] is True
        assert found["measured_ram_bytes"] is found["instructions_per_step"] is None
    status, out, _ = run("run", "watch-cnn", "--target", "host", "--steps", 1)
    assert status == 0
    assert "equal to the bit on host, simulator" in out


def test_the_autoencoder_is_trained_on_its_input(run: Command) -> None:
    found = object_of(run("run", "fc-autoencoder", "--scheme", "last_layer", "--target", "host", "--json"))
    assert (found["loss"], found["bit_equal"]) == ("squared_error", True)
    assert object_of(run("plan", "watch-cnn", "--json"))["loss"] == "cross_entropy"
    chosen = object_of(run("plan", "net.py:Ce", "--scheme", "full", "--loss", "cross_entropy", "--json"))
    assert chosen["loss"] == "cross_entropy", "what is chosen counts, whatever the class says"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Name one model, as MODEL or with --model; found none"),
        (("watch-cnn", "--model", "watch-cnn"), "found both"),
        (("net.py",), "name the class too, as in net.py:Net"),
        (("watch",), "Unknown model 'watch'. Did you mean 'watch-cnn'"),
        (("nope.py:Net",), "there is no file nope.py"),
        (("net.py:Nut",), "net.py has no 'Nut'"),
        (("net.py:Broken",), "calling Broken with {} failed ('no such thing')"),
        (("net.py:Net",), "does not say what its input is. Give the shape of one sample with --input"),
        (("net.py:Net", "--input", "3x0x8"), "sizes above 0 with x between them"),
        (("net.py:Net", "--input", "4x8x8"), "cannot trace the model"),
        (("net.py:Gelu",), "aten.gelu"),
        (("net.py:Real",), "input_shape is (3, 8.0, 8); expected whole numbers above 0, such as (3, 96, 96)"),
        (("net.py:Negative",), "input_shape is (3, -8, 8); expected whole numbers above 0"),
        (("net.py:Empty",), "the example must be a tensor of shape (1, channels, length)"),
        (("net.py:Depends",), f"net.py:{NET[: NET.index('if x.sum')].count(chr(10)) + 1}: Could not guard"),
        (("net.py:Gelu", "--classes", "3"), "unexpected keyword argument 'num_classes'"),
        (("char-transformer",), "takes torch.int64"),
        (("watch-cnn", "--scheme", "ful"), "scheme 'ful' is not known"),
        (("watch-cnn", "--scheme", "last_k=9"), "trains the last 9 layers, the model has 4"),
        (("watch-cnn", "--scheme", "mcunetv3-49kb"), "the model has"),
        (("watch-cnn", "--scheme", "nope.toml"), "scheme file nope.toml does not exist"),
        (("watch-cnn", "--board", "esp"), "board 'esp' is not known; known are"),
        (("watch-cnn", "--board", "nope.toml"), "board file nope.toml does not exist"),
        (("watch-cnn", "--ram", "0"), "--ram: expected bytes above 0, found 0"),
        (("watch-cnn", "--momentum", "1"), "--momentum, --batch: momentum is 1.0"),
        (("watch-cnn", "--batch", "3"), "--momentum, --batch: batch is 3"),
        (("watch-cnn", "--rounding", "up"), "expected master or stochastic, found 'up'"),
        (("watch-cnn", "--loss", "mse"), "expected cross_entropy or squared_error, found 'mse'"),
        (("net.py:Ce",), "'net.py:Ce': its attribute loss is 'ce'; expected cross_entropy or squared_error. Rename it"),
        (("watch-cnn", "--loss", "squared_error"), "compares 7 outputs with 768 inputs"),
        (("watch-cnn", "--lr", "nan"), "the learning rate is nan"),
        (("watch-cnn", "--seed", "-1"), "--seed: expected 0 or more"),
        (("watch-cnn", "--seed", "9" * 20), "less than 2^32"),
        (("watch-cnn", "--input", "6x100000000"), "--input: expected at most 16777216 elements"),
        (("watch-cnn", "--classes", "0"), "expected counts above 0"),
        (("watch-cnn", "--weights", "nope"), "--weights: there is no file nope"),
        (("watch-cnn", "--weights", "net.py"), "net.py does not fit the model"),
        (("watch-cnn", "--calibration", "nope"), "--calibration: there is no file nope"),
        (("watch-cnn", "--calibration", "net.py"), "net.py is no .npy file of numbers. Write one with numpy.save"),
        (("watch-cnn", "--calibration", "objects.npy"), "objects.npy is no .npy file of numbers. Write one with numpy"),
        (("watch-cnn", "--calibrate", "kl"), "--calibrate: expected max, percentile, mse, found 'kl'"),
        (("watch-cnn", "--without", "tiles"), "pass 'tiles' is not known; known are remove_dead_code, update_at_once"),
        (("watch-cnn", "--without", "overlap", "--waterfall"), "--waterfall and --without: expected one of them"),
        (("watch-cnn", "--calibration", "x.npy"), "expected real numbers of shape (N, 6, 128), found float64 (4, 3)"),
        (("watch-cnn", "--calibration", "x.npy", "--synthetic"), "expected one of them, found both"),
    ],
)
def test_errors_are_one_line(run: Command, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 3)))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    assert words in error_of(run("plan", *arguments, "--no-compare"))


def test_wrong_runs_are_one_line(run: Command) -> None:
    line = error_of(run("run", "watch-cnn", "--target", "unicorn"))
    assert "--target: expected one of simulator, host, unicorn-m7" in line
    assert "Did you mean 'unicorn-m" in line
    assert "--steps: expected 1 or more, found 0" in error_of(run("run", "watch-cnn", "--steps", 0))
    assert "cannot be a C prefix" in error_of(run("build", "watch-cnn", "--name", "a b"))


def test_presets_are_accepted(run: Command) -> None:
    for name in PRESETS:
        assert object_of(run("plan", "watch-cnn", "--scheme", name, "--json"))["scheme"] == name


@pytest.mark.parametrize("verb", [[], ["plan"], ["build"], ["run"]])
def test_help_loads_nothing_heavy(verb: list[str]) -> None:
    code = (
        "import sys\n"
        "from efftrain.cli.main import main\n"
        "try:\n"
        f"    main(['ondevice', *{verb}, '--help'])\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "heavy = {'torch', 'numpy', 'jinja2', 'unicorn', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
