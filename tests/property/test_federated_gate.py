"""The gate under fire: mutated replies by the hundred thousand, and what it costs the server to refuse them.

The replies come over a grid of this file that hands out whatever it likes, as a network would. Mutations change what an
honest client of ``uplink_mod`` sent, byte by byte or record by record. What may pass is what means the same: the same
number of samples, and for every element the honest update or, since a client may say that it trained only a part, none.

Half of the mutated payloads get their checksum made right again, as whoever means harm would, so decoders see them.
If such a payload still is one, it is another update, and any client may send any: it must be finite and within limits.
"""

import copy
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from efftrain.compression import Codec, Identity, Int8, TopK
from efftrain.federated.client_uplink import PARTS, uplink_mod
from efftrain.federated.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    ErrorCode,
    FedAvg,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    Run,
    quiet,
)
from efftrain.federated.gate import NUM_SAMPLES, PAYLOAD_STYPE
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import GateConfig
from efftrain.federated.uplink import UplinkGrid

Rng = np.random.Generator
Mutation = Callable[[RecordDict, Rng], RecordDict]
MODEL = {
    "w": np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8),
    "b": np.ones(3, np.float32),
    "steps": np.array(7),
}
GATE = GateConfig(max_samples=100, max_update_norm=5.0)
METRICS = ("loss", "partition-id")
SAMPLES = 12


def model_record(model: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(tensor)) for name, tensor in model.items()})


def honest_app(parts: bool) -> ClientApp:
    """Trains by adding fixed noise; with ``parts`` only half of one tensor, as a sparse scheme would."""
    app = ClientApp(mods=[uplink_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        rng = np.random.default_rng(5)
        state = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        for name in ("w", "b"):
            state[name] = state[name] + rng.normal(0, 0.1, state[name].shape).astype(np.float32)
        metrics = MetricRecord({NUM_SAMPLES: SAMPLES, "loss": 0.25, "partition-id": 3})
        content = RecordDict({"arrays": model_record(state), "metrics": metrics})
        if parts:
            content[PARTS] = ConfigRecord({"w": zlib.compress(np.packbits(np.arange(40) % 8 < 4).tobytes())})
        return Message(content, reply_to=message)

    return app


class Hostile(Grid):
    """Nodes that answer with what ``answer`` makes of the honest reply of their kind.

    Args:
        honest: One reply that passes.
        answer: Message, honest content -> reply.
    """

    def __init__(self, honest: RecordDict, answer: Callable[[Message, RecordDict], Message]) -> None:
        self._honest, self._answer = honest, answer
        self._waiting: dict[str, Message] = {}
        self._count = 0
        self._inner = InProcessGrid(ClientApp, 100)  # says who this process is

    def set_run(self, run: Run) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = f"m{self._count}"
            self._waiting[f"m{self._count}"] = message
            ids.append(f"m{self._count}")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._answer(self._waiting.pop(one), self._honest) for one in message_ids if one in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def reply_with(message: Message, content: RecordDict) -> Message:
    reply = Message(content, reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
    return reply


def honest_reply(codec: Codec, parts: bool, model: dict[str, np.ndarray]) -> RecordDict:
    """What ``uplink_mod`` around an honest client puts on the wire."""
    seen: list[RecordDict] = []

    class Tap(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            seen.extend(copy_of(reply.content) for reply in replies)
            return replies

    wire = UplinkGrid(Tap(honest_app(parts), 1), codec, GATE, feedback=False, train_metrics=METRICS)
    [reply] = wire.send_and_receive(train_messages(wire, model)[:1])
    assert not reply.has_error(), reply.error.reason
    return seen[0]


def train_messages(grid: Grid, model: dict[str, np.ndarray]) -> list[Message]:
    content = RecordDict({"arrays": model_record(model), "config": ConfigRecord({"server-round": 1})})
    return [Message(content, node, "train") for node in sorted(grid.get_node_ids())]


def copy_of(content: RecordDict) -> RecordDict:
    return RecordDict({name: record.copy() for name, record in content.items()})


# Mutations -----------------------------------------------------------------------------------------------------------


def noise(data: bytes, rng: Rng) -> bytes:
    """Other bytes: flipped, cut, longer, from elsewhere, a large number in the middle."""
    changed = bytearray(data)
    kind = rng.integers(7)
    if kind <= 1 or not changed:
        for _ in range(1 + int(rng.integers(4))):
            if changed:
                changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del changed[int(rng.integers(len(changed))) :]
    elif kind == 3:
        changed += rng.bytes(int(rng.integers(1, 50)))
    elif kind == 4:
        changed = bytearray(rng.bytes(len(data)))
    elif kind == 5:
        start = int(rng.integers(len(changed)))
        changed[start : start + 4] = int(rng.choice([2**31 - 1, 2**32 - 1, 2**30])).to_bytes(4, "little")
    else:
        start, end = sorted(int(i) for i in rng.integers(len(changed), size=2))
        del changed[start:end]
    return bytes(changed)


def checksum(data: bytes) -> bytes:
    """What bytes 14 to 17 of a payload must be."""
    return struct.pack("<I", zlib.crc32(data[18:], zlib.crc32(data[:14])))


def resealed(data: bytes, rng: Rng) -> bytes:
    """Half of the time with the checksum made right again."""
    return data if len(data) < 18 or rng.integers(2) else data[:14] + checksum(data) + data[18:]


def record_of(content: RecordDict, kind: type) -> str:
    return next((name for name, record in content.items() if isinstance(record, kind)), "arrays")


def payload(content: RecordDict, rng: Rng) -> RecordDict:
    """One tensor's bytes, or two tensors' exchanged."""
    arrays = content.array_records[record_of(content, ArrayRecord)]
    names = list(arrays)
    name, other = names[rng.integers(len(names))], names[rng.integers(len(names))]
    data = arrays[other].data if rng.integers(10) == 0 else resealed(noise(arrays[name].data, rng), rng)
    arrays[name] = Array("uint8", (len(data),), PAYLOAD_STYPE, data)
    return content


def array_frame(content: RecordDict, rng: Rng) -> RecordDict:
    """What Flower's record says about the bytes, which the gate must not believe."""
    arrays = content.array_records[record_of(content, ArrayRecord)]
    name = list(arrays)[rng.integers(len(arrays))]
    dtypes, shapes = ("uint8", "float32", "O", "<M8[ns]", "x" * 100), ((), (2**31, 2**31), (-1,), (0,), (3,))
    stypes = (PAYLOAD_STYPE, "numpy.ndarray", "", "pickle", "y" * 10_000)
    arrays[name] = Array(
        dtypes[rng.integers(5)], shapes[rng.integers(5)], stypes[rng.integers(5)], noise(arrays[name].data, rng)
    )
    return content


def plain_numpy(content: RecordDict, rng: Rng) -> RecordDict:
    """Uncompressed, as a stock client would send it: NaN, another shape, huge, an object."""
    arrays = content.array_records[record_of(content, ArrayRecord)]
    name = list(arrays)[rng.integers(len(arrays))]
    arrays[name] = Array(np.full(int(rng.integers(1, 9)), [np.nan, np.inf, 1e38, 0.0][rng.integers(4)], np.float32))
    return content


def names(content: RecordDict, rng: Rng) -> RecordDict:
    """Tensors left out, unknown, of other names, or many."""
    arrays = content.array_records[record_of(content, ArrayRecord)]
    kind, any_array = rng.integers(4), Array("uint8", (4,), PAYLOAD_STYPE, rng.bytes(4))
    if kind == 0:
        del arrays[list(arrays)[rng.integers(len(arrays))]]
    elif kind == 1:
        arrays[["z", "steps", "w ", "\u202e", "n" * 5000][rng.integers(5)]] = any_array
    elif kind == 2:
        first = next(iter(arrays))
        del arrays[first]
        arrays[first.upper()] = any_array
    else:
        for i in range(100 if rng.integers(30) == 0 else 1):
            arrays[f"t{i}"] = any_array
    return content


def metric(content: RecordDict, rng: Rng) -> RecordDict:
    """A sample count or metric that no honest client has."""
    record = content.metric_records[record_of(content, MetricRecord)]
    bad: list[Any] = [float("nan"), float("inf"), -float("inf"), [0.5, 0.5], [1] * 1000]
    kind = rng.integers(5)
    if kind == 0:
        counts: list[Any] = [0, -1, -(2**62), 101, 2**62, 12.0, 1e12, [12], *bad]
        record[NUM_SAMPLES] = counts[rng.integers(len(counts))]
    elif kind == 1:
        record[METRICS[rng.integers(2)]] = bad[rng.integers(len(bad))]
    elif kind == 2:
        del record[list(record)[rng.integers(len(record))]]
    elif kind == 3:
        record["accuracy" * int(rng.integers(1, 99))] = 1.0
    else:
        for i in range(100 if rng.integers(30) == 0 else 1):
            record[f"m{i}"] = i
    return content


def records(content: RecordDict, rng: Rng) -> RecordDict:
    """Records missing, doubled, renamed, exchanged for another kind."""
    keys = list(content)
    name = keys[rng.integers(len(keys))]
    kind = rng.integers(5)
    if kind in (0, 2):
        del content[name]
    if kind == 1:
        content["again"] = content[name]
    elif kind == 2:
        content[name] = ConfigRecord({"a": b"\0" * 100, "b": [1, 2]})
    elif kind == 3 and PARTS not in content:
        others: list[Any] = [ArrayRecord(), MetricRecord({"w": 1}), ConfigRecord()]
        content[PARTS] = others[rng.integers(3)]
    elif kind == 4:
        for i in range(100 if rng.integers(30) == 0 else 1):
            content[f"r{i}"] = MetricRecord({NUM_SAMPLES: 1})
    return content


MASKS = (zlib.compress(b"\0" * 5), zlib.compress(b"\xff" * 100_000))
"""One of no element, and one that would take a thousand times its size."""


def parts(content: RecordDict, rng: Rng) -> RecordDict:
    """Which elements were trained: masks of other sizes and bits, of other tensors, no bytes."""
    before = content[PARTS] if PARTS in content else ConfigRecord()
    masks: dict[str, Any] = dict(before) if isinstance(before, ConfigRecord) else {}
    name = ["w", "b", "steps", "z", "n" * 5000][rng.integers(5)]
    if isinstance(masks.get(name), bytes) and masks[name] and rng.integers(2):
        masks[name] = noise(masks[name], rng)
    else:
        masks[name] = [b"", rng.bytes(int(rng.integers(1, 99))), 3, "w", *MASKS][rng.integers(6)]
    content.pop(PARTS, None)
    content[PARTS] = ConfigRecord(masks)
    return content


MUTATIONS: tuple[Mutation, ...] = (payload, payload, payload, array_frame, plain_numpy, names, metric, records, parts)


def fire(codec: Codec, *, with_parts: bool, num_rounds: int, seed: int) -> tuple[int, int, int]:
    """Rounds of 100 replies, one of them honest; how many mutated ones there were, how many were refused, and how many
    updates that the honest client did not send passed."""
    rng = np.random.default_rng(seed)
    honest = honest_reply(codec, with_parts, MODEL)
    truth = UplinkGrid(Hostile(honest, lambda m, h: reply_with(m, copy_of(h))), codec, GATE, train_metrics=METRICS)
    with quiet():
        [expected, *_] = truth.send_and_receive(train_messages(truth, MODEL)[:1])
        assert not expected.has_error()
        target, _ = FedAvg().aggregate_train(1, [expected])
    assert target is not None
    lucky, others = 0, set[int]()

    def answer(message: Message, content: RecordDict) -> Message:
        if message.metadata.dst_node_id == lucky:
            return reply_with(message, copy_of(content))
        if rng.integers(50) == 0:
            return Message(Error(int(rng.integers(99)), "e" * int(rng.integers(99))), reply_to=message)
        mutated = copy_of(content)
        for _ in range(1 + int(rng.integers(2))):
            try:
                mutated = MUTATIONS[rng.integers(len(MUTATIONS))](mutated, rng)
            except (LookupError, ValueError, TypeError, AttributeError, StopIteration):
                continue  # a second mutation may find nothing left to mutate, and Flower refuses to build some
        if has_another_payload(mutated, content):
            others.add(message.metadata.dst_node_id)
        reply = reply_with(message, mutated)
        if rng.integers(30) == 0:
            reply.metadata.__dict__["_src_node_id"] = int(rng.integers(3000))
        if rng.integers(30) == 0:
            reply.metadata.__dict__["_reply_to_message_id"] = ["", "m1", "m99999999", "x" * 999][rng.integers(4)]
        return reply

    wire = UplinkGrid(Hostile(honest, answer), codec, GATE, train_metrics=METRICS)
    num_refused = num_others = 0
    for number in range(num_rounds):
        messages = train_messages(wire, MODEL)
        lucky = messages[number % len(messages)].metadata.dst_node_id
        others.clear()
        with quiet():
            replies = wire.pull_messages(wire.push_messages(messages))
        passed = [reply for reply in replies if not reply.has_error()]
        assert any(reply.metadata.src_node_id == lucky for reply in passed), "an honest client lost its round"
        same = [reply for reply in passed if reply.metadata.src_node_id not in others]
        for reply in same:
            assert same_update(reply, expected), "a mutated reply passed with another meaning"
        num_others += len(passed) - len(same)
        for reply in passed:
            assert within_limits(reply), "more passed than the gate allows"
        traffic = wire.take_traffic()
        num_refused += len(traffic.refused)
        assert len(traffic.refused) + len(traffic.dropped) + len(passed) == len(messages)
        # The round closes with all that the strategy is given. Without the updates of others every element is a mean
        # of honest ones and of none, so it lies between what was sent and what the honest client made of it.
        with quiet():
            errors = [reply for reply in replies if reply.has_error()]
            model, _ = FedAvg().aggregate_train(1, [*errors, *same])
            whole, _ = FedAvg().aggregate_train(1, replies)
        assert model is not None
        assert whole is not None
        for name, start in MODEL.items():
            ends = np.stack([start, target[name].numpy()])
            found = model[name].numpy()
            assert ((ends.min(0) - 1e-6 <= found) & (found <= ends.max(0) + 1e-6)).all()
        assert distance(whole) <= GATE.max_update_norm * (1 + 1e-6)
    return num_rounds * 99, num_refused, num_others


def has_another_payload(content: RecordDict, honest: RecordDict) -> bool:
    """Whether some tensor has bytes that the honest client did not send, under a checksum that is right."""
    sent = {array.data for record in honest.array_records.values() for array in record.values()}
    found = {array.data for record in content.array_records.values() for array in record.values()}
    return any(len(data) >= 18 and data[14:18] == checksum(data) for data in found - sent)


def within_limits(reply: Message) -> bool:
    """Finite, no further than the gate allows from what was sent, and with the honest number of samples."""
    far = distance(reply.content.array_records["arrays"])  # not <= for NaN either
    samples = reply.content.metric_records["metrics"][NUM_SAMPLES]
    return far <= GATE.max_update_norm * (1 + 1e-6) and samples == SAMPLES


def distance(arrays: ArrayRecord) -> float:
    """Euclidean, from the model that was sent."""
    assert list(arrays) == list(MODEL)
    return float(np.linalg.norm(np.concatenate([(arrays[n].numpy() - MODEL[n]).ravel() for n in MODEL])))


def same_update(one: Message, two: Message) -> bool:
    arrays, others = (reply.content.array_records["arrays"] for reply in (one, two))
    for name, tensor in MODEL.items():
        found, expected = arrays[name].numpy(), others[name].numpy()
        if not ((found == expected) | (found == tensor)).all():
            return False
    return list(arrays) == list(others) and one.content.metric_records["metrics"][NUM_SAMPLES] == SAMPLES


CODECS = [
    pytest.param(Identity(), False, id="identity"),
    pytest.param(TopK(0.3) >> Int8(block=8), False, id="topk-int8"),
    pytest.param(Int8(block=8), True, id="int8-parts"),
]


@pytest.mark.parametrize(("codec", "with_parts"), CODECS)
def test_mutated_replies_cost_nobody_else_anything(codec: Codec, with_parts: bool) -> None:
    """With its slow twin: 10^5 in all here, 10^6 there."""
    check_fire(codec, with_parts, num_rounds=337, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("codec", "with_parts"), CODECS)
def test_a_million_mutated_replies(codec: Codec, with_parts: bool) -> None:
    check_fire(codec, with_parts, num_rounds=3368, seed=2)


def check_fire(codec: Codec, with_parts: bool, num_rounds: int, seed: int) -> None:
    num_mutated, num_refused, num_others = fire(codec, with_parts=with_parts, num_rounds=num_rounds, seed=seed)
    assert num_refused > 0.8 * num_mutated
    # In a stack few, for there the values have a checksum of their own, which stays as it was.
    assert num_others > 20, "the outer checksum stopped all of them: no decoder was tried"


# Memory --------------------------------------------------------------------------------------------------------------

LARGE = {"w": np.zeros((300, 1000), np.float32), "b": np.zeros(7, np.float32), "steps": np.array(7)}


@pytest.mark.parametrize("codec", [Identity(), TopK(0.1) >> Int8(block=64)], ids=["identity", "topk-int8"])
def test_memory_stays_below_twice_the_largest_legal_message(codec: Codec) -> None:
    """Peak of what the server allocates for one reply, the message itself not counted: it came from the transport,
    which bounds it. The largest legal message is the model in fp32, whatever the codec decodes it from."""
    rng = np.random.default_rng(3)
    wide = GateConfig(max_samples=100, max_update_norm=1e4)
    legal_bytes = sum(Identity().encoded_bytes(t.size) for t in LARGE.values() if t.dtype == np.float32)
    update = {name: rng.normal(size=LARGE[name].size).astype(np.float32) for name in ("w", "b")}
    sent = {name: bytes(codec.encode(flat, key=1)) for name, flat in update.items()}
    honest = RecordDict(
        {
            "arrays": ArrayRecord({n: Array("uint8", (len(d),), PAYLOAD_STYPE, d) for n, d in sent.items()}),
            "metrics": MetricRecord({NUM_SAMPLES: SAMPLES, "loss": 0.25, "partition-id": 3}),
        }
    )
    contents = [copy_of(honest)]
    for i in range(60):
        contents.append(MUTATIONS[i % len(MUTATIONS)](copy_of(honest), rng))
    huge = bytearray(sent["w"])
    for start in range(0, 32, 2):  # a header that claims more than any memory
        contents.append(copy_of(honest))
        data = bytes(huge[:start] + b"\xff\xff\xff\x7f" + huge[start + 4 :])
        contents[-1].array_records["arrays"]["w"] = Array("uint8", (len(data),), PAYLOAD_STYPE, data)
    queue = iter(contents)
    wire = UplinkGrid(Hostile(honest, lambda m, h: reply_with(m, next(queue))), codec, wide, train_metrics=METRICS)
    messages = train_messages(wire, LARGE)[: len(contents)]
    ids = wire.push_messages(messages)
    passed, peak_bytes = 0, 0
    for message_id in ids:
        tracemalloc.start()
        for arrival in wire.pull_updates([message_id]):
            passed += arrival.update is not None
            del arrival
        peak_bytes = max(peak_bytes, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert passed >= 1
    assert 0.5 * legal_bytes < peak_bytes < 2 * legal_bytes


# Replay --------------------------------------------------------------------------------------------------------------


def test_a_reply_counts_once_for_its_own_message_and_round() -> None:
    """Twice, after the round, to a message of another round or of another node: never counted."""
    codec = Identity()
    honest = honest_reply(codec, False, MODEL)
    kept: list[Message] = []

    def answer(message: Message, content: RecordDict) -> Message:
        kept.append(reply_with(message, copy_of(content)))
        return kept[-1]

    inner = Hostile(honest, answer)
    wire = UplinkGrid(inner, codec, GATE, train_metrics=METRICS)
    nodes = train_messages(wire, MODEL)[:3]
    first = wire.push_messages(nodes)
    assert len(wire.pull_messages(first[:1])) == 1
    wire.give_up(first[1:2], "too late")
    inner.pull_messages(first[1:2])  # the late reply is made, and will come with the next round
    second = wire.push_messages(train_messages(wire, MODEL)[:1])
    stale = [copy.copy(message) for message in kept]
    assert len(stale) == 2
    wire.take_traffic()
    for message, told in ((stale[0], "no message that is waiting"), (stale[1], "no message that is waiting")):
        answers = iter([message])
        inner._answer = lambda m, h, answers=answers: next(answers)  # type: ignore[misc]
        inner._waiting["again"] = nodes[0]
        assert wire.pull_messages(["again"]) == []
        assert told in wire.take_traffic().refused[0].reason
    # An old reply, its id changed to that of the message now on its way, from the node that it was taken from.
    forged = reply_with(nodes[2], copy_of(honest))
    forged.metadata.__dict__["_reply_to_message_id"] = second[0]
    inner._answer = lambda m, h: forged
    [refused] = wire.pull_messages(second)
    assert refused.has_error()
    traffic = wire.take_traffic()
    assert "the message went to" in traffic.refused[0].reason
    assert traffic.trained == []


def test_reasons_stay_short_whatever_was_sent() -> None:
    """They end up in logs and journals."""
    honest = honest_reply(Identity(), False, MODEL)
    changes: tuple[Callable[[RecordDict], object], ...] = (
        lambda c: c.metric_records["metrics"].update({NUM_SAMPLES: [1] * 100_000}),
        lambda c: c.metric_records["metrics"].update({"loss": [0.5] * 100_000}),
        lambda c: c.metric_records["metrics"].update({"m" * 100_000: 1}),
        lambda c: c.array_records["arrays"].update({"n" * 100_000: Array(np.zeros(1))}),
        lambda c: c.array_records["arrays"].update({"w": Array("uint8", (1,), "s" * 100_000, b"1")}),
        lambda c: c.update({"r" * 100_000: MetricRecord({"a": 1})}),
    )
    for change in changes:
        content = copy_of(honest)
        change(content)
        assert len(reason_for(content)) < 500


def reason_for(content: RecordDict) -> str:
    """Why a reply is refused."""
    wire = UplinkGrid(Hostile(content, reply_with), Identity(), GATE, train_metrics=METRICS)
    [reply] = wire.send_and_receive(train_messages(wire, MODEL)[:1])
    assert reply.has_error()
    [refusal] = wire.take_traffic().refused
    return refusal.reason


def test_an_error_without_a_code_of_ours_is_a_drop_out() -> None:
    honest = honest_reply(Identity(), False, MODEL)
    grid = Hostile(honest, lambda m, h: Message(Error(ErrorCode.UNKNOWN), reply_to=m))
    wire = UplinkGrid(grid, Identity(), GATE, train_metrics=METRICS)
    [reply] = wire.send_and_receive(train_messages(wire, MODEL)[:1])
    assert reply.has_error()
    assert len(wire.take_traffic().dropped) == 1
