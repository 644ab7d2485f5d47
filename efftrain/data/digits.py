"""1,797 handwritten digits of 8x8 pixels. Ships with the package: the data set for quick tests and first tries.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI Machine Learning Repository, 1998), its
    test set, as scikit-learn distributes it.
"""

import numpy as np

from efftrain.data.dataset import ArrayDataset, check_split
from efftrain.data.shipped import load_shipped

NUM_TEST = 360
_SPLIT_SEED = 0


def load_digits(split: str = "train") -> ArrayDataset:
    """One split: 1,437 training or 360 test images, chosen once by a fixed seed.

    Returns:
        Inputs ``(N, 1, 8, 8)`` float32 in ``[0, 1]`` (the stored 0 to 16, divided by 16), targets 0 to 9.

    Raises:
        ConfigError: A split other than ``train`` and ``test``.
        DataError: The shipped file is missing or damaged.
    """
    check_split("digits", split, ("train", "test"))
    arrays = load_shipped("digits.npz")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(arrays["labels"]))
    chosen = np.sort(order[:NUM_TEST] if split == "test" else order[NUM_TEST:])
    inputs = arrays["images"][chosen, None].astype(np.float32) / 16
    return ArrayDataset("digits", inputs, arrays["labels"][chosen].astype(np.int64), None, 10)
