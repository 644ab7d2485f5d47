"""The 8,471-parameter network for motion of a smartwatch, small enough to be trained on the watch."""

from dataclasses import dataclass

from torch import Tensor, nn

from efftrain.models.pretrained import Pretrained, require


@dataclass(frozen=True)
class WatchCNNConfig:
    """Sizes of a ``WatchCNN``."""

    in_channels: int = 6
    steps: int = 128
    """Length of a window, at least 29 (what three strided convolutions of width 5 need for one output)."""
    channels: tuple[int, ...] = (16, 32, 32)
    """Output channels of the convolutions, three of them."""
    num_classes: int = 7

    def __post_init__(self) -> None:
        require(len(self.channels) == 3 and min(self.channels) > 0, "watch-cnn", "three channel counts above 0", self)
        require(self.in_channels > 0 and self.num_classes > 0, "watch-cnn", "counts above 0", self)
        require(self.steps >= 29, "watch-cnn", "steps of at least 29", self)


class WatchCNN(Pretrained):
    """Three strided convolutions, an average over time, one linear layer. 170,784 MACs a window.

    Args:
        config: Sizes; the defaults are those of the watch data.

    Input ``(B, 6, 128)`` float32, standardized; output ``(B, 7)`` logits.
    """

    name = "watch-cnn"
    config_class = WatchCNNConfig
    config: WatchCNNConfig

    def __init__(self, config: WatchCNNConfig | None = None) -> None:
        config = config or WatchCNNConfig()
        super().__init__(config)
        first, second, third = config.channels
        self.conv1 = nn.Conv1d(config.in_channels, first, 5, stride=2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv1d(first, second, 5, stride=2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv1d(second, third, 5, stride=2)
        self.relu3 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(third, config.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(in_channels, steps)``."""
        return (self.config.in_channels, self.config.steps)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of windows ``(B, in_channels, steps)``."""
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        x = self.relu3(self.conv3(x))
        logits: Tensor = self.head(self.flatten(self.pool(x)))
        return logits
