"""Networks of depthwise-separable convolutions, as MLPerf Tiny has them: DS-CNN (keywords), MobileNetV1-0.25 (persons).

Source: Banbury et al., MLPerf Tiny Benchmark (arXiv:2106.07597), keyword spotting and visual wake words; after Zhang et
al., Hello Edge (arXiv:1711.07128), and Howard et al., MobileNets (arXiv:1704.04861). Differs: where a stride needs an
odd number of zeros, both sides get the larger half, which TensorFlow's "same" gives to the end alone; no dropout.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from efftrain.models.pretrained import Pretrained, require


def _separable(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """3x3 depthwise, then 1x1, each with bias, batch norm and ReLU as in the reference."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, channels, 1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


@dataclass(frozen=True)
class DSCNNConfig:
    """Sizes of a ``DSCNN``."""

    frames: int = 49
    """Frames of a second of sound, at least 9."""
    features: int = 10
    """Coefficients of a frame, at least 2."""
    width: int = 64
    """Channels of every layer."""
    blocks: int = 4
    num_classes: int = 12

    def __post_init__(self) -> None:
        require(
            self.frames >= 9 and self.features >= 2, "ds-cnn", "frames of at least 9 and features of at least 2", self
        )
        require(min(self.width, self.blocks, self.num_classes) > 0, "ds-cnn", "counts above 0", self)


class DSCNN(Pretrained):
    """One 10x4 convolution, separable convolutions, an average over all positions, one linear layer.

    With the defaults 23,756 parameters and 1,152 statistics of batch norms: together the 24,908 that Keras counts;
    22,016 weights and 588 biases once batch norms are folded. 2,656,768 MACs.

    Args:
        config: Sizes; the defaults are those of the ten keywords of Speech Commands, "silence" and "unknown".

    Input ``(B, 1, 49, 10)`` float32, cepstral coefficients; output ``(B, 12)`` logits.
    """

    name = "ds-cnn"
    config_class = DSCNNConfig
    config: DSCNNConfig

    def __init__(self, config: DSCNNConfig | None = None) -> None:
        config = config or DSCNNConfig()
        super().__init__(config)
        width = config.width
        self.conv = nn.Conv2d(1, width, (10, 4), stride=2, padding=(5, 1))
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(*(_separable(width, width, 1) for _ in range(config.blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(width, config.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(1, frames, features)``."""
        return (1, self.config.frames, self.config.features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of spectrograms ``(B, 1, frames, features)``."""
        x = self.blocks(self.relu(self.norm(self.conv(x))))
        logits: Tensor = self.head(self.flatten(self.pool(x)))
        return logits


_STAGES = (
    *((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (128, 1), (128, 1), (128, 1)),
    *((256, 2), (256, 1)),
)
"""Output channels and stride of each separable convolution: MobileNetV1 at a width of 0.25."""


@dataclass(frozen=True)
class MobileNetV1Config:
    """Sizes of a ``MobileNetV1Quarter``."""

    in_channels: int = 3
    size: int = 96
    """Height and width of an image."""
    num_classes: int = 2

    def __post_init__(self) -> None:
        require(min(self.in_channels, self.num_classes) > 0, "mobilenet-v1-0.25", "counts above 0", self)
        require(self.size >= 17, "mobilenet-v1-0.25", "a size of at least 17", self)


class MobileNetV1Quarter(Pretrained):
    """MobileNetV1 at a quarter of its width: a convolution, 13 separable ones, an average, one linear layer.

    With the defaults 216,322 parameters and 5,472 statistics of batch norms: together the 221,794 that Keras counts;
    208,112 weights and 2,738 biases once batch norms are folded. 7,489,664 MACs.

    Args:
        config: Sizes; the defaults are those of Visual Wake Words.

    Input ``(B, 3, 96, 96)`` float32; output ``(B, 2)`` logits.
    """

    name = "mobilenet-v1-0.25"
    config_class = MobileNetV1Config
    config: MobileNetV1Config

    def __init__(self, config: MobileNetV1Config | None = None) -> None:
        config = config or MobileNetV1Config()
        super().__init__(config)
        channels = 8
        self.conv = nn.Conv2d(config.in_channels, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential()
        for out, stride in _STAGES:
            self.blocks.append(_separable(channels, out, stride))
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
        x = self.blocks(self.relu(self.norm(self.conv(x))))
        logits: Tensor = self.head(self.flatten(self.pool(x)))
        return logits
