"""A plain multi-layer perceptron; with its defaults 10 million parameters, so that gradients are worth compressing."""

import itertools
import math
from dataclasses import dataclass

from torch import Tensor, nn

from efftrain.models.pretrained import Pretrained, require


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an ``MLP``."""

    input_shape: tuple[int, ...] = (1, 28, 28)
    hidden: tuple[int, ...] = (1664, 1664, 1664, 1664, 256)
    """Widths of the hidden layers; empty gives a linear classifier."""
    num_classes: int = 10

    def __post_init__(self) -> None:
        sizes = (*self.input_shape, *self.hidden, self.num_classes)
        require(len(self.input_shape) > 0 and min(sizes) > 0, "mlp-10m", "sizes above 0", self)


class MLP(Pretrained):
    """Linear layers with ReLU between them. With the defaults 784-1664-1664-1664-1664-256-10: 10,046,730 parameters.

    Args:
        config: Sizes. ``input_shape`` is flattened, so any data set of fixed shape fits.

    Input ``(B, *input_shape)`` float32; output ``(B, num_classes)`` logits.
    """

    name = "mlp-10m"
    config_class = MLPConfig
    config: MLPConfig

    def __init__(self, config: MLPConfig | None = None) -> None:
        config = config or MLPConfig()
        super().__init__(config)
        widths = (math.prod(config.input_shape), *config.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        layers.append(nn.Linear(widths[-1], config.num_classes))
        self.layers = nn.Sequential(*layers)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """As configured."""
        return self.config.input_shape

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of inputs ``(B, *input_shape)``."""
        logits: Tensor = self.layers(x)
        return logits
