"""What a federated run says of itself: per client, per round, and as a whole."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch

from efftrain.compression import format_codec
from efftrain.config import to_dict
from efftrain.federated.flower import VERSION
from efftrain.federated.recipe import FederatedRecipe

Outcome = Literal["trained", "dropped", "late", "surplus", "refused"]
"""``dropped``: failed or vanished. ``late``: no reply by the deadline. ``surplus``: its work came to nothing, for the
round was complete without it or was abandoned. ``refused``: its reply did not pass the gate."""


@dataclass(frozen=True, kw_only=True)
class ClientResult:
    """One client's part in one round."""

    round: int
    node_id: int
    partition: int | None
    """Number in the population; None where a client on a network gave no reply that says it."""
    device: str | None
    """Device profile, in simulation."""
    outcome: Outcome
    reason: str
    started_s: float
    """Seconds since the run began: virtual ones in simulation."""
    ended_s: float
    energy_j: float
    uplink_bytes: int
    num_samples: int
    loss: float | None
    """Mean training loss."""
    ram_bytes: int
    """What its training needs: planned by the compiler, else counted from the model; 0 if nobody knows."""
    device_ram_bytes: int
    """What its device has; 0 without one."""
    staleness: int
    """Updates of the global model between what it was sent and what its update was added to."""

    @property
    def fits(self) -> bool:
        """Whether the training is within the device's RAM; true where there is no device to compare with."""
        return not self.device_ram_bytes or self.ram_bytes <= self.device_ram_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON lines and CSV."""
        return {**vars(self), "fits": self.fits}


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """One round: figures of the global model after it, and what it cost."""

    round: int
    """From 1."""
    accuracy: float
    """Share of right answers. Measured by the clients: on each one's own test part, mean over them (each counts the
    same). Measured by the server: on the whole test set. Of the last measurement by then; see ``measured``."""
    accuracy_per_person: dict[str, float]
    """The clients' own figures, by person or number of the client; empty if the server measured."""
    loss: float
    """Test loss, measured as the accuracy."""
    measured: bool
    """Whether accuracy and loss are of this round's model."""
    train_loss: float
    """Loss during local training, mean over the samples of the cohort."""
    uplink_bytes: int
    """Records of all replies of the round, training and evaluation: encoded updates, metrics, names."""
    downlink_bytes: int
    """Records of all messages to clients. The model goes out uncompressed, for training and again for evaluation."""
    fp32_uplink_bytes: int
    """The updates taken as plain fp32: 4 bytes an element, no names, no headers."""
    clients_selected: int
    clients_trained: int
    """Clients whose update became part of the model."""
    clients_dropped: int
    """Clients that failed, vanished or did not reply in time, in training or in evaluation; in both counts once."""
    clients_surplus: int
    """Clients whose work came to nothing: the round was complete without it, or was abandoned."""
    replies_refused: int
    """Replies that did not pass the gate."""
    abandoned: bool
    """Fewer accepted replies than the quorum, or than the strategy makes a model of: the model stayed as it was."""
    staleness: float
    """Mean over the updates; 0 in synchronous rounds."""
    reasons: tuple[str, ...]
    """Why clients were dropped or refused, one line each; at most ``MAX_REASONS``."""
    virtual_s: float | None
    """Simulated seconds since the run began; None without devices."""
    energy_j: float | None
    """Joules of all devices in this round; None without devices."""
    train_s: float
    """Wall-clock seconds of selecting, sending, training and aggregating."""
    round_s: float
    """Wall-clock seconds, evaluation included."""
    clients: tuple[ClientResult, ...] = ()
    """The clients, in ``on_round`` only: a finished run keeps its rounds, not everybody in them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON lines; without the clients."""
        plain = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "clients"}
        return {**plain, "reasons": list(self.reasons)}


MAX_REASONS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class FederatedResult:
    """A finished run."""

    recipe: FederatedRecipe
    rounds: tuple[RoundResult, ...]
    accuracy_before: float
    """As ``RoundResult.accuracy``, of the model that the run started with."""
    accuracy_per_person_before: dict[str, float]
    state: dict[str, torch.Tensor]
    """The global model after the last round."""
    initial_sha256: str
    final_sha256: str
    """SHA-256 of ``state``; see ``state_sha256``."""
    first_round_s: float
    """Seconds from the start of the run to the end of its first round, the evaluations included."""
    wall_s: float
    """Seconds from start to end, the first evaluation included; of the last process if the run was resumed."""
    peak_ram_bytes: int
    """Largest ``ClientResult.ram_bytes`` of those that trained."""
    resumed_after: int = 0
    """Rounds that an earlier process had done."""

    @property
    def accuracy(self) -> float:
        """Accuracy after the last round."""
        return self.rounds[-1].accuracy

    @property
    def accuracy_per_round(self) -> list[float]:
        """Accuracy after each round; see ``RoundResult.accuracy``."""
        return [one.accuracy for one in self.rounds]

    @property
    def energy_j(self) -> float | None:
        """Joules of all devices in all rounds; None without devices."""
        joules = [one.energy_j for one in self.rounds if one.energy_j is not None]
        return sum(joules) if joules else None

    def total(self, figure: str) -> int:
        """Sum of an integer figure of ``RoundResult`` over all rounds."""
        return sum(int(getattr(one, figure)) for one in self.rounds)

    @property
    def uplink_ratio(self) -> float:
        """How many times fewer uplink bytes than the same updates as plain fp32."""
        return self.total("fp32_uplink_bytes") / max(1, self.total("uplink_bytes"))

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values for JSON, without the model. Times vary, the rest repeats with the seed."""
        return {
            "name": self.recipe.name,
            "rounds": len(self.rounds),
            "rounds_abandoned": self.total("abandoned"),
            "accuracy": self.accuracy,
            "accuracy_before": self.accuracy_before,
            "accuracy_per_round": self.accuracy_per_round,
            "accuracy_per_person": self.rounds[-1].accuracy_per_person,
            "accuracy_per_person_before": self.accuracy_per_person_before,
            "loss": self.rounds[-1].loss,
            "uplink_bytes": self.total("uplink_bytes"),
            "downlink_bytes": self.total("downlink_bytes"),
            "fp32_uplink_bytes": self.total("fp32_uplink_bytes"),
            "uplink_ratio": self.uplink_ratio,
            "clients_selected": self.total("clients_selected"),
            "clients_trained": self.total("clients_trained"),
            "clients_dropped": self.total("clients_dropped"),
            "clients_surplus": self.total("clients_surplus"),
            "replies_refused": self.total("replies_refused"),
            "virtual_s": self.rounds[-1].virtual_s,
            "energy_j": self.energy_j,
            "peak_ram_bytes_per_client": self.peak_ram_bytes,
            "train_s": float(np.mean([one.train_s for one in self.rounds])),
            "round_s": float(np.mean([one.round_s for one in self.rounds])),
            "first_round_s": self.first_round_s,
            "wall_s": self.wall_s,
            "engine": self.recipe.client.engine,
            "strategy": self.recipe.server.strategy,
            "codec": format_codec(self.recipe.uplink.build()),
            "seed": self.recipe.seed,
            "resumed_after": self.resumed_after,
            "initial_sha256": self.initial_sha256,
            "final_sha256": self.final_sha256,
            "flwr_version": VERSION,
            "recipe": to_dict(self.recipe),
        }


def state_sha256(state: Mapping[str, Any]) -> str:
    """SHA-256 over name, dtype, shape and bytes (little endian) of every tensor, by name.

    Args:
        state: Name -> NumPy array or torch tensor on the CPU.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = np.asarray(state[name])
        tensor = tensor.astype(tensor.dtype.newbyteorder("<"), order="C", copy=False)
        digest.update(f"{name} {tensor.dtype.name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
