"""Models of the supported operators that hypothesis draws; the tests of several parts of the compiler share them."""

import math
import warnings
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[list[Tensor]], Tensor]
FUNCTIONS: dict[str, Callable[[bool], Callable[[Tensor], Tensor]]] = {
    "relu": lambda inplace: lambda x: F.relu(x, inplace),
    "relu6": lambda inplace: lambda x: F.relu6(x, inplace),
    "hardswish": lambda inplace: lambda x: F.hardswish(x, inplace),
    "hardsigmoid": lambda inplace: lambda x: F.hardsigmoid(x, inplace),
    "sigmoid": lambda inplace: torch.sigmoid_ if inplace else torch.sigmoid,
    "clamp": lambda inplace: lambda x: x.clamp_(0, 6) if inplace else x.clamp(min=0),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and factors of batch norms as training might leave them; fresh ones are all 0 and 1."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for value, low, high in ((module.running_mean, -1.0, 1.0), (module.running_var, 0.5, 2.0)):
                if value is not None:
                    value.uniform_(low, high, generator=rng)
            with torch.no_grad():
                if module.affine:
                    module.weight.uniform_(-1.5, 1.5, generator=rng)
                    module.bias.uniform_(-1.0, 1.0, generator=rng)
    return model


class Squeeze(nn.Module):
    """Squeeze-and-excite, its two layers once linear and once convolutions."""

    def __init__(self, channels: int, linear: bool, two_d: bool) -> None:
        super().__init__()
        conv = nn.Conv2d if two_d else nn.Conv1d
        self.linear = linear
        self.down: nn.Module = nn.Linear(channels, 2) if linear else conv(channels, 2, 1)
        self.up: nn.Module = nn.Linear(2, channels) if linear else conv(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(2, x.ndim))
        small = x.mean(dims, keepdim=not self.linear)
        gate = torch.sigmoid(self.up(F.relu(self.down(small))))
        gate = gate.view(x.shape[0], x.shape[1], *[1] * len(dims)) if self.linear else gate
        return gate * x if self.linear else x * gate


class Random(nn.Module):
    """Steps that each read the results so far, the last of them first, and add one."""

    def __init__(self, parts: list[nn.Module], steps: list[Step], end: nn.Module) -> None:
        super().__init__()
        self.parts, self.steps, self.end = nn.ModuleList(parts), steps, end

    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for step in self.steps:
            results.append(step(results))
        logits: Tensor = self.end(results[-1])
        return logits


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A model of up to nine operators over a signal or an image, and its example."""
    two_d = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 1000)))
    size = draw(st.tuples(st.integers(5, 11), st.integers(5, 11)))
    size = size if two_d else (1, size[1] * 2)
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if two_d else (nn.Conv1d, nn.BatchNorm1d)
    shapes = [(draw(st.integers(1, 4)), *size)]
    parts: list[nn.Module] = []
    steps: list[Step] = []

    def add_module(module: nn.Module) -> None:
        parts.append(module)
        steps.append(lambda results: module(results[-1]))

    def measure() -> None:
        model = Random(parts, steps, nn.Identity()).eval()
        example = torch.zeros(1, *(shapes[0] if two_d else (shapes[0][0], shapes[0][2])))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
            after = model(example).shape[1:]
        shapes.append(tuple(after) if two_d else (after[0], 1, after[1]))

    kinds = (
        "conv",
        "conv",
        "depthwise",
        "grouped",
        "norm",
        "function",
        "function",
        "pool",
        "add",
        "mul",
        "cat",
        "squeeze",
        "drop",
    )
    for kind in draw(st.lists(st.sampled_from((*kinds, "pad")), min_size=1, max_size=9)):
        channels, height, width = shapes[-1]
        smallest = min(height, width) if two_d else width
        if kind in ("conv", "depthwise", "grouped", "pad"):
            kernel = draw(st.integers(1, min(4, smallest + 2)))
            least = max(0, kernel - smallest + 1) // 2
            stride, padding, bias = draw(st.integers(1, 2)), draw(st.integers(least, kernel)), draw(st.booleans())
            divisors = [count for count in range(1, channels + 1) if channels % count == 0]
            groups = {"depthwise": channels, "grouped": draw(st.sampled_from(divisors))}.get(kind, 1)
            out = channels if kind == "depthwise" else groups * draw(st.integers(1, 3 if groups > 1 else 5))
            same = kind == "conv" and stride == 1 and draw(st.booleans())
            layer = conv(channels, out, kernel, stride, "same" if same else padding, groups=groups, bias=bias)
            sides = tuple(draw(st.tuples(*[st.integers(0, 2)] * (4 if two_d else 2))))
            border = nn.ZeroPad2d(sides) if two_d else nn.ConstantPad1d(sides, 0.0)
            add_module(nn.Sequential(border, layer) if kind == "pad" else layer)
        elif kind == "norm":
            add_module(norm(channels, affine=draw(st.booleans())))
        elif kind == "function":
            function = FUNCTIONS[draw(st.sampled_from(sorted(FUNCTIONS)))](draw(st.booleans()))
            steps.append(lambda results, function=function: function(results[-1]))  # type: ignore[misc]
        elif kind == "pool":
            kernel, average = draw(st.integers(1, min(4, smallest + 1))), draw(st.booleans())
            least = max(0, kernel - smallest + 1) // 2
            if average and smallest == 1:
                continue  # refused with padding, and nothing without
            stride, padding = draw(st.integers(1, 3)), draw(st.integers(least, kernel // 2))
            pools = (nn.MaxPool2d, nn.AvgPool2d) if two_d else (nn.MaxPool1d, nn.AvgPool1d)
            pool = pools[average](kernel, stride, padding)
            behind = draw(st.integers(0, max(0, kernel - 1 - padding)))
            low = nn.ConstantPad2d((0, behind, behind, 0), -math.inf) if two_d else nn.ConstantPad1d(behind, -math.inf)
            add_module(pool if average else nn.Sequential(low, pool))
        elif kind in ("add", "mul"):
            alike = [i for i, shape in enumerate(shapes) if shape == shapes[-1]]
            i, add, inplace = draw(st.sampled_from(alike)), kind == "add", draw(st.booleans())
            operators = (Tensor.mul_, Tensor.add_) if inplace else (Tensor.mul, Tensor.add)
            operator = operators[add]
            steps.append(lambda results, i=i, operator=operator: operator(results[-1], results[i]))  # type: ignore[misc]
        elif kind == "cat":
            alike = [i for i, shape in enumerate(shapes) if shape[1:] == shapes[-1][1:]]
            chosen = draw(st.lists(st.sampled_from(alike), min_size=1, max_size=3))
            steps.append(lambda results, chosen=chosen: torch.cat([results[-1], *(results[i] for i in chosen)], 1))  # type: ignore[misc]
        elif kind == "squeeze":
            add_module(Squeeze(channels, draw(st.booleans()), two_d))
        else:
            add_module(nn.Sequential(nn.Dropout(), nn.Identity()))
        measure()
    channels, height, width = shapes[-1]
    features = channels * height * width
    over_all = nn.AdaptiveAvgPool2d(1) if two_d else nn.AdaptiveAvgPool1d(1)
    cover = nn.Conv2d(channels, 3, (height, width)) if two_d else nn.Conv1d(channels, 3, width)
    ends: list[nn.Module] = [
        nn.Sequential(over_all, nn.Flatten(), nn.Linear(channels, 3)),
        nn.Sequential(nn.Flatten(), nn.ReLU6(), nn.Linear(features, 4, bias=False), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(features), nn.Linear(features, 2), nn.ReLU(), nn.Linear(2, 3)),
        nn.Sequential(cover, nn.Flatten()),
    ]
    end = draw(st.sampled_from(range(len(ends))))
    model = randomize(Random(parts, steps, ends[end]), draw(st.integers(0, 1000)))
    return model, torch.zeros(1, *(shapes[0] if two_d else (shapes[0][0], shapes[0][2])))
