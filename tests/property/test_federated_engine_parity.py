"""The fp32 host profile against PyTorch's autograd and SGD, on drawn chains of layers.

Both round every sum in another order, so results agree to a few ulp of the largest term, not to the bit. At a kink (an
input of ReLU at zero, two equal values in a max pool) the last bit decides where a whole gradient goes; batches that
come that close to one end the comparison of their chain. Chains are drawn by seed and not by hypothesis: each one is
compiled, which takes a second, and looking for a smaller one that fails would take minutes.
"""

import platform
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.models import build_model
from efftrain.ondevice.backends import host_f32
from efftrain.ondevice.backends.host_f32 import HostProgram
from efftrain.ondevice.backends.toolchain import Kind, host_toolchain

Arrays = dict[str, np.ndarray]
T = TypeVar("T")
NEAR = 2e-5


class Chain:
    """Up to five layers over an image or a signal, and a linear head."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.two_d = bool(self._rng.integers(2))
        sizes = [int(size) for size in self._rng.integers(6, 14, 2)]
        channels = self._pick((1, 2, 3, 8, 9))
        self.shape = (channels, *sizes) if self.two_d else (channels, 2 * sizes[0])
        self._layers: list[nn.Module] = []
        for _ in range(self._rng.integers(6)):
            self._draw(self._pick(("conv", "conv", "conv", "max", "mean", "relu")))
        self._layers.append(nn.Flatten())
        features = self._now()[0]
        if self._rng.integers(2):
            hidden = self._pick((3, 8, 10))
            self._layers += [nn.Linear(features, hidden, bias=self._flag()), nn.ReLU()]
            features = hidden
        self.classes = self._pick((2, 3, 5))
        self._layers.append(nn.Linear(features, self.classes, bias=self._flag()))
        self.model = nn.Sequential(*self._layers)
        self.batch_size, self.num_samples = self._pick(range(1, 10)), self._pick(range(1, 13))
        self.momentum = self._pick((0.0, 0.7))

    def _draw(self, kind: str) -> None:
        channels, *size = self._now()
        smallest = min(size)
        conv, max_pool, average = (
            (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d) if self.two_d else (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d)
        )
        if kind == "conv":
            kernel = self._pick(range(1, min(5, smallest) + 1))
            stride, padding = self._pick((1, 1, 2)), self._pick(range(kernel // 2 + 1))
            out = self._pick((1, 3, 7, 8, 12, 16, 17))
            self._layers.append(conv(channels, out, kernel, stride, padding, bias=self._flag()))
            self._layers += self._pick(([], [nn.ReLU()], [nn.ReLU6()]))
        elif kind == "relu":
            self._layers.append(nn.ReLU())
        elif smallest > 1:
            kernel = self._pick(range(1, min(3, smallest) + 1))
            stride, padding = self._pick((1, 2, kernel, kernel)), self._pick((0, 0, kernel // 2))
            self._layers.append((max_pool if kind == "max" else average)(kernel, stride, padding))

    def _now(self) -> tuple[int, ...]:
        with torch.no_grad():
            return tuple(nn.Sequential(*self._layers)(torch.zeros(1, *self.shape)).shape[1:])

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self._rng.integers(len(options)))]

    def _flag(self) -> bool:
        return bool(self._rng.integers(2))


def has_kink(model: nn.Module, x: Tensor) -> bool:
    """Whether a ReLU or a max pool is about to decide by the last bits. Exact zeros are no such case: they were made by
    a ReLU before, and have one gradient everywhere."""
    with torch.no_grad():
        for layer in model.children():
            if isinstance(layer, nn.ReLU | nn.ReLU6):
                near = (x.abs() < NEAR) & (x != 0)
                if isinstance(layer, nn.ReLU6):
                    near |= (x - 6).abs() < NEAR
                if near.any():
                    return True
            elif isinstance(layer, nn.MaxPool1d | nn.MaxPool2d):
                two_d = isinstance(layer, nn.MaxPool2d)
                size, stride, pad = (int(np.max(v)) for v in (layer.kernel_size, layer.stride, layer.padding))
                around = (pad, pad, pad, pad) if two_d else (pad, pad, 0, 0)
                maps = F.pad(x if two_d else x[:, :, None], around, value=-1e9)
                windows = F.unfold(maps, size if two_d else (1, size), stride=stride if two_d else (1, stride))
                windows = windows.reshape(*maps.shape[:2], -1, windows.shape[-1])
                if windows.shape[2] > 1:
                    first, second = windows.topk(2, dim=2).values.unbind(2)
                    if ((first - second < NEAR) & (first != 0)).any():
                        return True
            x = layer(x)
    return False


def compare(chain: Chain) -> int:
    """Train both ways, batch by batch as far as there is no kink; how many batches that was."""
    model, num_samples = chain.model, chain.num_samples
    x = np.random.default_rng(1).normal(size=(num_samples, *chain.shape)).astype(np.float32)
    y = np.random.default_rng(2).integers(0, chain.classes, num_samples)
    order = np.stack([np.random.default_rng(3 + epoch).permutation(num_samples) for epoch in range(2)])
    before = state_of(model)
    program = HostProgram(model, chain.shape, chain.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=chain.momentum)
    total, compared = 0.0, 0
    for epoch, row in enumerate(order):
        for end in range(chain.batch_size, num_samples + chain.batch_size, chain.batch_size):
            batch = row[end - chain.batch_size : end]
            inputs, labels = torch.from_numpy(x[batch]), torch.from_numpy(y[batch])
            if has_kink(model, inputs):
                return compared
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(batch)
            compared += 1
            if epoch == 0 or end >= num_samples:
                seen = order if epoch else row[None, :end]
                trained, found = program.train(before, x, y, seen, 0.05, chain.momentum)
                assert found == pytest.approx(total, rel=1e-5, abs=1e-6 * num_samples)
                check(trained, state_of(model), before)
    with torch.no_grad():
        logits = model(torch.from_numpy(x))
    right, found = program.evaluate(state_of(model), x, y)
    assert right == int((logits.argmax(1).numpy() == y).sum())
    expected = F.cross_entropy(logits, torch.from_numpy(y), reduction="sum").item()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6 * num_samples)
    return compared


def check(trained: Arrays, expected: Arrays, before: Arrays) -> None:
    """A few steps amplify a rounding error of 2**-24 of the largest weight or move by no more than a hundred times."""
    for name, tensor in expected.items():
        scale = max(np.abs(tensor).max(), np.abs(tensor - before[name]).max())
        np.testing.assert_allclose(trained[name], tensor, rtol=0, atol=1e-5 * scale, err_msg=name)


def state_of(model: nn.Module) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("seed", range(5))
def test_training_is_sgd(seed: int) -> None:
    compare(Chain(seed))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_is_sgd_on_many() -> None:
    assert sum(compare(Chain(seed)) for seed in range(5, 80)) > 150


@pytest.mark.parametrize(("name", "batch"), [("fashion-cnn", 10), ("watch-cnn", 16)])
def test_shipped_models(name: str, batch: int) -> None:
    """With these seeds nothing comes near a kink."""
    torch.manual_seed(5)
    model = build_model(name)
    shape: tuple[int, ...] = model.input_shape  # type: ignore[assignment]
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(25, *shape)).astype(np.float32), rng.integers(0, 7, 25)
    order = rng.permutation(25)[None]
    before = state_of(model)
    trained, _ = HostProgram(model, shape, batch).train(before, x, y, order, 0.1, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for start in range(0, 25, batch):
        optimizer.zero_grad()
        index = order[0][start : start + batch]
        F.cross_entropy(model(torch.from_numpy(x[index])), torch.from_numpy(y[index])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    check(trained, state_of(model), before)


@pytest.mark.parametrize(
    ("flags", "compiler"),
    [
        pytest.param(("-march=x86-64-v3",), "auto", id="fewer registers"),
        pytest.param(("-march=x86-64",), "auto", id="halves of vectors", marks=pytest.mark.slow),
        pytest.param((), "zig", id="zig"),
    ],
)
def test_other_processors_and_compilers(
    flags: tuple[str, ...], compiler: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are the compiler's own: they are right on a CPU that has shorter ones, and fewer of them."""
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these are kinds of x86")
    if compiler == "zig":
        pytest.importorskip("ziglang")
    monkeypatch.setattr(host_f32, "_FLAGS", (*host_f32._FLAGS, *flags))
    monkeypatch.setattr(host_f32, "host_toolchain", lambda: host_toolchain(compiler))
    test_shipped_models("fashion-cnn", 10)
    compare(Chain(5))
