"""ResNet-8, the image classification network of MLPerf Tiny."""

from dataclasses import dataclass

from torch import Tensor, nn

from efftrain.models.pretrained import Pretrained, require


@dataclass(frozen=True)
class ResNet8Config:
    """Sizes of a ``ResNet8``."""

    in_channels: int = 3
    size: int = 32
    """Height and width of an image, a multiple of 4."""
    width: int = 16
    """Channels of the first stage; the second and the third have twice and four times as many."""
    num_classes: int = 10

    def __post_init__(self) -> None:
        require(min(self.in_channels, self.width, self.num_classes) > 0, "resnet8", "counts above 0", self)
        require(self.size > 0 and self.size % 4 == 0, "resnet8", "a size that is a multiple of 4", self)


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 convolution where the size changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, channels, 1, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        sum_: Tensor = self.relu2(self.shortcut(x) + y)
        return sum_


class ResNet8(Pretrained):
    """A convolution and three residual blocks, an average over all positions, one linear layer.

    With the defaults 78,186 parameters and 480 statistics of batch norms: together the 78,666 that Keras counts;
    77,360 weights and 346 biases once batch norms are folded. 12,501,632 MACs.

    Args:
        config: Sizes; the defaults are those of CIFAR-10.

    Input ``(B, 3, 32, 32)`` float32; output ``(B, 10)`` logits.

    Source: Banbury et al., MLPerf Tiny Benchmark (arXiv:2106.07597), image classification. Differs: where the stride is
    2, zeros are added on both sides, which TensorFlow's "same" adds after the last row and column alone.
    """

    name = "resnet8"
    config_class = ResNet8Config
    config: ResNet8Config

    def __init__(self, config: ResNet8Config | None = None) -> None:
        config = config or ResNet8Config()
        super().__init__(config)
        width = config.width
        self.conv = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.block1 = _Block(width, width, 1)
        self.block2 = _Block(width, 2 * width, 2)
        self.block3 = _Block(2 * width, 4 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(4 * width, config.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(in_channels, size, size)``."""
        return (self.config.in_channels, self.config.size, self.config.size)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, in_channels, size, size)``."""
        x = self.relu(self.norm(self.conv(x)))
        x = self.block3(self.block2(self.block1(x)))
        logits: Tensor = self.head(self.flatten(self.pool(x)))
        return logits
