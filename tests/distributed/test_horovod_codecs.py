"""One run over Horovod and over gloo: the same bits. Two numbers have one sum, and messages are added in rank order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import jobs
from tests.distributed.conftest import StartRanks
from tests.distributed.test_horovod import why_not
from tests.distributed.test_resume import CODECS, NUM_STEPS, last_checkpoint, rows_of, write_recipe

TRAIN = Path(__file__).parent / "horovod_train.py"

# The first has feedback, momentum correction and gathered messages, the second travels in two phases.
FAST = ("correction", "int8")


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in CODECS]
)
def test_a_run_over_horovod_has_the_bits_of_a_run_over_gloo(tmp_path: Path, start_ranks: StartRanks, kind: str) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"Horovod does not load ({reason}); bash launch/horovod.sh")
    recipe = write_recipe(tmp_path, *CODECS[kind])
    gloo = start_ranks(jobs.train_recipe, 2, str(recipe), [], str(tmp_path / "gloo"))
    launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2", sys.executable]
    done = subprocess.run(
        [*map(str, [*launcher, TRAIN, recipe, tmp_path / "horovod"])],
        capture_output=True,
        text=True,
        timeout=200,
        env={name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert gloo.results()[0]["num_steps"] == NUM_STEPS
    over_gloo, over_horovod = tmp_path / "gloo" / "r", tmp_path / "horovod" / "r"
    assert rows_of(over_horovod) == rows_of(over_gloo)
    ours, theirs = last_checkpoint(over_horovod), last_checkpoint(over_gloo)
    if kind == "identity":  # the plain all-reduce of torch is DDP's, which keeps no state of its own
        ours, theirs = ({"shared": found["state/shared.safetensors"]} for found in (ours, theirs))
    else:
        assert len(theirs) == 3, "the weights, and the feedback of two ranks"
    assert ours == theirs
