"""Plans, budgets, schemes, boards, and what engines refuse."""

import json
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.errors import BudgetError, CompileError, ConfigError
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Board, LayerShare, Program, Scheme, compile
from efftrain.ondevice.emit.f32_plan import plan_host
from efftrain.ondevice.frontend import read_module
from efftrain.ondevice.scheme import PRESETS
from tests.ondevice_models import Groups
from tests.ondevice_models import build as build_groups

ROOT = Path(__file__).parents[2]
CALIBRATION = np.random.default_rng(0).normal(size=(32, 6, 128)).astype(np.float32)


def build(scheme: Scheme | str = "sparse", board: Board | str = "stm32f746", **options: object) -> Program:
    torch.manual_seed(0)
    settings = {"calibration": CALIBRATION, "learning_rate": 0.04, **options}
    return compile(WatchCNN(), torch.zeros(1, 6, 128), scheme=scheme, board=board, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", PRESETS)
def test_every_preset_fits_64_kib_and_its_arena_is_proven_minimal(scheme: str) -> None:
    plan = build(scheme).plan
    assert plan.total_ram_bytes <= 64 * 1024
    assert plan.arena_bytes == plan.arena_lower_bound_bytes
    parts = plan.arena_bytes + plan.trained_state_bytes + plan.scratch_bytes + plan.stack_bytes + plan.static_bytes
    assert plan.total_ram_bytes == parts
    assert plan.macs_forward == 170_784


def test_the_trained_state_holds_the_trained_slices_alone() -> None:
    program = build("sparse")
    weights, head, biases = 32 * 7 + 32 * 5 * 16, 7, 32 + 32
    assert program.layout.num_bytes == 4 + 4 * (head + biases) + 2 * weights
    assert build("sparse", rounding="stochastic").layout.num_bytes == 4 + 4 * head + 2 * biases + weights
    assert build("none").layout.num_bytes == 4


def test_the_plan_is_json_and_can_be_drawn() -> None:
    plan = json.loads(json.dumps(build("full").plan.to_dict()))
    assert plan["total_ram_bytes"] > plan["arena_bytes"] > 0
    for buffer in plan["buffers"]:
        assert set(buffer) == {"name", "kind", "offset", "num_bytes", "first_op", "last_op"}
        assert 0 <= buffer["first_op"] <= buffer["last_op"] < len(plan["ops"])
        assert 0 <= buffer["offset"] <= plan["arena_bytes"] - buffer["num_bytes"]


def test_one_byte_too_little_is_refused_with_the_largest_tensors_and_options() -> None:
    total = build("full").plan.total_ram_bytes
    board = replace(Board.named("stm32f746"), ram_bytes=total)
    assert build("full", board).plan.total_ram_bytes == total
    with pytest.raises(BudgetError) as caught:
        build("full", replace(board, ram_bytes=total - 1))
    for words in (f"needs {total} B of RAM", f"has {total - 1} B", "Largest: the trained state", "scheme sparse"):
        assert words in str(caught.value)


def test_too_little_flash_is_refused() -> None:
    with pytest.raises(BudgetError, match="weights and other constants; stm32f746 has 8192 B"):
        build("none", replace(Board.named("stm32f746"), flash_bytes=8192))


def test_each_pass_saves_ram_and_keeps_every_bit() -> None:
    smallest = build("sparse")
    x = smallest.quantize_input(CALIBRATION)
    labels = np.arange(32) % 7
    reference = smallest.simulator()
    reference.train(x, labels)
    for name in ("remove_dead_code", "update_at_once"):
        larger = build("sparse", switch_off=(name,))
        assert larger.plan.arena_bytes > smallest.plan.arena_bytes
        engine = larger.simulator()
        engine.train(x, labels)
        assert engine.state() == reference.state()
    with pytest.raises(ConfigError, match="pass 'fuse' is not known"):
        build("sparse", switch_off=("fuse",))


# --- schemes and boards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_the_scheme_files_are_the_presets(name: str) -> None:
    assert Scheme.load(ROOT / "ondevice" / "schemes" / f"{name}.toml") == PRESETS[name]


def test_a_scheme_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nheed = true\n')
    with pytest.raises(ConfigError, match="unknown key 'heed'; nearest is 'head'"):
        Scheme.load(file)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (
            Scheme(name="s", weights=(LayerShare(layer="conv9"),)),
            "names layer 'conv9'; the model has 'conv1', 'conv2', 'conv3'",
        ),
        (Scheme(name="s", weights=(LayerShare(layer="-4"),)), "names layer '-4'"),
        (Scheme(name="s", weights=(LayerShare(layer="-1"), LayerShare(layer="conv3"))), "'conv3' twice"),
        (Scheme(name="s", last_biases=4), "biases of 4 convolutions, the model has 3"),
    ],
)
def test_a_scheme_that_does_not_fit_the_model_is_refused(scheme: Scheme, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(scheme)


def test_sparse_needs_a_hidden_convolution() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 7))
    settings = {"calibration": CALIBRATION, "learning_rate": 0.04}
    scheme = Scheme(name="s", weights=(LayerShare(layer="-1"),))
    with pytest.raises(ConfigError, match=r"the model has '1'\. It needs a hidden convolution; use last_layer or full"):
        compile(model, torch.zeros(1, 6, 128), scheme=scheme, board="stm32f746", **settings)  # type: ignore[arg-type]


def test_a_wrong_shape_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(63, 7))
    settings = {"calibration": CALIBRATION, "learning_rate": 0.04}
    with pytest.raises(CompileError, match=r"cannot trace the model: .*[^.]\. Its forward"):
        compile(model, torch.zeros(1, 6, 128), scheme="none", board="stm32f746", **settings)  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_called_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"board file nope\.toml does not exist"):
        Board.load("nope.toml")
    with pytest.raises(ConfigError, match=r"scheme file nope\.toml does not exist"):
        Scheme.load("nope.toml")


def test_schemes_by_layer_name() -> None:
    program = build(Scheme(name="mine", weights=(LayerShare(layer="conv2", share=0.01),)))
    assert program.trained["conv2"].channels == 1
    assert program.layout.num_bytes == 4 + 2 * 32 * 5


def test_convolutions_in_groups_are_counted_and_shared_by_group() -> None:
    """Of 3 groups of 8 channels half is 4 each; a group of one channel has no half."""
    model, example = build_groups(Groups), torch.zeros(1, *Groups.shape)
    data = np.random.default_rng(0).normal(size=(8, *Groups.shape)).astype(np.float32)

    def program(layer: str) -> Program:
        scheme = Scheme(name="mine", weights=(LayerShare(layer=layer, share=0.5),))
        return compile(model, example, scheme=scheme, board="stm32f746", calibration=data, learning_rate=0.04)

    half = program("last")
    assert half.layout.num_bytes == 4 + 2 * 9 * 4
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    places = [5 * 5] * 4 + [3 * 3] * 2
    macs = [n * m.weight.numel() for n, m in zip(places, convolutions, strict=True)]
    assert half.plan.macs_forward == sum(macs) + 9 * 4
    assert half.plan.macs_backward == 9 * 4 + macs[-1] // 2
    with pytest.raises(
        ConfigError, match=r"a share of 0\.5 of layer 'widen\.0', whose 12 groups have one input channel"
    ):
        program("widen.0")
    with pytest.raises(
        CompileError, match=r"operator convolution with groups=2 \(conv at .* is not supported: the fp32"
    ):
        plan_host(
            read_module(
                nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 6, 3, groups=2), flat=nn.Flatten(), head=nn.Linear(24, 2))),
                torch.zeros(1, 4, 4, 4),
            ),
            1,
        )


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_a_head_of_zeros_learns(rounding: str) -> None:
    """As fine-tuning often begins. The sign of one feature is the class."""
    head = nn.Linear(8, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(nn.Flatten(), head)
    data = np.random.default_rng(0).normal(size=(64, 8, 1)).astype(np.float32)
    settings = {"scheme": "last_layer", "board": "stm32f746", "calibration": data, "learning_rate": 0.05}
    program = compile(model, torch.zeros(1, 8, 1), rounding=rounding, **settings)  # type: ignore[arg-type]
    labels = (data[:, 0, 0] > 0).astype(np.int64)
    engine = program.simulator()
    assert engine.evaluate(program.quantize_input(data), labels) < 0.7
    for _ in range(3):
        engine.train(program.quantize_input(data), labels)
    assert engine.evaluate(program.quantize_input(data), labels) > 0.9


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="presets are none, bias_only"):
        build("everything")
    with pytest.raises(
        ConfigError, match="known are gd32vf103, nrf52840, nrf5340, nucleo-h743, rp2040, stm32f446, stm32"
    ):
        build("none", "zx81")
    for bad in ("int", "a b", "eft_x", "x" * 40, "*/", "É"):
        with pytest.raises(ConfigError, match="cannot be a C prefix"):
            build("none", name=bad)
    with pytest.raises(ConfigError, match="rounding"):
        build("none", rounding="up")
    with pytest.raises(ConfigError, match="loss 'mse' is not known; known are cross_entropy and squared_error"):
        build("none", loss="mse")
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="learning rate"):
            build("none", learning_rate=rate)


def test_calibration_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(5, 7, 128\); expected \(N, 6, 128\)"):
        build(calibration=np.zeros((5, 7, 128), np.float32))
    with pytest.raises(ConfigError, match="inf or NaN"):
        build(calibration=np.full((5, 6, 128), np.inf, np.float32))


class Reconstruct(torch.nn.Module):
    """An autoencoder over ``shape``; ``image``: what it returns has that shape, and is else a vector."""

    def __init__(self, shape: tuple[int, ...], image: str) -> None:
        super().__init__()
        count = int(np.prod(shape))
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(count, 24), nn.ReLU(), nn.Linear(24, count))
        self.unflatten, self.shape, self.image = nn.Unflatten(1, shape), shape, image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        if self.image == "unflatten":
            y = self.unflatten(y)
        return y.view(1, *self.shape) if self.image == "view" else y


@pytest.mark.parametrize("image", ["", "view", "unflatten"])
@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 8), (3, 2, 4)])
def test_an_autoencoder_compares_each_pixel_with_itself(shape: tuple[int, ...], image: str) -> None:
    """The device has channels last, torch first: the error is that of torch, and steps lower it."""
    torch.manual_seed(0)
    data = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    model = Reconstruct(shape, image).eval()
    program = compile(
        model,
        torch.zeros(1, *shape),
        scheme="full",
        board="stm32f746",
        calibration=data,
        learning_rate=0.1,
        loss="squared_error",
    )
    engine, xs = program.simulator(), program.quantize_input(data)
    with torch.no_grad():
        errors = [float((model(x[None]).view(-1) - x.view(-1)).square().mean()) for x in torch.from_numpy(data)]
    units = np.array(errors) / program.input_scale**2
    found = np.array([engine.predict(x) for x in xs])
    np.testing.assert_allclose(found, units, rtol=0.05)
    for _ in range(10):
        engine.train(xs, np.zeros(64, np.int64))
    assert np.mean([engine.predict(x) for x in xs]) < 0.8 * found.mean()


def test_only_an_autoencoder_may_return_an_image() -> None:
    model, options = Reconstruct((1, 4, 4), "view"), {"board": "stm32f746", "learning_rate": 0.1}
    data = np.ones((2, 1, 4, 4), np.float32)
    with pytest.raises(CompileError, match=r"aten.view.*an autoencoder \(loss squared_error\) may bring its outputs"):
        compile(model, torch.zeros(1, 1, 4, 4), scheme="full", calibration=data, **options)  # type: ignore[arg-type]


# --- engines ----------------------------------------------------------------------------------------------------------


def test_engines_refuse_what_is_not_theirs() -> None:
    program = build()
    x = program.quantize_input(CALIBRATION)
    for engine in (program.simulator(), program.host()):
        before = engine.state()
        with pytest.raises(ValueError, match="must be int8"):
            engine.predict(CALIBRATION[0])
        with pytest.raises(ValueError, match="expected \\(N, 1, 128, 6\\)"):
            engine.predict(x[0, :, :64])
        for label in (-1, 7, 2**40):
            with pytest.raises(ValueError, match="must be in \\[0, 7\\)"):
                engine.train_step(x[0], label)
        with pytest.raises(ValueError, match="32 integers"):
            engine.train(x, np.zeros(31, np.int64))
        with pytest.raises(ValueError, match="32 integers"):
            engine.train(x, np.zeros(32))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="indices in \\[0, 32\\)"):
            engine.train(x, np.zeros(32, np.int64), [32])
        with pytest.raises(ConfigError, match="lr shift"):
            engine.set_lr_shift(32)
        assert engine.state() == before
        assert engine.train(x, np.zeros(32, np.int64), []) == 0


def test_a_state_that_cannot_be_is_refused_and_the_old_one_kept() -> None:
    program = build()
    bias, weight = program.layout.find("bias", "conv3"), program.layout.find("weight", "conv3")
    assert bias is not None
    assert weight is not None
    for engine in (program.simulator(), program.host()):
        good = engine.state()
        too_large = bytearray(good)
        too_large[bias.offset : bias.offset + 4] = (2**30 + 1).to_bytes(4, "little")
        lowest = bytearray(good)
        lowest[weight.offset] = 0x80
        for bad in (good[:-1], good + b"\0", b"", bytes(too_large), bytes(lowest)):
            with pytest.raises(ValueError, match="state"):
                engine.load_state(bad)
            assert engine.state() == good


def test_a_saved_state_continues_where_it_was() -> None:
    program = build(rounding="stochastic")
    x, labels = program.quantize_input(CALIBRATION), np.arange(32) % 7
    whole = program.host(seed=5)
    whole.train(x, labels)
    first, second = program.host(seed=5), program.simulator(seed=5)
    first.train(x[:10], labels[:10])
    second.load_state(first.state())
    second.train(x[10:], labels[10:])
    assert second.state_sha256() == whole.state_sha256()


def test_halving_the_learning_rate_makes_smaller_steps() -> None:
    program = build("last_layer")
    x = program.quantize_input(CALIBRATION)
    start = np.frombuffer(program.initial_state, np.uint8)
    changed = []
    for halvings in (0, 4, 31):
        engine = program.host()
        engine.set_lr_shift(halvings)
        engine.train_step(x[0], 3)
        changed.append(int((np.frombuffer(engine.state(), np.uint8)[4:] != start[4:]).sum()))
    assert changed[0] > changed[1] > changed[2] == 0


def test_constants_do_not_depend_on_the_seed_and_stochastic_steps_do() -> None:
    program, other = build(rounding="stochastic", seed=1), build(rounding="stochastic", seed=2)
    assert program.code == other.code
    x, labels = program.quantize_input(CALIBRATION), np.arange(32) % 7
    hashes = set()
    for engine in (program.host(), other.host(), program.host(seed=2)):
        engine.train(x, labels)
        hashes.add(engine.state_sha256())
    assert len(hashes) == 2


def test_quantize_input_rounds_and_clips() -> None:
    program = build()
    x = np.zeros((1, 6, 128), np.float32)
    x[0, 2, 5], x[0, 3, 6] = 1e9, -1e9
    x[0, 4, 7] = 2.6 * program.input_scale
    q = program.quantize_input(x)
    assert q.shape == (1, 1, 128, 6)
    assert (q[0, 0, 5, 2], q[0, 0, 6, 3], q[0, 0, 7, 4]) == (127, -128, 3)
    with pytest.raises(ValueError, match="inf or NaN"):
        program.quantize_input(np.full((1, 6, 128), np.nan))
    with pytest.raises(ValueError, match="expected \\(N, 6"):
        program.quantize_input(np.zeros((1, 128, 6)))


def test_importing_the_package_loads_neither_torch_nor_an_emulator() -> None:
    code = (
        "import sys, efftrain.ondevice as o; o.Scheme.preset('sparse'); o.Board.named('stm32f746'); "
        "print([m for m in ('torch', 'unicorn', 'elftools') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("option", "words"),
    [("--board=nope.toml", "board file nope.toml"), ("--scheme=x", "scheme 'x'"), ("--out=taken/x", "taken")],
)
def test_finetune_checks_its_options_before_it_trains(option: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    script = ROOT / "ondevice" / "finetune.py"
    result = subprocess.run([sys.executable, script, option], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("finetune: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
