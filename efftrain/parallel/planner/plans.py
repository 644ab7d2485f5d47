"""Every plan that a number of processes can try, and what is said of those that cannot run."""

# N ranks in all

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from efftrain.compression import Codec, Identity, Int8, TopK, format_codec
from efftrain.errors import ConfigError
from efftrain.parallel.pipeline import SCHEDULES
from efftrain.parallel.plan import Plan


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
    if plan.pipeline > 1:
        found |= {"schedule": plan.schedule, "microbatches": plan.num_micro_batches}
    if not isinstance(plan.codec, Identity):
        found["codec"] = format_codec(plan.codec)
    return found


def enumerate_plans(base: Plan, world_size: int, codecs: Sequence[Codec] | None = None) -> Iterator[Plan | Refusal]:
    """Every plan of ``data x tensor x pipeline = world_size``, with every way to shard, schedule and codec.

    Args:
        base: Everything else.
        world_size: ``N``.
        codecs: Of the data axis; ``None`` takes none, ``Int8()``, ``TopK(0.01) >> Int8()`` and that of ``base``.
    """
    wanted = [Identity(), Int8(), TopK(0.01) >> Int8(), base.codec] if codecs is None else list(codecs)
    codecs = list(dict.fromkeys(wanted))
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            data = world_size // tensor // pipeline
            for shard in ("none", "grads", "full") if data > 1 else ("none",):
                for schedule in SCHEDULES if pipeline > 1 else (base.schedule,):
                    for codec in codecs if data > 1 else (Identity(),):
                        changes: dict[str, Any] = {
                            "data": data, "tensor": tensor, "pipeline": pipeline, "shard": shard,
                            "schedule": schedule, "codec": codec,
                            "microbatches": base.microbatches if pipeline > 1 else None,
                            "sequence": base.sequence and tensor > 1,
                            "tensor_styles": base.tensor_styles if tensor > 1 else {},
                            "shard_size": base.shard_size if shard != "none" else None,
                        }  # fmt: skip
                        try:
                            yield replace(base, **changes)
                        except ConfigError as error:
                            named = {
                                name: changes[name] for name in ("data", "tensor", "pipeline", "shard", "schedule")
                            }
                            yield Refusal({**named, "codec": format_codec(codec)}, str(error))


def reasons(refused: Sequence[Refusal]) -> list[tuple[str, int]]:
    """Why plans were refused, the most frequent reason first."""
    return Counter(refusal.reason for refusal in refused).most_common()


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
