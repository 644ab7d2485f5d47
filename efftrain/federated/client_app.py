"""The client: a Flower ``ClientApp``, the same in process, under ``flwr run`` and on a SuperNode.

It needs its number in the population (``node_config["partition-id"]``, which says whose data it holds) and takes
everything else from the message: model, recipe, round.
"""

import json
from functools import lru_cache

import numpy as np

from efftrain.config import from_dict
from efftrain.errors import ConfigError
from efftrain.federated.data import client_data
from efftrain.federated.engines import State, get_engine
from efftrain.federated.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from efftrain.federated.gate import NUM_SAMPLES
from efftrain.federated.recipe import FederatedRecipe
from efftrain.federated.uplink import uplink_mod

PARTITION = "partition-id"
TRAIN_METRICS = ("loss", PARTITION)
EVALUATE_METRICS = ("accuracy", "loss", PARTITION)

app = ClientApp(mods=[uplink_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model of the message on this client's data.

    Reply: the whole model as it is afterwards (``uplink_mod`` makes the update of it), sample count, mean loss.

    Raises:
        ConfigError: The message has no valid recipe, or this node has no partition of its data.
        NonFiniteError: Training diverged.
    """
    recipe, partition, server_round = _read(message, context)
    result = get_engine(recipe.client.engine).train(
        recipe.model,
        _state(message),
        client_data(recipe.data, partition).train,
        recipe.client,
        seed=_client_seed(recipe.seed, server_round, partition),
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(np.asarray(tensor)) for name, tensor in result.state.items()}),
            "metrics": MetricRecord({NUM_SAMPLES: result.num_samples, "loss": result.loss, PARTITION: partition}),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the model of the message on this client's test data.

    Reply: sample count, accuracy in ``[0, 1]``, mean loss.

    Raises:
        ConfigError: As ``train``.
    """
    recipe, partition, _ = _read(message, context)
    result = get_engine(recipe.client.engine).evaluate(
        recipe.model, _state(message), client_data(recipe.data, partition).test, recipe.client
    )
    metrics = MetricRecord(
        {NUM_SAMPLES: result.num_samples, "accuracy": result.accuracy, "loss": result.loss, PARTITION: partition}
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _read(message: Message, context: Context) -> tuple[FederatedRecipe, int, int]:
    """Recipe, number of this client and round."""
    config = message.content.config_records["config"]
    recipe = _recipe(str(config["recipe"]))
    partition = context.node_config.get(PARTITION)
    if type(partition) is not int:
        raise ConfigError(
            f"node {context.node_id} does not know whose data it holds. Start its SuperNode with "
            f"--node-config '{PARTITION}=0' (0 to {recipe.num_clients - 1})."
        )
    server_round = config["server-round"]
    if type(server_round) is not int:
        raise ConfigError(f"server-round is {server_round!r}, expected a whole number")
    return recipe, partition, server_round


@lru_cache(maxsize=4)
def _recipe(text: str) -> FederatedRecipe:
    return from_dict(FederatedRecipe, json.loads(text))


def _state(message: Message) -> State:
    return {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}


def _client_seed(seed: int, server_round: int, partition: int) -> int:
    """By partition, not by node id: a deployment draws its node ids anew each time."""
    return int(np.random.SeedSequence([seed, server_round, partition]).generate_state(1)[0])
