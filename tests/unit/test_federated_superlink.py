"""The same apps over Flower's own SuperLink and SuperNodes, on loopback, and in its own simulation (Ray): the same bits
as in one process."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from efftrain.federated import FederatedRecipe, run_federated
from efftrain.federated.recipe import DataConfig, RoundsConfig

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(log: Path, environment: dict[str, str], *command: object) -> Iterator[int]:
    """A command in a process group of its own, ended with all it started. Gives the number of the group."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            yield started.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


RECIPE = replace(
    FederatedRecipe(name="watch_people"),
    data=DataConfig(people=(3, 8)),
    server=RoundsConfig(rounds=2, timeout_s=100),
)
CONFIG = 'data.people="[3, 8]" server.rounds=2 server.timeout_s=100.0'


def home_of(folder: Path, connection: str) -> dict[str, str]:
    """The environment of Flower's commands, with one connection called ``here``."""
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{connection}\n')
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }


def flwr(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(part) for part in (BIN / "flwr", *arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def wait_for_result(folder: Path, output: Path, limit_s: float = 150) -> dict[str, Any]:
    end = time.monotonic() + limit_s
    while not output.exists() and time.monotonic() < end:
        time.sleep(0.5)
    time.sleep(0.5)
    logs = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))
    assert output.exists(), logs
    result: dict[str, Any] = json.loads(output.read_text())
    return result


@pytest.mark.parametrize("page", ["docs/federated.md", "federated/README.md"])
def test_flower_takes_the_connections_that_the_guides_print(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "config.toml").write_text("\n".join(blocks))
    names = re.findall(r"^\[superlink\.(\w+)\]", "\n".join(blocks), re.MULTILINE)
    code = (
        "import sys; from flwr.cli.flower_config import read_superlink_connection\n"
        "for name in sys.argv[1:]: print(read_superlink_connection(name).address)"
    )
    environment = {**os.environ, "FLWR_HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    addresses = done.stdout.split()
    assert len(addresses) == len(names) > 0
    # ":local:" would take any server that answers on its port, whoever started it.
    assert all(re.fullmatch(r"[\w.-]+:\d+|HOST:8000", address) for address in addresses)


def test_our_server_is_not_taken_for_one_that_was_left_on_its_port(tmp_path: Path) -> None:
    flower, keys = ROOT / "launch" / "flower", tmp_path / "keys"
    subprocess.run(["bash", flower / "keys.sh", keys, "1", "127.0.0.1"], check=True, capture_output=True, timeout=200)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        command = ["bash", str(flower / "superlink.sh"), str(keys), "127.0.0.1", str(other.getsockname()[1])]
        environment = home_of(tmp_path, 'address = "127.0.0.1:1"\ninsecure = true')
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "address already in use" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_superlink_and_two_supernodes_give_the_bits_of_one_process(tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "result.json"
    address = f"127.0.0.1:{port}"
    environment = home_of(tmp_path, f'address = "{address}"\ninsecure = true')
    with contextlib.ExitStack() as stack:
        superlink = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port]
        superlink.append("--disable-runtime-dependency-installation")
        stack.enter_context(process(tmp_path / "superlink.log", environment, *superlink))
        wait_for(port)
        for partition in range(2):
            supernode = [BIN / "flower-supernode", "--insecure", "--superlink", address, "--port", free_port()]
            supernode += ["--node-config", f"partition-id={partition}"]
            stack.enter_context(process(tmp_path / f"supernode{partition}.log", environment, *supernode))
        flwr(environment, "run", ROOT / "federated", "here", "--run-config", f'output="{output}" {CONFIG}')
        result = wait_for_result(tmp_path, output)
    assert_same_as_in_one_process(result)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_hangs_and_one_that_never_came_cost_no_round_more_than_its_deadline(tmp_path: Path) -> None:
    """Three people: one's SuperNode is stopped in mid-run, one's was never started. ``evaluate`` is ``clients``."""
    port, output, limit_s = free_port(), tmp_path / "result.json", 25.0
    address = f"127.0.0.1:{port}"
    environment = home_of(tmp_path, f'address = "{address}"\ninsecure = true')
    lines = tmp_path / "journal" / "rounds.jsonl"
    settings = f'output="{output}" journal="{lines.parent}" data.people="[3, 8, 2]" '
    settings += f"server.rounds=4 server.min_replies=1 server.timeout_s={limit_s}"
    with contextlib.ExitStack() as stack:
        superlink = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port]
        superlink.append("--disable-runtime-dependency-installation")
        stack.enter_context(process(tmp_path / "superlink.log", environment, *superlink))
        wait_for(port)
        nodes = []
        for partition in range(2):
            supernode = [BIN / "flower-supernode", "--insecure", "--superlink", address, "--port", free_port()]
            supernode += ["--node-config", f"partition-id={partition}"]
            nodes.append(stack.enter_context(process(tmp_path / f"supernode{partition}.log", environment, *supernode)))
        flwr(environment, "run", ROOT / "federated", "here", "--run-config", settings)
        end = time.monotonic() + 150
        while not (lines.exists() and lines.read_bytes().count(b"\n")) and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(nodes[1], signal.SIGSTOP)
        stack.callback(os.killpg, nodes[1], signal.SIGCONT)
        result = wait_for_result(tmp_path, output)
    assert result["rounds"] == 4
    assert result["rounds_abandoned"] == 0
    assert 5 <= result["clients_trained"] <= 6, "the one that runs every time, the other once or twice"
    rounds = [json.loads(line.partition(" ")[2])["result"] for line in lines.read_text().splitlines()]
    assert max(one["round_s"] for one in rounds) < 1.9 * limit_s, "a second deadline is waited for"
    assert all(one["measured"] for one in rounds)
    assert set(rounds[-1]["accuracy_per_person"]) == {"3"}, "who hangs measures nothing"
    # After some rounds the SuperLink notices, and the node is not selected any more.
    assert all(one["clients_trained"] + one["clients_dropped"] == one["clients_selected"] for one in rounds)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_flowers_own_simulation_gives_the_bits_of_one_process(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    port = free_port()
    environment = home_of(tmp_path, f'address = "127.0.0.1:{port}"\ninsecure = true')
    with contextlib.ExitStack() as stack:
        superlink = [BIN / "flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", port]
        superlink.append("--disable-runtime-dependency-installation")
        stack.enter_context(process(tmp_path / "superlink.log", environment, *superlink))
        wait_for(port)
        flwr(
            environment, "run", ROOT / "federated", "here", "--federation-config", "num-supernodes=2",
            "--run-config", f'output="{output}" {CONFIG}',
        )  # fmt: skip
        result = wait_for_result(tmp_path, output)
    assert_same_as_in_one_process(result)


def assert_same_as_in_one_process(result: dict[str, Any]) -> None:
    expected = run_federated(RECIPE)
    assert result["final_sha256"] == expected.final_sha256
    assert result["accuracy_per_round"] == expected.accuracy_per_round
    assert result["uplink_bytes"] == expected.total("uplink_bytes")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tls_and_registered_nodes_as_the_guide_says(tmp_path: Path) -> None:
    """``launch/flower``: keys, server, nodes. A node whose key is not registered stays outside."""
    flower = ROOT / "launch" / "flower"
    keys, port, output = tmp_path / "keys", free_port(), tmp_path / "result.json"
    subprocess.run(["bash", flower / "keys.sh", keys, "3", "127.0.0.1"], check=True, capture_output=True, timeout=200)
    again = subprocess.run(
        ["bash", flower / "keys.sh", keys, "3", "127.0.0.1"], capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 1
    assert "has keys already" in again.stderr
    environment = home_of(tmp_path, f'address = "127.0.0.1:{port}"\nroot-certificates = "{keys / "ca.crt"}"')
    with contextlib.ExitStack() as stack:
        superlink = ["bash", flower / "superlink.sh", keys, "127.0.0.1", port]
        stack.enter_context(process(tmp_path / "superlink.log", environment, *superlink))
        wait_for(port)
        for number in range(2):
            flwr(environment, "supernode", "register", keys / f"node_{number}.pub", "here")
        for number in (2, 1, 0):
            supernode = ["bash", flower / "supernode.sh", keys, number, f"127.0.0.1:{port}", free_port()]
            stack.enter_context(process(tmp_path / f"supernode{number}.log", environment, *supernode))
        flwr(environment, "run", ROOT / "federated", "here", "--run-config", f'output="{output}" {CONFIG}')
        result = wait_for_result(tmp_path, output)
    assert result["final_sha256"] == run_federated(RECIPE).final_sha256
    assert result["clients_trained"] == 4


def wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on port {port}")
