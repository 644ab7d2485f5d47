"""Rounds and buffered updates in virtual time: deadlines, quorum, drop-outs, staleness, devices; all repeatable."""

import copy
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efftrain.errors import ConfigError, RoundError
from efftrain.federated import FederatedRecipe, RoundResult, drive_rounds, run_federated
from efftrain.federated.aggregate import Aggregation, Fold
from efftrain.federated.client_app import app
from efftrain.federated.devices import DeviceProfile
from efftrain.federated.fleet import Fleet, device_of
from efftrain.federated.flower import ArrayRecord, FedAvg, Grid, Message, RecordDict, Run, quiet, read_arrays
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import (
    DEVICES,
    ClientConfig,
    DataConfig,
    FedBuffConfig,
    FleetConfig,
    ModelConfig,
    RoundsConfig,
    UplinkConfig,
)
from efftrain.federated.rounds import check_run
from efftrain.federated.selection import Selector
from efftrain.federated.uplink import PartialUpdate

DIGITS = FederatedRecipe(
    name="digits",
    model=ModelConfig(name="fashion-cnn", options={"size": 8, "channels": (2, 4), "hidden": 8}),
    data=DataConfig(name="digits", partition="iid", clients=40, samples_per_client=20),
    client=ClientConfig(epochs=1, batch_size=10),
    server=RoundsConfig(rounds=3, cohort=8, evaluate="server"),
    uplink=UplinkConfig(codec="Int8()", feedback=False),
)
MIXED = FleetConfig(devices={"phone_high": 1.0, "rp2040": 1.0})


def with_server(recipe: FederatedRecipe, **knobs: Any) -> FederatedRecipe:
    return replace(recipe, server=replace(recipe.server, **knobs))


def tensors(arrays: ArrayRecord | None) -> dict[str, Any]:
    assert arrays is not None
    return dict(read_arrays(arrays))


def rounds_of(recipe: FederatedRecipe) -> list[RoundResult]:
    seen: list[RoundResult] = []
    run_federated(recipe, on_round=seen.append)
    return seen


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    recipe = replace(DIGITS, fleet=FleetConfig(devices=MIXED.devices, drop_out=0.2, workers=workers))
    result = run_federated(recipe)
    again = run_federated(replace(recipe, fleet=replace(recipe.fleet, workers=1)))
    assert result.final_sha256 == again.final_sha256
    assert [one.virtual_s for one in result.rounds] == [one.virtual_s for one in again.rounds]


def test_virtual_time_and_energy_are_those_of_the_slowest_and_of_all() -> None:
    for one in rounds_of(replace(DIGITS, fleet=MIXED)):
        assert one.virtual_s == pytest.approx(max(row.ended_s for row in one.clients))
        assert one.energy_j == pytest.approx(sum(row.energy_j for row in one.clients))
        assert {row.device for row in one.clients} == {"phone_high", "rp2040"}
        slow, fast = (
            min(row.ended_s - row.started_s for row in one.clients if row.device == name)
            for name in ("rp2040", "phone_high")
        )
        assert slow > 2 * fast
        assert all(row.fits and 0 < row.ram_bytes < row.device_ram_bytes for row in one.clients)


def test_without_devices_there_is_no_virtual_time() -> None:
    assert {(one.virtual_s, one.energy_j) for one in rounds_of(DIGITS)} == {(None, None)}


def test_a_round_ends_at_its_deadline_with_what_has_come() -> None:
    every = rounds_of(replace(DIGITS, fleet=MIXED))[0]
    slowest = max(row.ended_s for row in every.clients)
    limit = 0.5 * (slowest + max(row.ended_s for row in every.clients if row.device == "phone_high"))
    [one, *_] = rounds_of(with_server(replace(DIGITS, fleet=MIXED), timeout_s=limit))
    late = [row for row in one.clients if row.outcome == "late"]
    assert late
    assert {row.device for row in late} == {"rp2040"}
    assert one.clients_trained + len(late) == 8
    assert one.clients_dropped == len(late)
    assert one.virtual_s == pytest.approx(limit)
    with pytest.raises(RoundError, match=r"late: no reply by the deadline \(server.timeout_s\)"):
        run_federated(with_server(replace(DIGITS, fleet=MIXED), timeout_s=1e-6, rounds=1))


def test_drop_outs_do_not_hold_a_round_up_and_over_selection_makes_up_for_them() -> None:
    fleet = FleetConfig(devices={"phone_high": 1.0}, drop_out=0.3)
    plain = rounds_of(with_server(replace(DIGITS, fleet=fleet), rounds=12))
    more = rounds_of(with_server(replace(DIGITS, fleet=fleet), rounds=12, over_select=True))
    assert 0.1 < np.mean([one.clients_dropped / one.clients_selected for one in plain]) < 0.5
    assert np.mean([one.clients_trained for one in more[4:]]) > np.mean([one.clients_trained for one in plain[4:]])
    assert max(one.clients_trained for one in more) == 8
    assert any(one.clients_surplus for one in more)
    for one in more:
        assert one.clients_trained + one.clients_dropped + one.clients_surplus == one.clients_selected


def test_below_the_quorum_a_round_is_abandoned_and_the_model_stays() -> None:
    recipe = with_server(replace(DIGITS, fleet=FleetConfig(drop_out=0.5)), rounds=8, min_replies=5, max_abandoned=8)
    seen = rounds_of(recipe)
    abandoned = [one for one in seen if one.abandoned]
    assert 0 < len(abandoned) < 8
    for before, one in itertools.pairwise(seen):
        if one.abandoned:
            assert "replies were accepted, expected at least 5" in one.reasons[0]
            assert (one.accuracy, one.loss, one.clients_trained) == (before.accuracy, before.loss, 0)
            # Nobody is lost in the counts: what was accepted came to nothing, and the rows say so too.
            assert one.clients_dropped + one.clients_surplus == one.clients_selected == 8
            outcomes = Counter(row.outcome for row in one.clients)
            assert outcomes == Counter(dropped=one.clients_dropped, surplus=one.clients_surplus)
            assert "the round was abandoned" in {row.reason for row in one.clients}
        else:
            assert one.loss != before.loss


def test_a_round_that_the_strategy_makes_no_model_of_is_abandoned() -> None:
    """Bulyan with 2 liars needs 11 replies; with drop-outs there are not always so many."""
    options: dict[str, int | float | str | bool] = {"num_malicious": 2}
    recipe = with_server(
        replace(DIGITS, fleet=FleetConfig(drop_out=0.1)), rounds=6, cohort=12, strategy="bulyan",
        strategy_options=options, max_abandoned=6,
    )  # fmt: skip
    seen = rounds_of(recipe)
    assert {one.abandoned for one in seen} == {True, False}
    for before, one in itertools.pairwise(seen):
        assert one.abandoned == (sum(row.outcome == "trained" for row in one.clients) < 11)
        if one.abandoned:
            assert re.search(r"strategy bulyan makes no model of \d+ accepted replies", one.reasons[0])
            assert (one.loss, one.clients_trained) == (before.loss, 0)


def test_too_many_abandoned_rounds_end_the_run() -> None:
    recipe = with_server(replace(DIGITS, fleet=FleetConfig(drop_out=0.9)), rounds=50, min_replies=8, max_abandoned=2)
    with pytest.raises(RoundError, match=r"3 rounds one after the other were abandoned.*expected at least 8"):
        run_federated(recipe)


def test_a_device_that_cannot_hold_the_training_is_never_asked() -> None:
    """fashion-cnn with batches of 10 needs 1.1 MB: no microcontroller here has that."""
    recipe = replace(DIGITS, model=ModelConfig(name="fashion-cnn", options={"size": 8, "hidden": 4096}), fleet=MIXED)
    for one in rounds_of(recipe):
        assert {row.device for row in one.clients} == {"phone_high"}
    with pytest.raises(ConfigError, match=r"no device of the fleet can do this training: training needs \d+ bytes"):
        run_federated(replace(recipe, fleet=FleetConfig(devices={"rp2040": 1.0})))


@pytest.mark.parametrize("share", ['choose = "largest"', 'of = "outputs"'])
def test_a_device_whose_scheme_cannot_be_used_is_neither_asked_nor_measures(share: str, tmp_path: Path) -> None:
    scheme = tmp_path / "scheme.toml"
    scheme.write_text(f'name = "part"\nhead = true\n[[weights]]\nlayer = "-1"\nshare = 0.5\n{share}\n')
    fleet = FleetConfig(devices={"stm32f746": 1.0, "phone_high": 1.0}, schemes={"stm32f746": str(scheme)})
    client = ClientConfig(engine="device", epochs=1, batch_size=10)
    recipe = with_server(replace(DIGITS, client=client, fleet=fleet), rounds=1, evaluate="clients")
    [refusal] = check_run(recipe)
    assert re.match(r"clients with the device stm32f746 are never asked: .* scheme 'part' has a share with", refusal)
    [one] = rounds_of(recipe)
    assert {row.device for row in one.clients} == {"phone_high"}
    phones = {str(client) for client in range(40) if device_of(recipe, client) == "phone_high"}
    assert set(one.accuracy_per_person) == phones
    assert 0 < len(phones) < 40


def test_a_scheme_that_trains_nothing_is_refused() -> None:
    client = ClientConfig(engine="device", scheme="none")
    with pytest.raises(ConfigError, match=r"^the update scheme 'none' trains nothing; choose another"):
        run_federated(replace(DIGITS, client=client))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_planned_before_a_round_is_what_its_clients_need(momentum: float) -> None:
    client = ClientConfig(engine="device", scheme="sparse", epochs=1, momentum=momentum)
    recipe = with_server(replace(DIGITS, client=client, fleet=FleetConfig(devices={"stm32f746": 1.0})), rounds=1)
    [one] = rounds_of(recipe)
    assert one.clients_trained == 8
    assert {row.ram_bytes for row in one.clients} == {Fleet(recipe).kind(0).cost.ram_bytes}


@pytest.mark.parametrize("scheme", ["sparse", "last_layer", "full"])
def test_a_device_takes_the_time_of_what_it_sends(scheme: str) -> None:
    """Of a sparse scheme that is a part of the model, and the masks that say which."""
    fleet = FleetConfig(devices={"stm32f746": 1.0, "phone_high": 1.0}, schemes={"stm32f746": scheme})
    client = ClientConfig(engine="device", epochs=1, batch_size=10)
    recipe = replace(DIGITS, client=client, fleet=fleet, uplink=UplinkConfig(codec="Identity()", feedback=False))
    [one] = rounds_of(with_server(recipe, rounds=1, cohort=12))
    assert {row.device for row in one.clients} == {"stm32f746", "phone_high"}
    names = sum(len(name) for name in run_federated(with_server(recipe, rounds=1)).state)
    for row in one.clients:
        assert row.device is not None
        assert row.partition is not None
        device, cost = DeviceProfile.named(row.device), Fleet(recipe).kind(row.partition).cost
        rest_s = device.download_s(one.downlink_bytes / 12) + device.compute_s(
            cost.macs_per_sample * 20, cost.number_format
        )
        upload_s = row.ended_s - row.started_s - rest_s
        # Names and metrics are not counted: some 60 B of metrics, and the names once for payloads and once for masks.
        assert device.upload_s(row.uplink_bytes - 2 * names - 80) <= upload_s <= device.upload_s(row.uplink_bytes)


def test_momentum_is_part_of_what_must_fit() -> None:
    client = ClientConfig(engine="device", scheme="full", momentum=0.9)
    big = replace(DIGITS, client=client, model=ModelConfig(name="fashion-cnn", options={"size": 8, "hidden": 600}))
    recipe = replace(big, fleet=FleetConfig(devices={"stm32f746": 1.0}))
    with pytest.raises(ConfigError, match=r"no device of the fleet can do this training.*stm32f746 has 262144 B"):
        run_federated(recipe)
    Fleet(replace(recipe, client=replace(client, momentum=0.0))).check()


def test_a_device_that_is_no_board_is_bounded_by_its_own_memory() -> None:
    client = ClientConfig(engine="device", scheme="full", epochs=1)
    big = ModelConfig(name="fashion-cnn", options={"size": 8, "hidden": 2048})
    recipe = with_server(replace(DIGITS, client=client, model=big), rounds=1, cohort=2)
    on_pi = replace(recipe, fleet=FleetConfig(devices={"raspberry_pi": 1.0}))
    [one] = rounds_of(on_pi)
    assert one.clients_trained == 2
    assert all(262_144 < row.ram_bytes < row.device_ram_bytes == 1 << 30 for row in one.clients)
    with pytest.raises(ConfigError, match=r"stm32f746 has 262144 B"):
        run_federated(replace(recipe, fleet=FleetConfig(devices={"stm32f746": 1.0})))
    for name in DEVICES:  # the compiler refuses what does not fit a board's RAM, and what does not fit its flash
        device, board = DeviceProfile.named(name), DeviceProfile.named(name).board(name)
        assert (board.ram_bytes, board.flash_bytes) == (device.ram_bytes, device.flash_bytes)


def test_pace_steering_gives_clients_a_rest() -> None:
    fleet = FleetConfig(devices={"phone_high": 1.0})
    seen = rounds_of(with_server(replace(DIGITS, fleet=fleet), rounds=5, pace_s=1e9))
    asked = [row.partition for one in seen for row in one.clients]
    assert len(asked) == len(set(asked)) == 40


def test_availability_follows_the_day() -> None:
    recipe = replace(DIGITS, fleet=FleetConfig(devices={"phone_low": 1.0}, availability=True))
    fleet = Fleet(recipe)

    def online(hour: float) -> float:
        return float(np.mean([fleet.is_online(client, hour * 3600) for client in range(400)]))

    assert online(0.5) < 0.2 < 0.5 < online(12.0)
    assert [fleet.is_online(7, s) for s in range(0, 9000, 60)] == [fleet.is_online(7, s) for s in range(0, 9000, 60)]
    assert all(one.clients_trained for one in rounds_of(recipe))


def test_the_fleet_has_the_shares_asked_for() -> None:
    recipe = replace(DIGITS, fleet=FleetConfig(devices={"phone_low": 3.0, "rp2040": 1.0}))
    names = [device_of(recipe, client) for client in range(2000)]
    assert 0.72 < names.count("phone_low") / 2000 < 0.78
    assert names == [device_of(recipe, client) for client in range(2000)]


def test_every_profile_loads_and_is_in_order() -> None:
    assert set(DEVICES) >= {"stm32f746", "nrf52840", "rp2040", "esp32_s3", "raspberry_pi", "phone_low", "phone_high"}
    for name in DEVICES:
        device = DeviceProfile.named(name)
        assert device.macs_per_s_int8 > device.macs_per_s_fp32
        assert device.online_share(0) == pytest.approx(device.online_by_day)
        assert device.online_share(43_200) == pytest.approx(device.online_by_night)
    with pytest.raises(ConfigError, match="device profile 'pdp11' is unknown"):
        DeviceProfile.named("pdp11")


# Buffered updates -------------------------------------------------------------------------------------------------

FEDBUFF = with_server(
    replace(DIGITS, fleet=MIXED, fedbuff=FedBuffConfig(buffer=4, concurrency=10)), rounds=10, timeout_s=1e6
)


def test_fedbuff_is_repeatable_learns_and_does_not_wait_for_the_slow() -> None:
    seen = rounds_of(FEDBUFF)
    assert [one.clients_trained for one in seen] == [4] * 10
    assert [row.partition for one in seen for row in one.clients] == [
        row.partition for one in rounds_of(replace(FEDBUFF, fleet=replace(MIXED, workers=3))) for row in one.clients
    ]
    assert seen[0].staleness == 0
    assert max(row.staleness for one in seen for row in one.clients) >= 2
    times = [row.ended_s for one in seen for row in one.clients]
    assert times == sorted(times)
    synchronous = rounds_of(with_server(replace(DIGITS, fleet=MIXED), rounds=10, cohort=4))
    assert seen[-1].virtual_s < 0.5 * synchronous[-1].virtual_s  # type: ignore[operator]
    assert seen[-1].loss < seen[0].loss


@pytest.mark.parametrize("drop_out", [0.0, 0.1])
@pytest.mark.parametrize("buffer", [8, 20])
def test_fedbuff_does_not_wait_for_clients_whose_replies_have_come(buffer: int, drop_out: float) -> None:
    """With a buffer as large as the population all clients are due together, and none is left to be asked meanwhile."""
    recipe = with_server(
        replace(
            DIGITS,
            data=replace(DIGITS.data, clients=8),
            fleet=replace(MIXED, drop_out=drop_out),
            fedbuff=FedBuffConfig(buffer=buffer),
        ),
        rounds=6,
        timeout_s=1e6,
    )
    for before, one in itertools.pairwise(rounds_of(recipe)):
        assert before.virtual_s is not None
        assert one.virtual_s is not None
        longest = max(row.ended_s - row.started_s for row in one.clients)
        # Each client is asked as soon as it is free: so many trainings of it, one after the other, and no waiting.
        turns = max(Counter(row.node_id for row in one.clients).values())
        assert one.virtual_s == pytest.approx(max(row.ended_s for row in one.clients))
        assert one.virtual_s <= before.virtual_s + turns * longest


def test_a_stale_update_counts_less() -> None:
    model: dict[str, Any] = {"w": np.zeros(2, np.float32)}
    taken = Aggregation(FedAvg(), mean_only=True)
    for delta, staleness in ((1.0, 0), (1.0, 3)):
        taken.add(update_of(model, {"w": [delta, delta]}), 1, weight=1.0, share=1 / np.sqrt(1 + staleness))
    np.testing.assert_allclose(tensors(taken.close(1, model, lr=0.5))["w"], [0.5 * 1.5 / 2] * 2)


def test_fedbuff_gives_up_when_nobody_ever_replies() -> None:
    with pytest.raises(RoundError, match=r"0 of \d+ replies were accepted"):
        run_federated(with_server(FEDBUFF, timeout_s=1e-4))


# Parts ------------------------------------------------------------------------------------------------------------


def update_of(sent: dict[str, Any], deltas: dict[str, Any], masks: dict[str, Any] | None = None) -> PartialUpdate:
    flat = {name: np.asarray(delta, np.float32) for name, delta in deltas.items()}
    known = {name: np.asarray(mask, bool) for name, mask in (masks or {}).items()}
    return PartialUpdate(flat, known, 10, {"loss": 1.0}, sent)


@pytest.mark.parametrize("mean_only", [True, False])
def test_an_element_is_the_mean_over_those_that_trained_it(mean_only: bool) -> None:
    model: dict[str, Any] = {
        "a": np.zeros(3, np.float32),
        "b": np.ones(2, np.float32),
        "c": np.ones(1, np.float32),
        "n": np.array(5),
    }
    taken = Aggregation(FedAvg(min_train_nodes=1), mean_only=mean_only)
    for deltas, masks in (
        ({"a": [1.0, 2.0], "b": [1.0, 1.0]}, {"a": [True, False, True]}),
        ({"a": [3.0]}, {"a": [True, False, False]}),
        ({"b": [3.0, 3.0]}, {}),
    ):
        taken.add(update_of(model, deltas, masks), 1, weight=10)
    state = tensors(taken.close(1, model))
    np.testing.assert_allclose(state["a"], [2.0, 0.0, 2.0])
    np.testing.assert_allclose(state["b"], [3.0, 3.0])
    np.testing.assert_allclose(state["c"], [1.0])
    assert state["n"] == 5
    assert state["n"].dtype == model["n"].dtype


def test_the_running_mean_is_flowers_up_to_rounding() -> None:
    rng = np.random.default_rng(0)
    model: dict[str, Any] = {"w": rng.normal(size=50).astype(np.float32)}
    fold, held = Aggregation(FedAvg(), mean_only=True), Aggregation(FedAvg(), mean_only=False)
    for number in range(20):
        update = replace(update_of(model, {"w": rng.normal(size=50)}), num_samples=number + 1)
        for one in (fold, held):
            one.add(update, number, weight=number + 1)
    first, second = (tensors(one.close(1, model))["w"] for one in (fold, held))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)
    assert Fold().metrics() == {}


def test_selection_is_seeded_and_asks_nobody_twice() -> None:
    selector, nodes = Selector(DIGITS, None), list(range(1000, 1040))
    first = selector.cohort(1, nodes, 8, 0.0)
    assert first == Selector(DIGITS, None).cohort(1, nodes, 8, 0.0) == sorted(set(first))
    assert selector.cohort(2, nodes, 8, 0.0) != first
    busy = set(nodes[1:])
    assert selector.one(nodes[:1], busy, 0.0) == 1000
    assert selector.one(nodes[1:], busy, 0.0) is None


# A network that misbehaves ----------------------------------------------------------------------------------------


class Unreliable(Grid):
    """Looks like a network to the driver: replies come late, twice, in any order, or never."""

    def __init__(self, hung: int | None = None, hangs_at: str = "") -> None:
        self._inner = InProcessGrid(app, 8)
        self._hung, self._hangs_at = hung, hangs_at  # -1: everybody
        self._old: list[Message] = []

    def set_run(self, run: Run) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> list[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self._nodes = {message.metadata.dst_node_id for message in messages}
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        new = self._inner.pull_messages(message_ids)
        if self._hung is not None:
            new = [reply for reply in new if not self._hangs(reply)]
        repeated = [copy.copy(reply) for reply in self._old[-3:]]
        self._old += new
        return [*repeated, *reversed(new), *[copy.copy(reply) for reply in new[:2]]]

    def _hangs(self, reply: Message) -> bool:
        metadata = reply.metadata
        return self._hung in (-1, metadata.src_node_id) and metadata.message_type.startswith(self._hangs_at)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise AssertionError("the driver pushes and pulls")


EIGHT = with_server(
    replace(DIGITS, data=replace(DIGITS.data, clients=8)), rounds=3, cohort=8, timeout_s=5.0, max_abandoned=9
)


def test_replayed_duplicate_and_disordered_replies_change_nothing() -> None:
    expected = run_federated(EIGHT)
    with quiet():
        result = drive_rounds(Unreliable(), EIGHT)
    assert result.final_sha256 == expected.final_sha256
    assert [one.clients_trained for one in result.rounds] == [8, 8, 8]
    assert result.total("replies_refused") > 6
    assert all("no message that is waiting" in line for one in result.rounds for line in one.reasons)


@pytest.mark.parametrize("evaluate", ["server", "clients"])
def test_a_hung_node_never_holds_a_round_beyond_its_deadline(evaluate: str) -> None:
    recipe = with_server(EIGHT, timeout_s=2.0, evaluate=evaluate)
    with quiet():
        result = drive_rounds(Unreliable(hung=1003), recipe)
    assert all(one.round_s < 2.0 + 1.0 for one in result.rounds)
    assert all(one.measured for one in result.rounds)
    assert {len(one.accuracy_per_person) for one in result.rounds} == {0 if evaluate == "server" else 7}
    assert [one.clients_trained for one in result.rounds] == [7, 7, 7]
    assert [one.clients_dropped for one in result.rounds] == [1, 1, 1]
    assert "no reply by the deadline" in " ".join(result.rounds[0].reasons)


@pytest.mark.parametrize("buffer", [0, 4])
def test_pace_steering_on_a_network_too(buffer: int) -> None:
    """Eight clients, four in a round, each of them once: after two rounds nobody is left, and the run says so."""
    recipe = with_server(EIGHT, cohort=4, rounds=5, min_replies=4, pace_s=1e9, timeout_s=1.0)
    recipe = replace(recipe, fedbuff=FedBuffConfig(buffer=buffer))
    seen: list[RoundResult] = []
    with quiet(), pytest.raises(RoundError, match=r"for 1\.0 s .* connected and not resting \(server\.pace_s\)"):
        drive_rounds(Unreliable(), recipe, on_round=seen.append)
    assert sorted(row.node_id for one in seen for row in one.clients) == list(range(1000, 1008))
    rested = with_server(recipe, rounds=4, pace_s=0.2)
    with quiet():
        result = drive_rounds(Unreliable(), rested)
    assert [one.clients_trained for one in result.rounds] == [4, 4, 4, 4]


def test_a_node_that_hangs_in_measuring_alone_is_waited_for_once() -> None:
    """Half of the clients train in a round; the one that hangs is asked to measure at the start, and then no more."""
    recipe = with_server(EIGHT, rounds=4, cohort=1, timeout_s=4.0, evaluate="clients")
    started = time.monotonic()
    with quiet():
        result = drive_rounds(Unreliable(hung=1003, hangs_at="evaluate"), recipe)
    assert time.monotonic() - started < 4.0 + 4 * 1.0
    assert [one.clients_trained for one in result.rounds] == [1, 1, 1, 1]


def test_rounds_go_on_while_nobody_measures_but_not_for_ever() -> None:
    nobody = Unreliable(hung=-1, hangs_at="evaluate")
    recipe = with_server(EIGHT, rounds=9, timeout_s=1.0, max_abandoned=2, evaluate="clients")
    seen: list[RoundResult] = []
    with quiet(), pytest.raises(RoundError, match=r"round 2, evaluation: 0 of 8 replies were accepted, expected at "):
        drive_rounds(nobody, recipe, on_round=seen.append)
    assert [(one.clients_trained, one.measured) for one in seen] == [(8, False)]
    assert seen[0].reasons[0].startswith("round 1, evaluation: 0 of 8 replies were accepted")


def test_a_quorum_of_nodes_is_enough_to_start() -> None:
    recipe = with_server(replace(EIGHT, data=replace(EIGHT.data, clients=9)), timeout_s=0.5)
    with quiet():
        result = drive_rounds(Unreliable(), recipe)
    assert [one.clients_trained for one in result.rounds] == [8, 8, 8]
    with pytest.raises(RoundError, match=r"8 of 9 nodes connected within 0\.1 s, expected at least 9 \(server\.min_r"):
        drive_rounds(Unreliable(), with_server(recipe, cohort=9, min_replies=9, timeout_s=0.1))


def test_a_network_is_given_no_simulation() -> None:
    with pytest.raises(ConfigError, match=r"\[fleet\] and \[attack\] are for simulation"):
        drive_rounds(Unreliable(), replace(EIGHT, fleet=MIXED))


class Unreachable(Unreliable):
    """A network that cannot send to some nodes, or to nobody: Flower's grids say so by an empty id."""

    def __init__(self, *nodes: int) -> None:
        super().__init__()
        self._unreachable = nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = [message for message in messages if message.metadata.dst_node_id not in self._unreachable]
        ids = dict(zip((message.metadata.dst_node_id for message in sent), super().push_messages(sent), strict=True))
        return [ids.get(message.metadata.dst_node_id, "") for message in messages]


@pytest.mark.parametrize("buffer", [0, 7])
def test_a_message_that_cannot_be_sent_is_a_drop_out(buffer: int) -> None:
    recipe = replace(EIGHT, fedbuff=FedBuffConfig(buffer=buffer))
    seen: list[RoundResult] = []
    with quiet():
        drive_rounds(Unreachable(1003), recipe, on_round=seen.append)
    assert [one.clients_trained for one in seen] == [7, 7, 7]
    assert all(one.clients_dropped >= 1 for one in seen)
    assert all("node 1003 dropped: its message could not be sent" in one.reasons for one in seen)
    assert {row.outcome for one in seen for row in one.clients if row.node_id == 1003} == {"dropped"}


@pytest.mark.parametrize("buffer", [0, 2])
def test_a_network_that_sends_nothing_ends_the_run(buffer: int) -> None:
    recipe = with_server(replace(EIGHT, fedbuff=FedBuffConfig(buffer=buffer)), max_abandoned=1, rounds=9)
    with quiet(), pytest.raises(RoundError, match=r"node \d+ dropped: its message could not be sent"):
        drive_rounds(Unreachable(*range(1000, 1008)), recipe)


def test_buffered_updates_over_a_network_give_up_who_hangs_and_go_on() -> None:
    recipe = with_server(
        replace(EIGHT, fedbuff=FedBuffConfig(buffer=3, concurrency=5), client=replace(EIGHT.client, lr=0.3)),
        rounds=8,
        timeout_s=0.15,
    )
    with quiet():
        result = drive_rounds(Unreliable(hung=1003), recipe, on_round=lambda _: time.sleep(0.05))
    assert all(one.clients_trained >= 3 for one in result.rounds)
    assert result.total("clients_dropped") >= 1
    assert "node 1003 dropped: no reply by the deadline" in str([one.reasons for one in result.rounds])
    assert result.final_sha256 != result.initial_sha256
