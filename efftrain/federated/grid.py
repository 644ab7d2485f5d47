"""A Flower ``Grid`` whose nodes live in this process.

It runs the real ``ClientApp`` for every message, without Ray, threads or sockets: any stock strategy and any stock
``ClientApp`` work on it unchanged, and a round costs little more than its training.

Note [isolation in one process]
    What a wire would separate is separated here too. A client gets its own copy of the message's records, and its own
    copy of its state: if it raises, the state stays as it was before the message. What it cannot do is change array
    bytes, which are shared and immutable.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence

from efftrain.errors import ConfigError
from efftrain.federated.flower import (
    SUPERLINK_NODE_ID,
    ClientApp,
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    RecordDict,
    Run,
    copy_records,
    identify_process,
)

ConfigValue = bool | float | int | str

_FIRST_NODE_ID = 1000  # clear of 0 and of the SuperLink's own id


class InProcessGrid(Grid):
    """Nodes of one process, numbered from ``1000``.

    Clients run when their replies are pulled, one after the other in the order of the messages. The same messages give
    the same replies, so a run is as reproducible as its ``ClientApp`` and strategy. Flower's own strategies draw nodes
    from the global ``random``; see Note [seeded sampling] in ``rounds``.

    Args:
        client_app: The app that every node runs, or a function that makes one, called at the first message.
        num_nodes: How many nodes there are, at least 1.
        run_config: ``Context.run_config`` of every node.
        node_configs: ``Context.node_config`` of each node. By default ``partition-id`` (0 to ``num_nodes - 1``) and
            ``num-partitions``, as in Flower's simulation.
        run_id: Number of the run.

    Raises:
        ConfigError: ``num_nodes`` is below 1 or differs from the length of ``node_configs``.
    """

    def __init__(
        self,
        client_app: ClientApp | Callable[[], ClientApp],
        num_nodes: int,
        *,
        run_config: Mapping[str, ConfigValue] | None = None,
        node_configs: Sequence[Mapping[str, ConfigValue]] | None = None,
        run_id: int = 1,
    ) -> None:
        if num_nodes < 1:
            raise ConfigError(f"num_nodes is {num_nodes}, expected at least 1")
        if node_configs is not None and len(node_configs) != num_nodes:
            raise ConfigError(f"there are {num_nodes} nodes but {len(node_configs)} node_configs, expected one each")
        identify_process(run_id)
        self._client_app = client_app
        self._num_nodes = num_nodes
        self._run_config = dict(run_config or {})
        self._node_configs = node_configs
        self._run = Run.create_empty(run_id)
        self._contexts: dict[int, Context] = {}
        self._waiting: dict[str, Message] = {}
        self._num_messages = 0

    # The interface of Grid ---------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Use another run for messages to come."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

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

    def get_node_ids(self) -> list[int]:
        """All nodes, ascending; node ``i`` of the population has id ``1000 + i``."""
        return list(range(_FIRST_NODE_ID, _FIRST_NODE_ID + self._num_nodes))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages for nodes. Nothing runs before their replies are pulled.

        Returns:
            One id a message, in order.
        """
        ids = []
        for message in messages:
            self._num_messages += 1
            message_id = f"{self._run.run_id}-{self._num_messages}"
            message.metadata.__dict__.update(
                _message_id=message_id, _run_id=self._run.run_id, _src_node_id=SUPERLINK_NODE_ID
            )
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the clients of these messages and return their replies, in the order of the ids.

        An id that is unknown or was already pulled gives nothing. A client that raises, or a node that does not exist,
        gives an error reply.
        """
        messages = [self._waiting.pop(message_id) for message_id in message_ids if message_id in self._waiting]
        return [self._deliver(message) for message in messages]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, run, pull. Every message gets a reply; ``timeout`` has no meaning here and is ignored."""
        return self.pull_messages(self.push_messages(messages))

    # Beyond Grid -------------------------------------------------------------------------------------------------

    def context(self, node_id: int) -> Context:
        """The context that a node keeps between its messages.

        Raises:
            KeyError: There is no such node.
        """
        partition = node_id - _FIRST_NODE_ID
        if not 0 <= partition < self._num_nodes:
            raise KeyError(node_id)
        if node_id not in self._contexts:
            config: Mapping[str, ConfigValue] = {"partition-id": partition, "num-partitions": self._num_nodes}
            self._contexts[node_id] = Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config=dict(self._node_configs[partition] if self._node_configs else config),
                state=RecordDict(),
                run_config=dict(self._run_config),
            )
        return self._contexts[node_id]

    def _deliver(self, message: Message) -> Message:
        """Run one client. See Note [isolation in one process]."""
        node_id = message.metadata.dst_node_id
        try:
            kept = self.context(node_id)
        except KeyError:
            return self._finish(message, _error(message, ErrorCode.NODE_UNAVAILABLE, f"there is no node {node_id}"))
        context = Context(
            run_id=self._run.run_id,
            node_id=node_id,
            node_config=dict(kept.node_config),
            state=copy_records(kept.state),
            run_config=dict(kept.run_config),
        )
        received = Message(copy_records(message.content), reply_to=message)  # an envelope for what is set below
        received.metadata.__dict__.update(message.metadata.__dict__)
        try:
            reply = self._app()(received, context)
            if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise TypeError(f"the ClientApp returned {type(reply).__name__}, expected a reply to its message")
            if reply.has_content():
                reply.content = copy_records(reply.content)
        except Exception as error:
            # Whatever a client does, it costs only its own reply: the others have nothing to do with it.
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} (in {place.name}, line {place.lineno})"
            return self._finish(message, _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason))
        self._contexts[node_id] = context
        return self._finish(message, reply)

    def _app(self) -> ClientApp:
        if not isinstance(self._client_app, ClientApp):
            self._client_app = self._client_app()
        return self._client_app

    def _finish(self, message: Message, reply: Message) -> Message:
        """Stamp a reply with what the transport knows, whatever the client wrote there."""
        reply.metadata.__dict__.update(
            _run_id=self._run.run_id,
            _message_id=f"{message.metadata.message_id}-reply",
            _src_node_id=message.metadata.dst_node_id,
            _dst_node_id=SUPERLINK_NODE_ID,
        )
        return reply


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)
