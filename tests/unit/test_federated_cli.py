"""``efftrain federate``: its JSON, its run folder, its exit codes, its report."""

import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from efftrain.models import model_class
from efftrain.report.federated import federated_page
from tests.conftest import ROOT, Run

RECIPE = ROOT / "federated" / "recipes" / "watch_people.toml"
SMALLEST = ("--set", "server.rounds=2", "--set", "data.people=[2, 5]", "--set", "client.epochs=1")
PROMISED = {
    *("rounds", "accuracy", "accuracy_per_round", "uplink_bytes", "downlink_bytes", "clients_trained"),
    *("clients_dropped", "replies_refused", "round_s", "first_round_s", "virtual_s", "energy_j"),
    *("peak_ram_bytes_per_client", "peak_rss_bytes", "engine", "seed", "final_sha256"),
}
"""What the project's checks read."""


def test_json_and_run_folder(efftrain: Run, tmp_path: Path) -> None:
    done = efftrain("federate", RECIPE, *SMALLEST, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= PROMISED
    assert result["rounds"] == len(result["accuracy_per_round"]) == 2
    assert result["clients_trained"] == 4
    assert result["virtual_s"] > 0 < result["energy_j"]
    assert 100_000 < result["peak_ram_bytes_per_client"] < 8 << 20
    assert result["peak_rss_bytes"] > 50 << 20
    assert "round   1  accuracy" in done.stderr
    folder = tmp_path / "runs" / "watch_people"
    assert json.loads((folder / "result.json").read_text())["final_sha256"] == result["final_sha256"]
    rows = list(csv.DictReader((folder / "clients.csv").read_text().splitlines()))
    assert [(row["round"], row["device"], row["outcome"], row["fits"]) for row in rows] == [
        (number, "esp32_s3", "trained", "True") for number in "1122"
    ]
    assert len((folder / "rounds.csv").read_text().splitlines()) == 3
    page = (folder / "report.html").read_text()
    assert "All 4 trainings were within their device" in page
    assert page.count("<svg") >= 4
    assert "The worst off" in page
    again = efftrain("federate", RECIPE, *SMALLEST, "--resume", "--initial", folder / "model", "--json")
    assert json.loads(again.stdout)["resumed_after"] == 2, again.stderr
    report = efftrain("report", folder, "--json", "--out", tmp_path / "page.html")
    assert report.returncode == 0, report.stderr


def test_initial_and_what_is_refused(efftrain: Run, tmp_path: Path) -> None:
    folder = model_class("watch-cnn").from_config().save_pretrained(tmp_path / "model")
    done = efftrain("federate", RECIPE, *SMALLEST, "--initial", folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"started from {folder}" in done.stderr
    changed = efftrain("federate", RECIPE, *SMALLEST, "--set", "client.lr=0.3", "--resume")
    assert "was started with other settings in client" in changed.stderr
    other = model_class("fashion-cnn").from_config().save_pretrained(tmp_path / "other")
    for arguments, reason in (
        (("--initial", other), "holds a fashion-cnn, the recipe trains a watch-cnn"),
        (("--initial", tmp_path), "cannot be read"),
        (("--set", "server.round=1"), "nearest is 'server.rounds'"),
        (("--set", "server.strategy=krumm"), "krum"),
        (("--set", "server.min_replies=8", "--set", "fleet.drop_out=0.9"), "rounds one after the other were abandoned"),
    ):
        refused = efftrain("federate", RECIPE, *arguments)
        assert (refused.returncode, refused.stdout) == (1, ""), refused.stderr
        last = refused.stderr.splitlines()[-1]
        assert last.startswith("efftrain: ")
        assert reason in last


def test_a_failed_start_leaves_nothing_behind(efftrain: Run, tmp_path: Path) -> None:
    first = efftrain("federate", RECIPE, *SMALLEST, "--set", "server.rounds=1")
    assert first.returncode == 0, first.stderr
    no_device = ("--set", "fleet.devices={rp2040=1.0}", "--set", "client.batch_size=4000")
    for arguments, reason in ((("--set", "server.strategy=krumm"), "krum"), (no_device, "no device of the fleet")):
        refused = efftrain("federate", RECIPE, *SMALLEST, *arguments)
        assert refused.returncode == 1
        assert reason in refused.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["watch_people"]
    # Killed before its first round, a later run of other settings is no run to go on with.
    (tmp_path / "runs" / "watch_people-2" / "journal").mkdir(parents=True)
    (tmp_path / "runs" / "watch_people-2" / "recipe.toml").write_text("seed = 7\n")
    done = efftrain("federate", RECIPE, *SMALLEST, "--resume", "--json")
    assert json.loads(done.stdout)["resumed_after"] == 1, done.stderr


def test_without_flower_one_line_says_so() -> None:
    code = "import sys; sys.modules['flwr'] = None; from efftrain.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "federate", str(RECIPE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'efftrain[federated]'" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_it_can_be_interrupted_and_resumed(efftrain: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "efftrain", "federate", str(RECIPE), "--set", "server.rounds=10000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stderr is not None
            for number in (1, 2):
                assert started.stderr.readline().startswith(f"round   {number}")
            started.send_signal(signal.SIGINT)
            output, errors = started.communicate(timeout=200)
        finally:
            started.kill()
    assert (started.returncode, output) == (130, ""), errors
    assert "interrupted" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    done = efftrain("federate", RECIPE, "--set", "server.rounds=3", "--resume", "--json")
    assert json.loads(done.stdout)["resumed_after"] >= 1, done.stderr


def test_a_run_belongs_to_one_process(efftrain: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "efftrain", "federate", str(RECIPE), "--set", "server.rounds=10000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        try:
            assert first.stderr is not None
            assert first.stderr.readline().startswith("round   1")
            second = efftrain("federate", RECIPE, "--set", "server.rounds=10000", "--resume")
            assert first.poll() is None
        finally:
            first.kill()
    assert (second.returncode, second.stdout) == (1, "")
    assert "belongs to a run that is still going on" in second.stderr
    assert second.stderr.count("\n") == 1, second.stderr
    fewer = efftrain("federate", RECIPE, "--set", "server.rounds=1", "--resume")
    assert fewer.returncode == 1
    assert "rounds already, but server.rounds is 1, and no round can" in fewer.stderr
    lines = (tmp_path / "runs" / "watch_people" / "journal" / "rounds.jsonl").read_bytes().count(b"\n")
    done = efftrain("federate", RECIPE, "--set", f"server.rounds={lines + 1}", "--resume", "--json")
    assert json.loads(done.stdout)["resumed_after"] == lines, done.stderr


def test_a_resumed_run_started_from_what_it_was_first_given(efftrain: Run, tmp_path: Path) -> None:
    model = model_class("watch-cnn").from_config().save_pretrained(tmp_path / "model")
    first = efftrain("federate", RECIPE, *SMALLEST, "--initial", model)
    assert first.returncode == 0, first.stderr
    done = efftrain("federate", RECIPE, *SMALLEST, "--set", "server.rounds=3", "--resume")
    assert f"started from {model}, accuracy" in done.stderr
    folder = tmp_path / "runs" / "watch_people"
    assert json.loads((folder / "result.json").read_text())["started_from"] == str(model)


def test_a_damaged_folder_is_not_resumed_and_nothing_in_it_is_lost(efftrain: Run, tmp_path: Path) -> None:
    first = efftrain("federate", RECIPE, *SMALLEST)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "watch_people"
    clients, recipe = folder / "clients.jsonl", folder / "recipe.toml"
    text = recipe.read_text()

    def refused() -> str:
        before = sorted(path.name for path in folder.rglob("*"))
        done = efftrain("federate", RECIPE, *SMALLEST, "--set", "server.rounds=3", "--resume")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        assert sorted(path.name for path in folder.rglob("*")) == before
        return done.stderr

    recipe.unlink()
    assert "cannot be resumed: recipe runs/watch_people/recipe.toml does not exist; put its recipe back" in refused()
    recipe.write_text(text)
    rows = clients.read_text()
    clients.write_text(rows + "no row\n")
    assert "clients.jsonl, line 5, is no row of a client (Expecting value" in refused()
    assert clients.read_text() == rows + "no row\n"
    clients.write_text(rows)
    done = efftrain("federate", RECIPE, *SMALLEST, "--set", "server.rounds=3", "--resume", "--json")
    assert json.loads(done.stdout)["resumed_after"] == 2, done.stderr


def test_a_client_that_never_ends_costs_its_own_reply_and_no_exit_code(efftrain: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import os, threading\n"
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
        "    def forward(self, x):\n"
        "        in_client = threading.current_thread().name == 'efftrain-client'\n"
        "        if self.training and in_client and os.environ.setdefault('HUNG', 'no') == 'no':\n"
        "            os.environ['HUNG'] = 'yes'\n"
        "            while True:\n"
        "                super().forward(x).sum().backward()\n"
        "        return super().forward(x)\n"
    )
    digits = ("data.name=digits", "data.partition=iid", "data.clients=2", "model.name=net.py:Net", "fleet.devices={}")
    server = ("server.rounds=2", "server.evaluate=server", "client.timeout_s=2.0")
    arguments = [word for setting in digits + server for word in ("--set", setting)]
    done = efftrain("federate", RECIPE, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["clients_selected"], result["clients_trained"], result["clients_dropped"]) == (4, 3, 1)
    # Where the run fails the exit code is that of the failure.
    done = efftrain("federate", RECIPE, *arguments, "--set", "server.rounds=1", "--set", "server.min_replies=2")
    assert done.returncode == 1, done.stderr
    assert "the only round was abandoned" in done.stderr.splitlines()[-1]


def test_a_terminal_gets_a_dashboard(tmp_path: Path) -> None:
    text = shown_on_a_terminal(tmp_path, *SMALLEST)
    for word in ("federate watch_people", "2 of 2", "less than fp32", "simulated"):
        assert word in text
    # While the first round is on, nothing is known but that.
    assert "replies" in text.partition("accuracy")[0]
    assert "abandoned" not in text


def test_the_dashboard_says_which_rounds_were_abandoned(tmp_path: Path) -> None:
    drops = ("--set", "server.rounds=6", "--set", "server.min_replies=8", "--set", "fleet.drop_out=0.1")
    more = ("--set", "server.max_abandoned=5", "--set", "client.epochs=1")
    text = shown_on_a_terminal(tmp_path, *drops, *more)
    assert re.search(r"abandoned\s+\d\s+the last in round \d", text)
    assert re.search(r"0 trained, \d dropped\s+\d surplus", text)
    found = re.search(r"(\d) of 6 rounds abandoned: too few replies \(server.min_replies is 8\)", text)
    assert found is not None
    # Gone on with, it counts the rounds before as well.
    again = shown_on_a_terminal(tmp_path, *drops, "--set", "server.rounds=7", *more, "--resume")
    [counted, *_] = re.findall(r"abandoned\s+(\d)\s+the last in round \d", again)
    assert int(found[1]) <= int(counted) <= int(found[1]) + 1


def shown_on_a_terminal(tmp_path: Path, *arguments: str) -> str:
    main_end, other_end = pty.openpty()
    command = [sys.executable, "-m", "efftrain", "federate", str(RECIPE), *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=other_end) as started:
        os.close(other_end)
        shown = b""
        while True:
            try:
                shown += (data := os.read(main_end, 65536))
            except OSError:  # how Linux says that the other end is closed
                break
            if not data:
                break
        assert started.wait(60) == 0
    os.close(main_end)
    return shown.decode()


def test_the_page_of_a_run_without_devices_and_with_abandoned_rounds() -> None:
    one: dict[str, Any] = {
        "round": 1,
        "abandoned": True,
        "accuracy": 0.5,
        "measured": True,
        "train_loss": None,
        "clients_trained": 0,
        "clients_dropped": 2,
        "replies_refused": 1,
        "uplink_bytes": 100,
        "downlink_bytes": 3000,
        "virtual_s": None,
        "energy_j": None,
        "round_s": 0.1,
        "accuracy_per_person": {},
    }
    result = {
        "name": "x",
        "rounds": 1,
        "strategy": "fedavg",
        "accuracy": 0.5,
        "accuracy_before": 0.4,
        "uplink_bytes": 100,
        "downlink_bytes": 3000,
        "uplink_ratio": 2.0,
        "clients_selected": 3,
        "clients_trained": 0,
        "clients_dropped": 2,
        "clients_surplus": 0,
        "replies_refused": 1,
        "rounds_abandoned": 1,
        "virtual_s": None,
        "recipe": {"fedbuff": {"buffer": 0}},
    }
    shared = {"device": None, "device_ram_bytes": 0, "ram_bytes": 0, "reason": "", "energy_j": 0.0, "fits": True}
    times = {"started_s": 0.0, "ended_s": 1.0}
    clients = [
        {**shared, **times, "round": number, "partition": client, "outcome": outcome, "loss": loss}
        for number, client, outcome, loss in [(1, 0, "trained", 9.0), (2, 0, "trained", 1.0), (1, 1, "trained", 2.0),
                                              (1, 2, "dropped", None)]
    ]  # fmt: skip
    [worst] = federated_page(result, [one], clients).sections[-1].tables
    assert worst.rows == [("1", "-", "1", "2.000", "+0.500"), ("0", "-", "2", "1.000", "-0.500")]
    page = federated_page(result, [one], [])
    assert "Abandoned for too few replies: 1 round." in page.sections[1].text
    assert [section.title for section in page.sections] == ["Learning", "Who took part", "Devices"]
