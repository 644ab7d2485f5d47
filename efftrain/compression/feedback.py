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
    """What one sender (one rank, one client) still owes: residuals and, with momentum correction, velocities.

    ``encode`` stages the new state; ``commit`` makes it valid once the step is known to count, ``rollback`` drops it
    (another rank saw a NaN, the reply was not accepted). Until then the old state is untouched, at the price of a
    second copy of it.

    With ``momentum``, the velocity ``v = momentum * v + g`` is kept here and sent in place of the gradient, and the
    optimizer at the other end runs without momentum. Momentum applied after a sparse exchange loses the discount of
    the entries that waited; applied before it, what arrives is what dense momentum SGD would have applied, only later.

    Args:
        codec: What encodes; the state is float32 whatever it is.
        momentum: In ``[0, 1)``; 0 sends plain gradients and keeps no velocity.

    Source: momentum correction of Lin et al., Deep Gradient Compression (arXiv:1712.01887), section 3.1.
        Differs: no momentum factor masking. It resets the velocity of every entry that is sent, which at small batches
        costs more than staleness does (``docs/log.md``).
    """

    def __init__(self, codec: Codec, *, momentum: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected [0, 1)")
        self.codec = codec
        self.momentum = momentum
        self._state: dict[str, Floats] = {}
        self._staged: dict[str, Floats] = {}

    def encode(self, name: str, flat: Any, *, key: int = 0) -> Payload:
        """Encode ``flat`` (or its velocity) plus the residual of parameter ``name`` and stage what is left over.

        Args:
            name: The parameter's name; always the same for the same parameter.
            flat: Shape ``(N,)``, as for ``Codec.encode``. Not changed.
            key: As for ``Codec.encode``.

        Raises:
            NonFiniteError: ``flat`` holds inf or NaN; the message has ``name``. No state changes.
            ValueError: ``N`` differs from that of the state.
        """
        values = as_float32(flat)
        refuse_non_finite(values, f"parameter {name!r}")
        if self.momentum:
            values = self._plus(f"velocity/{name}", values, self.momentum)
            # The first velocity is the gradient itself, whose memory belongs to the caller (DDP fills it anew).
            self._staged[f"velocity/{name}"] = values if f"velocity/{name}" in self._state else values.copy()
        values = self._plus(f"residual/{name}", values)
        payload = self.codec.encode(values, key=key)
        left = -self.codec.decode(payload, max_elements=values.size)
        left += values
        self._staged[f"residual/{name}"] = left
        return payload

    def commit(self) -> None:
        """Make all that is staged valid."""
        self._state.update(self._staged)
        self._staged.clear()

    def rollback(self) -> None:
        """Forget all that is staged."""
        self._staged.clear()

    def norm(self) -> float:
        """Euclidean norm over all residuals: how much is still waiting to be sent."""
        residuals = (value for name, value in self._state.items() if name.startswith("residual/"))
        return float(np.sqrt(sum(float(np.dot(r, r)) for r in residuals)))

    def state_dict(self) -> dict[str, Floats]:
        """``residual/<name>`` and ``velocity/<name>``, flat float32, copied. In every checkpoint, one per rank."""
        return {name: value.copy() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Floats]) -> None:
        """Replace the whole state.

        Raises:
            CheckpointError: An entry is not flat float32, or is no residual or velocity.
        """
        for name, value in state.items():
            if value.dtype != np.float32 or value.ndim != 1 or not name.startswith(("residual/", "velocity/")):
                raise CheckpointError(f"feedback entry {name!r} is {value.dtype} {value.shape}, expected flat float32")
        self._state = {name: value.copy() for name, value in state.items()}
        self._staged.clear()

    def _plus(self, name: str, values: Floats, factor: float = 1.0) -> Floats:
        old = self._state.get(name)
        if old is None:
            return values
        if old.size != values.size:
            raise ValueError(f"{name!r} has {old.size} elements, its gradient {values.size}")
        return values + np.float32(factor) * old


def redistribute(states: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    """Feedback for a new world size: every new rank gets the mean of the old ranks' residuals and velocities.

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
