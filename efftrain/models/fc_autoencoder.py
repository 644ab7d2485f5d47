"""The autoencoder that MLPerf Tiny listens to machines with: what it reconstructs badly is an anomaly."""

import itertools
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from efftrain.models.pretrained import Pretrained, require


@dataclass(frozen=True)
class FCAutoencoderConfig:
    """Sizes of an ``FCAutoencoder``."""

    features: int = 640
    """Length of a vector: 5 frames of 128 mel bands."""
    width: int = 128
    depth: int = 4
    """Layers of this width before the code, and as many after it."""
    code: int = 8

    def __post_init__(self) -> None:
        require(min(self.features, self.width, self.depth, self.code) > 0, "fc-autoencoder", "counts above 0", self)


class FCAutoencoder(Pretrained):
    """Linear layers, each but the last with batch norm and ReLU: 640, 4 x 128, 8, 4 x 128, 640.

    With the defaults 267,928 parameters and 2,064 statistics of batch norms: together the 269,992 that Keras counts;
    264,192 weights and 1,672 biases once batch norms are folded. 264,192 MACs.

    Args:
        config: Sizes; the defaults are those of ToyADMOS.

    Input ``(B, 640)`` float32; output ``(B, 640)``, the reconstruction. The loss is their mean squared difference.

    Source: Banbury et al., MLPerf Tiny Benchmark (arXiv:2106.07597), anomaly detection; after the DCASE 2020 baseline.
    """

    name = "fc-autoencoder"
    loss: ClassVar[str] = "squared_error"
    """What it is trained with, for those who have to choose: its target is its input."""
    config_class = FCAutoencoderConfig
    config: FCAutoencoderConfig

    def __init__(self, config: FCAutoencoderConfig | None = None) -> None:
        config = config or FCAutoencoderConfig()
        super().__init__(config)
        side = [config.width] * config.depth
        widths = [config.features, *side, config.code, *side]
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.layers.append(nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()))
        self.head = nn.Linear(widths[-1], config.features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(features,)``."""
        return (self.config.features,)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions ``(B, features)`` of vectors ``(B, features)``."""
        reconstruction: Tensor = self.head(self.layers(x))
        return reconstruction
