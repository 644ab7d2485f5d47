"""Compressed uplinks for any Flower app: a mod on the client, a grid around the server's grid.

Both are independent of the training code and of the strategy. The client's app trains and replies with a whole model,
as every Flower app does; ``uplink_mod`` turns that into the encoded difference to the model it was sent. On the server
``UplinkGrid`` passes each reply through the gate, decodes it, adds it to the model that went out with that message,
and hands the strategy the whole model that it expects.

Note [feedback over rounds]
    What the codec left out is kept by the client, per parameter, in ``Context.state`` (arrays, no pickle) and added to
    its next update. A reply can be lost or refused, so the new residual is only staged; the next training message says
    which of the client's replies the server took last, and the client then makes it valid or drops it. So over the
    replies that the server took: sum of decoded updates + residual == sum of true updates.

Wire, in the records of the messages: the server adds a ``ConfigRecord`` named ``efftrain.uplink`` (codec as text,
feedback, key, ticket, taken); a reply's array ``data`` is a payload of ``efftrain.compression``.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from efftrain.compression import Codec, Feedback, format_codec, parse_codec
from efftrain.errors import ConfigError
from efftrain.federated.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    Run,
    category,
    copy_records,
)
from efftrain.federated.gate import (
    NUM_SAMPLES,
    PAYLOAD_STYPE,
    Refused,
    check_metrics,
    check_update,
    content_bytes,
    is_trained,
)
from efftrain.federated.recipe import GateConfig

ORDER = "efftrain.uplink"
"""Name of the record that tells a client how to encode its reply."""
RESIDUAL, STAGED, TICKET = "efftrain.residual", "efftrain.residual.staged", "efftrain.residual.ticket"
"""Names of the records in ``Context.state``."""

Tensors = dict[str, npt.NDArray[np.generic]]
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]
"""A Flower mod: message, context, and what comes next."""

# The client's end ------------------------------------------------------------------------------------------------


def uplink_mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower mod: encode the reply to a training message as the server ordered.

    A message without an order (from a server without ``UplinkGrid``, or an evaluation) passes through unchanged, so
    the mod can be part of any ``ClientApp(mods=[uplink_mod])``.

    Raises:
        NonFiniteError: Training gave inf or NaN. The client then gives an error reply, its residual stays.
        ConfigError: The reply lacks tensors of the model that was sent, or the order is malformed.
    """
    if ORDER not in message.content:
        return call_next(message, context)
    order = message.content.config_records[ORDER]
    del message.content[ORDER]
    sent = _tensors(message.content)
    reply = call_next(message, context)
    if not reply.has_content():
        return reply
    updates = _updates(sent, _tensors(reply.content))
    codec, key = parse_codec(str(order["codec"])), _client_key(order, context)
    if order["feedback"]:
        payloads = _encode_with_feedback(updates, codec, key, order, context)
    else:
        payloads = {name: bytes(codec.encode(flat, key=_key(key, name))) for name, flat in updates.items()}
    [record] = reply.content.array_records
    reply.content[record] = ArrayRecord(
        {name: Array("uint8", (len(data),), PAYLOAD_STYPE, data) for name, data in payloads.items()}
    )
    return reply


def _tensors(content: RecordDict) -> Tensors:
    records = list(content.array_records.values())
    if len(records) != 1:
        raise ConfigError(f"the message has {len(records)} records of arrays, the uplink needs exactly one: the model")
    return {name: array.numpy() for name, array in records[0].items()}


def _updates(sent: Tensors, trained: Tensors) -> dict[str, npt.NDArray[np.float32]]:
    """Trained minus sent, flat, for the tensors that travel."""
    if set(sent) != set(trained):
        raise ConfigError(f"the client replied with the tensors {sorted(trained)}, it was sent {sorted(sent)}")
    updates = {}
    for name, before in sent.items():
        if is_trained(before):
            after = trained[name]
            if after.shape != before.shape:
                raise ConfigError(f"tensor {name!r} came back with shape {after.shape}, it was sent as {before.shape}")
            updates[name] = np.subtract(after, before).astype(np.float32).reshape(-1)
    return updates


def _client_key(order: ConfigRecord, context: Context) -> int:
    """A key of this client: with one for all, their stochastic rounding errors would add up instead of averaging out.
    By partition where there is one, so that it does not depend on the node ids that a deployment draws."""
    client = context.node_config.get("partition-id", context.node_id)
    return zlib.crc32(f"{order['key']!r}/{client}".encode())


def _key(key: int, name: str) -> int:
    return zlib.crc32(f"{key}/{name}".encode())


def _encode_with_feedback(
    updates: dict[str, npt.NDArray[np.float32]], codec: Codec, key: int, order: ConfigRecord, context: Context
) -> dict[str, bytes]:
    """See Note [feedback over rounds]."""
    state = context.state
    if STAGED in state:
        if state.config_records[TICKET]["ticket"] == order["taken"]:
            state[RESIDUAL] = state.array_records[STAGED]
        del state[STAGED]
    feedback = Feedback(codec)
    if RESIDUAL in state:
        feedback.load_state_dict({name: a.numpy() for name, a in state.array_records[RESIDUAL].items()})
    payloads = {name: bytes(feedback.encode(name, flat, key=_key(key, name))) for name, flat in updates.items()}
    feedback.commit()
    state[STAGED] = ArrayRecord({name: Array(residual) for name, residual in feedback.state_dict().items()})
    state[TICKET] = ConfigRecord({"ticket": order["ticket"]})
    return payloads


# The server's end ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """One reply that did not pass the gate."""

    node_id: int
    reason: str


@dataclass
class Traffic:
    """What crossed the wire since the last ``UplinkGrid.take_traffic``."""

    uplink_bytes: int = 0
    """Records of all replies, refused ones included: encoded updates, metrics, names."""
    downlink_bytes: int = 0
    """Records of all messages to clients: models, recipe, orders."""
    fp32_uplink_bytes: int = 0
    """What the updates taken would have been as plain fp32: 4 bytes an element and nothing else."""
    trained: list[int] = field(default_factory=list)
    """Nodes whose update was taken."""
    dropped: list[Refusal] = field(default_factory=list)
    """Nodes that gave an error reply or none in time, and why."""
    refused: list[Refusal] = field(default_factory=list)


@dataclass
class _Sent:
    """A message on its way: what its reply is measured against."""

    message: Message
    tensors: Tensors
    ticket: int


class UplinkGrid(Grid):
    """A grid around a grid: orders encoded updates, lets replies through the gate, decodes and counts them.

    A strategy on it sees whole models and plain metrics, as if nothing was compressed; a refused reply reaches it as an
    error reply.

    Args:
        inner: The grid that carries the messages: ``InProcessGrid`` or Flower's own.
        codec: What clients encode their updates with.
        gate: Limits on replies.
        feedback: See Note [feedback over rounds].
        seed: Of stochastic rounding.
        train_metrics: Metrics beside the sample count that replies to training must have.
        evaluate_metrics: The same for evaluation.
    """

    def __init__(
        self,
        inner: Grid,
        codec: Codec,
        gate: GateConfig | None = None,
        *,
        feedback: bool = True,
        seed: int = 0,
        train_metrics: Sequence[str] = (),
        evaluate_metrics: Sequence[str] = (),
    ) -> None:
        self._inner = inner
        self._codec = codec
        self._gate = gate or GateConfig()
        self._feedback = feedback
        self._seed = seed
        self._metrics = {MessageType.TRAIN: tuple(train_metrics), MessageType.EVALUATE: tuple(evaluate_metrics)}
        self._on_the_way: dict[str, _Sent] = {}
        self._taken: dict[int, int] = {}
        self._num_tickets = 0
        self._traffic = Traffic()

    def take_traffic(self) -> Traffic:
        """What happened since the last call, and start counting anew."""
        taken, self._traffic = self._traffic, Traffic()
        return taken

    # The interface of Grid ---------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run of the inner grid."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the inner grid."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message, as ``Message(...)`` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes of the inner grid."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; training messages carry an order for the reply's encoding.

        Returns:
            Ids of the messages that could be sent.

        Raises:
            ConfigError: A training message has not exactly one record of arrays.
        """
        messages = list(messages)
        # A strategy puts one record into all messages of a round: decode it once. The list keeps the ids valid.
        originals = [message.content for message in messages]
        models: dict[int, Tensors] = {}
        tickets = []
        for message, original in zip(messages, originals, strict=True):
            self._num_tickets += 1
            tickets.append(self._num_tickets)
            if category(message) == MessageType.TRAIN:
                if id(original) not in models:
                    models[id(original)] = _tensors(original)
                message.content = copy_records(original)
                message.content[ORDER] = self._order(message, self._num_tickets)
            self._traffic.downlink_bytes += content_bytes(message)
        ids = list(self._inner.push_messages(messages))
        for message_id, message, original, ticket in zip(ids, messages, originals, tickets, strict=False):
            if message_id:
                self._on_the_way[message_id] = _Sent(message, models.get(id(original), {}), ticket)
        return [message_id for message_id in ids if message_id]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have arrived, checked and decoded. A reply to nothing on its way is counted and left out."""
        replies = []
        for reply in self._inner.pull_messages(message_ids):
            sent = self._on_the_way.pop(reply.metadata.reply_to_message_id, None)
            self._traffic.uplink_bytes += content_bytes(reply)
            if sent is None:
                self._refuse(reply.metadata.src_node_id, "reply to no message that is waiting for one")
            else:
                replies.append(self._receive(reply, sent))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, wait, pull. Returns after ``timeout`` seconds with the replies there are; the others count as dropped.

        None waits until every message has its reply.
        """
        waiting = self.push_messages(messages)
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        pause_s = 0.05
        while waiting:
            replies += self.pull_messages(waiting)
            waiting = [message_id for message_id in waiting if message_id in self._on_the_way]
            if not waiting:
                break
            if end is not None and time.monotonic() >= end:
                for message_id in waiting:
                    late = self._on_the_way.pop(message_id)
                    self._traffic.dropped.append(Refusal(late.message.metadata.dst_node_id, "no reply in time"))
                break
            time.sleep(pause_s)
            pause_s = min(1.0, 1.5 * pause_s)
        return replies

    # Parts of it -------------------------------------------------------------------------------------------------

    def _order(self, message: Message, ticket: int) -> ConfigRecord:
        return ConfigRecord(
            {
                "codec": format_codec(self._codec),
                "feedback": self._feedback,
                "key": zlib.crc32(f"{self._seed}/{self._round_of(message)}".encode()),
                "ticket": ticket,
                "taken": self._taken.get(message.metadata.dst_node_id, 0),
            }
        )

    def _round_of(self, message: Message) -> int:
        """Number of the round where the strategy says it, as Flower's do; it only varies the rounding."""
        for record in message.content.config_records.values():
            number = record.get("server-round")
            if isinstance(number, int):
                return number
        return 0

    def _receive(self, reply: Message, sent: _Sent) -> Message:
        node_id = sent.message.metadata.dst_node_id
        if reply.has_error():
            self._traffic.dropped.append(Refusal(node_id, reply.error.reason or f"error code {reply.error.code}"))
            return reply
        try:
            if reply.metadata.src_node_id != node_id:
                raise Refused(f"reply comes from node {reply.metadata.src_node_id}, the message went to {node_id}")
            return self._let_through(reply, sent)
        except Refused as refusal:
            self._refuse(node_id, str(refusal))
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"refused: {refusal}"), reply_to=sent.message)

    def _let_through(self, reply: Message, sent: _Sent) -> Message:
        """The reply as a strategy expects it, built anew from what was checked and nothing else."""
        kind = category(sent.message)
        if kind not in self._metrics:
            return reply
        if kind == MessageType.EVALUATE:
            num_samples, metrics = check_metrics(reply, self._gate, self._metrics[kind])
            reply.content = RecordDict({"metrics": MetricRecord({NUM_SAMPLES: num_samples, **metrics})})
            return reply
        update = check_update(reply, sent.tensors, self._codec, self._gate, self._metrics[kind])
        model = {}
        for name, tensor in sent.tensors.items():
            if name in update.deltas:
                with np.errstate(over="ignore"):
                    tensor = np.add(tensor, update.deltas[name], dtype=tensor.dtype)
                if not np.isfinite(tensor).all():
                    raise Refused(f"tensor {name!r} would overflow with this update")
            model[name] = Array(np.asarray(tensor))
        node_id = sent.message.metadata.dst_node_id
        self._taken[node_id] = sent.ticket
        self._traffic.trained.append(node_id)
        self._traffic.fp32_uplink_bytes += 4 * sum(delta.size for delta in update.deltas.values())
        reply.content = RecordDict(
            {
                "arrays": ArrayRecord(model),
                "metrics": MetricRecord({NUM_SAMPLES: update.num_samples, **update.metrics}),
            }
        )
        return reply

    def _refuse(self, node_id: int, reason: str) -> None:
        self._traffic.refused.append(Refusal(node_id, reason))
