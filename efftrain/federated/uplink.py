"""Compressed uplinks for any Flower app: a mod on the client, a grid around the server's grid.

Both are independent of the training code and of the strategy. The client's app trains and replies with a whole model,
as every Flower app does; ``uplink_mod`` turns that into the encoded difference to the model it was sent. On the server
``UplinkGrid`` passes each reply through the gate and decodes it. To a strategy it gives the whole model that it
expects; our own driver takes the differences as they are (``pull_updates``).

Note [feedback over rounds]
    What the codec left out is kept by the client, per parameter, in ``Context.state`` (arrays, no pickle) and added to
    its next update. A reply can be lost or refused, so the new residual is only staged; the next training message says
    which of the client's replies the server took last, and the client then makes it valid or drops it. So over the
    replies that the server took: sum of decoded updates + residual == sum of true updates.

Note [parts]
    A client whose plan trains a part of the model says so in a ``ConfigRecord`` named ``efftrain.parts``: name of each
    tensor that it trained -> the mask of the elements (bits, deflated), or nothing for all of them. It sends payloads
    of these tensors only, of the trained elements only. What it did not train is not its vote: the mean of an element
    is over the clients that trained it.

Wire, in the records of the messages: the server adds a ``ConfigRecord`` named ``efftrain.uplink`` (codec as text,
feedback, key, ticket, taken); a reply's array ``data`` is a payload of ``efftrain.compression``.
"""

import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from efftrain.compression import Codec, Identity, format_codec
from efftrain.federated.client_uplink import (
    ORDER,
    PARTS,
    RESIDUAL,
    STAGED,
    TICKET,
    Mod,
    Tensors,
    model_of,
    unpack_mask,
    uplink_mod,
)
from efftrain.federated.downlink import ModelEncoder
from efftrain.federated.flower import (
    ConfigRecord,
    ConfigValue,
    Error,
    ErrorCode,
    Grid,
    Message,
    MessageType,
    RecordDict,
    Run,
    category,
    make_config,
    make_content,
    make_metrics,
    values_of,
    write_arrays,
)
from efftrain.federated.gate import (
    NUM_SAMPLES,
    Floats,
    Refused,
    check_metrics,
    check_update,
    content_bytes,
    is_trained,
)
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import GateConfig

__all__ = [
    "ORDER",
    "PARTS",
    "RESIDUAL",
    "STAGED",
    "TICKET",
    "Arrival",
    "Mod",
    "PartialUpdate",
    "Refusal",
    "Traffic",
    "UplinkGrid",
    "uplink_mod",
]

NOT_SENT = "its message could not be sent"
_MOST_REASON = 500
"""Characters of what a client says went wrong: they end up in logs and journals."""


@dataclass(frozen=True)
class Refusal:
    """One reply that did not pass the gate, or never came."""

    node_id: int
    reason: str


@dataclass(frozen=True, eq=False)
class PartialUpdate:
    """What one client changed: the difference to the model that it was sent, of the parts that it trained."""

    deltas: dict[str, Floats]
    """Flat; the trained elements only. A floating-point tensor that is missing was not trained."""
    masks: dict[str, npt.NDArray[np.bool_]]
    """Flat, of a whole tensor: which elements the delta is of. A tensor that is missing was trained in full."""
    num_samples: int
    metrics: dict[str, float]
    sent: Tensors
    """The model that it was sent."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """What came of one message."""

    message_id: str
    node_id: int
    update: PartialUpdate | None = None
    """Of a training message whose reply was accepted."""
    metrics: dict[str, float] | None = None
    """Of an evaluation message whose reply was accepted, sample count included."""
    problem: str = ""
    """Why there is neither."""
    refused: bool = False
    """The reply did not pass the gate; otherwise a problem means that the client failed or was too late."""
    uplink_bytes: int = 0
    ticket: int = 0


@dataclass
class Traffic:
    """What crossed the wire since the last ``UplinkGrid.take_traffic``."""

    uplink_bytes: int = 0
    """Records of all replies, refused ones included: encoded updates, metrics, names."""
    downlink_bytes: int = 0
    """Records of all messages to clients: models, recipe, orders."""
    fp32_uplink_bytes: int = 0
    """What the updates taken would have been as plain fp32 of the whole model: 4 bytes an element, nothing else."""
    trained: list[int] = field(default_factory=list)
    """Nodes whose update was taken."""
    dropped: list[Refusal] = field(default_factory=list)
    """Nodes that gave an error reply or none in time, and why."""
    refused: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Posted:
    """What all messages with one content share: a strategy puts the same into all of a round."""

    original: RecordDict
    """As the strategy made it. Kept, so that its ``id`` stays its own."""
    content: RecordDict
    """As it goes out."""
    num_bytes: int
    """Of a whole message, orders included."""
    order: dict[str, ConfigValue] = field(default_factory=dict)
    """What a training message tells about the reply's encoding, but for the ticket and the last one taken."""
    tensors: Tensors = field(default_factory=dict)
    """The model in a training message."""
    trained_bytes: int = 0
    """What of it travels back, as plain fp32."""
    roomy: bool = True
    """No update that the gate accepts can overflow the sum with this model, so nobody need look."""


@dataclass(frozen=True, eq=False)
class _Sent:
    """A message on its way: what its reply is measured against."""

    message: Message
    posted: _Posted
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
        downlink: What models are sent to clients with, which need ``downlink_mod`` then; None sends them as they are.
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
        downlink: Codec | None = None,
        seed: int = 0,
        train_metrics: Sequence[str] = (),
        evaluate_metrics: Sequence[str] = (),
    ) -> None:
        self._inner = inner
        self._codec, self._codec_text = codec, format_codec(codec)
        self._gate = gate or GateConfig()
        self._feedback = feedback
        self._encoder = ModelEncoder(downlink or Identity(), seed)
        self._seed = seed
        self._metrics = {MessageType.TRAIN: tuple(train_metrics), MessageType.EVALUATE: tuple(evaluate_metrics)}
        self._on_the_way: dict[str, _Sent] = {}
        self._taken: dict[int, int] = {}
        self._num_tickets = 0
        self._traffic = Traffic()

    @property
    def inner(self) -> Grid:
        """The grid that carries the messages."""
        return self._inner

    @property
    def downlink_bytes(self) -> int:
        """Sent since the last ``take_traffic``."""
        return self._traffic.downlink_bytes

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
        return [message_id for message_id in self.post(messages) if message_id]

    def post(self, messages: Iterable[Message]) -> list[str]:
        """As ``push_messages``, with an empty id for each message that could not be sent; its node has dropped out."""
        messages = list(messages)
        known: dict[tuple[int, str], _Posted] = {}
        sent = []
        for message in messages:
            key = id(message.content), category(message)
            posted = known.get(key) or known.setdefault(key, self._prepare(message))
            self._num_tickets += 1
            message.content = posted.content
            if posted.order:
                taken = self._taken.get(message.metadata.dst_node_id, 0)
                order = make_config({**posted.order, "ticket": self._num_tickets, "taken": taken})
                message.content = make_content({**values_of(posted.content), ORDER: order})
            self._traffic.downlink_bytes += posted.num_bytes
            sent.append(_Sent(message, posted, self._num_tickets))
        ids = [message_id or "" for message_id in self._inner.push_messages(messages)]
        ids += [""] * (len(messages) - len(ids))
        for message_id, one in zip(ids, sent, strict=True):
            if message_id:
                self._on_the_way[message_id] = one
            else:
                self._traffic.dropped.append(Refusal(one.message.metadata.dst_node_id, NOT_SENT))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have arrived, checked and decoded. A reply to nothing on its way is counted and left out."""
        replies = []
        for reply in self._replies(message_ids):
            sent = self._expect(reply)
            if sent is not None:
                arrival = self._receive(reply, sent)
                if arrival.update is not None:
                    self.settle({arrival.node_id: arrival.ticket})
                replies.append(_as_message(reply, arrival, sent, self._metrics))
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
                self.give_up(waiting, "no reply in time")
                break
            time.sleep(pause_s)
            pause_s = min(1.0, 1.5 * pause_s)
        return replies

    # For a driver that takes updates -----------------------------------------------------------------------------

    def pull_updates(self, message_ids: Iterable[str]) -> Iterator[Arrival]:
        """What has arrived of these messages, checked and decoded, one at a time.

        An update counts for error feedback only once ``settle`` was told of it.
        """
        for reply in self._replies(message_ids):
            sent = self._expect(reply)
            if sent is not None:
                yield self._receive(reply, sent)

    def settle(self, tickets: Mapping[int, int]) -> None:
        """The updates with these tickets, by node, became part of the model. See Note [feedback over rounds]."""
        self._taken.update(tickets)

    def give_up(self, message_ids: Iterable[str], reason: str) -> list[Arrival]:
        """Wait no longer for the replies to these messages: should one still come, it counts for nothing."""
        late = [(message_id, self._on_the_way.pop(message_id)) for message_id in message_ids if self.waits(message_id)]
        if isinstance(self._inner, InProcessGrid):
            self._inner.drop_messages([message_id for message_id, _ in late])
        arrivals = []
        for message_id, sent in late:
            node_id = sent.message.metadata.dst_node_id
            self._traffic.dropped.append(Refusal(node_id, reason))
            arrivals.append(Arrival(message_id, node_id, problem=reason))
        return arrivals

    def waits(self, message_id: str) -> bool:
        """Whether a message is on its way."""
        return message_id in self._on_the_way

    def memory(self) -> tuple[int, dict[int, int]]:
        """What a journal needs of error feedback: tickets given, and the last ticket taken of each node."""
        return self._num_tickets, dict(self._taken)

    def restore(self, num_tickets: int, taken: dict[int, int]) -> None:
        """Go on from ``memory``."""
        self._num_tickets, self._taken = num_tickets, dict(taken)

    # Parts of it -------------------------------------------------------------------------------------------------

    def _replies(self, message_ids: Iterable[str]) -> Iterable[Message]:
        # Not of a subclass with a pull_messages of its own: what that does must not be passed by.
        if isinstance(self._inner, InProcessGrid) and type(self._inner).pull_messages is InProcessGrid.pull_messages:
            return self._inner.pull_each(list(message_ids))
        return self._inner.pull_messages(message_ids)

    def _expect(self, reply: Message) -> _Sent | None:
        """The message that this is the first reply to. A second reply, or one to nothing, is counted and left out."""
        sent = self._on_the_way.pop(reply.metadata.reply_to_message_id, None)
        if sent is None:
            self._traffic.uplink_bytes += content_bytes(reply)
            self._refuse(reply.metadata.src_node_id, "reply to no message that is waiting for one")
        return sent

    def _prepare(self, message: Message) -> _Posted:
        """Read, encode and count once what goes to many."""
        original, number = message.content, self._round_of(message)
        message.content = content = self._encoder.encode(original, number)
        num_bytes = content_bytes(message)
        if category(message) != MessageType.TRAIN:
            return _Posted(original, content, num_bytes)
        model = model_of(original)
        order: dict[str, ConfigValue] = {
            "codec": self._codec_text,
            "feedback": self._feedback,
            "key": zlib.crc32(f"{self._seed}/{number}".encode()),
        }
        num_bytes += ConfigRecord({**order, "ticket": 0, "taken": 0}).count_bytes()
        trained_bytes = 4 * sum(tensor.size for tensor in model.values() if is_trained(tensor))
        roomy = _is_roomy(model, self._gate.max_update_norm)
        return _Posted(original, content, num_bytes, order, model, trained_bytes, roomy)

    def _round_of(self, message: Message) -> int:
        """Number of the round where the strategy says it, as Flower's do; it only varies the rounding."""
        for record in message.content.values():
            number = record.get("server-round") if isinstance(record, ConfigRecord) else None
            if isinstance(number, int):
                return number
        return 0

    def _receive(self, reply: Message, sent: _Sent) -> Arrival:
        message_id, node_id = reply.metadata.reply_to_message_id, sent.message.metadata.dst_node_id
        uplink_bytes = content_bytes(reply)
        self._traffic.uplink_bytes += uplink_bytes
        if reply.has_error():
            reason = (reply.error.reason or f"error code {reply.error.code}")[:_MOST_REASON]
            self._traffic.dropped.append(Refusal(node_id, reason))
            return Arrival(message_id, node_id, problem=reason)
        update, metrics, kind = None, None, category(sent.message)
        try:
            if reply.metadata.src_node_id != node_id:
                raise Refused(f"reply comes from node {reply.metadata.src_node_id}, the message went to {node_id}")
            if kind == MessageType.TRAIN:
                update = self._check_update(reply, sent)
            elif kind == MessageType.EVALUATE:
                num_samples, metrics = check_metrics(reply, self._gate, self._metrics[kind])
                metrics[NUM_SAMPLES] = num_samples
        except Refused as refusal:
            self._refuse(node_id, str(refusal))
            return Arrival(message_id, node_id, problem=str(refusal), refused=True, uplink_bytes=uplink_bytes)
        if update is not None:
            self._traffic.trained.append(node_id)
            self._traffic.fp32_uplink_bytes += sent.posted.trained_bytes
        return Arrival(message_id, node_id, update, metrics, uplink_bytes=uplink_bytes, ticket=sent.ticket)

    def _check_update(self, reply: Message, sent: _Sent) -> PartialUpdate:
        """Through the gate, which sees of the model only the parts that the reply is about; see Note [parts]."""
        posted = sent.posted
        try:
            masks, about = _parts(reply, posted.tensors)
        except Refused:
            raise
        except Exception as error:  # the record was built by somebody else: a border catches everything
            raise Refused(f"malformed reply ({type(error).__name__}: {error})") from error
        update = check_update(reply, about, self._codec, self._gate, self._metrics[MessageType.TRAIN])
        for name, delta in () if posted.roomy else update.deltas.items():
            tensor = about[name].reshape(-1)
            with np.errstate(over="ignore"):
                # Added once here, so that what is accepted can be added.
                if not np.isfinite(np.add(tensor, delta, dtype=tensor.dtype)).all():
                    raise Refused(f"tensor {name!r} would overflow with this update")
        return PartialUpdate(update.deltas, masks, update.num_samples, update.metrics, posted.tensors)

    def _refuse(self, node_id: int, reason: str) -> None:
        self._traffic.refused.append(Refusal(node_id, reason))


def _is_roomy(model: Tensors, max_update_norm: float) -> bool:
    for tensor in model.values():
        if is_trained(tensor) and tensor.size:
            largest = np.finfo(tensor.dtype.name).max
            if not float(np.abs(tensor).max()) + max_update_norm < float(largest) / 2:
                return False
    return True


def _parts(reply: Message, sent: Tensors) -> tuple[dict[str, npt.NDArray[np.bool_]], Tensors]:
    """The masks that a reply declares, and of the model that was sent what it is about. Takes the record out."""
    records = values_of(reply.content)
    if PARTS not in records:
        return {}, sent
    record = records.pop(PARTS)
    if not isinstance(record, ConfigRecord) or not len(record):
        raise Refused(f"{PARTS} is no record of parts")
    masks, about = {}, {}
    for name, packed in record.items():
        if name not in sent or not is_trained(sent[name]) or not isinstance(packed, bytes):
            raise Refused(f"{PARTS} names {name[:40]!r}, which is no trained tensor, or has no mask of it")
        about[name] = sent[name]
        if packed:
            masks[name] = unpack_mask(packed, sent[name].size)
            about[name] = sent[name].reshape(-1)[masks[name]]
    return masks, about


def _as_message(reply: Message, arrival: Arrival, sent: _Sent, known: dict[str, tuple[str, ...]]) -> Message:
    """The reply as a strategy expects it, built anew from what was checked and nothing else."""
    kind = category(sent.message)
    if reply.has_error() or kind not in known:
        return reply
    if arrival.refused:
        return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"refused: {arrival.problem}"), reply_to=sent.message)
    if arrival.update is None:
        metrics = dict(arrival.metrics or {})
        reply.content = make_content({"metrics": make_metrics({**metrics, NUM_SAMPLES: int(metrics[NUM_SAMPLES])})})
        return reply
    reply.content = whole_model(arrival.update, arrival.update.sent)
    return reply


def whole_model(update: PartialUpdate, base: Tensors) -> RecordDict:
    """``base`` plus an update, with sample count and metrics: what a reply of a stock client holds.

    Args:
        update: Accepted by the gate.
        base: The model that it is added to, of any tensors; what the update did not train stays as it is here.
    """
    model = dict(base)
    for name, delta in update.deltas.items():
        before = base[name].reshape(-1)
        if name in update.masks:
            after, mask = before.copy(), update.masks[name]
            after[mask] = np.add(before[mask], delta, dtype=before.dtype)
        else:
            after = np.add(before, delta, dtype=before.dtype)
        model[name] = after.reshape(base[name].shape)
    metrics = make_metrics({NUM_SAMPLES: update.num_samples, **update.metrics})
    return make_content({"arrays": write_arrays(model), "metrics": metrics})
