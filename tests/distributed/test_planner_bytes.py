"""The bytes that the planner predicts are those that a step sends."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from efftrain.compression import parse_codec
from efftrain.models import build_model
from efftrain.parallel import Plan, SyncConfig, mesh
from efftrain.parallel.planner import Planner, Setting
from efftrain.parallel.planner.calibrate import calibrate
from efftrain.parallel.planner.hardware import load_hardware
from efftrain.training import OptimizerConfig
from tests.distributed import jobs
from tests.distributed.conftest import StartRanks

BATCH = 12
SHAPE = (6, 128)  # of a sample of watch-cnn
CODECS = ("Identity()", "Int8(block=64)", "TopK(0.05) >> Int8()", "IntN(4)", "LowRank(2)", "Sign()")


def plan_of(codec: str, bucket_mb: float | None, whole: bool) -> Plan:
    return Plan(codec=parse_codec(codec), sync=SyncConfig(bucket_mb=bucket_mb, whole_buckets=whole))


def cases() -> list[tuple[str, float | None, bool]]:
    return [(codec, mb, False) for codec in CODECS for mb in (None, 0.01)] + [("TopK(0.05) >> Int8()", 0.05, True)]


@jobs.in_group
def send() -> list[float]:
    sent = []
    for case in cases():
        torch.manual_seed(0)
        job = plan_of(*case).apply(build_model("watch-cnn"), optimizer=OptimizerConfig())
        share = BATCH // mesh.world_size()
        inputs = torch.from_numpy(np.random.default_rng(mesh.rank()).standard_normal((share, *SHAPE)))
        job.step(inputs.float(), torch.zeros(share, dtype=torch.long))
        sent.append(job.exchange.stats()["wire_bytes"])
    return sent


@jobs.in_group
def measure() -> dict[str, float]:
    setting = Setting(build_model("watch-cnn"), torch.zeros(1, *SHAPE), BATCH, OptimizerConfig())
    found = calibrate(load_hardware("laptop_2core"), setting, mesh.transport(torch.device("cpu")))
    return {name: value for name, value in asdict(found).items() if isinstance(value, float)} | asdict(found.inside)


@pytest.mark.slow
def test_ranks_measure_what_is_between_them(start_ranks: StartRanks) -> None:
    found, _ = start_ranks(measure, 2).results()
    assert found["gbit_s"] != load_hardware("laptop_2core").inside.gbit_s
    for name in ("latency_us", "gbit_s", "cpu_ns_per_byte", "gathered_layer_us", "divided_operator_us"):
        assert 0 < found[name] < 1e5, name


@pytest.mark.parametrize("world_size", [2, 3])
def test_predicted_bytes_are_sent(start_ranks: StartRanks, world_size: int) -> None:
    model = build_model("watch-cnn")
    setting = Setting(model, torch.zeros(1, *SHAPE), BATCH, OptimizerConfig())
    planner = Planner(setting, load_hardware("laptop_2core"))
    predicted = [planner.predict(plan_of(*case), world_size).wire_bytes for case in cases()]
    ranks = start_ranks(send, world_size).results()
    for case, wanted, *found in zip(cases(), predicted, *ranks, strict=True):
        # Ranks in charge of a part send what its pieces need: a few bytes more or less than one another.
        assert np.mean(found) == pytest.approx(wanted, rel=0.02), case
