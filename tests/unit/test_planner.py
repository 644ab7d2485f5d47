"""The planner: what it counts is what runs, every plan is judged, and more hardware is never worse."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from efftrain.compression import Identity, Int8, LowRank, TopK
from efftrain.config import dump_toml
from efftrain.errors import ConfigError
from efftrain.models import build_model
from efftrain.parallel import Plan, SyncConfig
from efftrain.parallel.pipeline import Schedule
from efftrain.parallel.planner import Planner, Prediction, Refusal, Setting, describe, enumerate_plans, reasons
from efftrain.parallel.planner.calibrate import Axis, calibrate
from efftrain.parallel.planner.exchange import codec_speed
from efftrain.parallel.planner.hardware import Hardware, Link, load_hardware, shipped_hardware
from efftrain.parallel.planner.work import measure_work, seconds
from efftrain.parallel.recompute import Checkpointing
from efftrain.parallel.tensor import plan_tensor
from efftrain.profile import profile_model
from efftrain.training import OptimizerConfig
from tests.conftest import ROOT, Run
from tests.unit.test_cli import Main

LAPTOP = load_hardware("laptop_2core")
SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "context": 16, "tied": False}


def language_model(batch_size: int = 32, **options: Any) -> Setting:
    torch.manual_seed(0)
    model = build_model("char-transformer", **{**SMALL, **options})
    sample = torch.from_numpy(np.arange(16, dtype=np.int64)[None] % 7)
    return Setting(model, sample, batch_size, OptimizerConfig(name="adamw", lr=1e-3))


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(language_model(), LAPTOP)


# Hardware ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_hardware())
def test_a_shipped_cluster_is_read_and_plans_a_model(name: str) -> None:
    cluster = load_hardware(name)
    assert cluster.name == name
    found, _ = Planner(language_model(), cluster).rank(16, [Plan(), Plan(tensor=2), Plan(pipeline=2)])
    assert len(found) == 3


def test_a_cluster_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no file and none of h100x8_400gbit, laptop_2core, "):
        load_hardware("h100")
    with pytest.raises(ValueError, match="must be more than 0"):
        Link(latency_us=1, gbit_s=0)
    with pytest.raises(ValueError, match="gflops is 0"):
        replace(LAPTOP, gflops=0)


def test_ranks_share_cores() -> None:
    assert [LAPTOP.slowdown(n) for n in (1, 2, 4)] == [1.0, LAPTOP.crowding, 2 * LAPTOP.crowding]
    assert load_hardware("h100x8_400gbit").slowdown(64) == 1.0


# Work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "batch"), [("watch-cnn", 4), ("resnet8", 2), ("mlp-10m", 8)])
def test_work_is_what_the_profiler_counts(name: str, batch: int) -> None:
    model = build_model(name)
    inputs = torch.zeros(batch, *model.input_shape)  # type: ignore[misc]
    work, profile = measure_work(model, inputs), profile_model(model, inputs)
    assert sum(operation.macs for operation in work.forward) == profile.macs
    assert sum(operation.macs for operation in work.backward) == profile.backward_macs
    assert work.num_parameters == profile.trainable_parameters
    # The loss keeps little on top; batch statistics are buffers of other sizes than fp32.
    assert profile.saved_for_backward_bytes <= work.saved_bytes <= profile.saved_for_backward_bytes + 1024
    assert work.later_peak_bytes >= work.saved_bytes
    assert work.first_peak_bytes >= 4 * work.num_parameters


def test_the_tensor_axis_divides_work() -> None:
    setting = language_model()
    inputs = setting.sample.expand(8, 16)
    styles = plan_tensor(setting.model, inputs, 2).styles
    whole, half = measure_work(setting.model, inputs), measure_work(setting.model, inputs, styles=styles, size=2)
    assert 0.5 * whole.num_parameters <= half.num_parameters < 0.6 * whole.num_parameters
    ratio = sum(o.macs for o in half.forward) / sum(o.macs for o in whole.forward)
    assert ratio == pytest.approx(0.5), "every matrix product of this model is divided"
    assert half.saved_bytes < whole.saved_bytes
    # Two embeddings; in each of two blocks three columns and rows of attention, up and down; the head.
    assert len(half.reduced_bytes) == 2 + 2 * (4 + 2) + 1


def test_recomputed_activations_cost_arithmetic_in_place_of_memory() -> None:
    setting = language_model()
    works = [
        measure_work(setting.model, setting.sample.expand(8, 16), checkpointing=kind)
        for kind in ("none", "selective", "full")
    ]
    saved = [work.saved_bytes for work in works]
    assert saved == sorted(saved, reverse=True)
    assert len(set(saved)) == 3
    macs = [sum(operation.macs for operation in work.backward) for work in works]
    assert macs[0] == macs[1] < macs[2] < 1.5 * macs[0]
    names = [[parameter.name for parameter in work.parameters] for work in works]
    assert names[0] == names[1] == names[2]


def test_time_follows_the_slower_of_arithmetic_and_memory() -> None:
    work = measure_work(build_model("mlp-10m"), torch.zeros(8, 1, 28, 28))
    calls = len(work.forward) * (LAPTOP.operator_us + LAPTOP.autograd_us) / 1e6
    slow_memory, slow_arithmetic = replace(LAPTOP, memory_gb_s=1e-3), replace(LAPTOP, gflops=1e-3)
    moved = sum(b.elements * b.itemsize for o in work.forward for b in (*o.reads, *o.writes))
    assert seconds(work.forward, slow_memory, bf16=False) == pytest.approx(
        calls + LAPTOP.efficiency * moved / 1e6, rel=1e-3
    )
    macs = sum(o.macs for o in work.forward)
    assert seconds(work.forward, slow_arithmetic, bf16=False) == pytest.approx(
        calls + LAPTOP.efficiency * 2 * macs / 1e6, rel=1e-3
    )


# Plans ------------------------------------------------------------------------------------------------------------


def test_every_way_to_spread_four_ranks_is_judged(planner: Planner) -> None:
    plans = list(enumerate_plans(Plan(), 4))
    sizes = {(p.data, p.tensor, p.pipeline) for p in plans if isinstance(p, Plan)}
    assert sizes == {(d, t, p) for d in (1, 2, 4) for t in (1, 2, 4) for p in (1, 2, 4) if d * t * p == 4}
    found, refused = planner.rank(4, plans)
    assert len(found) + len(refused) == len(plans)
    assert all(refusal.reason for refusal in refused)
    assert [p.time.total for p in found] == sorted(p.time.total for p in found)
    for prediction in found:
        prediction.plan.check(4)
        parts = (*vars(prediction.time).values(), *vars(prediction.memory).values())
        assert min(parts) >= 0
    assert sum(count for _, count in reasons(refused)) == len(refused)
    said = " ".join(reason for reason, _ in reasons(refused))
    for reason in ("can be cut into 7 stages at most, the plan wants 8", "left without gradients"):
        assert reason in said
    with pytest.raises(ConfigError, match=r"parallel\.tensor must divide the heads"):
        planner.predict(Plan(tensor=8), 8)


def test_machines_joined_by_a_slow_link_sum_up_inside_first() -> None:
    """Of 2 sites x 4 ranks: a rank sends a quarter of each bucket between sites; the planner finds that by itself."""
    sites = load_hardware("sites_100mbit")
    planner = Planner(language_model(64, width=256), sites)
    flat, nodes = (Plan(codec=Int8(), sync=SyncConfig(node_size=size)) for size in (1, 4))
    one, other = planner.predict(flat, 8), planner.predict(nodes, 8)
    assert other.wire_bytes == pytest.approx(one.wire_bytes * (1 / 2 * 1 / 4) / (7 / 8), rel=0.02)
    assert other.time.exchange < one.time.exchange / 4
    assert other.memory.total > one.memory.total
    plans = list(enumerate_plans(Plan(), 8, node_size=sites.ranks_per_node))
    assert nodes in [replace(plan, data=None) for plan in plans if isinstance(plan, Plan)]
    best = planner.rank(8, plans)[0][0]
    assert best.plan.sync.node_size == 4, describe(best.plan)
    assert "node_size" in describe(best.plan)


def test_weights_sharded_inside_a_machine_are_gathered_inside_it() -> None:
    sites = load_hardware("sites_100mbit")
    planner = Planner(language_model(64, width=256), sites)
    whole, inside = (planner.predict(Plan(shard="full", shard_size=size), 8) for size in (None, 4))
    assert inside.time.exchange < whole.time.exchange / 2
    assert inside.memory.total > whole.memory.total
    assert describe(inside.plan)["shard_size"] == 4
    plans = [p for p in enumerate_plans(Plan(), 8, node_size=4) if isinstance(p, Plan) and p.shard == "full"]
    assert {p.shard_size for p in plans if p.data == 8} == {None, 4}


def test_a_plan_that_needs_too_much_memory_is_refused(planner: Planner) -> None:
    needed = planner.predict(Plan(), 2).memory.total
    for spare, runs in ((1, True), (-1, False)):
        tight = Planner(planner.setting, replace(LAPTOP, memory_gib=(needed + spare) / (1 << 30)))
        found, refused = tight.rank(2, [Plan()])
        assert bool(found) == runs
        assert runs or "GiB a rank, laptop_2core has" in refused[0].reason


def test_a_batch_that_cannot_be_cut_is_refused(planner: Planner) -> None:
    with pytest.raises(ConfigError, match=r"loop\.batch_size is 32, expected a multiple of 3: 3 replicas x 1 micro-b"):
        planner.predict(Plan(), 3)


def test_no_pipeline_is_planned_that_ends_a_stage_between_divided_layers() -> None:
    model = build_model("fashion-cnn")
    setting = Setting(model, torch.zeros(1, 1, 28, 28), 32, OptimizerConfig())
    found, refused = Planner(setting, LAPTOP).rank(4, list(enumerate_plans(Plan(), 4, codecs=[Identity()])))
    assert any("can be cut into 3 stages at most, the plan wants 4" in r.reason for r in refused)
    assert {one.plan.num_stages for one in found if one.plan.tensor == 2 and one.plan.pipeline == 2} == {2}


def memory_of(planner: Planner, world_size: int, **plan: Any) -> Any:
    return planner.predict(Plan(**plan), world_size).memory


def test_memory_goes_where_the_literature_says(planner: Planner) -> None:
    whole = memory_of(planner, 4)
    weights = 4 * measure_work(planner.setting.model, planner.setting.sample).num_parameters
    assert (whole.gradients, whole.optimizer) == (weights, 2 * weights)
    full, grads = memory_of(planner, 4, shard="full"), memory_of(planner, 4, shard="grads")
    assert full.optimizer == grads.optimizer == whole.optimizer // 4
    assert full.weights < whole.weights <= grads.weights
    assert memory_of(planner, 4, codec=Int8()).feedback == 2 * weights
    all_in_flight = memory_of(planner, 2, pipeline=2, schedule="gpipe", microbatches=8).activations
    assert memory_of(planner, 2, pipeline=2, microbatches=8).activations < all_in_flight


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved_1f1b"])
def test_stages_can_compute_their_blocks_again(schedule: Schedule, planner: Planner) -> None:
    plan = Plan(pipeline=2, schedule=schedule, microbatches=4)
    kinds: tuple[Checkpointing, ...] = ("none", "selective", "full")
    none, selective, full = (planner.predict(replace(plan, checkpointing=kind), 2) for kind in kinds)
    assert none.memory.activations > selective.memory.activations > full.memory.activations
    assert none.memory.weights == full.memory.weights
    assert none.time.compute < full.time.compute < 1.6 * none.time.compute
    assert describe(full.plan)["checkpointing"] == "full"


def test_zero_bubble_idles_least(planner: Planner) -> None:
    instant = Planner(planner.setting, replace(LAPTOP, inside=Link(latency_us=0, gbit_s=1e9)))
    idle = [
        instant.predict(Plan(pipeline=2, schedule=schedule), 2).time.bubble
        for schedule in ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble")
    ]
    assert idle == sorted(idle, reverse=True)


PLANS = [
    Plan(), Plan(codec=Int8()), Plan(codec=TopK(0.01)), Plan(codec=LowRank(2)), Plan(tensor=2), Plan(pipeline=2),
    Plan(shard="full"), Plan(shard="grads", codec=Int8()), Plan(tensor=2, pipeline=2),
]  # fmt: skip


@given(plan=st.sampled_from(PLANS), factor=st.floats(1.0, 100.0), what=st.sampled_from(["link", "memory", "gflops"]))
@settings(max_examples=12)
def test_more_hardware_is_never_slower(plan: Plan, factor: float, what: str) -> None:
    faster = {
        "link": {"inside": replace(LAPTOP.inside, gbit_s=LAPTOP.inside.gbit_s * factor)},
        "memory": {"memory_gb_s": LAPTOP.memory_gb_s * factor},
        "gflops": {"gflops": LAPTOP.gflops * factor},
    }[what]
    changed: Hardware = replace(LAPTOP, **faster)  # type: ignore[arg-type]
    before, after = (Planner(_SETTING, cluster) for cluster in (LAPTOP, changed))
    after._works = before._works = _WORKS
    assert after.predict(plan, 4).time.total <= before.predict(plan, 4).time.total * (1 + 1e-9)


_SETTING = language_model()
_WORKS: dict[Any, Any] = {}


def test_a_chain_costs_what_its_parts_cost() -> None:
    chain = codec_speed(TopK(0.1) >> Int8(), LAPTOP)
    top, rest, plain = (LAPTOP.codecs[name] for name in ("TopK", "Int8", "Identity"))
    assert chain.encode_ns == pytest.approx(top.encode_ns + 0.1 * rest.encode_ns)
    assert chain.encode_us == pytest.approx(top.encode_us + rest.encode_us - plain.encode_us)
    assert codec_speed(TopK(0.1), LAPTOP) == top


class Parts(nn.Module):
    """As many parameters in all, in so many tensors."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024 // num, 32, bias=False) for _ in range(num))

    def forward(self, inputs: Tensor) -> Tensor:
        parts = zip(self.layers, inputs.chunk(len(self.layers), 1), strict=True)
        return torch.stack([layer(part) for layer, part in parts]).sum(0)


def test_small_tensors_cost_a_codec_as_many_times_as_there_are() -> None:
    def codec_s(tensors: int) -> float:
        setting = Setting(Parts(tensors), torch.zeros(1, 1024), 4, OptimizerConfig())
        return Planner(setting, LAPTOP).predict(Plan(codec=TopK(0.1)), 2).time.codec

    top = LAPTOP.codecs["TopK"]
    more = 15 * (top.encode_us + 2 * top.decode_us) / 1e6 * LAPTOP.slowdown(2)
    assert codec_s(16) - codec_s(1) == pytest.approx(more, rel=1e-6)


# Calibration and the command line ---------------------------------------------------------------------------------


def test_this_machine_is_measured_and_written(tmp_path: Path) -> None:
    setting = replace(language_model(), optimizer=OptimizerConfig())
    found = calibrate(LAPTOP, setting)
    (tmp_path / "here.toml").write_text(dump_toml(found))
    assert load_hardware(str(tmp_path / "here.toml")) == found
    predicted = Planner(setting, found).predict(Plan(), 1).time.total
    assert 1e-4 < predicted < 10


@pytest.mark.parametrize(
    ("cost", "plan"),
    [
        ("gathered_layer_us", Plan(shard="full")),
        ("divided_operator_us", Plan(tensor=2)),
        ("split_operator_us", Plan(pipeline=2, schedule="interleaved_zero_bubble")),
    ],
)
def test_a_probe_gives_its_figure_back(cost: str, plan: Plan) -> None:
    setting = language_model()
    known = replace(LAPTOP, **{cost: 321.0})  # type: ignore[arg-type]
    step_s = Planner(setting, known).predict(plan, 2).time.total
    axis = Axis(cost, setting, plan, lambda: None, 0)
    assert getattr(axis.fit(LAPTOP, step_s, 2), cost) == pytest.approx(321.0, rel=1e-3)
    assert getattr(axis.fit(LAPTOP, 0.0, 2), cost) == pytest.approx(0.0, abs=1e-3)


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    return Main(capsys)


RECIPE = str(ROOT / "parallel" / "recipes" / "watch_ddp_topk.toml")


def test_plans_are_shown_with_reasons(main: Main) -> None:
    status, out, err = main("plan", RECIPE, "--world", 2, "--set", "parallel.momentum_correction=false")
    assert status == 0, err
    assert "data=2" in out
    assert "memory a rank" in out


def test_plans_as_json(main: Main) -> None:
    found = main.json("plan", RECIPE, "--world", 4, "--hardware", "sites_100mbit")
    assert found["hardware"] == "sites_100mbit"
    assert found["plans"][0]["data"] == 4
    assert all(plan["step_s"] == pytest.approx(sum(plan["time"].values())) for plan in found["plans"])
    assert {refusal["reason"] for refusal in found["refused"]}
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_planned_is_one_line(main: Main) -> None:
    status, _, err = main("plan", RECIPE, "--world", 2, "--write", "x.toml")
    assert (status, err) == (1, "efftrain: --write saves what --calibrate measured; give both\n")
    status, _, err = main("plan", RECIPE, "--world", 13)
    assert status == 1
    assert err.splitlines()[-1].startswith("efftrain: no plan of 13 processes can run")


def test_help_of_plan_loads_no_torch(efftrain: Run) -> None:
    assert "--hardware" in efftrain("plan", "--help", COLUMNS="200").stdout


def test_predictions_are_typed(planner: Planner) -> None:
    found, refused = planner.rank(2, [Plan(), Refusal({}, "because")])
    assert isinstance(found[0], Prediction)
    assert refused == [Refusal({}, "because")]


def test_weights_that_a_sparse_mean_leaves_alone_cost_no_update() -> None:
    plain = OptimizerConfig(lr=0.1, momentum=0.0)
    planner = Planner(replace(language_model(), optimizer=plain), LAPTOP)
    sparse, dense = (planner.predict(Plan(codec=TopK(ratio)), 2).time.update for ratio in (0.01, 0.2))
    assert sparse < dense
    clipping = Planner(replace(language_model(), optimizer=plain, clips=True), LAPTOP)
    assert clipping.predict(Plan(codec=TopK(0.01)), 2).time.update == dense
