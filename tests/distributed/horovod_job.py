"""What each rank does under horovodrun: ``horovod_job.py CASE OUT``. It writes plain facts, the test judges them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.append(str(Path(__file__).parent.parent.parent))

from efftrain.errors import EfftrainError
from efftrain.parallel import mesh

Facts = dict[str, Any]


def collectives(device: torch.device) -> Facts:
    """Every collective against what it should give, computed on each rank alone."""
    moved = mesh.transport(device)
    rank, world_size = moved.rank, moved.world_size
    facts: Facts = {"rank": mesh.rank(), "world_size": mesh.world_size(), "wrong": []}

    def message(of: int, size: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * salt + of)
        if dtype.is_floating_point:
            return torch.randn(size, generator=generator, dtype=dtype)
        return torch.randint(0, 256, (size,), generator=generator, dtype=dtype)

    def same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        # The bits: NaN is not equal to itself, and -0.0 is equal to 0.0.
        if found.shape != expected.shape or found.dtype != expected.dtype:
            facts["wrong"].append(f"{name}: {found.dtype} {found.shape}")
        elif found.numpy().tobytes() != expected.numpy().tobytes():
            facts["wrong"].append(name)

    everyone = range(world_size)
    for dtype in (torch.uint8, torch.float32):
        for size in (1, 7, 4096, 300_001):
            found = moved.all_gather(message(rank, size, dtype)).wait()
            same(f"gather {dtype} {size}", found, torch.stack([message(of, size, dtype) for of in everyone]))
        # What rank a sends to rank b: uneven, and nothing at all from rank 0 to rank 1.
        for scale in (1, 5000):
            sizes = [
                [scale * ((3 * a + b) % 4 + (a == b)) if (a, b) != (0, 1) else 0 for b in everyone] for a in everyone
            ]
            sent = [torch.split(message(a, sum(sizes[a]), dtype), sizes[a]) for a in everyone]
            receive = [sizes[a][rank] for a in everyone]
            found = moved.all_to_all(torch.cat(sent[rank]), sizes[rank], receive).wait()
            same(f"to all {dtype} {scale}", found, torch.cat([sent[a][rank] for a in everyone]))

    for dtype in (torch.float32, torch.float64):
        for size in (1, 5, 100_003):
            values = message(rank, size, dtype)
            found = moved.all_reduce(values).wait()
            if found.data_ptr() != values.data_ptr():
                facts["wrong"].append(f"sum {dtype} {size} is not in place")
            # Two numbers have one sum; more are added in an order that is the library's.
            expected = torch.stack([message(of, size, dtype) for of in everyone]).sum(0)
            if world_size == 2:
                same(f"sum {dtype} {size}", values, expected)
            torch.testing.assert_close(values, expected)
            facts[f"sum {dtype} {size}"] = values.numpy().tobytes().hex()[:4096]
    part = torch.full((10,), float(rank))
    moved.all_reduce(part[2:5]).wait()
    same("sum of a slice", part[2:5], torch.full((3,), float(sum(everyone))))
    same("beside the slice", part[5:], torch.full((5,), float(rank)))

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        ours, theirs = (torch.arange(12).view(3, 4) * (of + 1) % 7 for of in (rank, 0))
        found = moved.broadcast(copy := ours.to(dtype)).wait()
        if found.data_ptr() != copy.data_ptr() or not torch.equal(copy, theirs.to(dtype)):
            facts["wrong"].append(f"broadcast {dtype}")
    same("broadcast of a number", moved.broadcast(torch.tensor(rank + 5)).wait(), torch.tensor(5))

    # Many at once, waited for from the last to the first.
    pending = []
    for n in range(12):
        pending.append(moved.all_gather(message(rank, 100 + n, torch.uint8, salt=n)))
        pending.append(moved.all_reduce(message(rank, 50, torch.float32, salt=n)))
        pending.append(moved.all_to_all(message(rank, 2 * world_size, torch.uint8), [2] * world_size, [2] * world_size))
    results = [one.wait() for one in reversed(pending)][::-1]
    for n in range(12):
        gathered = torch.stack([message(of, 100 + n, torch.uint8, salt=n) for of in everyone])
        same(f"gather {n} of many", results[3 * n], gathered)
        added = torch.stack([message(of, 50, torch.float32, salt=n) for of in everyone]).sum(0)
        torch.testing.assert_close(results[3 * n + 1], added)
        swapped = torch.cat([message(of, 2 * world_size, torch.uint8)[2 * rank : 2 * rank + 2] for of in everyone])
        same(f"to all {n} of many", results[3 * n + 2], swapped)

    try:
        moved.split(1)
    except EfftrainError as error:
        facts["split"] = str(error)
    return facts


def lost(device: torch.device) -> Facts:
    """Rank 1 is killed, or stands still; rank 0 waits for it."""
    moved = mesh.transport(device)
    moved.all_reduce(torch.ones(3)).wait()
    if moved.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.all_reduce(torch.ones(3)).wait()
    return {}


def still(device: torch.device) -> Facts:
    """Rank 1 is alive and never comes."""
    moved = mesh.transport(device)
    moved.all_reduce(torch.ones(3)).wait()
    if moved.rank == 1:
        time.sleep(4)
    moved.all_reduce(torch.ones(3)).wait()
    return {}


def stopped(device: torch.device) -> Facts:
    """Rank 1 and all its threads stand still, longer than the limit."""
    moved = mesh.transport(device)
    moved.all_reduce(torch.ones(3)).wait()
    if moved.rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    moved.all_reduce(torch.ones(3)).wait()
    return {}


def raised(device: torch.device) -> Facts:
    """Rank 1 has an error of its own."""
    moved = mesh.transport(device)
    moved.all_reduce(torch.ones(3)).wait()
    if moved.rank == 1:
        raise ValueError("a mistake of rank 1")
    moved.all_reduce(torch.ones(3)).wait()
    return {}


def latency(device: torch.device) -> Facts:
    """Seconds of one small gather after the other, and of many at once."""
    moved = mesh.transport(device)
    small, large = torch.zeros(100, dtype=torch.uint8), torch.zeros(4_000_000, dtype=torch.uint8)
    facts: Facts = {}
    for name, message, at_once in (("one", small, 1), ("twenty", small, 20), ("large", large, 1)):
        started = time.perf_counter()
        for _ in range(50):
            for pending in [moved.all_gather(message) for _ in range(at_once)]:
                pending.wait()
        facts[name] = (time.perf_counter() - started) / 50
    return facts


def write(out: Path, facts: Facts) -> None:
    """The launcher ends all ranks when one fails: nothing half written may be read."""
    rank = os.environ.get("HOROVOD_RANK", os.environ.get("RANK", "0"))
    part = out / f"{rank}.part"
    part.write_text(json.dumps(facts))
    part.rename(out / f"{rank}.json")


CASES: dict[str, Callable[[torch.device], Facts]] = {
    "collectives": collectives,
    "lost": lost,
    "still": still,
    "stopped": stopped,
    "raised": raised,
    "latency": latency,
}


def main(case: str, out: Path, timeout_s: float) -> None:
    """One case in the group; errors with a remedy are facts too."""
    torch.set_num_threads(1)
    # horovodrun ends the others when one fails; they shall say first what they saw.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    backend: Literal["torch", "horovod"] = "horovod" if "HOROVOD_SIZE" in os.environ else "torch"
    started = time.monotonic()
    facts: Facts = {}
    try:
        with mesh.process_group(backend=backend, timeout_s=timeout_s) as device:
            started = time.monotonic()
            facts = CASES[case](device)
    except EfftrainError as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    facts["seconds"] = time.monotonic() - started
    write(out, facts)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
