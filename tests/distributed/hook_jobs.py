"""Scripts that keep their own DDP or FSDP2."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from efftrain.compression import parse_codec
from efftrain.errors import EfftrainError
from efftrain.parallel import compress_ddp, compress_fsdp, mesh
from tests.distributed.jobs import batch, digest, in_group, model_of, run, weights

NUM_STEPS = 6


@in_group
def ddp(codec: str, num_steps: int = NUM_STEPS, poison: int | None = None) -> dict[str, Any]:
    """A plain DDP script with the hook, in several buckets, beside a plan's."""
    model = model_of()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    hook = compress_ddp(wrapped, parse_codec(codec), momentum=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nans = []
    for step in range(num_steps):
        inputs, targets = batch(step, mesh.rank(), mesh.world_size())
        if poison == step and mesh.rank() == 1:
            inputs[0] = math.nan
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs), targets).backward()  # type: ignore[no-untyped-call]
        if any(p.grad is not None and p.grad.isnan().any() for p in model.parameters()):
            nans.append(step)
            continue
        optimizer.step()
    facts: dict[str, Any] = {
        "digest": digest(weights(model)),
        "weights": weights(model),
        "nans": nans,
        "stats": hook.stats(),
    }
    facts["plan"] = run(codec, num_steps=num_steps)["weights"] if poison is None else None
    facts["owed"] = sorted(hook.state_dict())
    return facts


@in_group
def fsdp(codec: str, poison: int | None = None) -> dict[str, Any]:
    """The same under ``fully_shard``, with and without codec."""
    facts: dict[str, Any] = {}
    for form in ("plain", "coded"):
        model: Any = model_of()
        device_mesh = init_device_mesh("cpu", (mesh.world_size(),))
        for part in (model.features, model):
            fully_shard(part, mesh=device_mesh)
        exchange = compress_fsdp(model, parse_codec(codec)) if form == "coded" else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        nans = []
        for step in range(NUM_STEPS):
            inputs, targets = batch(step, mesh.rank(), mesh.world_size())
            if poison == step and mesh.rank() == 1:
                inputs[0] = math.nan
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if exchange is not None:
                exchange.settle(ok=bool(torch.isfinite(whole)))
            if not torch.isfinite(whole):
                nans.append(step)
                continue
            optimizer.step()
        full = {name: p.full_tensor().detach().numpy().copy() for name, p in model.named_parameters()}
        facts[form] = {"weights": full, "nans": nans, "stats": exchange.stats() if exchange else {}}
        facts["owed"] = sorted(exchange.state_dict()) if exchange else []
    return facts


@in_group
def refused() -> list[str]:
    """What the two doors do not take."""

    def error_of(function: Any, *arguments: Any) -> str:
        try:
            function(*arguments)
        except EfftrainError as error:
            return str(error)
        return "accepted"

    return [
        error_of(compress_ddp, DistributedDataParallel(model_of()), parse_codec("Identity()")),
        error_of(compress_fsdp, model_of(), parse_codec("Int8()")),
        error_of(compress_fsdp, model_of(), parse_codec("LowRank(2)")),
    ]
