"""The generated C itself: clean under every compiler, free of what a microcontroller lacks, safe under sanitizers."""

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Board, Program, compile
from efftrain.ondevice.backends.toolchain import build as link
from efftrain.ondevice.backends.toolchain import compile_objects
from efftrain.ondevice.emit.names import safe
from tests.firmware.compilers import COMPILERS, sanitized, sources

pytestmark = pytest.mark.firmware

DATA = np.random.default_rng(0).normal(size=(40, 6, 128)).astype(np.float32)
LABELS = np.arange(40) % 7


def build(scheme: str, board: str = "stm32f746", **options: object) -> Program:
    torch.manual_seed(0)
    settings = {"calibration": DATA, "learning_rate": 0.02, **options}
    example = torch.zeros(1, 6, 128)
    return compile(WatchCNN(), example, scheme=scheme, board=board, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_warnings(compiler: str, tmp_path: Path) -> None:
    folder = build("full").write(tmp_path / "full")
    for scheme, rounding in (
        ("sparse", "master"),
        ("none", "master"),
        ("bias_only", "stochastic"),
        ("full", "stochastic"),
    ):
        build(scheme, rounding=rounding, name=f"{scheme}_{rounding}").write(folder)
    compile_objects(COMPILERS[compiler], sources(folder))
    assert {"main.c", "eft_conv_s8.c", "model.h", "README.md", "board.ld"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_nothing_is_linked_that_a_bare_board_lacks(rounding: str) -> None:
    firmware = build("full", rounding=rounding).firmware("m4")
    symbols = set(firmware.symbols)
    forbidden = re.compile(
        r"malloc|calloc|realloc|free$|sbrk|printf|puts|__aeabi_[fd](?!iv)|__[a-z]+[sd]f\d|float|double"
    )
    assert not [name for name in symbols if forbidden.search(name) and not name.startswith("eft_")]
    assert "board_train" in symbols


def test_all_data_is_const_but_the_context(tmp_path: Path) -> None:
    folder = build("full").write(tmp_path)
    for source in folder.glob("*.c"):
        if source.name != "main.c":
            subprocess.run(["gcc", "-O2", "-c", source.name], cwd=folder, check=True)
    for line in subprocess.run(
        ["size", *map(str, folder.glob("*.o"))], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]:
        _, data, bss, *_ = line.split()
        # Tables of pointers are relocated on a host, so they count as data there; on a board they are in flash.
        assert bss == "0"
        assert int(data) <= 400


HARNESS = """
#include <stdio.h>
#include "model.h"
static model_context context;
int main(int count, char **arguments)
{
    static int8_t x[MODEL_INPUT_BYTES];
    FILE *file = fopen(arguments[count - 1], "rb");
    int32_t label;
    uint32_t i;
    const uint8_t *state;
    if (model_init(&context, 3u) != EFT_OK) { return 1; }
    while (fread(x, 1, sizeof x, file) == sizeof x && fread(&label, sizeof label, 1, file) == 1) {
        if (model_train_step(&context, x, MODEL_INPUT_BYTES, label) < 0) { return 2; }
    }
    fclose(file);
    /* what must be refused, with the state as it was */
    if (model_train_step(&context, x, MODEL_INPUT_BYTES, -1) != EFT_ERROR_LABEL) { return 10; }
    if (model_train_step(&context, x, MODEL_INPUT_BYTES, MODEL_NUM_CLASSES) != EFT_ERROR_LABEL) { return 11; }
    if (model_train_step(&context, x, MODEL_INPUT_BYTES - 1u, 0) != EFT_ERROR_SIZE) { return 12; }
    if (model_predict(&context, x, 0u) != EFT_ERROR_SIZE) { return 13; }
    if (model_predict(NULL, x, MODEL_INPUT_BYTES) != EFT_ERROR_ARGUMENT) { return 14; }
    if (model_predict(&context, NULL, MODEL_INPUT_BYTES) != EFT_ERROR_ARGUMENT) { return 15; }
    if (model_set_lr_shift(&context, 32) != EFT_ERROR_ARGUMENT) { return 16; }
    if (model_set_lr_shift(NULL, 1) != EFT_ERROR_ARGUMENT) { return 17; }
    if (model_init(NULL, 1u) != EFT_ERROR_ARGUMENT) { return 18; }
    if (model_load_state(&context, NULL, MODEL_STATE_BYTES) != EFT_ERROR_ARGUMENT) { return 19; }
    if (model_load_state(&context, model_state(&context), MODEL_STATE_BYTES - 1u) != EFT_ERROR_SIZE) { return 20; }
    if (model_state(NULL) != NULL || model_input(NULL) != NULL) { return 21; }
    if (model_context_bytes() != sizeof context) { return 22; }
    state = model_state(&context);
    for (i = 0; i < MODEL_STATE_BYTES; i++) { printf("%02x", (unsigned)state[i]); }
    return 0;
}
"""


@pytest.mark.parametrize(("scheme", "rounding"), [("full", "master"), ("sparse", "stochastic")])
def test_sanitizers_report_nothing_and_extremes_stay_equal(scheme: str, rounding: str, tmp_path: Path) -> None:
    """1,000 steps, among them inputs that no sensor sends, at a learning rate that drives weights into their limits."""
    program = build(scheme, rounding=rounding, learning_rate=2.0)
    folder = program.write(tmp_path)
    (folder / "main.c").write_text(HARNESS)
    harness = link(sanitized(), sources(folder), "harness")
    rng = np.random.default_rng(1)
    samples = rng.integers(-128, 128, (1000, *program.input_shape)).astype(np.int8)
    samples[::7], samples[1::7], samples[2::7] = -128, 127, 0
    samples[3::7] = rng.choice(np.array([-128, 127], np.int8), samples[3::7].shape)
    labels = rng.integers(0, 7, 1000).astype(np.int32)
    data = b"".join(x.tobytes() + y.tobytes() for x, y in zip(samples, labels, strict=True))
    (folder / "data.bin").write_bytes(data)
    result = subprocess.run([harness, "data.bin"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    engine = program.simulator(seed=3)
    engine.train(samples, labels)
    assert bytes.fromhex(result.stdout) == engine.state()
    host = program.host(seed=3)
    host.train(samples, labels)
    assert host.state() == engine.state()


def commands(folder: Path) -> list[str]:
    """The command lines of a written project's README, as printed."""
    return re.findall(r"^    (\S.*)$", (folder / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "board",
    ["stm32f746", pytest.param("nrf52840", marks=pytest.mark.slow), pytest.param("rp2040", marks=pytest.mark.slow)],
)
def test_the_written_folder_builds_by_its_readme(board: str, tmp_path: Path) -> None:
    folder = build("sparse", board=board, name="watch").write(tmp_path)
    target = Board.named(board)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    lines = commands(folder)
    assert [line.split()[0] for line in lines] == ["cmake", "cmake", "gcc", "arm-none-eabi-gcc", "python"]
    for line in lines:
        tools = [line.split()[0], *(["arm-none-eabi-gcc"] if "arm-none-eabi.cmake" in line else [])]
        if any(shutil.which(tool, path=path) is None for tool in tools):
            continue
        result = subprocess.run(
            line, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "error" not in result.stderr
        assert "entry symbol" not in result.stderr
        if line.startswith("cmake"):
            continue
        if line.startswith("gcc"):
            assert (folder / "libwatch.so").exists()
            continue
        with (folder / "watch.elf").open("rb") as file:
            elf: Any = ELFFile(file)
            vectors, symbols = elf.get_section_by_name(".vectors"), elf.get_section_by_name(".symtab")
            assert vectors["sh_addr"] == target.flash_origin
            stack_top, reset = struct.unpack("<II", vectors.data()[:8])
            assert stack_top == symbols.get_symbol_by_name("_stack_top")[0]["st_value"]
            assert reset == symbols.get_symbol_by_name("Reset_Handler")[0]["st_value"] == elf["e_entry"]
        (folder / "watch.elf").unlink()
    # The same sources are an ordinary program on this machine, and without a vector table none for the board.
    subprocess.run("gcc -std=c99 -Wall -Wextra -Wpedantic -Werror *.c -o watch", shell=True, cwd=folder, check=True)
    (folder / "startup.c").write_text("int nothing;\n")
    bare = subprocess.run(lines[-1], shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True)
    assert bare.returncode != 0
    assert b"no vector table" in bare.stderr


CONVERSION = """
#include <stdio.h>
#include "model.h"
int main(void)
{
    int value;
    while (scanf("%d", &value) == 1) {
        const int32_t s = MODEL_INPUT_SHIFT + 16;
        const int64_t scaled = (int64_t)value * MODEL_INPUT_MULTIPLIER;
        const int64_t q = ((scaled + ((int64_t)1 << (s - 1))) >> s) + MODEL_INPUT_ZERO_POINT;
        printf("%d\\n", (int)(q < -128 ? -128 : q > 127 ? 127 : q));
    }
    return 0;
}
"""


def test_real_values_become_inputs_by_the_header_alone(tmp_path: Path) -> None:
    """What firmware computes in integers is what ``quantize_input`` does, but for halves between two units."""
    program = build("none")
    folder = program.write(tmp_path)
    (folder / "main.c").write_text(CONVERSION)
    subprocess.run(["gcc", "-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Werror", "main.c"], cwd=folder, check=True)
    fixed = np.random.default_rng(0).integers(-(5 << 16), 5 << 16, 768)
    fixed[:2] = (1 << 31) - 1, -(1 << 31)
    done = subprocess.run(
        [folder / "a.out"], input="\n".join(map(str, fixed)), capture_output=True, text=True, check=True
    )
    real = fixed / 65536
    expected = program.quantize_input(real.reshape(1, 6, 128)).transpose(0, 3, 1, 2).ravel()
    half = np.abs(np.abs(real / program.input_scale) % 1 - 0.5) < 1e-4
    assert half.mean() < 0.01
    assert ((np.array(done.stdout.split(), int) == expected) | half).all()
    scale = repr(program.input_scale)
    assert f"scale = {scale}" in program.code.header
    assert f"scale {scale}, zero point 0" in (folder / "README.md").read_text()


HOSTILE = ["*/ int x; /*", 'a"b', "a\nb", "a\\", "??/", "%s%n", "§é中", "_" * 300, "int", "../../x", "${name}"]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=80)))
def test_any_name_is_safe_in_a_comment(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._#-]{0,60}", safe(name))


def test_hostile_layer_names_change_nothing_but_comments() -> None:
    def source(names: list[str]) -> tuple[str, str]:
        torch.manual_seed(0)
        net = nn.Sequential()
        layers = [
            nn.Conv1d(6, 4, 5, 2),
            nn.ReLU(),
            nn.Conv1d(4, 4, 5, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
        ]
        for name, layer in zip(names, [*layers, nn.Linear(4, 7)], strict=True):
            net.add_module(name, layer)
        program = compile(
            net, torch.zeros(1, 6, 128), scheme="full", board="stm32f746", calibration=DATA, learning_rate=0.02
        )
        code = program.code.source
        assert not re.search(r"int x;", code)
        program.host().train(program.quantize_input(DATA), LABELS)
        return code, hashlib.sha256(re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL).encode()).hexdigest()

    plain, hostile = source(list("abcdefg")), source(["*/ int x; /*", 'b"', "c\n", "d\\", "é", "??/", "g%n"])
    assert plain[1] == hostile[1]
