"""What the schedules of a pipeline idle and keep."""

# P ranks of the pipeline axis

from efftrain.parallel.pipeline import stages_a_rank


def bubble(schedule: str, size: int, forward: float, backward: float, tensor: float) -> float:
    """Idle time of a rank at the ends of a step.

    Source: Narayanan et al. (arXiv:2104.04473) for 1F1B, its interleaving and GPipe; Qi et al. (arXiv:2401.10241,
    arXiv:2405.15362) for zero bubble, where a backward pass is an input and a weight half of equal length; DeepSeek-AI
    (arXiv:2412.19437) for DualPipe, of whose V shape a rank holds two chunks.
    """
    whole = forward + backward + tensor
    ends = {
        "gpipe": whole,
        "1f1b": whole,
        "interleaved_1f1b": whole / stages_a_rank(schedule),
        "interleaved_zero_bubble": forward / stages_a_rank(schedule),
        "zbv": 0.0,
        "dualpipev": forward,
    }
    return (size - 1) * ends[schedule]


def in_flight(schedule: str, size: int, num: int, rank: int) -> float:
    """Micro-batches whose activations a rank keeps at once, at most; half of one are those of one of two stages.

    See ``bubble`` for the sources. Interleaved zero bubble as torch has it: the weight half follows later by a rank's
    number.
    """
    if schedule == "gpipe":
        return num
    if schedule == "1f1b":
        return min(num, size - rank)
    if schedule in ("zbv", "dualpipev"):
        return min(num, size + (0.5 if schedule == "dualpipev" else 0.0))
    later = rank if schedule == "interleaved_zero_bubble" else 0
    return min(num, (2 * (size - 1 - rank) + size + 1 + later) / 2)
