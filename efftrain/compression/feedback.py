"""Error feedback: what a codec could not send, kept for the next step.

``decode(encode(g + r)) + r' == g + r``: exactly for sparse codecs and nearest rounding, within one ulp for stochastic
rounding.

Residuals are keyed by parameter name, never by bucket: DDP rebuilds its buckets after the first step, and a residual
kept for the old bucket would be added to other parameters.

Source: Seide et al., 1-bit SGD (Interspeech 2014); Karimireddy et al., Error Feedback Fixes SignSGD (arXiv:1901.09847).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        codec: What ``encode`` uses; the state is float32 whatever it is.
        momentum: In ``[0, 1)``; 0 sends plain gradients and keeps no velocity.
        masking: Momentum factor masking: the velocity of an entry that is sent starts again from zero, so that a late
            entry does not push in a stale direction. Costs a pass over the tensor, and accuracy at small batches
            (``docs/log.md``).
        clip_norm: Local clipping: a gradient of larger Euclidean norm is scaled down to it before it is added to what
            waits. On ``W`` ranks that clip at ``c`` together, it is ``c / sqrt(W)``.

    Source: Lin et al., Deep Gradient Compression (arXiv:1712.01887), sections 3.1 to 3.3.
        Differs: masking is off unless asked for; the clipped norm is that of each parameter, not of the whole model,
        since the first gradient leaves before the last is known.
    """

    def __init__(
        self,
        codec: Codec | None = None,
        *,
        momentum: float = 0.0,
        masking: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected [0, 1)")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm is {clip_norm}, expected more than 0")
        self.codec = codec
        self.momentum = momentum
        self.masking = masking and momentum > 0
        self.clip_norm = clip_norm
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
        if self.codec is None:
            raise ValueError("this Feedback was made without a codec; give it one, or use open() and Owed.encode")
        owed = self.open(name, flat)
        try:
            return owed.encode(self.codec, key=key)
        except NonFiniteError:
            for kind in ("residual", "velocity"):
                self._unstage(f"{kind}/{name}")
            raise

    def open(self, name: str, flat: Any, *, first: int = 0, size: int | None = None) -> "Owed":
        """What parameter ``name`` owes in this step, to be sent whole or in parts.

        Every element has to be dealt with before ``commit``: encoded, or taken by ``Owed.total`` and written to
        ``Owed.left``.

        Args:
            name: As for ``encode``.
            flat: This step's gradient of elements ``first`` and on, shape ``(N,)``. Not changed, and not copied
                without need.
            first: Where ``flat`` begins in the parameter: a rank may be in charge of a part of it only.
            size: Elements of the whole parameter; ``N`` if it is ``None``.

        Raises:
            ValueError: The parameter had another size before.
        """
        values = as_float32(flat)
        part = slice(first, first + values.size)
        size = values.size if size is None else size
        values = self._clipped(values)
        velocity = None
        if self.momentum:
            velocity = self._stage(f"velocity/{name}", size)[part]
            old = self._old(f"velocity/{name}", size)
            if old is None:
                np.copyto(velocity, values)
            else:
                np.multiply(old[part], np.float32(self.momentum), out=velocity)
                add(velocity, values, out=velocity)
        residual = self._old(f"residual/{name}", size)
        left = self._stage(f"residual/{name}", size)[part]
        return Owed(
            name,
            values if velocity is None else velocity,
            None if residual is None else residual[part],
            left,
            velocity if self.masking else None,
        )

    def commit(self) -> None:
        """Make all that is staged valid."""
        for name, value in self._staged.items():
            if name in self._state:
                self._spare[name] = self._state[name]
            self._state[name] = value
        self._staged.clear()

    def rollback(self) -> None:
        """Forget all that is staged."""
        for name in list(self._staged):
            self._unstage(name)

    def settle(self, ok: bool) -> None:
        """``commit`` a step that counts, ``rollback`` one that is skipped."""
        if ok:
            self.commit()
        else:
            self.rollback()

    def restore(self, name: str, part: slice | None = None) -> None:
        """``rollback`` of one parameter, or of a part of it that has no factor."""
        for key in (f"{kind}/{name}" for kind in ("residual", "velocity", "factor")):
            if part is None:
                self._unstage(key)
            elif key in self._staged:
                old = self._state.get(key)
                self._staged[key][part] = 0 if old is None else old[part]

    def norm(self) -> float:
        """Euclidean norm over all residuals: how much is still waiting to be sent.

        Six digits: the last bits of a sum over an array depend on where it lies in memory.
        """
        residuals = (self._state[name] for name in sorted(self._state) if name.startswith("residual/"))
        return float(f"{np.sqrt(sum(float(np.dot(r, r)) for r in residuals)):.6g}")

    def factor(self, name: str) -> Floats | None:
        """What ``stage_factor`` kept of the last step that counted, flat; ``None`` before the first."""
        return self._state.get(f"factor/{name}")

    def stage_factor(self, name: str, value: Floats) -> None:
        """Keep the low-rank factor from which the next step of parameter ``name`` starts; equal on all ranks."""
        self._staged[f"factor/{name}"] = np.ascontiguousarray(value.reshape(-1), np.float32)

    def state_dict(self) -> dict[str, Floats]:
        """``residual/<name>``, ``velocity/<name>``, ``factor/<name>``, flat float32, copied.

        In every checkpoint, one per rank.
        """
        return {name: value.copy() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Floats]) -> None:
        """Replace the whole state.

        Raises:
            CheckpointError: An entry is not flat float32, or is nothing that ``state_dict`` gives.
        """
        for name, value in state.items():
            known = name.startswith(("residual/", "velocity/", "factor/"))
            if value.dtype != np.float32 or value.ndim != 1 or not known:
                raise CheckpointError(f"feedback entry {name!r} is {value.dtype} {value.shape}, expected flat float32")
        self._state = {name: value.copy() for name, value in state.items()}
        self._staged.clear()
        self._spare.clear()

    def _clipped(self, values: Floats) -> Floats:
        if self.clip_norm is None:
            return values
        norm = float(np.sqrt(np.dot(values, values)))
        if not np.isfinite(norm):  # squares may overflow where the values do not; NaN is for the codec to refuse
            norm = float(np.linalg.norm(values.astype(np.float64)))
        return values if not norm > self.clip_norm else values * np.float32(self.clip_norm / norm)

    def _old(self, name: str, size: int) -> Floats | None:
        old = self._state.get(name)
        if old is not None and old.size != size:
            raise ValueError(f"{name!r} has {old.size} elements, its gradient {size}")
        return old

    def _stage(self, name: str, size: int) -> Floats:
        """Memory for the new state; a parameter in several parts asks once for each.

        Zeros: what another rank is in charge of stays so, and costs no memory that is never touched.
        """
        staged = self._staged.get(name)
        if staged is None:
            staged = self._spare.pop(name, None)
            if staged is None or staged.size != size:
                staged = np.zeros(size, np.float32)
            self._staged[name] = staged
        return staged

    def _unstage(self, name: str) -> None:
        staged = self._staged.pop(name, None)
        if staged is not None and not name.startswith("factor/"):
            self._spare[name] = staged


@dataclass(frozen=True)
class Owed:
    """What one parameter owes in one step: ``values + residual``. All arrays are float32, shape ``(N,)``.

    Attributes:
        name: Of the parameter.
        values: The gradient or the velocity of this step.
        residual: What earlier steps left unsent; ``None`` for nothing.
        left: Staged: what this step leaves unsent. To be written.
        masked: The velocity, if entries sent have to leave it.
    """

    name: str
    values: Floats
    residual: Floats | None
    left: Floats
    masked: Floats | None

    def encode(self, codec: Codec, part: slice = slice(None), *, key: int = 0) -> Payload:
        """Encode a part and write what it leaves unsent to ``left``.

        Raises:
            NonFiniteError: The part holds inf or NaN; the message has the parameter's name.
        """
        values, left = self.values[part], self.left[part]
        residual = None if self.residual is None else self.residual[part]
        try:
            payload, _ = codec.encode_with_residual(values, residual, key=key, out=left)
        except NonFiniteError:
            refuse_non_finite(values, f"parameter {self.name!r}")
            refuse_non_finite(add(values, residual), f"parameter {self.name!r} plus what earlier steps left unsent")
            raise
        if self.masked is not None:
            self.mask(part, add(values, residual))
        return payload

    def total(self, part: slice = slice(None), out: Floats | None = None) -> Floats:
        """``values + residual`` of a part, in new memory or in ``out``."""
        values = self.values[part]
        out = np.empty_like(values) if out is None else out
        return add(values, None if self.residual is None else self.residual[part], out=out)

    def mask(self, part: slice, before: Floats) -> None:
        """Momentum factor masking: entries of which something was sent (``before`` is not what is left) lose their
        velocity. Does nothing if the feedback has none, or no masking.
        """
        if self.masked is not None:
            self.masked[part][before != self.left[part]] = 0


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
