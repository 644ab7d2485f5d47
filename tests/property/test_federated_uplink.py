"""The uplink and its gate, for all inputs: nothing is lost, nothing hostile gets in, the others are never harmed."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.compression import Codec, Identity, Int8, TopK
from efftrain.compression.wire import pack
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
)
from efftrain.federated.gate import PAYLOAD_STYPE
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import GateConfig
from efftrain.federated.uplink import RESIDUAL, STAGED, Traffic, UplinkGrid, uplink_mod

Floats = npt.NDArray[np.float32]
SHAPES = {"w": (5, 8), "b": (3,)}
SENT: dict[str, npt.NDArray[Any]] = {
    "w": np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8),
    "b": np.ones(3, np.float32),
    "steps": np.array(7),
}
Attack = Callable[[RecordDict], object]


def record(tensors: dict[str, npt.NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(tensor)) for name, tensor in tensors.items()})


def app_with(update: Callable[[int, int], dict[str, Floats]], attack: Callable[[int, int], Attack | None]) -> ClientApp:
    """A client that adds ``update(partition, round)`` to the model; ``attack`` changes its reply on the wire."""

    def hostile_mod(message: Message, context: Context, call_next: Any) -> Message:
        where = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])  # type: ignore[arg-type]
        reply: Message = call_next(message, context)
        change = attack(*where)
        if change is not None:
            change(reply.content)
        return reply

    app = ClientApp(mods=[hostile_mod, uplink_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        model = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        for name, delta in update(int(context.node_config["partition-id"]), number).items():
            model[name] = model[name] + delta
        metrics = MetricRecord({"num-examples": 10, "loss": 0.5})
        return Message(RecordDict({"arrays": record(model), "metrics": metrics}), reply_to=message)

    return app


def exchange(
    app: ClientApp, codec: Codec, num_nodes: int = 2, rounds: int = 1, sent: dict[str, Any] | None = None
) -> tuple[list[list[Message]], list[Traffic], InProcessGrid]:
    inner = InProcessGrid(app, num_nodes)
    grid = UplinkGrid(inner, codec, GateConfig(max_samples=1000, max_update_norm=1000), train_metrics=("loss",))
    replies, traffic = [], []
    for number in range(1, rounds + 1):
        config = ConfigRecord({"server-round": number})
        content = RecordDict({"arrays": record(sent or SENT), "config": config})
        replies.append(grid.send_and_receive([Message(content, node, "train") for node in inner.get_node_ids()]))
        traffic.append(grid.take_traffic())
    return replies, traffic, inner


def honest_update(partition: int, number: int) -> dict[str, Floats]:
    rng = np.random.default_rng([partition, number])
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


CODECS = [Identity(), Int8(block=16), TopK(0.2) >> Int8(block=4), TopK(0.5)]


# Nothing is lost --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    accepted=st.lists(st.booleans(), min_size=1, max_size=6),
    ratio=st.sampled_from([0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_decoded_and_residual_are_all_updates_that_were_taken(accepted: list[bool], ratio: float, seed: int) -> None:
    """Exact: the updates are small whole numbers, so that no float sum rounds, and TopK sends values as they are."""
    rng = np.random.default_rng(seed)
    true = [
        {name: rng.integers(-99, 100, shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in accepted
    ]

    def attack(_: int, number: int) -> Attack | None:
        return (
            None
            if accepted[number - 1]
            else lambda content: content.metric_records["metrics"].update({"num-examples": -1})
        )

    zeros: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    replies, traffic, grid = exchange(
        app_with(lambda _, number: true[number - 1], attack), TopK(ratio), 1, len(accepted), zeros
    )
    assert [len(one.refused) for one in traffic] == [int(not taken) for taken in accepted]
    state = grid.context(grid.get_node_ids()[0]).state
    residuals = state.array_records.get(STAGED if accepted[-1] else RESIDUAL, ArrayRecord())
    for name in SHAPES:
        decoded = [one.content.array_records["arrays"][name].numpy() for [one] in replies if not one.has_error()]
        kept = residuals.get(f"residual/{name}")
        rest = 0 if kept is None else kept.numpy().reshape(SHAPES[name])
        total = sum(update[name] for update, taken in zip(true, accepted, strict=True) if taken)
        np.testing.assert_array_equal(sum(decoded) + rest, total)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_any_codec_loses_only_rounding(codec: Codec) -> None:
    """20 rounds of float sums: each of the 2 * 20 additions rounds by at most 2**-24 of values below 32."""
    rounds = 20
    zeros: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    replies, traffic, grid = exchange(app_with(honest_update, lambda *_: None), codec, 2, rounds, zeros)
    assert not any(one.refused or one.dropped for one in traffic)
    for partition, node in enumerate(grid.get_node_ids()):
        for name, shape in SHAPES.items():
            decoded = sum(one[partition].content.array_records["arrays"][name].numpy() for one in replies)
            rest = grid.context(node).state.array_records[STAGED][f"residual/{name}"].numpy().reshape(shape)
            total = sum(honest_update(partition, number)[name] for number in range(1, rounds + 1))
            np.testing.assert_allclose(decoded + rest, total, rtol=0, atol=40 * 32 * 2.0**-24)


def test_a_client_without_an_order_replies_as_it_always_did() -> None:
    inner = InProcessGrid(app_with(honest_update, lambda *_: None), 1)
    content = RecordDict({"arrays": record(SENT), "config": ConfigRecord({"server-round": 1})})
    [reply] = inner.send_and_receive([Message(content, inner.get_node_ids()[0], "train")])
    np.testing.assert_array_equal(
        reply.content.array_records["arrays"]["b"].numpy(), SENT["b"] + honest_update(0, 1)["b"]
    )


def test_counters_stay_and_bytes_are_those_of_the_payloads() -> None:
    codec = TopK(0.2) >> Int8(block=4)
    [[reply, _]], [traffic], _ = exchange(app_with(honest_update, lambda *_: None), codec)
    assert reply.content.array_records["arrays"]["steps"].numpy() == 7
    one = codec.encoded_bytes(40) + codec.encoded_bytes(3) + len("w" + "b") + 2 * 8 + len("num-examples" + "loss")
    assert traffic.uplink_bytes == 2 * one
    assert traffic.fp32_uplink_bytes == 2 * 4 * 43


def test_feedback_can_be_off() -> None:
    inner = InProcessGrid(app_with(honest_update, lambda *_: None), 1)
    grid = UplinkGrid(inner, TopK(0.1), feedback=False, train_metrics=("loss",))
    content = RecordDict({"arrays": record(SENT), "config": ConfigRecord({"server-round": 1})})
    [reply] = grid.send_and_receive([Message(content, inner.get_node_ids()[0], "train")])
    assert not reply.has_error()
    assert not inner.context(inner.get_node_ids()[0]).state


# Nothing hostile gets in ------------------------------------------------------------------------------------------


def outcome(attack: Attack | None, codec: Codec) -> tuple[dict[str, Any], Traffic]:
    """FedAvg over an attacker (partition 0) and two honest clients."""
    app = app_with(honest_update, lambda partition, _: attack if partition == 0 else None)
    [replies], [traffic], _ = exchange(app, codec, 3)
    arrays, metrics = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    return {name: array.numpy() for name, array in arrays.items()}, traffic


def without_the_attacker(codec: Codec) -> dict[str, Any]:
    def silent(*_: Any) -> None:
        raise RuntimeError("not there")

    return outcome(silent, codec)[0]


def check_refused(attack: Attack, codec: Codec, reason: str = "") -> None:
    model, traffic = outcome(attack, codec)
    assert [one.node_id for one in traffic.refused] == [1000]
    assert reason in traffic.refused[0].reason, traffic.refused[0].reason
    assert len(traffic.trained) == 2
    for name, tensor in without_the_attacker(codec).items():
        np.testing.assert_array_equal(model[name], tensor)


def with_data(name: str, data: bytes, stype: str = PAYLOAD_STYPE) -> Attack:
    def change(content: RecordDict) -> None:
        content.array_records["arrays"][name] = Array("uint8", (len(data),), stype, data)

    return change


@settings(max_examples=150)
@given(
    codec=st.sampled_from(CODECS),
    name=st.sampled_from(sorted(SHAPES)),
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4, unique_by=lambda e: e[0]
    ),
    cut=st.integers(-3, 3),
)
def test_mutated_bytes_are_refused(codec: Codec, name: str, edits: list[tuple[int, int]], cut: int) -> None:
    def change(content: RecordDict) -> None:
        data = bytearray(content.array_records["arrays"][name].data)
        for place, mask in edits:
            data[place % len(data)] ^= mask
        changed = bytes(data[:cut] if cut < 0 else data + b"\0" * cut)
        if changed == content.array_records["arrays"][name].data:  # two edits undid each other
            changed = changed[::-1]
        with_data(name, changed)(content)

    check_refused(change, codec)


@settings(max_examples=60)
@given(codec=st.sampled_from(CODECS), data=st.binary(max_size=300))
def test_random_bytes_are_refused(codec: Codec, data: bytes) -> None:
    check_refused(with_data("w", data), codec)


@settings(max_examples=60)
@given(
    count=st.one_of(
        st.integers(-(2**63), 0),
        st.integers(1001, 2**63 - 1),
        st.floats(allow_nan=True, allow_infinity=True),
        st.lists(st.integers(0, 9), max_size=3),
    )
)
def test_hostile_counts_are_refused(count: Any) -> None:
    check_refused(
        lambda content: content.metric_records["metrics"].update({"num-examples": count}), TopK(0.5), "num-examples"
    )


def _identity_payload(values: list[float]) -> bytes:
    """A payload with a right checksum that ``encode`` would never write."""
    floats = np.array(values, "<f4")
    return bytes(pack(Identity.codec_id, b"", floats.size, [floats.view(np.uint8)]))


def _drop(name: str) -> Attack:
    return lambda content: content.array_records["arrays"].pop(name)


ATTACKS: list[tuple[str, Attack, str]] = [
    ("NaN", with_data("b", _identity_payload([np.nan, 0, 0])), "inf or NaN"),
    ("inf", with_data("b", _identity_payload([0, np.inf, 0])), "inf or NaN"),
    ("huge", with_data("b", _identity_payload([3e38, 0, 0])), "norm 3e+38"),
    ("too few elements", with_data("b", _identity_payload([1])), "takes 22 bytes, expected 30"),
    ("too many elements", with_data("b", _identity_payload([1] * 40)), "expected 30"),
    ("a bomb", with_data("b", struct.pack("<2sBBBBQI", b"EF", 1, 1, 0, 0, 2**60, 0) + b"\0" * 12), "checksum"),
    ("another codec", with_data("b", bytes(TopK(0.4).encode(np.ones(3, np.float32)))), "expected 30"),
    (
        "a plain array",
        lambda c: c.array_records["arrays"].update(w=Array(np.ones((5, 8), np.float32))),
        "not sent through",
    ),
    (
        "broadcastable",
        lambda c: c.array_records["arrays"].update(w=Array(np.ones((1, 1), np.float32))),
        "not sent through",
    ),
    ("a pickle", with_data("w", b"\x80\x04\x95.", "numpy.ndarray"), "not sent through"),
    ("an unknown tensor", with_data("evil" * 50, b"x"), "unknown tensors ['evil"),
    ("a counter", with_data("steps", b"x"), "unknown tensors ['steps']"),
    ("a missing tensor", _drop("w"), "lacks ['w']"),
    ("no metrics", lambda c: c.pop("metrics"), "expected one ArrayRecord and one MetricRecord"),
    ("a second model", lambda c: c.update(more=ArrayRecord()), "expected one ArrayRecord"),
    ("a config", lambda c: c.update(more=ConfigRecord({"a": b"x" * 100})), "expected one ArrayRecord"),
    ("an unknown metric", lambda c: c.metric_records["metrics"].update(score=1.0), "has the metrics"),
    ("a missing metric", lambda c: c.metric_records["metrics"].pop("loss"), "has the metrics"),
    ("a NaN metric", lambda c: c.metric_records["metrics"].update(loss=float("nan")), "'loss' is nan"),
    ("a list", lambda c: c.metric_records["metrics"].update(loss=[1.0]), "expected a finite number"),
    ("broken inside", lambda c: c.array_records["arrays"]["w"].__dict__.update(data=None), "not sent through"),
    (
        "lies about its type",
        lambda c: c.metric_records["metrics"].__dict__["_data"].update({"num-examples": "9"}),
        "whole number",
    ),
    ("no data at all", lambda c: c.array_records["arrays"]["w"].__dict__.pop("stype"), "malformed reply"),
]


@pytest.mark.parametrize(("attack", "reason"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS])
def test_attacks_are_refused_with_a_reason(attack: Attack, reason: str) -> None:
    check_refused(attack, Identity(), reason)


def test_overflow_of_the_global_model_is_refused() -> None:
    sent = {**SENT, "b": np.full(3, np.finfo(np.float32).max, np.float32)}
    inner = InProcessGrid(app_with(lambda *_: {}, lambda *_: with_data("b", _identity_payload([1e36, 0, 0]))), 1)
    grid = UplinkGrid(inner, Identity(), GateConfig(max_update_norm=1e38), train_metrics=("loss",))
    content = RecordDict({"arrays": record(sent), "config": ConfigRecord({"server-round": 1})})
    [reply] = grid.send_and_receive([Message(content, inner.get_node_ids()[0], "train")])
    assert "would overflow" in str(reply.error.reason)


def test_a_reply_counts_once_and_only_from_its_node() -> None:
    class Replaying(InProcessGrid):
        """Gives every reply twice, the second time also under a stranger's name."""

        def pull_messages(self, message_ids: Any) -> list[Message]:
            replies = super().pull_messages(message_ids)
            return replies + replies

    inner = Replaying(app_with(honest_update, lambda *_: None), 2)
    grid = UplinkGrid(inner, Identity(), train_metrics=("loss",))
    content = RecordDict({"arrays": record(SENT), "config": ConfigRecord({"server-round": 1})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in inner.get_node_ids()])
    traffic = grid.take_traffic()
    assert len(replies) == len(traffic.trained) == 2
    assert [one.reason for one in traffic.refused] == ["reply to no message that is waiting for one"] * 2


def test_a_late_reply_ends_the_wait_and_counts_as_dropped() -> None:
    class Hanging(InProcessGrid):
        """Its second node never replies."""

        def pull_messages(self, message_ids: Any) -> list[Message]:
            return super().pull_messages([one for one in message_ids if not one.endswith("-2")])

    inner = Hanging(app_with(honest_update, lambda *_: None), 2)
    grid = UplinkGrid(inner, Identity(), train_metrics=("loss",))
    content = RecordDict({"arrays": record(SENT), "config": ConfigRecord({"server-round": 1})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in inner.get_node_ids()], timeout=0.2)
    traffic = grid.take_traffic()
    assert len(replies) == len(traffic.trained) == 1
    assert [(one.node_id, one.reason) for one in traffic.dropped] == [(1001, "no reply in time")]
