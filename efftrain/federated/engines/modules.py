"""Torch modules for the engines: fresh weights of a seed, and one module a thread and model that is loaded again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from efftrain.errors import ConfigError
from efftrain.federated.engines import State
from efftrain.federated.recipe import ModelConfig
from efftrain.models import build_model

_MODULES_KEPT = 4
_building = threading.Lock()
"""Building draws from torch's global generator, which is put back afterwards: one at a time."""
_kept = threading.local()


def fresh_state(model: ModelConfig, seed: int) -> State:
    """Weights drawn with ``seed``; torch's global generator is left as it was."""
    with _building, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return state_of(build_model(model.name, **model.options))


def blank_module(model: ModelConfig) -> nn.Module:
    """This thread's module of that model, with the weights of whoever used it last."""
    modules: list[tuple[ModelConfig, nn.Module]] = _kept.__dict__.setdefault("modules", [])
    for known, module in modules:
        if known == model:
            return module
    with _building, torch.random.fork_rng(devices=[]):  # the weights are overwritten, the draw must not be noticed
        module = build_model(model.name, **model.options)
    modules.append((model, module))
    del modules[:-_MODULES_KEPT]
    return module


def loaded_module(model: ModelConfig, state: State) -> nn.Module:
    """This thread's module of that model, holding ``state``.

    Raises:
        ConfigError: The tensors are not those of the model.
    """
    module = blank_module(model)
    own = _arrays(module)
    for name in own.keys() | state.keys():
        found, expected = (tensors[name].shape if name in tensors else "nothing" for tensors in (state, own))
        if found != expected:
            raise ConfigError(f"these tensors are no {model.name}: {name!r} has shape {found}, expected {expected}")
    for name, tensor in own.items():
        np.copyto(tensor, state[name], casting="same_kind")
    return module


def state_of(module: nn.Module) -> State:
    """A copy of a module's tensors."""
    return {name: tensor.copy() for name, tensor in _arrays(module).items()}


def _arrays(module: nn.Module) -> State:
    """A module's tensors themselves, seen as arrays: a fifth of the time of ``load_state_dict``."""
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Compute with this many threads an operator meanwhile."""
    before = torch.get_num_threads()
    if before == num_threads:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
