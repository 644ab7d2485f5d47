"""A Flower ``Grid`` whose nodes live in this process.

It runs the real ``ClientApp`` for every message, without Ray and sockets: any stock strategy and any stock
``ClientApp`` work on it unchanged, and a round costs little more than its training.

Note [isolation in one process]
    What a wire would separate is separated here too. A client gets its own copy of the message's records, and its own
    copy of its state: if it raises, the state stays as it was before the message. What it cannot do is change array
    bytes, which are shared and immutable.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from efftrain.errors import ConfigError
from efftrain.federated.flower import (
    SUPERLINK_NODE_ID,
    ClientApp,
    ConfigValue,
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    RecordDict,
    Run,
    copy_message,
    copy_records,
    identify_process,
)
from efftrain.federated.workers import in_order

FIRST_NODE_ID = 1000  # clear of 0 and of the SuperLink's own id


class InProcessGrid(Grid):
    """Nodes of one process, numbered from ``1000``.

    Clients run when their replies are pulled, and the replies come in the order of the messages, whatever the number of
    workers. The same messages give the same replies, so a run is as reproducible as its ``ClientApp`` and strategy.
    Flower's own strategies draw nodes from the global ``random``; see Note [seeded sampling] in ``rounds``. Nothing is
    kept for a node but the state that its app leaves, so a population costs nothing before it is used.

    Args:
        client_app: The app that every node runs, or a function that makes one, called at the first message.
        num_nodes: How many nodes there are, at least 1.
        run_config: ``Context.run_config`` of every node.
        node_configs: ``Context.node_config`` of each node. By default ``partition-id`` (0 to ``num_nodes - 1``) and
            ``num-partitions``, as in Flower's simulation.
        run_id: Number of the run.
        workers: Threads that run clients. More than one pays where the app lets go of Python's lock while it computes,
            and needs an app that several threads may call at once.
        timeout_s: A client that takes longer gives an error reply, and its thread is abandoned. None waits for ever,
            and with one worker runs the clients in the calling thread.
        fatal: What a client raises of these is raised by ``pull_messages``, instead of an error reply: for what is
            wrong with all of them.

    Raises:
        ConfigError: ``num_nodes`` or ``workers`` is below 1, or ``num_nodes`` differs from the length of
            ``node_configs``.
    """

    def __init__(
        self,
        client_app: ClientApp | Callable[[], ClientApp],
        num_nodes: int,
        *,
        run_config: Mapping[str, ConfigValue] | None = None,
        node_configs: Sequence[Mapping[str, ConfigValue]] | None = None,
        run_id: int = 1,
        workers: int = 1,
        timeout_s: float | None = None,
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        if num_nodes < 1 or workers < 1:
            raise ConfigError(f"num_nodes is {num_nodes} and workers {workers}, expected at least 1 of each")
        if node_configs is not None and len(node_configs) != num_nodes:
            raise ConfigError(f"there are {num_nodes} nodes but {len(node_configs)} node_configs, expected one each")
        identify_process(run_id)
        self._client_app = client_app
        self._num_nodes = num_nodes
        self._run_config = dict(run_config or {})
        self._node_configs = node_configs
        self._run = Run.create_empty(run_id)
        self._workers = workers
        self._timeout_s = timeout_s
        self._fatal = fatal
        self._states: dict[int, RecordDict] = {}
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
        return list(range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_nodes))

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
        return list(self.pull_each(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, run, pull. Every message gets a reply; ``timeout`` has no meaning here and is ignored."""
        return self.pull_messages(self.push_messages(messages))

    # Beyond Grid -------------------------------------------------------------------------------------------------

    def pull_each(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """As ``pull_messages``, one reply at a time: a round of 10,000 replies need not lie in memory at once."""
        messages = [self._waiting.pop(message_id) for message_id in message_ids if message_id in self._waiting]
        runs = in_order(self._run_client, messages, workers=self._workers, timeout_s=self._timeout_s)
        for message, ran in zip(messages, runs, strict=True):
            if ran is None:
                reason = f"gave no reply within client.timeout_s ({self._timeout_s:g} s)"
                yield self._finish(message, _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason))
                continue
            reply, state = ran
            if state is not None:
                self.put_state(message.metadata.dst_node_id, state)
            yield self._finish(message, reply)

    def drop_messages(self, message_ids: Iterable[str]) -> None:
        """Forget messages whose clients need not run: nobody will ask for their replies."""
        for message_id in message_ids:
            self._waiting.pop(message_id, None)

    def context(self, node_id: int) -> Context:
        """The context that a node would be given now.

        Raises:
            KeyError: There is no such node.
        """
        partition = node_id - FIRST_NODE_ID
        if not 0 <= partition < self._num_nodes:
            raise KeyError(node_id)
        config: Mapping[str, ConfigValue] = {"partition-id": partition, "num-partitions": self._num_nodes}
        state = self._states.get(node_id)
        return Context(
            run_id=self._run.run_id,
            node_id=node_id,
            node_config=dict(self._node_configs[partition] if self._node_configs else config),
            state=RecordDict() if state is None else copy_records(state),
            run_config=dict(self._run_config),
        )

    def put_state(self, node_id: int, state: RecordDict) -> None:
        """Set what a node keeps between its messages; empty forgets it."""
        if len(state):
            self._states[node_id] = state
        else:
            self._states.pop(node_id, None)

    def _run_client(self, message: Message) -> tuple[Message, RecordDict | None]:
        """Run one client, in any thread: its reply, and its new state if it gave one that counts.

        See Note [isolation in one process].
        """
        node_id = message.metadata.dst_node_id
        try:
            context = self.context(node_id)
        except KeyError:
            return _error(message, ErrorCode.NODE_UNAVAILABLE, f"there is no node {node_id}"), None
        try:
            reply = self._app()(copy_message(message), context)
            if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise TypeError(f"the ClientApp returned {type(reply).__name__}, expected a reply to its message")
            if reply.has_content():
                reply.content = copy_records(reply.content)
        except self._fatal:
            raise
        except (Exception, SystemExit) as error:
            # Whatever a client does, it costs only its own reply: the others have nothing to do with it.
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} (in {place.name}, line {place.lineno})"
            return _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), None
        return reply, context.state

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
