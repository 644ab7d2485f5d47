"""Networks of inverted residual blocks that were made for microcontrollers, and are the usual ones to train on them.

Shapes as shipped with the reference system for training under 256 KB (Lin et al., arXiv:2206.15472): the blocks of the
search result alone, no wide layer before the classifier.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from efftrain.models.pretrained import Pretrained, require

Row = tuple[int, int, int, int]
"""One block: channels of its wide part, output channels, width of the depthwise kernel, stride."""


class _Block(nn.Module):
    """1x1 to the wide part, depthwise, 1x1 back. ReLU6 after the first two; a sum with the input if it fits."""

    def __init__(self, in_channels: int, wide: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Identity() if wide == in_channels else _layer(in_channels, wide, 1, 1)
        self.depthwise = _layer(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _layer(in_channels: int, channels: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6())


@dataclass(frozen=True)
class InvertedResidualConfig:
    """Sizes of the networks of this file; blocks and channels are each one's own."""

    in_channels: int = 3
    size: int = 128
    """Height and width of an image, at least 32."""
    num_classes: int = 10

    def __post_init__(self) -> None:
        expected = "counts above 0 and a size of at least 32"
        require(
            min(self.in_channels, self.num_classes) > 0 and self.size >= 32, "of inverted residuals", expected, self
        )


class _InvertedResiduals(Pretrained):
    """A 3x3 convolution of stride 2 to 16 channels, the blocks of ``rows``, an average, one linear layer.

    Args:
        config: Sizes.

    Input ``(B, 3, 128, 128)`` float32; output ``(B, 10)`` logits.
    """

    rows: ClassVar[tuple[Row, ...]]
    config_class = InvertedResidualConfig
    config: InvertedResidualConfig

    def __init__(self, config: InvertedResidualConfig | None = None) -> None:
        config = config or InvertedResidualConfig()
        super().__init__(config)
        channels = 16
        self.stem = _layer(config.in_channels, channels, 3, 2)
        self.blocks = nn.Sequential()
        for wide, out, kernel, stride in self.rows:
            self.blocks.append(_Block(channels, wide, out, kernel, stride))
            channels = out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, config.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(in_channels, size, size)``."""
        return (self.config.in_channels, self.config.size, self.config.size)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, in_channels, size, size)``."""
        x = self.blocks(self.stem(x))
        logits: Tensor = self.head(self.flatten(self.pool(x)))
        return logits


class MCUNet5fps(_InvertedResiduals):
    """MCUNet "5fps": found for 5 images a second on a Cortex-M7. 43 layers, 464,816 weights, 22,455,104 MACs.

    Args:
        config: Sizes. 6,018 biases once batch norms are folded.

    Source: Lin et al., MCUNet (arXiv:2007.10319); the layer table of the reference system's "49kb" model.
    """

    name = "mcunet-5fps"
    rows = (
        *((16, 8, 3, 1), (32, 16, 3, 2), (48, 16, 3, 1), (48, 24, 7, 2), (120, 24, 3, 1), (120, 40, 3, 2)),
        *((160, 40, 7, 1), (160, 48, 5, 1), (144, 48, 3, 1), (192, 48, 3, 1), (240, 96, 7, 2)),
        *((384, 96, 5, 1), (384, 96, 5, 1), (576, 160, 3, 1)),
    )


class MobileNetV2W035(_InvertedResiduals):
    """MobileNetV2 at a width of 0.35 without its last wide convolution. 52 layers, 239,808 weights, 16,648,032 MACs.

    Args:
        config: Sizes. 5,770 biases once batch norms are folded.

    Source: Sandler et al., MobileNetV2 (arXiv:1801.04381).
    """

    name = "mobilenet-v2-w0.35"
    rows = (
        *((16, 8, 3, 1), (48, 8, 3, 2), (48, 8, 3, 1), (48, 16, 3, 2), (96, 16, 3, 1), (96, 16, 3, 1)),
        *((96, 24, 3, 2), (144, 24, 3, 1), (144, 24, 3, 1), (144, 24, 3, 1), (144, 32, 3, 1)),
        *((192, 32, 3, 1), (192, 32, 3, 1), (192, 56, 3, 2), (336, 56, 3, 1), (336, 56, 3, 1), (336, 112, 3, 1)),
    )


class ProxylessW03(_InvertedResiduals):
    """ProxylessNAS at a width of 0.3 without its last wide convolution. 61 layers, 321,776 weights, 18,620,864 MACs.

    Args:
        config: Sizes. 5,426 biases once batch norms are folded.

    Source: Cai et al., ProxylessNAS (arXiv:1812.00332).
    """

    name = "proxyless-w0.3"
    rows = (
        *((16, 8, 3, 1), (24, 16, 5, 2), (48, 16, 3, 1), (48, 16, 7, 2), (48, 16, 3, 1), (48, 16, 5, 1)),
        *((48, 16, 5, 1), (96, 24, 7, 2), (72, 24, 5, 1), (72, 24, 5, 1), (72, 24, 5, 1), (144, 32, 5, 1)),
        *((96, 32, 5, 1), (96, 32, 5, 1), (96, 32, 5, 1), (192, 64, 7, 2), (384, 64, 7, 1), (192, 64, 7, 1)),
        *((192, 64, 7, 1), (384, 96, 7, 1)),
    )
