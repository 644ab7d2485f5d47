"""Threads that run clients: results in the order asked for, and a client that hangs costs only itself."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 4
"""Results that a worker may be ahead of whoever takes them: enough to keep it busy, few enough to stay small."""
_STOP_S = 5.0
_THREAD_NAME = "efftrain-client"


def in_order(
    run: Callable[[T], R], items: Sequence[T], *, workers: int = 1, timeout_s: float | None = None
) -> Iterator[R | None]:
    """``map(run, items)`` with threads.

    Args:
        run: Called once an item, from any thread. What it raises is raised here, when that item's turn comes.
        items: All of them.
        workers: Number of threads. One without a timeout needs no thread: then ``run`` is called right here.
        timeout_s: An item that takes longer gives None, and its thread is abandoned: nobody can end a thread in
            Python, but what it returns later is dropped.

    Yields:
        The results in the order of ``items``.
    """
    if timeout_s is None and workers == 1:
        yield from map(run, items)
        return
    work = _Work(run, items, workers, timeout_s)
    try:
        for number in range(len(items)):
            yield work.take(number)
    finally:
        work.stop()


def are_computing() -> bool:
    """Whether threads that were given up still compute; waits for a moment for their end."""
    end = time.monotonic() + _STOP_S
    left = [thread for thread in threading.enumerate() if thread.name == _THREAD_NAME]
    for thread in left:
        thread.join(max(0.0, end - time.monotonic()))
    return any(thread.is_alive() for thread in left)


class _Work(Generic[T, R]):
    """A list of jobs that threads take from the front."""

    def __init__(self, run: Callable[[T], R], items: Sequence[T], workers: int, timeout_s: float | None) -> None:
        self._run, self._items, self._timeout_s = run, items, timeout_s
        self._changed = threading.Condition()
        self._next = 0
        self._taken = 0
        # One worker starts when it is asked: two threads that take turns with Python's lock cost more than they save.
        self._ahead = _AHEAD * workers if workers > 1 else 1
        # Whoever takes the results is woken for several at a time: each time threads change places costs Python's lock.
        self._enough = max(1, self._ahead // 2)
        self._started: dict[int, float] = {}
        self._serving: dict[int, threading.Thread] = {}
        self._threads: list[threading.Thread] = []
        self._results: dict[int, R | None] = {}
        self._errors: dict[int, BaseException] = {}
        self._abandoned: set[int] = set()
        self._stopped = False
        for _ in range(min(workers, len(items))):
            self._spawn()

    def take(self, number: int) -> R | None:
        """The result of one job; the numbers come in order."""
        with self._changed:
            self._taken = number
            self._changed.notify_all()
            while number not in self._results and number not in self._errors:
                self._abandon_late()
                if number in self._results:
                    break
                self._changed.wait(self._patience())
            if number in self._errors:
                raise self._errors.pop(number)
            return self._results.pop(number)

    def stop(self) -> None:
        """Let the threads end after the job they are at, and wait for them for a moment: a process that ends while one
        of its threads computes is aborted."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            busy = [thread for thread in self._threads if thread.is_alive()]
        end = time.monotonic() + _STOP_S
        for thread in busy:
            thread.join(max(0.0, end - time.monotonic()))

    def _spawn(self) -> None:
        # A daemon: a thread that hangs must not keep the process from ending.
        thread = threading.Thread(target=self._serve, name=_THREAD_NAME, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _abandon_late(self) -> None:
        if self._timeout_s is None:
            return
        now = time.monotonic()
        for number in [n for n, at in self._started.items() if now - at >= self._timeout_s]:
            del self._started[number]
            self._abandoned.add(number)
            self._results[number] = None
            self._threads.remove(self._serving.pop(number))  # nobody waits for it any more
            self._spawn()

    def _patience(self) -> float | None:
        """Seconds until the next job may be late. Never for ever with a limit: a job may start meanwhile."""
        if self._timeout_s is None:
            return None
        oldest = min(self._started.values(), default=time.monotonic())
        return max(0.0, oldest + self._timeout_s - time.monotonic()) + 1e-3

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and self._next - self._taken >= self._ahead and self._next < len(self._items):
                    self._changed.wait()
                if self._stopped or self._next >= len(self._items):
                    self._changed.notify_all()  # there may never be enough
                    return
                number = self._next
                self._next += 1
                self._started[number] = time.monotonic()
                self._serving[number] = threading.current_thread()
            result, error = None, None
            try:
                result = self._run(self._items[number])
            except BaseException as caught:
                error = caught
            with self._changed:
                if number in self._abandoned:  # another thread has taken this one's place
                    return
                del self._started[number], self._serving[number]
                if error is not None:
                    self._errors[number] = error
                else:
                    self._results[number] = result
                if len(self._results) + len(self._errors) >= self._enough:
                    self._changed.notify_all()
