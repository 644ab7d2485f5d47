"""FedProx and SCAFFOLD, whole rounds on the real apps, against the papers' algorithms written out as plain loops."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from efftrain.config import from_dict, to_dict
from efftrain.errors import ConfigError
from efftrain.federated import FederatedRecipe, FederatedResult, RoundResult, drive_rounds, run_federated
from efftrain.federated import client_app as real
from efftrain.federated.client_uplink import RESIDUAL, STAGED, Mod
from efftrain.federated.data import client_train
from efftrain.federated.engines import Correction, get_engine
from efftrain.federated.fleet import Fleet
from efftrain.federated.flower import (
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    ErrorCode,
    Message,
    quiet,
    read_arrays,
    write_arrays,
)
from efftrain.federated.grid import FIRST_NODE_ID, InProcessGrid
from efftrain.federated.local import CONTROL
from efftrain.federated.recipe import (
    ClientConfig,
    DataConfig,
    DownlinkConfig,
    FedBuffConfig,
    GateConfig,
    ModelConfig,
    Options,
    RoundsConfig,
    UplinkConfig,
)
from efftrain.federated.strategies import build_strategy
from efftrain.federated.strategies.scaffold import Scaffold
from efftrain.models import build_model

State = dict[str, Tensor]
SMALL = FederatedRecipe(
    seed=5,
    model=ModelConfig(name="fashion-cnn", options={"size": 8, "channels": (2, 4), "hidden": 8}),
    data=DataConfig(name="digits", partition="dirichlet", clients=8, samples_per_client=25),
    client=ClientConfig(epochs=2, batch_size=10, lr=0.1),  # three steps an epoch, the last of 5 samples
    server=RoundsConfig(rounds=3, cohort=3, evaluate="server", evaluate_every=3),
    uplink=UplinkConfig(codec="Identity()"),
)


def with_strategy(recipe: FederatedRecipe, name: str, **options: float) -> FederatedRecipe:
    given: Options = dict(options)
    return replace(recipe, server=replace(recipe.server, strategy=name, strategy_options=given))


def run(recipe: FederatedRecipe) -> tuple[FederatedResult, list[list[int]]]:
    """A run, and who took part in each round."""
    cohorts: list[list[int]] = []

    def on_round(one: RoundResult) -> None:
        cohorts.append([int(row.partition) for row in one.clients if row.partition is not None])

    return run_federated(recipe, on_round=on_round), cohorts


def world(recipe: FederatedRecipe) -> tuple[nn.Module, State]:
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model.name, **recipe.model.options)
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def local_sgd(
    model: nn.Module,
    start: State,
    recipe: FederatedRecipe,
    number: int,
    client: int,
    add: Callable[[str, Tensor], Tensor],
) -> tuple[State, int]:
    """Where a client ends whose gradients ``add(name, weight)`` is added to, and in how many steps."""
    model.load_state_dict(start)
    data, steps = client_train(recipe.data, client, recipe.seed), 0
    rng = np.random.default_rng(np.random.SeedSequence([recipe.seed, number, client]).generate_state(1)[0])
    for _ in range(recipe.client.epochs):
        for batch in torch.split(torch.from_numpy(rng.permutation(len(data))), recipe.client.batch_size):
            logits = model(torch.from_numpy(data.inputs)[batch])
            model.zero_grad()
            nn.functional.cross_entropy(logits, torch.from_numpy(data.targets)[batch]).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    assert weight.grad is not None
                    weight.sub_(recipe.client.lr * (weight.grad + add(name, weight)))
            steps += 1
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, steps


def fedprox_by_hand(recipe: FederatedRecipe, cohorts: list[list[int]], mu: float) -> State:
    """Li et al., algorithm 2: the gradient of ``mu / 2 * ||w - w_t||**2`` is ``mu * (w - w_t)``."""
    model, x = world(recipe)
    for number, cohort in enumerate(cohorts, 1):
        start = x

        def proximal(name: str, weight: Tensor, start: State = start) -> Tensor:
            return mu * (weight - start[name])

        ends = [local_sgd(model, start, recipe, number, client, proximal)[0] for client in cohort]
        x = {name: torch.stack([end[name] for end in ends]).mean(0) for name in x}
    return x


def scaffold_by_hand(recipe: FederatedRecipe, cohorts: list[list[int]], server_lr: float) -> State:
    """Karimireddy et al., algorithm 1, option II."""
    model, x = world(recipe)
    c = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    own = [{name: torch.zeros_like(tensor) for name, tensor in x.items()} for _ in range(recipe.num_clients)]
    for number, cohort in enumerate(cohorts, 1):
        moved_x, moved_c = [], []
        for client in cohort:
            c_i = own[client]
            correction = {name: c[name] - c_i[name] for name in c}
            y, steps = local_sgd(model, x, recipe, number, client, lambda name, _, d=correction: d[name])  # type: ignore[misc]
            new = {n: c_i[n] - c[n] + (x[n] - y[n]) / (steps * recipe.client.lr) for n in x}
            moved_x.append({n: y[n] - x[n] for n in x})
            moved_c.append({n: new[n] - c_i[n] for n in x})
            own[client] = new
        x = {n: x[n] + server_lr * torch.stack([one[n] for one in moved_x]).mean(0) for n in x}
        share = len(cohort) / recipe.num_clients
        c = {n: c[n] + share * torch.stack([one[n] for one in moved_c]).mean(0) for n in c}
    return x


def check_close(found: State, expected: State, atol: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


def largest_difference(one: State, two: State) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


# FedProx ----------------------------------------------------------------------------------------------------------


def test_fedprox_is_the_papers() -> None:
    """18 steps a client in fp32 with values below 1; another mu shows at a thousand times the bound."""
    result, cohorts = run(with_strategy(SMALL, "fedprox", mu=0.5))
    check_close(result.state, fedprox_by_hand(SMALL, cohorts, 0.5), 1e-6)
    assert largest_difference(result.state, fedprox_by_hand(SMALL, cohorts, 0.4)) > 1e-4


def test_fedprox_without_mu_is_fedavg_to_the_bit() -> None:
    assert run_federated(with_strategy(SMALL, "fedprox", mu=0.0)).final_sha256 == run_federated(SMALL).final_sha256


@pytest.mark.parametrize("engine", ["torch", "vmap"])
def test_a_larger_mu_gives_shorter_updates(engine: str) -> None:
    state, data = get_engine("torch").initial_state(SMALL.model, 0), client_train(SMALL.data, 0, 0)

    def length(correction: Correction | None) -> float:
        trained = get_engine(engine).train(SMALL.model, state, data, SMALL.client, 1, correction).state
        return float(np.sqrt(sum(np.square(np.subtract(trained[name], state[name])).sum() for name in state)))

    lengths = [length(None), *(length(Correction(mu)) for mu in (0.1, 1.0, 5.0))]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.7 * lengths[0]


def test_fedprox_works_with_buffered_updates_and_in_buckets() -> None:
    buffered = replace(SMALL, fedbuff=FedBuffConfig(buffer=2, concurrency=4))
    bucketing: Options = {"rule": "fedprox", "mu": 1.0, "size": 2}
    bucketed = replace(SMALL, server=replace(SMALL.server, strategy="bucketing", strategy_options=bucketing))
    plain = replace(bucketed, server=replace(bucketed.server, strategy_options={**bucketing, "mu": 0.0}))
    assert (
        run_federated(with_strategy(buffered, "fedprox", mu=1.0)).final_sha256 != run_federated(buffered).final_sha256
    )
    assert run_federated(bucketed).final_sha256 != run_federated(plain).final_sha256


# SCAFFOLD ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_scaffold_is_the_papers(server_lr: float) -> None:
    """Three of eight clients a round, some of them twice, so that old control variates count; FedAvg ends far away."""
    result, cohorts = run(with_strategy(SMALL, "scaffold", lr=server_lr))
    assert len({client for cohort in cohorts for client in cohort}) < sum(map(len, cohorts))
    check_close(result.state, scaffold_by_hand(SMALL, cohorts, server_lr), 1e-6)
    assert largest_difference(result.state, run_federated(SMALL).state) > 1e-3


def test_scaffold_does_not_drift_where_fedavg_does() -> None:
    """Softmax regression, which has one optimum, on clients of one class each that take ten full steps a round."""
    recipe = replace(
        SMALL,
        model=ModelConfig(name="mlp-10m", options={"input_shape": (1, 8, 8), "hidden": ()}),
        data=DataConfig(name="digits", partition="shards", clients=10, samples_per_client=60, shards_per_client=1),
        client=ClientConfig(epochs=10, batch_size=60, lr=0.2),
        server=RoundsConfig(rounds=12, cohort=5, evaluate="server", evaluate_every=12),
        gate=GateConfig(max_update_norm=100),
    )
    fedavg, scaffold = (run_federated(with_strategy(recipe, name)).accuracy for name in ("fedavg", "scaffold"))
    assert scaffold > 0.85
    assert fedavg < scaffold - 0.2


def app_with_fates(fate: Callable[[int, int], str]) -> ClientApp:
    """The real client; what becomes of its reply on the way is ``ok``, ``lost`` or ``refused``."""

    def on_the_way(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        what = fate(int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]))  # type: ignore[arg-type]
        reply = call_next(message, context)
        if what == "lost":
            return Message(Error(ErrorCode.UNKNOWN, "lost on the way"), reply_to=message)
        if what == "refused":
            reply.content.metric_records["metrics"]["num-examples"] = -1
        return reply

    mods: list[Mod] = [on_the_way]
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply: Message = real.app(message, context)
        return reply

    return app


@pytest.mark.parametrize("codec", ["Identity()", "TopK(0.2) >> Int8(block=16)"])
@pytest.mark.parametrize("feedback", [True, False])
def test_lost_and_refused_replies_leave_the_controls_balanced(codec: str, feedback: bool) -> None:
    """The sum of all ``c_i`` is ``N * c``: what keeps the corrections of a round from adding up to a drift."""
    fates = np.random.default_rng(3).choice(["ok", "lost", "refused"], (SMALL.num_clients, 9), p=[0.5, 0.25, 0.25])
    last: dict[int, str] = {}

    def fate(client: int, number: int) -> str:
        last[client] = str(fates[client, number])
        return last[client]

    server = RoundsConfig(rounds=8, cohort=5, evaluate="server", evaluate_every=8)
    downlink = DownlinkConfig(codec="Identity()" if feedback else "Half()")
    recipe = replace(SMALL, server=server, uplink=UplinkConfig(codec=codec, feedback=feedback), downlink=downlink)
    recipe = with_strategy(recipe, "scaffold")
    strategy = build_strategy("scaffold", {}, seed=0, population=recipe.num_clients)
    assert isinstance(strategy, Scaffold)
    grid = InProcessGrid(app_with_fates(fate), recipe.num_clients)
    with quiet():
        result = drive_rounds(grid, recipe, strategy=strategy)
    assert result.total("clients_dropped") > 3
    assert result.total("replies_refused") > 3

    def sums(valid: Callable[[int], str]) -> dict[str, npt.NDArray[np.float64]]:
        totals = {name: np.zeros(t.size) for name, t in controls.items()}
        for client in last:
            record = grid.context(FIRST_NODE_ID + client).state.array_records.get(valid(client))
            for name, tensor in read_arrays(record).items() if record is not None else ():
                if name.startswith(CONTROL):
                    totals[name] += np.asarray(tensor, np.float64)
        return totals

    sent = strategy.sent({name: tensor.numpy() for name, tensor in result.state.items()})
    controls = {name: np.asarray(c, np.float64).ravel() for name, c in sent.items() if name.startswith(CONTROL)}
    found, careless = (
        max(np.abs(total - recipe.num_clients * controls[name]).max() for name, total in sums(valid).items())
        for valid in (lambda client: STAGED if last[client] == "ok" else RESIDUAL, lambda _: STAGED)
    )
    assert max(np.abs(tensor).max() for tensor in controls.values()) > 0.01
    assert found < 1e-5
    assert careless > 1e-2  # as it would be, had replies counted that never arrived


def test_only_the_model_is_the_result_and_both_are_counted() -> None:
    plain, result = run_federated(SMALL), run_federated(with_strategy(SMALL, "scaffold"))
    assert set(result.state) == set(plain.state)
    assert result.initial_sha256 == plain.initial_sha256
    assert 1.9 < result.total("uplink_bytes") / plain.total("uplink_bytes") < 2.1
    # The control variates go out with training messages only, and three of four messages of three rounds are such.
    assert 1.4 < result.total("downlink_bytes") / plain.total("downlink_bytes") < 2.0


def test_what_is_added_to_gradients_needs_ram_on_the_device() -> None:
    """One vector of the model's size, as momentum does."""
    model_bytes = sum(tensor.nbytes for tensor in get_engine("torch").initial_state(SMALL.model, 0).values())
    plain = Fleet(SMALL).kind(0).cost.ram_bytes
    heavy = replace(SMALL, client=replace(SMALL.client, momentum=0.9))
    for recipe in (with_strategy(SMALL, "scaffold"), with_strategy(SMALL, "fedprox"), heavy):
        assert Fleet(recipe).kind(0).cost.ram_bytes == plain + model_bytes


def test_scaffold_is_refused_where_nobody_says_what_was_taken() -> None:
    """Flower's own loop: without ``UplinkGrid`` a client cannot know which of its control variates are valid."""
    strategy, state = (
        build_strategy("scaffold", {}, seed=0, population=2),
        get_engine("torch").initial_state(SMALL.model, 0),
    )
    grid = InProcessGrid(real.app, 2)
    sent = list(strategy.configure_train(1, write_arrays(state), ConfigRecord({"recipe": "{}"}), grid))
    for reply in grid.send_and_receive(sent):
        assert "says nothing of which replies were taken" in str(reply.error.reason)


# What cannot be combined ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"client": {"engine": "device"}},
            r"scaffold adds to the clients' gradients, which the device engine cannot do",
        ),
        ({"client": {"engine": "board"}}, r"which the board engine cannot do; set client\.engine=\"torch\""),
        ({"fedbuff": {"buffer": 3}}, r"scaffold needs rounds, but fedbuff\.buffer is 3"),
        ({"client": {"momentum": 0.9}}, r"client\.momentum is 0\.9; set client\.momentum=0\.0"),
        ({"attack": {"kind": "alie"}}, r"attack\.kind alie trains as other clients do"),
    ],
)
def test_what_scaffold_cannot_be_combined_with(change: dict[str, dict[str, object]], message: str) -> None:
    table = to_dict(with_strategy(SMALL, "scaffold"))
    with pytest.raises(ConfigError, match=message):
        from_dict(FederatedRecipe, {**table, **{key: {**table[key], **value} for key, value in change.items()}})


def test_what_fedprox_cannot_be_combined_with() -> None:
    device = replace(SMALL, client=ClientConfig(engine="device"))
    with pytest.raises(ValueError, match=r"fedprox adds to the clients' gradients, which the device engine cannot do"):
        with_strategy(device, "fedprox", mu=1.0)
    bucketing: Options = {"rule": "fedprox"}
    with pytest.raises(ValueError, match="fedprox adds to the clients' gradients"):
        replace(device, server=replace(device.server, strategy="bucketing", strategy_options=bucketing))
    data, state = client_train(SMALL.data, 0, 0), get_engine("torch").initial_state(SMALL.model, 0)
    for name in ("device", "board"):
        with pytest.raises(ConfigError, match=rf"which the {name} engine cannot do"):
            get_engine(name).train(SMALL.model, state, data, device.client, 0, Correction(1.0))
    for options, message in (({"mu": -1.0}, r"mu is -1\.0"), ({"nu": 1.0}, r"no option 'nu', the nearest is 'mu'")):
        with pytest.raises(ConfigError, match=message):
            build_strategy("fedprox", options, seed=0)
