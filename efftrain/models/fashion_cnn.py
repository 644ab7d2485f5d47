"""The 54,314-parameter network for 28x28 images."""

from dataclasses import dataclass

from torch import Tensor, nn

from efftrain.models.pretrained import Pretrained, require


@dataclass(frozen=True)
class FashionCNNConfig:
    """Sizes of a ``FashionCNN``."""

    in_channels: int = 1
    size: int = 28
    """Height and width of an image, a multiple of 4."""
    channels: tuple[int, ...] = (8, 16)
    """Output channels of the convolutions, two of them."""
    hidden: int = 64
    num_classes: int = 10

    def __post_init__(self) -> None:
        require(len(self.channels) == 2 and min(self.channels) > 0, "fashion-cnn", "two channel counts above 0", self)
        require(min(self.in_channels, self.hidden, self.num_classes) > 0, "fashion-cnn", "counts above 0", self)
        require(self.size > 0 and self.size % 4 == 0, "fashion-cnn", "a size that is a multiple of 4", self)


class FashionCNN(Pretrained):
    """Two 5x5 convolutions that keep the size, each halved by a max pool, and two linear layers. 834,816 MACs.

    Args:
        config: Sizes; the defaults are those of Fashion-MNIST.

    Input ``(B, 1, 28, 28)`` float32; output ``(B, 10)`` logits.
    """

    name = "fashion-cnn"
    config_class = FashionCNNConfig
    config: FashionCNNConfig

    def __init__(self, config: FashionCNNConfig | None = None) -> None:
        config = config or FashionCNNConfig()
        super().__init__(config)
        first, second = config.channels
        self.conv1 = nn.Conv2d(config.in_channels, first, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * (config.size // 4) ** 2, config.hidden)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(config.hidden, config.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(in_channels, size, size)``."""
        return (self.config.in_channels, self.config.size, self.config.size)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, in_channels, size, size)``."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        logits: Tensor = self.fc2(self.relu3(self.fc1(self.flatten(x))))
        return logits
