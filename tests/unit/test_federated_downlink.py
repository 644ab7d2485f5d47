"""Compressed downlinks: clients train from what the codec leaves, the server's model stays exact."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efftrain.compression import Identity, parse_codec
from efftrain.federated import FederatedRecipe, run_federated
from efftrain.federated.client_uplink import uplink_mod
from efftrain.federated.downlink import ModelEncoder, downlink_mod
from efftrain.federated.flower import (
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    FedAvg,
    Message,
    MetricRecord,
    RecordDict,
    make_array,
    quiet,
    read_arrays,
    record_of,
    write_arrays,
)
from efftrain.federated.gate import PAYLOAD_STYPE
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import ClientConfig, DataConfig, DownlinkConfig, ModelConfig, RoundsConfig, UplinkConfig
from efftrain.federated.uplink import UplinkGrid

MODEL: dict[str, Any] = {
    "w": np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32),
    "steps": np.array(7, np.int64),
}
RECIPE = FederatedRecipe(
    model=ModelConfig(name="fashion-cnn", options={"size": 8, "channels": (4, 8), "hidden": 32}),
    data=DataConfig(name="digits", partition="iid", clients=10, samples_per_client=60),
    client=ClientConfig(epochs=2, batch_size=10, lr=0.3),
    server=RoundsConfig(rounds=10, evaluate="server", evaluate_every=10),
    uplink=UplinkConfig(codec="Identity()"),
)


def tensors(record: ArrayRecord) -> dict[str, Any]:
    return dict(read_arrays(record))


def seeing_app(seen: list[dict[str, Any]]) -> ClientApp:
    """Notes the model that it gets, and adds 0.5 to it."""
    app = ClientApp(mods=[downlink_mod, uplink_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        [record] = [one for one in message.content.values() if isinstance(one, ArrayRecord)]
        model = read_arrays(record)
        seen.append(model)
        arrays = write_arrays({name: tensor + np.asarray(0.5).astype(tensor.dtype) for name, tensor in model.items()})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})}), reply_to=message)

    return app


def test_clients_get_what_the_codec_leaves_and_the_servers_model_stays_exact() -> None:
    codec, seen = parse_codec("IntN(4, block=16)"), list[dict[str, Any]]()
    grid = UplinkGrid(InProcessGrid(seeing_app(seen), 2), Identity(), downlink=codec)
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=1)
    with quiet():
        result = strategy.start(grid, write_arrays(MODEL), num_rounds=1)
    flat = codec.decode(codec.encode(MODEL["w"].reshape(-1)), max_elements=MODEL["w"].size)
    for model in seen:
        assert model["w"].dtype == np.float32
        assert model["w"].shape == (9, 5)
        np.testing.assert_array_equal(model["w"].reshape(-1), flat)
        assert model["steps"] == 7
    assert np.abs(flat - MODEL["w"].reshape(-1)).max() > 0.01
    np.testing.assert_allclose(tensors(result.arrays)["w"], MODEL["w"] + 0.5, atol=1e-6)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    dtype=st.sampled_from(["f2", "f4", "f8"]),
    codec=st.sampled_from(["Half()", "Int8(block=7)", "Int8(block=7, rounding='stochastic')", "Mx()", "Fp8()"]),
    number=st.integers(0, 5),
)
def test_every_tensor_comes_back_with_its_shape_and_type(
    shape: tuple[int, ...], dtype: str, codec: str, number: int
) -> None:
    tensor = np.random.default_rng(number).normal(size=shape).astype(dtype)
    content = RecordDict({"m": write_arrays({"w": tensor, "n": np.array([1, 2])}), "c": ConfigRecord({"a": 1})})
    encoder = ModelEncoder(parse_codec(codec), seed=number)
    encoded = encoder.encode(content, number)
    again = ModelEncoder(parse_codec(codec), seed=number).encode(content, number)
    payloads = [record_of(one, "m", ArrayRecord)["w"].data for one in (encoded, again)]
    assert payloads[0] == payloads[1]

    def take(message: Message, context: Context) -> Message:
        return message

    message = Message(encoded, 5, "evaluate")
    decoded = downlink_mod(message, None, take).content  # type: ignore[arg-type]
    found: dict[str, Any] = read_arrays(record_of(decoded, "m", ArrayRecord))
    assert found["w"].dtype == tensor.dtype
    assert found["w"].shape == tensor.shape
    np.testing.assert_allclose(found["w"], tensor, atol=0.13 * np.abs(tensor).max(initial=0))
    np.testing.assert_array_equal(found["n"], [1, 2])
    np.testing.assert_array_equal(tensors(record_of(content, "m", ArrayRecord))["w"], tensor)


def test_a_model_that_does_not_fit_its_shape_costs_the_client_its_reply() -> None:
    payload = bytes(Identity().encode(np.zeros(4, np.float32)))
    record = ArrayRecord()
    record["w"] = make_array("float32", (2, 3), PAYLOAD_STYPE, payload)
    grid = InProcessGrid(seeing_app([]), 1)
    [reply] = grid.send_and_receive([Message(RecordDict({"m": record}), 1000, "train")])
    assert "has 4 elements, expected those of (2, 3)" in str(reply.error.reason)


def test_a_run_with_a_quarter_of_the_downlink_learns_the_same() -> None:
    plain = run_federated(RECIPE)
    small = replace(RECIPE, downlink=DownlinkConfig(codec="Int8(block=64)"))
    first, again = run_federated(small), run_federated(small)
    assert first.final_sha256 == again.final_sha256 != plain.final_sha256
    assert first.accuracy > plain.accuracy - 0.05 > 0.6
    saved = plain.rounds[0].downlink_bytes - first.rounds[0].downlink_bytes
    model_bytes = sum(4 * tensor.numel() for tensor in first.state.values())
    assert saved > 0.7 * 10 * model_bytes, "10 clients get the model at a little over a quarter of its bytes"


@pytest.mark.parametrize("codec", ["TopK(0.1)", "Sign()", "LowRank(2)"])
def test_codecs_for_updates_are_refused(codec: str) -> None:
    with pytest.raises(ValueError, match="too little of a model is left"):
        DownlinkConfig(codec=codec)
