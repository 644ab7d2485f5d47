"""The client: a Flower ``ClientApp``, the same in process, under ``flwr run`` and on a SuperNode.

It needs its number in the population (``node_config["partition-id"]``, which says whose data it holds) and takes
everything else from the message: model, recipe, round.
"""

import json
import math
from functools import lru_cache

import numpy as np

from efftrain.config import from_dict
from efftrain.errors import ConfigError
from efftrain.federated.attack import poison_data, poison_update
from efftrain.federated.client_uplink import PARTS, model_of, pack_mask, uplink_mod
from efftrain.federated.data import client_data, client_train, seed_of
from efftrain.federated.downlink import downlink_mod
from efftrain.federated.engines import Correction, State, Trained, get_engine
from efftrain.federated.fleet import client_config
from efftrain.federated.flower import (
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    make_content,
    make_metrics,
    record_of,
    values_of,
    write_arrays,
)
from efftrain.federated.gate import NUM_SAMPLES
from efftrain.federated.local import CONTROL, PROXIMAL_MU, num_steps
from efftrain.federated.own_code import check
from efftrain.federated.recipe import ClientConfig, FederatedRecipe

PARTITION = "partition-id"
RAM = "ram-bytes"
TRAIN_METRICS = ("loss", PARTITION, RAM)
EVALUATE_METRICS = ("accuracy", "loss", PARTITION)

app = ClientApp(mods=[downlink_mod, uplink_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model of the message on this client's data.

    Reply: the whole model as it is afterwards (``uplink_mod`` makes the update of it), which parts of it were trained
    if not all, sample count, mean loss, and the RAM that the training was planned to need (0 without a plan). With
    SCAFFOLD the client's new control variate besides; see Note [control variates] in ``local``.

    Raises:
        ConfigError: The message has no valid recipe, this node has no partition of its data, or its engine cannot do
            what the strategy asks.
        NonFiniteError: Training diverged.
    """
    recipe, partition, server_round = _read(message, context)
    arrays = model_of(message.content)
    sent = {name: tensor for name, tensor in arrays.items() if not name.startswith(CONTROL)}
    offset = {name.removeprefix(CONTROL): c for name, c in arrays.items() if name.startswith(CONTROL)}
    correction = _correction(message, offset)
    config = client_config(recipe, partition)

    def train_as(number: int) -> Trained:
        return get_engine(recipe.client.engine).train(
            recipe.model,
            sent,
            poison_data(recipe, number, client_train(recipe.data, number, recipe.seed)),
            config if number == partition else client_config(recipe, number),
            seed=_client_seed(recipe.seed, server_round, number),
            correction=correction,
        )

    result = train_as(partition)
    state = poison_update(recipe, partition, sent, result.state, lambda number: train_as(number).state)
    metrics = make_metrics(
        {NUM_SAMPLES: result.num_samples, "loss": result.loss, PARTITION: partition, RAM: result.ram_bytes or 0}
    )
    state = {**state, **_mean_gradients(sent, state, offset, result.num_samples, config)}
    content: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {"arrays": write_arrays(state), "metrics": metrics}
    if result.trained is not None:
        content[PARTS] = _parts(result)
    return Message(make_content(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the model of the message on this client's test data.

    Reply: sample count, accuracy in ``[0, 1]``, mean loss.

    Raises:
        ConfigError: As ``train``.
    """
    recipe, partition, _ = _read(message, context)
    data = client_data(recipe.data, partition, recipe.seed).test
    config = client_config(recipe, partition)
    result = get_engine(recipe.client.engine).evaluate(recipe.model, model_of(message.content), data, config)
    metrics = make_metrics(
        {NUM_SAMPLES: result.num_samples, "accuracy": result.accuracy, "loss": result.loss, PARTITION: partition}
    )
    return Message(make_content({"metrics": metrics}), reply_to=message)


def _read(message: Message, context: Context) -> tuple[FederatedRecipe, int, int]:
    """Recipe, number of this client and round."""
    config = values_of(record_of(message.content, "config", ConfigRecord))
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
    recipe = from_dict(FederatedRecipe, json.loads(text))
    check(recipe)
    return recipe


def _correction(message: Message, offset: State) -> Correction | None:
    """What the strategy adds to the gradients: FedProx by Flower's key, SCAFFOLD by tensors beside the model."""
    mu = values_of(record_of(message.content, "config", ConfigRecord)).get(PROXIMAL_MU, 0.0)
    if not isinstance(mu, int | float) or not 0 <= mu < math.inf:
        raise ConfigError(f"{PROXIMAL_MU} is {mu!r}, expected a number of at least 0")
    return Correction(float(mu), offset) if mu or offset else None


def _mean_gradients(sent: State, trained: State, offset: State, num_samples: int, config: ClientConfig) -> State:
    """The client's new control variate, by option II of SCAFFOLD: its mean gradient over the steps, which is how far it
    moved, less what was added."""
    moved = config.lr * num_steps(num_samples, config.batch_size, config.epochs)
    return {
        CONTROL + name: np.asarray((sent[name] - trained[name]) / moved - added, np.float32)  # type: ignore[operator]
        for name, added in offset.items()
    }


def _parts(result: Trained) -> ConfigRecord:
    """Name -> which elements were trained, packed; empty for all of them. See Note [parts] in ``uplink``."""
    parts = ConfigRecord()
    for name, mask in (result.trained or {}).items():
        parts[name] = pack_mask(mask)
    return parts


def _client_seed(seed: int, server_round: int, partition: int) -> int:
    """By partition, not by node id: a deployment draws its node ids anew each time."""
    return int(seed_of(seed, server_round, partition).generate_state(1)[0])
