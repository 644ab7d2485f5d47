"""The in-process grid under stock Flower parts: a stock ClientApp, FedAvg, Message API."""

import numpy as np
import pytest

from efftrain.compression import TopK
from efftrain.errors import ConfigError
from efftrain.federated.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    FedAvg,
    Message,
    MetricRecord,
    RecordDict,
    quiet,
)
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.uplink import Mod, UplinkGrid, uplink_mod


def counting_app(*mods: Mod) -> ClientApp:
    """Adds 1 + partition to the model, and counts its trainings in its state. Partition 2 raises if told to."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        times = context.state.config_records.get("times", ConfigRecord({"times": 0}))
        times["times"] = int(times["times"]) + 1  # type: ignore[arg-type]
        context.state["times"] = times
        if context.run_config.get("fails") == partition:
            raise RuntimeError("battery empty")
        weights = message.content.array_records["arrays"]["w"].numpy() + 1 + partition
        message.content.config_records["config"]["lr"] = -1.0  # a client may do this to its own copy only
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(weights)}),
                "metrics": MetricRecord({"num-examples": 1 + partition, "times": times["times"]}),  # type: ignore[dict-item]
            }
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        weights = message.content.array_records["arrays"]["w"].numpy()
        metrics = MetricRecord({"num-examples": 1, "sum": float(weights.sum())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def model() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(3, np.float32))})


def messages(grid: InProcessGrid, kind: str = "train") -> list[Message]:
    content = RecordDict({"arrays": model(), "config": ConfigRecord({"lr": 0.1})})
    return [Message(content, node_id, kind) for node_id in grid.get_node_ids()]


def test_stock_fedavg_runs_unchanged() -> None:
    grid = InProcessGrid(counting_app, 4)
    with quiet():
        result = FedAvg().start(grid, model(), num_rounds=2)
    # Weights 1..4 and additions 1..4: each round adds (1 + 4 + 9 + 16) / 10 = 3.
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.full(3, 6.0), rtol=1e-6)
    assert result.train_metrics_clientapp[2]["times"] == pytest.approx(2)
    assert result.evaluate_metrics_clientapp[2]["sum"] == pytest.approx(18)


def test_stock_fedavg_with_compressed_uplinks() -> None:
    """The example of ``federated/README.md``: a mod on the client, a grid around the grid, nothing else changes."""
    grid = UplinkGrid(
        InProcessGrid(counting_app(uplink_mod), 4), TopK(1.0), train_metrics=("times",), evaluate_metrics=("sum",)
    )
    with quiet():
        result = FedAvg().start(grid, model(), num_rounds=2)
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.full(3, 6.0), rtol=1e-6)
    assert result.evaluate_metrics_clientapp[2]["sum"] == pytest.approx(18)
    assert not grid.take_traffic().refused


def test_state_is_kept_per_node() -> None:
    grid = InProcessGrid(counting_app(), 3)
    first, *_ = messages(grid)
    grid.send_and_receive([first])
    replies = grid.send_and_receive(messages(grid))
    assert [reply.content["metrics"]["times"] for reply in replies] == [2, 1, 1]


def test_raising_client_gives_an_error_reply_and_harms_nobody() -> None:
    grid = InProcessGrid(counting_app(), 4, run_config={"fails": 2})
    replies = grid.send_and_receive(messages(grid))
    assert [reply.has_error() for reply in replies] == [False, False, True, False]
    assert "RuntimeError: battery empty" in str(replies[2].error.reason)
    assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()
    # What it changed before it raised is undone: a client's state moves on only with its reply.
    assert "times" not in grid.context(grid.get_node_ids()[2]).state
    with quiet():
        result = FedAvg().start(grid, model(), num_rounds=1)
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.full(3, (1 + 4 + 16) / 7), rtol=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_client_that_asks_to_exit_ends_nothing_but_its_reply(workers: int) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise SystemExit(3)

    grid = InProcessGrid(app, 4, workers=workers, timeout_s=60)
    replies = grid.send_and_receive(messages(grid))
    assert ["SystemExit: 3" in str(reply.error.reason) for reply in replies] == [True] * 4


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_wrong_with_all_clients_can_be_raised(workers: int) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ConfigError("no client can do this")

    grid = InProcessGrid(app, 4, workers=workers, fatal=(ConfigError,))
    with pytest.raises(ConfigError, match=r"^no client can do this$"):
        grid.send_and_receive(messages(grid))


def test_clients_do_not_share_a_message() -> None:
    grid = InProcessGrid(counting_app(), 2)
    sent = messages(grid)
    assert not any(reply.has_error() for reply in grid.send_and_receive(sent))
    assert [message.content["config"]["lr"] for message in sent] == [0.1, 0.1]


def test_nothing_runs_before_it_is_pulled_and_a_reply_is_given_once() -> None:
    grid = InProcessGrid(counting_app(), 2)
    ids = grid.push_messages(messages(grid))
    assert "times" not in grid.context(grid.get_node_ids()[0]).state
    assert len(grid.pull_messages([*ids, "unknown"])) == 2
    assert grid.pull_messages(ids) == []


def test_a_node_that_is_not_there_gives_an_error_reply() -> None:
    grid = InProcessGrid(counting_app(), 2)
    [reply] = grid.send_and_receive([Message(RecordDict(), 7, "train")])
    assert "there is no node 7" in str(reply.error.reason)


def test_a_reply_that_is_none_gives_an_error_reply() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return "a model"  # type: ignore[return-value]

    [reply] = (grid := InProcessGrid(app, 1)).send_and_receive(messages(grid))
    assert "expected a reply to its message" in str(reply.error.reason)


def test_no_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        InProcessGrid(counting_app, 0)
