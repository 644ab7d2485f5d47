"""The ``torch`` engine: one client after the other, eager PyTorch on the CPU."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError, NonFiniteError
from efftrain.federated.engines import Measured, State, Trained
from efftrain.federated.recipe import ClientConfig, ModelConfig
from efftrain.models import build_model

_EVALUATION_BATCH = 256


class TorchEngine:
    """See ``Engine``. One module a model is kept and reloaded for every client."""

    def initial_state(self, model: ModelConfig, seed: int) -> State:
        """Fresh weights drawn with ``seed``; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _state_of(build_model(model.name))

    def train(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig, seed: int) -> Trained:
        """Plain SGD over ``config.epochs`` shuffles of ``data``; the last batch of an epoch may be smaller."""
        with _threads(config.threads):
            module = _load(model, state).train()
            optimizer = torch.optim.SGD(module.parameters(), lr=config.lr, momentum=config.momentum)
            rng = np.random.default_rng(seed)
            total = 0.0
            for _ in range(config.epochs):
                order = rng.permutation(len(data))
                for start in range(0, len(data), config.batch_size):
                    inputs, targets = data.batch(order[start : start + config.batch_size])
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(module(torch.from_numpy(inputs)), torch.from_numpy(targets))
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    total += loss.item() * len(targets)
            if not math.isfinite(total):
                raise NonFiniteError(f"local training diverged: the loss is {total}. Lower client.lr ({config.lr}).")
            return Trained(_state_of(module), total / (config.epochs * len(data)), len(data))

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """See ``Engine.evaluate``."""
        with _threads(config.threads), torch.no_grad():
            module = _load(model, state).eval()
            right, total = 0, 0.0
            for start in range(0, len(data), _EVALUATION_BATCH):
                inputs, targets = data.batch(np.arange(start, min(start + _EVALUATION_BATCH, len(data))))
                logits, labels = module(torch.from_numpy(inputs)), torch.from_numpy(targets)
                right += int((logits.argmax(dim=1) == labels).sum())
                total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            return Measured(right / len(data), total / len(data), len(data))


@lru_cache(maxsize=4)
def _module(model: ModelConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the weights are overwritten, the draw must not be noticed
        return build_model(model.name)


def _load(model: ModelConfig, state: State) -> nn.Module:
    module = _module(model)
    try:
        module.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()})
    except RuntimeError as error:
        raise ConfigError(f"these tensors are no {model.name}: {str(error).splitlines()[-1].strip()}") from error
    return module


def _state_of(module: nn.Module) -> State:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Compute with this many threads meanwhile."""
    before = torch.get_num_threads()
    if before == num_threads:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
