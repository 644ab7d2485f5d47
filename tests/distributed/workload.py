"""A model and a data set that tests train on, as a user's own file: ``workload.py:Net`` and ``workload.py:Digits``."""

import os
import time

import numpy as np
from torch import Tensor, nn

from efftrain.data.digits import load_digits


class Net(nn.Module):
    """Has all that a resumed run could lose: dropout (random numbers), batch norm (buffers), several layers."""

    def __init__(self, width: int = 24, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.BatchNorm1d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 8, 8)``."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Digits:
    """The digits; what is wrong with them comes from the environment, so that a resumed run may see them right.

    ``TEST_SLEEP_S``: seconds that a training batch takes. ``TEST_NAN``: number of a sample that is NaN.
    ``TEST_FAIL_RANK``: this rank cannot read training batches.
    """

    num_classes = 10

    def __init__(self, split: str) -> None:
        self._data = load_digits(split)
        self._train = split == "train"

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``efftrain.data.Dataset``."""
        inputs, targets = self._data.batch(indices)
        if self._train and len(indices) > 1:
            time.sleep(float(os.environ.get("TEST_SLEEP_S", "0")))
            if os.environ.get("TEST_FAIL_RANK") == os.environ.get("RANK", "0"):
                from efftrain.errors import DataError

                raise DataError("sample 3 cannot be read")
            inputs[indices == int(os.environ.get("TEST_NAN", "-1"))] = np.nan
        return inputs, targets
