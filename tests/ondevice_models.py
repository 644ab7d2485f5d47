"""Small models that together use every operator the on-device compiler takes; the tests of all its parts share them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InvertedResiduals(nn.Module):
    """Depthwise layers of stride 1 and 2, batch norms, ReLU6, a linear bottleneck and an addition of two branches."""

    shape = (3, 12, 10)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.last = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        x = self.last(self.down(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Residuals(nn.Module):
    """Additions before a ReLU, a branch with a convolution of its own, as in a ResNet."""

    shape = (3, 9, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(6, 10, 3, 2, 1), nn.Conv2d(10, 10, 3, padding=1)
        self.skip = nn.Conv2d(6, 10, 1, 2)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        x = F.relu(self.skip(x) + self.b2(F.relu(self.b1(x))))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class SqueezeExcite(nn.Module):
    """Hard-swish, a sigmoid gate on every channel, and a product of two maps."""

    shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.mix = nn.Conv2d(8, 6, 3, 2, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = x * scale
        x = x * F.hardsigmoid(self.gate(x))
        logits: Tensor = self.head(F.relu(self.mix(x)).mean((2, 3)))
        return logits


class Pools(nn.Module):
    """Max pools with and without overlap, an average pool, and maps side by side in channels."""

    shape = (2, 11, 10)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.join = nn.Conv2d(9, 8, 1)
        self.head = nn.Linear(8 * 2 * 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        x = F.max_pool2d(F.relu(self.join(x)), 2)
        logits: Tensor = self.head(F.avg_pool2d(x, 2, 1).flatten(1))
        return logits


class Groups(nn.Module):
    """Convolutions in groups: a block of a ResNeXt, two filters a channel, a 1x1 in groups as in a ShuffleNet."""

    shape = (3, 10, 9)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.reduce = nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.groups = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.widen = nn.Sequential(nn.Conv2d(12, 24, 3, 2, 1, groups=12, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.last = nn.Conv2d(24, 9, 1, groups=3)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.expand(self.groups(self.reduce(x))))
        x = F.relu(self.last(self.widen(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Borders(nn.Module):
    """Padding as TensorFlow's "SAME" puts it, behind first, for convolutions and max pools; kernels of even sizes."""

    shape = (2, 12, 11)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 6, 3, 2, bias=False), nn.BatchNorm2d(6))
        self.even = nn.Conv2d(6, 8, (4, 2), padding="same")
        self.depthwise = nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(8, 8, 4, 2, groups=8))
        self.far = nn.Conv2d(8, 6, 1, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = F.max_pool2d(F.pad(self.even(x), (0, 1, 1, 0), value=-math.inf), 2, 1)
        x = F.max_pool2d(F.pad(F.relu(self.depthwise(x)), (0, 1, 0, 1)), 3, 1, 1)
        x = F.relu(self.far(F.pad(x, (0, 2, 0, 3))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Dead(nn.Module):
    """Batch norms that switch off every other channel, as pruning by their factors does, in layers of every kind."""

    shape = (3, 9, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.groups, self.norm3 = nn.Conv2d(8, 12, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(12)
        self.linear, self.norm4 = nn.Linear(12, 10), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 4)
        for norm, factor in ((self.norm1, 0.0), (self.norm2, 0.0), (self.norm3, 1e-9), (self.norm4, 0.0)):
            with torch.no_grad():
                norm.weight[::2] = factor
                norm.bias.uniform_(0.1, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.depthwise(F.relu(self.norm1(self.stem(x))))))
        x = F.relu(self.norm3(self.groups(x))).mean((2, 3))
        logits: Tensor = self.head(F.relu(self.norm4(self.linear(x))))
        return logits


class Autoencoder(nn.Module):
    """Linear layers with batch norms; what goes in should come out."""

    shape = (20, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.norm = nn.Linear(20, 12), nn.BatchNorm1d(12)
        self.code, self.decode = nn.Linear(12, 5), nn.Linear(5, 12)
        self.out = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.encode(x.flatten(1))))
        outputs: Tensor = self.out(F.relu(self.decode(F.relu(self.code(x)))))
        return outputs


CLASSIFIERS: tuple[type[nn.Module], ...] = (InvertedResiduals, Residuals, SqueezeExcite, Pools, Groups, Borders, Dead)


def build(model: type[nn.Module], seed: int = 0) -> nn.Module:
    """A model with random weights and random batch-norm statistics."""
    torch.manual_seed(seed)
    module = model()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return module.eval()
