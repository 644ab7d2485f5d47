"""How a process that a launcher started meets the others, the first time and after a restart.

Note [roll call]
    torchrun restarts all workers when one dies, but its store stays, with all that the dead ones wrote: gloo's
    addresses, NCCL's id. A new worker that reads an old address is refused there, or waits for nobody. (torch 2.13
    counts on a new store each time; torchrun shares one.) The count of restarts would not tell new from old: it stays
    the same when nodes join or leave. So whoever comes writes a word that nobody ever wrote, rank 0 reads all words
    back to all, and everyone answers to the list that has theirs. What is exchanged afterwards lies under the name of
    that list.
"""

import hashlib
import itertools
import os
import secrets
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from efftrain.errors import ConfigError, PeerError

_PREFIX = "efftrain/join"
_POLL_S = (0.005, 0.2)
_PATIENCE_S = 300.0
"""At least so long a restarted worker waits for the others. It costs nothing: torchrun ends all if one of them dies."""
_meetings = itertools.count(1)


def meet(timeout_s: float) -> tuple[Store, int, int]:
    """Find the others through the variables that the launcher set.

    Returns:
        A store that only the processes of this start use, this one's rank, and how many there are.

    Raises:
        PeerError: Somebody did not come in time.
    """
    limit_s = max(timeout_s, _PATIENCE_S) if _outlives_workers() else timeout_s
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=limit_s)))
    if not _outlives_workers():
        return store, rank, world_size
    return PrefixStore(call_roll(store, rank, world_size, limit_s), store), rank, world_size


def call_roll(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Agree with all who are alive on a name that no earlier start had. See Note [roll call].

    Raises:
        PeerError: Somebody did not answer in time; rank 0 knows who.
    """
    own = secrets.token_hex(8)
    store.set(f"{_PREFIX}/word/{rank}", own)
    words = [f"{_PREFIX}/word/{other}" for other in range(world_size)]
    answers = [f"{_PREFIX}/answer/{other}" for other in range(world_size)]
    give_up, pause = time.monotonic() + timeout_s, _POLL_S[0]
    while True:
        if rank == 0:
            _pass_on(store, words, f"{_PREFIX}/list")
        roll = _read(store, f"{_PREFIX}/list")
        if roll.split(",")[rank : rank + 1] == [own] and roll.count(",") == world_size - 1:
            name = hashlib.sha256(roll.encode()).hexdigest()[:16]
            store.set(answers[rank], name)
            if rank == 0 and all(_read(store, answer) == name for answer in answers):
                store.set(f"{_PREFIX}/go", name)
            if _read(store, f"{_PREFIX}/go") == name:
                return name
        if time.monotonic() > give_up:
            raise PeerError(
                f"after {timeout_s:g} s not all {world_size} ranks have joined{_missing(store, roll, answers)}"
            )
        time.sleep(pause)
        pause = min(1.5 * pause, _POLL_S[1])


def refuse_other_devices(store: Store, rank: int, world_size: int, kind: str) -> None:
    """Compare what the ranks train on before they choose a back end: NCCL and gloo would wait for each other.

    Args:
        store: From ``meet``; so are rank and number of ranks.
        kind: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: Some rank has another kind than rank 0; on all ranks.
    """
    store.set(f"{_PREFIX}/device/{rank}", kind)
    if rank == 0:
        kinds = [
            word.decode() for word in store.multi_get([f"{_PREFIX}/device/{other}" for other in range(world_size)])
        ]
        others = [f"rank {other} trains on {found}" for other, found in enumerate(kinds) if found != kind]
        store.set(f"{_PREFIX}/devices", f"{', '.join(others[:4])}, rank 0 on {kind}" if others else "equal")
    found = bytes(store.get(f"{_PREFIX}/devices")).decode()
    if found != "equal":
        raise ConfigError(
            f"{found}; start as many processes a machine as it has GPUs, or set CUDA_VISIBLE_DEVICES= on all of them"
        )


def launch_id(store: Store) -> str | None:
    """What tells this launch from others, the same after its workers were restarted; ``None`` if nothing restarts them.

    ``EFFTRAIN_LAUNCH_ID`` if something above torchrun restarts whole jobs (a cluster's queue), else a word that stays
    in torchrun's store. A process that meets the others twice does two things: the number of the meeting is part of it.
    """
    word = os.environ.get("EFFTRAIN_LAUNCH_ID")
    if not word and _outlives_workers():
        word = bytes(_agent_store(store).compare_set("efftrain/launch", "", secrets.token_hex(8))).decode()
    return f"{word}/{next(_meetings)}" if word else None


def _outlives_workers() -> bool:
    """Whether the store is the agent's, which is there before and after its workers."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agent_store(store: Store) -> Store:
    return store.underlying_store if isinstance(store, PrefixStore) else store


def _pass_on(store: Store, words: list[str], to: str) -> None:
    """Rank 0 makes the list of all words, again if somebody came anew."""
    if not store.check(words):
        return
    roll = ",".join(word.decode() for word in store.multi_get(words))
    if _read(store, to) != roll:
        store.set(to, roll)


def _read(store: Store, key: str) -> str:
    return bytes(store.get(key)).decode() if store.check([key]) else ""


def _missing(store: Store, roll: str, answers: list[str]) -> str:
    name = hashlib.sha256(roll.encode()).hexdigest()[:16]
    silent = [str(rank) for rank, answer in enumerate(answers) if _read(store, answer) != name]
    return (
        f"; no answer from rank {', '.join(silent[:8])}: did it start, and does it reach the others?" if silent else ""
    )
