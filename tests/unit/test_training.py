"""One process: the step, its guards, the loop, and resuming after a kill."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from efftrain.config import load_recipe
from efftrain.data.digits import load_digits
from efftrain.errors import ConfigError, NonFiniteError
from efftrain.parallel import ClusterRecipe, train
from efftrain.training import Distillation, Job, LoopConfig, OptimizerConfig, StepConfig, evaluate, fit, set_seed
from efftrain.training.loop import _batches

WORKLOAD = Path(__file__).parent.parent / "distributed" / "workload.py"


def net(seed: int = 0, *, norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    middle: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))


def batch(size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    digits = load_digits("train")
    inputs, targets = digits.batch(np.random.default_rng(seed).permutation(len(digits))[:size])
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def state_of(job: Job) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in job.state_dict()[0].items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# The step


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(lr=0.1, momentum=0.9, schedule="constant"),
        OptimizerConfig(name="adamw", lr=0.01, schedule="constant"),
    ],
    ids=["sgd", "adamw"],
)
def test_a_step_is_what_a_plain_loop_does(optimizer: OptimizerConfig) -> None:
    job = Job(net(), optimizer=optimizer)
    plain = net()
    theirs: torch.optim.Optimizer
    if optimizer.name == "sgd":
        theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    else:
        theirs = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    for seed in range(5):
        inputs, targets = batch(seed=seed)
        theirs.zero_grad()
        loss = nn.functional.cross_entropy(plain(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None))
        theirs.step()
        result = job.step(inputs, targets)
        assert result.loss == pytest.approx(float(loss.detach()), abs=1e-7)
        assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert_equal(dict(job.model.state_dict()), dict(plain.state_dict()))


def test_weight_decay_spares_vectors() -> None:
    for name in ("sgd", "adamw"):
        config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0, schedule="constant")
        model = net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        job = Job(model, optimizer=config, objective=lambda model, x, y: 0 * model(x).sum())
        job.step(*batch())
        for parameter in model.parameters():
            shrunk = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
            torch.testing.assert_close(parameter, torch.full_like(parameter, shrunk))


@pytest.mark.parametrize("micro_batches", [2, 4, 32])
def test_accumulation_equals_the_full_batch(micro_batches: int) -> None:
    whole = Job(net(), optimizer=OptimizerConfig(lr=0.1))
    pieces = Job(net(), optimizer=OptimizerConfig(lr=0.1), step=StepConfig(micro_batches=micro_batches))
    for seed in range(4):
        a, b = whole.step(*batch(seed=seed)), pieces.step(*batch(seed=seed))
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for p, q in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        # Sums of 32 products in another order: a few units of 2**-24 of weights below 1, over four steps.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    job = Job(net(), step=StepConfig(micro_batches=3))
    with pytest.raises(ConfigError, match="32 a rank cannot be cut into 3"):
        job.step(*batch())


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    config = OptimizerConfig(lr=1.0, momentum=0, schedule="constant")
    free, clipped = Job(net(), optimizer=config), Job(net(), optimizer=config, step=StepConfig(clip_norm=0.01))
    loose = Job(net(), optimizer=config, step=StepConfig(clip_norm=1e6))
    start = state_of(free)
    results = [job.step(*batch()) for job in (free, clipped, loose)]
    assert results[0].grad_norm == results[1].grad_norm == results[2].grad_norm > 0.01, "the norm is from before"
    assert_equal(state_of(free), state_of(loose))

    def moved(job: Job) -> Tensor:
        return torch.cat([(value - start[name]).flatten() for name, value in state_of(job).items()])

    assert float(moved(clipped).norm()) == pytest.approx(0.01, rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(moved(free), moved(clipped), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_bf16_computes_in_bf16_and_keeps_fp32() -> None:
    seen = set()

    def objective(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        seen.add(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), targets)

    job = Job(net(), objective=objective, step=StepConfig(precision="bf16"), optimizer=OptimizerConfig(lr=0.1))
    exact = Job(net(), optimizer=OptimizerConfig(lr=0.1))
    for seed in range(5):
        result, reference = job.step(*batch(seed=seed)), exact.step(*batch(seed=seed))
        assert result.loss == pytest.approx(reference.loss, rel=0.02)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in job.model.parameters()} == {torch.float32}


# The schedule


def test_learning_rates_worked_out_by_hand() -> None:
    config = OptimizerConfig(lr=0.4, warmup_steps=4, final_lr_ratio=0.25)
    assert [config.lr_at(step, 12) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    # 8 steps of cosine from 0.4 to 0.1: 0.1 + 0.3 * (1 + cos(pi * t / 8)) / 2
    assert config.lr_at(4, 12) == pytest.approx(0.4)
    assert config.lr_at(6, 12) == pytest.approx(0.1 + 0.3 * (1 + math.sqrt(0.5)) / 2)
    assert config.lr_at(8, 12) == pytest.approx(0.25)
    assert config.lr_at(12, 12) == pytest.approx(0.1)
    assert config.lr_at(99, 12) == pytest.approx(0.1), "a longer run stays at the end"
    constant = OptimizerConfig(lr=0.4, warmup_steps=2, schedule="constant")
    assert [constant.lr_at(step, 3) for step in range(3)] == pytest.approx([0.2, 0.4, 0.4])
    assert OptimizerConfig(lr=1, warmup_steps=9).lr_at(8, 5) == 1, "a warmup longer than the run"


def test_the_schedule_reaches_the_optimizer() -> None:
    job = Job(net(), optimizer=OptimizerConfig(lr=0.4, warmup_steps=2), total_steps=4)
    rates = []
    for seed in range(4):
        result = job.step(*batch(seed=seed))
        assert all(group["lr"] == result.lr for group in job.optimizer.param_groups)
        rates.append(result.lr)
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.2])


# Guards


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_poisoned_batch_changes_nothing(value: float, micro_batches: int) -> None:
    job = Job(
        net(norm=True),
        optimizer=OptimizerConfig(name="adamw", lr=0.01),
        step=StepConfig(micro_batches=micro_batches),
        total_steps=10,
    )
    job.step(*batch(seed=1))
    before = state_of(job)
    assert "model/2.running_mean" in before
    inputs, targets = batch(seed=2)
    inputs[5] = value
    result = job.step(inputs, targets)
    assert result.skipped
    assert math.isnan(result.loss)
    assert (job.num_steps, job.num_skipped) == (2, 1)
    assert_equal(state_of(job), before)
    assert not job.step(*batch(seed=3)).skipped
    assert all(torch.isfinite(value).all() for value in state_of(job).values())


def test_an_infinite_loss_with_finite_gradients_is_skipped_too() -> None:
    job = Job(net(), objective=lambda model, x, y: model(x).sum() * 1.0 + float("inf"))
    before = state_of(job)
    assert job.step(*batch()).skipped
    assert_equal(state_of(job), before)


def test_twenty_skips_in_a_row_end_the_run() -> None:
    job = Job(net(), total_steps=100)
    bad = torch.full((8, 1, 8, 8), float("nan")), torch.zeros(8, dtype=torch.int64)
    for _ in range(19):
        assert job.step(*bad).skipped
    assert not job.step(*batch()).skipped, "a healthy step starts the count anew"
    for _ in range(19):
        assert job.step(*bad).skipped
    with pytest.raises(NonFiniteError, match=r"in 20 steps one after the other, up to step 40; lower optimizer\.lr"):
        job.step(*bad)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="model Flatten has no trainable parameter"):
        Job(nn.Flatten())
    frozen = net()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="has no trainable parameter"):
        Job(frozen)


# Objectives


def test_distillation_is_the_papers_formula() -> None:
    temperature, weight = 3.0, 0.7
    teacher, student = net(1, dropout=0.5), net(2)
    teacher.train()
    objective = Distillation(teacher, temperature, weight)
    assert not teacher.training
    inputs, targets = batch(8)
    loss = objective(student, inputs, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in teacher.parameters())
    t = np.asarray(teacher(inputs).detach(), np.float64) / temperature
    s = np.asarray(student(inputs).detach(), np.float64)

    def softmax(x: Any) -> Any:
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    p, q = softmax(t), softmax(s / temperature)
    soft = (p * np.log(p / q)).sum() / 8
    hard = -np.log(softmax(s)[np.arange(8), np.asarray(targets)]).mean()
    assert float(loss.detach()) == pytest.approx(weight * temperature**2 * soft + (1 - weight) * hard, rel=1e-5)
    itself = Distillation(net(2), temperature, 1.0)(student, inputs, targets)
    assert float(itself.detach()) == pytest.approx(0, abs=1e-6), "nothing to learn from oneself"


def test_evaluation_counts_every_sample_once() -> None:
    data, model = load_digits("test"), net()
    job = Job(model)
    inputs, targets = data.batch(np.arange(len(data)))
    logits = model(torch.from_numpy(inputs)).detach()
    expected = float((logits.argmax(-1).numpy() == targets).mean())
    for batch_size in (1, 7, 360, 1000):
        found = evaluate(job, data, batch_size)
        assert found.accuracy == pytest.approx(expected, abs=1e-12)
        assert found.loss == pytest.approx(
            float(nn.functional.cross_entropy(logits, torch.from_numpy(targets))), rel=1e-6
        )


# The loop


@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_data_order(num_samples: int, epochs: int, seed: int, data: st.DataObject) -> None:
    """No sample twice in an epoch; a run that starts at any step sees what an undisturbed one sees from there on."""
    config = LoopConfig(epochs=epochs, batch_size=data.draw(st.integers(1, num_samples)))
    whole = [indices.tolist() for indices in _batches(num_samples, config, seed, 0)]
    steps = config.steps_per_epoch(num_samples)
    assert len(whole) == epochs * steps
    for epoch in range(epochs):
        seen = [index for indices in whole[epoch * steps : (epoch + 1) * steps] for index in indices]
        assert len(set(seen)) == len(seen) == steps * config.batch_size
    first = data.draw(st.integers(0, len(whole)))
    assert [indices.tolist() for indices in _batches(num_samples, config, seed, first)] == whole[first:]


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        set_seed(seed, 0, deterministic=True)
        model = net(seed, dropout=0.3, norm=True)
        job = Job(model, optimizer=OptimizerConfig(lr=0.1))
        fit(job, load_digits("train"), load_digits("test"), LoopConfig(epochs=2, batch_size=64), seed=seed)
        return state_of(job)

    first = run(0)
    assert_equal(first, run(0))
    assert not torch.equal(first["model/1.weight"], run(1)["model/1.weight"])


def test_data_sets_that_are_too_small_are_refused() -> None:
    digits = load_digits("train")
    with pytest.raises(ConfigError, match="the data set has only 3 samples"):
        fit(Job(net()), digits.subset(np.arange(3)), digits, LoopConfig(batch_size=4), seed=0)
    with pytest.raises(ConfigError, match="test data set is empty"):
        fit(Job(net()), digits, digits.subset(np.arange(0)), LoopConfig(), seed=0)


# Whole runs


def recipe_file(folder: Path, optimizer: str = 'name = "sgd"\nlr = 0.1') -> Path:
    path = folder / "r.toml"
    path.write_text(
        f'name = "r"\nseed = 5\n[model]\nname = "{WORKLOAD}:Net"\n[data]\nname = "{WORKLOAD}:Digits"\n'
        f"[optimizer]\n{optimizer}\nwarmup_steps = 5\n"
        "[loop]\nepochs = 3\nbatch_size = 64\nlog_every = 1\ncheckpoint_every = 4\n"
    )
    return path


def run_here(path: Path, out: Path, *, resume: bool = False) -> dict[str, Any]:
    result = train(load_recipe(ClusterRecipe, path), out=out, resume=resume)
    assert result is not None
    return result


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def last_checkpoint(run: Path) -> dict[str, bytes]:
    folder = max((run / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def kill_at(path: Path, out: Path, step: int) -> int:
    """Start a run in a process of its own and SIGKILL it once ``step`` updates are logged; returns how many were."""
    command = [sys.executable, "-m", "efftrain", "train", str(path), "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "TEST_SLEEP_S": "0.02"}, stderr=subprocess.PIPE)
    metrics = out / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    return metrics.read_text().count("\n")


@pytest.mark.parametrize(
    "optimizer",
    [
        'name = "sgd"\nlr = 0.1\nweight_decay = 1e-3',
        'name = "adamw"\nlr = 0.01\nweight_decay = 0.1',
    ],
    ids=["sgd", "adamw"],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    path = recipe_file(tmp_path, optimizer)
    whole = run_here(path, tmp_path / "whole")
    step = random.Random(optimizer).randint(2, 50)
    done = kill_at(path, tmp_path / "killed", step)
    assert step <= done < whole["num_steps"]
    resumed = run_here(path, tmp_path / "killed", resume=True)
    assert resumed["path"] == str(tmp_path / "killed" / "r")
    assert (resumed["loss"], resumed["accuracy"]) == (whole["loss"], whole["accuracy"])
    assert rows_of(tmp_path / "killed" / "r") == rows_of(tmp_path / "whole" / "r")
    assert last_checkpoint(tmp_path / "killed" / "r") == last_checkpoint(tmp_path / "whole" / "r")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    run_here(path, tmp_path / "whole")
    killed = tmp_path / "killed" / "r"
    killed.mkdir(parents=True)
    (killed / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 9.0}\n{"kind": "st')
    run_here(path, tmp_path / "killed", resume=True)
    assert rows_of(killed) == rows_of(tmp_path / "whole" / "r")


def test_a_poisoned_sample_costs_its_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_NAN", "77")
    result = run_here(recipe_file(tmp_path), tmp_path)
    assert result["num_skipped"] == 3, "once an epoch, if it is in no incomplete batch"
    rows = rows_of(tmp_path / "r")
    assert [row["loss"] for row in rows if row["kind"] == "step" and row["skipped"]] == [None] * 3
    assert result["accuracy"] > 0.5


def test_tensorboard_files_hold_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    path = recipe_file(tmp_path)
    path.write_text(path.read_text().replace("seed = 5", "seed = 5\ntensorboard = true"))
    result = run_here(path, tmp_path)
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert {"step/loss", "step/lr", "eval/accuracy"} <= set(events.Tags()["scalars"])
    assert events.Scalars("eval/accuracy")[-1].value == pytest.approx(result["accuracy"])
    assert len(events.Scalars("step/loss")) == result["num_steps"]


def test_bf16_runs_from_a_recipe(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    path.write_text(path.read_text() + '[step]\nprecision = "bf16"\nclip_norm = 1.0\nmicro_batches = 2\n')
    with pytest.warns(UserWarning, match=r"BatchNorm1d 'features\.2' normalizes each of the 2 pieces of a batch"):
        assert run_here(path, tmp_path)["accuracy"] > 0.5
