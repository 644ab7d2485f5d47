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

from efftrain.compression.codec import Codec, add, as_float32, refuse_non_finite
from efftrain.compression.wire import Floats, Payload
from efftrain.errors import CheckpointError, NonFiniteError


class Feedback:
    """What one sender (one rank, one client) still owes: residuals and, with momentum correction, velocities.

    ``encode`` stages the new state; ``commit`` makes it valid once the step is known to count, ``rollback`` drops it
    (another rank saw a NaN, the reply was not accepted). Until then the old state is untouched, at the price of a
    second copy of it, whose memory is used in turn.

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
        # Memory of states that are past. Fresh pages would cost more than the arithmetic in them.
        self._spare: dict[str, Floats] = {}

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
        velocity = self._velocity(name, values) if self.momentum else None
        owed = values if velocity is None else velocity
        residual, spare = self._old(f"residual/{name}", owed), self._spare.pop(f"residual/{name}", None)
        try:
            payload, left = self.codec.encode_with_residual(owed, residual, key=key, out=spare)
        except NonFiniteError:
            refuse_non_finite(values, f"parameter {name!r}")
            refuse_non_finite(add(owed, residual), f"parameter {name!r} plus what earlier steps left unsent")
            raise
        self._staged[f"residual/{name}"] = left
        if velocity is not None:
            self._staged[f"velocity/{name}"] = velocity
        return payload

    def commit(self) -> None:
        """Make all that is staged valid."""
        for name, value in self._staged.items():
            if name in self._state:
                self._spare[name] = self._state[name]
            self._state[name] = value
        self._staged.clear()

    def rollback(self) -> None:
        """Forget all that is staged."""
        self._spare.update(self._staged)
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
        self._spare.clear()

    def _velocity(self, name: str, values: Floats) -> Floats:
        """In memory of ours: that of ``values`` belongs to the caller (DDP fills it anew)."""
        old = self._old(f"velocity/{name}", values)
        out = self._spare.pop(f"velocity/{name}", None)
        if old is None:
            return values.copy()
        velocity = np.multiply(old, np.float32(self.momentum), out=out)
        return add(velocity, values, out=velocity)

    def _old(self, name: str, values: Floats) -> Floats | None:
        old = self._state.get(name)
        if old is not None and old.size != values.size:
            raise ValueError(f"{name!r} has {old.size} elements, its gradient {values.size}")
        return old


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
