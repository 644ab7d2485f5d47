"""Every plan that a number of processes can try, and what is said of those that cannot run."""

# N ranks in all

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from efftrain.compression import Codec, Identity, Int8, TopK, format_codec
from efftrain.errors import ConfigError
from efftrain.parallel.pipeline import SCHEDULES
from efftrain.parallel.plan import Plan

Shard: TypeAlias = Literal["none", "grads", "full"]


@dataclass(frozen=True)
class Refusal:
    """A plan that cannot."""

    plan: dict[str, Any]
    reason: str


def describe(plan: Plan) -> dict[str, Any]:
    """The axes of a plan, as a recipe's ``[parallel]`` writes them; what has no effect is left out."""
    found: dict[str, Any] = {"data": plan.data, "tensor": plan.tensor, "pipeline": plan.pipeline}
    if plan.shard != "none":
        found["shard"] = plan.shard
        if plan.shard_size is not None:
            found["shard_size"] = plan.shard_size
    if plan.pipeline > 1:
        found |= {"schedule": plan.schedule, "microbatches": plan.num_micro_batches}
    if plan.checkpointing != "none":
        found["checkpointing"] = plan.checkpointing
    if not isinstance(plan.codec, Identity):
        found["codec"] = format_codec(plan.codec)
        if plan.sync.node_size > 1:
            found["node_size"] = plan.sync.node_size
    return found


def enumerate_plans(
    base: Plan, world_size: int, codecs: Sequence[Codec] | None = None, *, node_size: int = 1
) -> Iterator[Plan | Refusal]:
    """Every plan of ``data x tensor x pipeline = world_size``, with every way to shard, schedule and codec.

    Args:
        base: Everything else.
        world_size: ``N``.
        codecs: Of the data axis; ``None`` takes none, ``Int8()``, ``TopK(0.01) >> Int8()`` and that of ``base``.
        node_size: Ranks of a machine. If there are several machines, weights sharded over the ranks of each, and codecs
            between machines only, are tried, too.
    """
    wanted = [Identity(), Int8(), TopK(0.01) >> Int8(), base.codec] if codecs is None else list(codecs)
    codecs = list(dict.fromkeys(wanted))
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            data = world_size // tensor // pipeline
            for shard, shard_size in _ways_to_shard(base, data, node_size // tensor):
                for schedule in SCHEDULES if pipeline > 1 else (base.schedule,):
                    for codec, node in _ways_to_send(base, codecs, shard, data, tensor, node_size):
                        changes: dict[str, Any] = {
                            "data": data, "tensor": tensor, "pipeline": pipeline, "shard": shard,
                            "schedule": schedule, "codec": codec,
                            "microbatches": base.microbatches if pipeline > 1 else None,
                            "sequence": base.sequence and tensor > 1,
                            "tensor_styles": base.tensor_styles if tensor > 1 else {},
                            "shard_size": shard_size,
                            "sync": replace(base.sync, node_size=node),
                        }  # fmt: skip
                        try:
                            yield replace(base, **changes)
                        except ConfigError as error:
                            named = {
                                name: changes[name] for name in ("data", "tensor", "pipeline", "shard", "schedule")
                            }
                            yield Refusal({**named, "codec": format_codec(codec)}, str(error))


def _ways_to_shard(base: Plan, data: int, neighbors: int) -> Iterator[tuple[Shard, int | None]]:
    """How weights are divided over the data axis, and over how many of its ranks (``None``: all)."""
    yield "none", None
    for shard in ("grads", "full") if data > 1 else ():
        yield shard, base.shard_size
        if base.shard_size is None and 1 < neighbors < data and data % neighbors == 0:
            yield shard, neighbors


def _ways_to_send(
    base: Plan, codecs: Sequence[Codec], shard: Shard, data: int, tensor: int, node_size: int
) -> Iterator[tuple[Codec, int]]:
    """Codecs of the data axis, and the ranks of a node that sum up in fp32 in front of them."""
    for codec in codecs if data > 1 else (Identity(),):
        gathered = shard == "none" and codec.combine not in ("sum", "low_rank")
        yield codec, base.sync.node_size if gathered else 1
        if gathered and base.sync.node_size == 1 and tensor < node_size < data * tensor and node_size % tensor == 0:
            yield codec, node_size


def reasons(refused: Sequence[Refusal]) -> list[tuple[str, int]]:
    """Why plans were refused, the most frequent reason first."""
    return Counter(refusal.reason for refusal in refused).most_common()


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
