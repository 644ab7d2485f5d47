"""Error feedback: what a codec could not send, kept for the next step.

``decode(encode(g + r)) + r' == g + r``: exactly for sparse codecs and nearest rounding, within one ulp for stochastic
rounding.

Residuals are keyed by parameter name, never by bucket: DDP rebuilds its buckets after the first step, and a residual
kept for the old bucket would be added to other parameters.

Source: Seide et al., 1-bit SGD (Interspeech 2014); Karimireddy et al., Error Feedback Fixes SignSGD (arXiv:1901.09847).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from efftrain.compression.codec import Codec, as_float32, refuse_non_finite
from efftrain.compression.wire import Floats, Payload
from efftrain.errors import CheckpointError


class Feedback:
    """Residuals of one sender (one rank, one client).

    ``encode`` stages the new residual; ``commit`` makes it valid once the step is known to count, ``rollback`` drops
    it (another rank saw a NaN, the reply was not accepted). Until then the old residual is untouched, at the price of
    a second copy of it.

    Args:
        codec: What encodes; the residual is float32 whatever it is.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._residuals: dict[str, Floats] = {}
        self._staged: dict[str, Floats] = {}

    def encode(self, name: str, flat: Any, *, key: int = 0) -> Payload:
        """Encode ``flat`` plus the residual of parameter ``name`` and stage what is left over.

        Args:
            name: The parameter's name; always the same for the same parameter.
            flat: Shape ``(N,)``, as for ``Codec.encode``. Not changed.
            key: As for ``Codec.encode``.

        Raises:
            NonFiniteError: ``flat`` holds inf or NaN; the message has ``name``. No residual changes.
            ValueError: ``N`` differs from the residual's.
        """
        values = as_float32(flat)
        refuse_non_finite(values, f"parameter {name!r}")
        residual = self._residuals.get(name)
        if residual is not None:
            if residual.size != values.size:
                raise ValueError(f"parameter {name!r} has {values.size} elements, its residual {residual.size}")
            values = values + residual
        payload = self.codec.encode(values, key=key)
        left = -self.codec.decode(payload, max_elements=values.size)
        left += values
        self._staged[name] = left
        return payload

    def commit(self) -> None:
        """Make all staged residuals valid."""
        self._residuals.update(self._staged)
        self._staged.clear()

    def rollback(self) -> None:
        """Forget all staged residuals."""
        self._staged.clear()

    def norm(self) -> float:
        """Euclidean norm over all residuals: how much is still waiting to be sent."""
        return float(np.sqrt(sum(float(np.dot(r, r)) for r in self._residuals.values())))

    def state_dict(self) -> dict[str, Floats]:
        """Name -> residual, float32, copied. Goes into every checkpoint, one per rank."""
        return {name: residual.copy() for name, residual in self._residuals.items()}

    def load_state_dict(self, state: Mapping[str, Floats]) -> None:
        """Replace all residuals.

        Raises:
            CheckpointError: An entry is not flat float32.
        """
        for name, residual in state.items():
            if residual.dtype != np.float32 or residual.ndim != 1:
                raise CheckpointError(
                    f"residual of {name!r} is {residual.dtype} {residual.shape}, expected flat float32"
                )
        self._residuals = {name: residual.copy() for name, residual in state.items()}
        self._staged.clear()


def redistribute(states: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    """Residuals for a new world size: every new rank gets the mean of the old ranks' residuals.

    Gradients are averaged over ranks, so what ``W`` ranks still owe the model is ``sum(r) / W``; if each new rank holds
    just that, its average is the same for every new world size. Nothing is lost, but who owes it is forgotten.

    Args:
        states: ``Feedback.state_dict()`` of all old ranks, at least one.
    """
    total: dict[str, npt.NDArray[np.float64]] = {}
    for state in states:
        for name, residual in state.items():
            total[name] = total[name] + residual if name in total else residual.astype(np.float64)
    return {name: (residual / len(states)).astype(np.float32) for name, residual in total.items()}
