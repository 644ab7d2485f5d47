"""How a rank computes: forward and backward passes over the model, or over the part of it that the rank holds."""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from efftrain.errors import ConfigError
from efftrain.training.exchange import Exchange
from efftrain.training.float8 import to_float8
from efftrain.training.objective import Objective

Precision = Literal["fp32", "bf16", "float8"]
"""Of the forward pass and of the products in the backward pass."""


class Compute(Protocol):
    """What is between a batch and its gradients.

    ``WholeModel`` holds all layers; ``efftrain.parallel`` has one for pipelines.
    """

    model: nn.Module
    """The parameters and buffers that this rank holds, under the names that they have in the whole model."""

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add the gradient of the mean loss of this replica's share to ``.grad``.

        Returns:
            That loss, a scalar without graph; 0 on the ranks of a replica but one.
        """

    def logits(self, inputs: Tensor) -> Tensor | None:
        """The model's output in evaluation mode, on one rank of a replica; ``None`` on the others. All call it."""


class WholeModel:
    """All layers on this rank, the batch in one piece or in micro-batches.

    Args:
        model: Its parameters are trained.
        exchange: May wrap it.
        objective: Gives the mean loss of a batch.
        micro_batches: Pieces of equal size whose gradients are accumulated.
        precision: Of the forward pass: ``bf16`` runs it under autocast, ``float8`` changes linear layers as well.
    """

    def __init__(
        self, model: nn.Module, exchange: Exchange, objective: Objective, *, micro_batches: int, precision: Precision
    ) -> None:
        self.model = model
        self._exchange, self._objective = exchange, objective
        self._micro_batches, self._bf16 = micro_batches, precision != "fp32"
        if precision == "float8":
            to_float8(model)
        self._wrapped = exchange.wrap(model)
        self._device = next(model.parameters()).device

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See ``Compute``; only the last micro-batch lets the exchange send."""
        n = self._micro_batches
        if len(inputs) % n:
            raise ConfigError(f"a batch of {len(inputs)} a rank cannot be cut into {n} micro_batches of equal size")
        self._wrapped.train()
        loss = torch.zeros((), device=self._device)
        pieces = list(zip(inputs.chunk(n), targets.chunk(n), strict=True))
        for part_inputs, part_targets in pieces[:-1]:
            with self._exchange.local_only():
                loss += self._piece(part_inputs, part_targets)
        return loss + self._piece(*pieces[-1])

    def logits(self, inputs: Tensor) -> Tensor:
        """See ``Compute``."""
        result: Tensor = self.model.eval()(inputs.to(self._device))
        return result

    def _piece(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            loss = self._objective(self._wrapped, inputs.to(self._device), targets.to(self._device))
        loss = loss / self._micro_batches
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
