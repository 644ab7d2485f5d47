"""A Flower app of your own with compressed uplinks: linear regression in NumPy. See README.md in this folder."""

from efftrain.compression import Int8, TopK
from efftrain.federated import InProcessGrid, UplinkGrid, uplink_mod  # before flwr: this turns its usage figures off

# isort: split
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

app = ClientApp(mods=[uplink_mod])  # the one line that the client needs


def own_data(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Load what this client holds; here 64 made-up rows whose true weights are -1 to 1."""
    inputs = np.random.default_rng(int(context.node_config["partition-id"])).normal(size=(64, 40)).astype(np.float32)
    return inputs, inputs @ np.linspace(-1, 1, 40, dtype=np.float32)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Reply with the whole model; the mod sends only what changed, encoded."""
    inputs, targets = own_data(context)
    weights = message.content.array_records["arrays"]["weights"].numpy().copy()
    for _ in range(5):
        weights -= 0.1 * inputs.T @ (inputs @ weights - targets) / len(inputs)
    loss = float(np.mean((inputs @ weights - targets) ** 2))
    arrays = ArrayRecord({"weights": Array(weights)})
    metrics = MetricRecord({"num-examples": len(inputs), "loss": loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the model that was sent on what this client holds."""
    inputs, targets = own_data(context)
    error = float(np.mean((inputs @ message.content.array_records["arrays"]["weights"].numpy() - targets) ** 2))
    metrics = MetricRecord({"num-examples": len(inputs), "error": error})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


grid = UplinkGrid(
    InProcessGrid(app, num_nodes=10), TopK(0.25) >> Int8(), train_metrics=("loss",), evaluate_metrics=("error",)
)
start = ArrayRecord({"weights": Array(np.zeros(40, np.float32))})
result = FedAvg().start(grid, initial_arrays=start, num_rounds=10)
print(result.evaluate_metrics_clientapp[10]["error"], grid.take_traffic().uplink_bytes)
