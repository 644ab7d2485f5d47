"""The tensor axis in processes of their own: under torchrun each has another seed of Python's hashes, and so another
order of its sets, which ranks that are forked from one process have in common.
"""

import json
from pathlib import Path

from tests.conftest import Run

JOB = Path(__file__).parent / "tensor_job.py"


def test_divided_models_train_as_whole_ones_or_are_refused(torchrun: Run) -> None:
    run = torchrun(2, JOB)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.strip().splitlines()[-1])
    refused = {name: text for name, text in results.items() if isinstance(text, str)}
    for name, differences in results.items():
        if name not in refused:
            assert max(differences) < 2e-6, f"{name}: gradients, losses, weights {differences}"
    assert refused.keys() == {"centered", "gain", "faint gain", "tied, divided"}
    assert "'head', whose weights another module has, too" in refused["tied, divided"]
    for name in ("gain", "faint gain"):
        assert "another gradient of 'scale' than in one process" in refused[name]
    for name in ("centered", "gain", "faint gain"):
        assert "Leave parallel.sequence out" in refused[name]
