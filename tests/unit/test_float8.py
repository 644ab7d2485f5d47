"""Linear layers in 8-bit floats: torchao itself, on the CPU, which computes what the units of a GPU do."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efftrain.errors import ConfigError
from efftrain.models import build_model
from efftrain.parallel import Plan
from efftrain.training import Job, OptimizerConfig, StepConfig
from efftrain.training.float8 import to_float8

FLOAT8 = StepConfig(precision="float8")
OPTIMIZER = OptimizerConfig(lr=0.1, momentum=0.0, schedule="constant")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10))


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 64, generator=generator), torch.randint(10, (size,), generator=generator)


def gradients(step: StepConfig, size: int) -> dict[str, Tensor]:
    job = Job(model(), optimizer=OPTIMIZER, step=step)
    job.step(*batch(size))
    return {name: p.grad.clone() for name, p in job.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [16, 5, 1])
def test_gradients_are_those_of_fp32_to_a_few_bits(size: int) -> None:
    found, expected = gradients(FLOAT8, size), gradients(StepConfig(), size)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert 0 < error < 0.1, name


def test_it_learns_and_its_checkpoint_is_that_of_any_job(tmp_path: Path) -> None:
    job = Job(model(), optimizer=OPTIMIZER, step=FLOAT8)
    losses = [job.step(*batch(16)).loss for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    job.save(tmp_path)
    plain = Job(model(), optimizer=OPTIMIZER)
    plain.load(tmp_path)
    for one, other in zip(job.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_only_what_fits_is_changed_and_once() -> None:
    changed = model()
    for _ in range(2):
        to_float8(changed)
        assert [type(changed[i]).__name__ for i in (1, 3, 5)] == ["Float8Linear", "Float8Linear", "Linear"]  # type: ignore[index]


class Half(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


def test_what_does_more_than_a_product_stays() -> None:
    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    changed = nn.Sequential(nn.Linear(32, 32), Half(32, 32), hooked)
    inputs = torch.randn(16, 32)
    expected = changed(inputs)
    to_float8(changed)
    assert [type(layer).__name__ for layer in changed] == ["Float8Linear", "Half", "Linear"]
    found = changed(inputs)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(ConfigError, match="MultiheadAttention has none"):  # it reads the weights of its layers
        to_float8(nn.MultiheadAttention(32, 2))


def test_what_it_cannot_do_is_refused_before_any_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.zeros(4, 8, dtype=torch.long)
    for axis in ("tensor", "pipeline"):
        plan = Plan(**{axis: 2})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"float8 changes whole linear layers.*step\.precision=bf16"):
            plan.check(2, build_model("char-transformer"), inputs, FLOAT8)
        layout = plan.check(2, build_model("char-transformer"), inputs)
        with pytest.raises(ConfigError, match="float8 changes whole linear layers"):
            plan.apply(build_model("char-transformer"), inputs, step=FLOAT8, layout=layout)
    for small in (nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 10)), nn.Sequential(nn.Conv2d(16, 16, 1))):
        with pytest.raises(ConfigError, match=r"multiples of 16; \w+ has none"):
            Plan().check(1, small, None, FLOAT8)
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'efftrain\[float8\]'"):
        Plan().check(1, model(), None, FLOAT8)
