"""The ``torch`` engine: one client after the other, eager PyTorch on the CPU."""

import math

import numpy as np
import torch
from torch import nn

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError, NonFiniteError
from efftrain.federated.engines import Measured, State, Trained
from efftrain.federated.engines.modules import fresh_state, loaded_module, state_of, torch_threads
from efftrain.federated.recipe import ClientConfig, ModelConfig

_EVALUATION_BATCH = 256

# Inputs are copied into torch's own memory (torch.tensor): NumPy's lies at any multiple of 16 bytes, and where a tensor
# lies decides the order in which some of MKL's kernels add up.


class TorchEngine:
    """See ``Engine``. One module a model and thread is kept and loaded again for every client."""

    def initial_state(self, model: ModelConfig, seed: int) -> State:
        """Fresh weights drawn with ``seed``; torch's global generator is left as it was."""
        return fresh_state(model, seed)

    def train(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig, seed: int) -> Trained:
        """Plain SGD over ``config.epochs`` shuffles of ``data``; the last batch of an epoch may be smaller.

        Raises:
            ConfigError: ``config.scheme`` is not ``fp32``.
            NonFiniteError: The loss became inf or NaN.
        """
        if config.scheme != "fp32":
            raise ConfigError(
                f"client.scheme is {config.scheme!r}, but the torch engine trains every parameter in fp32. Set "
                'client.engine="device", or leave client.scheme at "fp32".'
            )
        with torch_threads(config.threads):
            module = loaded_module(model, state).train()
            optimizer = torch.optim.SGD(module.parameters(), lr=config.lr, momentum=config.momentum)
            rng = np.random.default_rng(seed)
            total = 0.0
            for _ in range(config.epochs):
                order = rng.permutation(len(data))
                for start in range(0, len(data), config.batch_size):
                    inputs, targets = data.batch(order[start : start + config.batch_size])
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(module(torch.tensor(inputs)), torch.from_numpy(targets))
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    total += loss.item() * len(targets)
            if not math.isfinite(total):
                raise NonFiniteError(f"local training diverged: the loss is {total}. Lower client.lr ({config.lr}).")
            return Trained(state_of(module), total / (config.epochs * len(data)), len(data))

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """See ``Engine.evaluate``."""
        with torch_threads(config.threads), torch.no_grad():
            module = loaded_module(model, state).eval()
            right, total = 0, 0.0
            for start in range(0, len(data), _EVALUATION_BATCH):
                inputs, targets = data.batch(np.arange(start, min(start + _EVALUATION_BATCH, len(data))))
                logits, labels = module(torch.tensor(inputs)), torch.from_numpy(targets)
                right += int((logits.argmax(dim=1) == labels).sum())
                total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            return Measured(right / len(data), total / len(data), len(data))
