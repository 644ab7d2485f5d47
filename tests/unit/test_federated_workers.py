"""Threads that run clients: order, errors, and the client that hangs."""

import threading
import time

import numpy as np
import pytest

from efftrain.federated.flower import Array, ArrayRecord, ClientApp, Context, Message, RecordDict
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.workers import in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int) -> None:
    def run(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * number

    assert list(in_order(run, range(30), workers=workers, timeout_s=10)) == [n * n for n in range(30)]


def test_workers_do_not_run_far_ahead() -> None:
    """So that 10,000 results need not lie in memory while the first is looked at."""
    started: list[int] = []
    results = in_order(started.append, range(100), workers=2)
    next(results)
    time.sleep(0.1)
    assert len(started) <= 12
    assert len(list(results)) == 99


def test_what_is_raised_is_raised_here_in_turn() -> None:
    def run(number: int) -> int:
        if number == 2:
            raise RuntimeError("battery empty")
        return number

    results = in_order(run, range(5), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="battery empty"):
        next(results)


def test_a_job_that_hangs_is_abandoned_and_the_others_go_on() -> None:
    release = threading.Event()

    def run(number: int) -> int:
        if number in (1, 2):
            release.wait(20)
        return number

    started = time.monotonic()
    assert list(in_order(run, range(6), workers=1, timeout_s=0.2)) == [0, None, None, 3, 4, 5]
    assert time.monotonic() - started < 5
    release.set()


def test_a_client_that_hangs_costs_its_own_reply() -> None:
    release = threading.Event()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            release.wait(20)
        context.state["seen"] = ArrayRecord({"x": message.content["arrays"]["x"]})
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, timeout_s=0.3)
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(2))})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "no reply within client.timeout_s (0.3 s)" in str(replies[1].error.reason)
    release.set()
    time.sleep(0.1)
    # What it leaves behind after it was given up does not count either.
    assert [bool(len(grid.context(node).state)) for node in grid.get_node_ids()] == [True, False, True]
