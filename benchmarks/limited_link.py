"""A step on slow links: our codecs beside torch's own hooks and Horovod, same model and batch, in the same run.

Every node is a network namespace; veth pairs join them to one bridge, and a token bucket limits what each node sends.
Bytes are read from the interface counters, so framing and acknowledgements count too. Needs root on Linux (iproute2).

Modes take turns, so that a machine that others use for a while disturbs all of them alike.

    python benchmarks/limited_link.py --nodes 2 --rate 100mbit --steps 12 --turns 3
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).parent
BRIDGE = "eftbr"
SUBNET = "10.77.0"
HOST = f"{SUBNET}.254"
"""This end of the bridge: Horovod's ranks find each other through a server here."""
WARM_UP = 3
BATCH = 16
MODES = {
    "no exchange": "none",
    "fp32": "ddp:",
    "torch fp16 hook": "ddp:fp16",
    "torch PowerSGD rank 2, one bucket": "ddp:powersgd",
    "Horovod fp16": "horovod:fp16",
    "Int8, two phases": "codec:two_phase:Int8(block=256)",
    "Int8, gathered": "codec:gather:Int8(block=256)",
    "TopK 1 %": "codec:auto:TopK(0.01)",
    "TopK 1 %, Int8 values": "codec:auto:TopK(0.01) >> Int8(block=256)",
    "TopK 1 %, Int4 values": "codec:auto:TopK(0.01) >> IntN(4, block=256)",
    "LowRank rank 2": "codec:auto:LowRank(2)",
}


def worker(mode: str, steps: int) -> None:
    """One rank: train ``mlp-10m`` on noise and print what a step took and sent."""
    if mode.startswith("horovod"):
        horovod_worker(steps)
    else:
        torch_worker(mode, steps)


def horovod_worker(steps: int) -> None:
    """Horovod's own optimizer with its fp16 compression; nothing of ours."""
    import horovod.torch as hvd
    import torch

    from efftrain.models import build_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hvd.init()
    model = build_model("mlp-10m")
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=hvd.Compression.fp16)
    inputs, targets = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    figures = measure(step, steps)
    if hvd.rank() == 0:
        print(json.dumps(figures), flush=True)
    hvd.shutdown()


def measure(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Seconds of each step after the first few, CPU seconds and bytes sent a step."""
    times, sent, cpu_s = [], 0, 0.0
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            sent, cpu_s = _tx_bytes(), time.process_time()
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    wire, cpu_s = (_tx_bytes() - sent) / steps, (time.process_time() - cpu_s) / steps
    return {"step_s": times[WARM_UP:], "cpu_s": cpu_s, "wire_bytes": wire}


def torch_worker(mode: str, steps: int) -> None:
    """Plain training, torch's DDP with its hooks, or our exchange."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    from efftrain.compression import parse_codec
    from efftrain.models import build_model
    from efftrain.parallel import Plan, SyncConfig, mesh
    from efftrain.training import Job, OptimizerConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with mesh.process_group(timeout_s=120):
        model = build_model("mlp-10m")
        optimizer = OptimizerConfig(lr=0.01, momentum=0.0, schedule="constant")
        kind, _, detail = mode.partition(":")
        inputs, targets = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
        job = None
        if kind == "codec":
            algorithm, _, codec = detail.partition(":")
            # A layer has 11 MB and fills a bucket: one an exchange starts early, and the last one has least to send.
            sync = SyncConfig(algorithm=algorithm, bucket_mb=8)
            job = Plan(codec=parse_codec(codec), sync=sync).apply(model, optimizer=optimizer)
        if kind == "none":
            job = Job(model, optimizer=optimizer)
        wrapped = None
        if kind == "ddp":
            # PowerSGD's hook hangs over gloo with more than one bucket; give it one.
            wrapped = DistributedDataParallel(model, bucket_cap_mb=1000 if detail == "powersgd" else 25)
            if detail == "fp16":
                wrapped.register_comm_hook(dist.group.WORLD, default_hooks.fp16_compress_hook)
            if detail == "powersgd":
                state = powerSGD_hook.PowerSGDState(dist.group.WORLD, 2, start_powerSGD_iter=2)
                wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            if job is not None:
                job.step(inputs, targets)
                return
            assert wrapped is not None, f"mode {mode!r} has neither job nor DDP"
            sgd.zero_grad()
            loss = torch.nn.functional.cross_entropy(wrapped(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()

        figures = measure(step, steps)
        if dist.get_rank() == 0:
            found = {name: value / (WARM_UP + steps) for name, value in job.exchange.stats().items()} if job else {}
            seconds = {name: value for name, value in found.items() if name.endswith("_s")}
            print(json.dumps({**figures, **seconds}), flush=True)


def _tx_bytes() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text(encoding="ascii"))


@contextmanager
def network(num_nodes: int, rate: str) -> Iterator[None]:
    """Namespaces joined by a bridge; each node's sending is limited to ``rate``. Gone afterwards, also on SIGTERM."""
    _tear_down(num_nodes)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _ip(f"link add {BRIDGE} type bridge", f"addr add {HOST}/24 dev {BRIDGE}", f"link set {BRIDGE} up")
        for node in range(num_nodes):
            name, inside = f"eft{node}", f"-n eft{node}"
            _ip(
                f"netns add {name}",
                f"link add {name}v type veth peer name eth0 netns {name}",
                f"link set {name}v master {BRIDGE} up",
                f"{inside} addr add {SUBNET}.{node + 1}/24 dev eth0",
                f"{inside} link set eth0 up",
                f"{inside} link set lo up",
            )
            limit = f"tc qdisc add dev eth0 root tbf rate {rate} burst 128kb latency 200ms"
            subprocess.run(["ip", "netns", "exec", name, *limit.split()], check=True)
            # ``ip netns exec`` lays this over /etc/hosts: Horovod asks for the host's own name where it forgets the
            # interface that it was told.
            _etc(node).mkdir(parents=True)
            names = f"127.0.0.1 localhost\n{SUBNET}.{node + 1} {platform.node()}\n"
            (_etc(node) / "hosts").write_text(names, encoding="ascii")
        yield
    finally:
        _tear_down(num_nodes)
        signal.signal(signal.SIGTERM, before)


def _tear_down(num_nodes: int) -> None:
    for node in range(num_nodes):
        subprocess.run(["ip", "netns", "delete", f"eft{node}"], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(_etc(node), ignore_errors=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], stderr=subprocess.DEVNULL, check=False)


def _etc(node: int) -> Path:
    return Path(f"/etc/netns/eft{node}")


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


@contextmanager
def horovod_environments(num_nodes: int) -> Iterator[list[dict[str, str]]]:
    """What ``horovodrun --gloo`` tells each rank, for one rank a namespace; it would want ssh between them."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
    from horovod.runner.http.http_server import RendezvousServer

    hosts = ",".join(f"{SUBNET}.{node + 1}:1" for node in range(num_nodes))
    slots = get_host_assignments(parse_hosts(hosts), num_nodes)
    server = RendezvousServer()
    port = server.start()
    server.init(slots)
    common = {name: str(value) for name, value in create_run_env_vars(HOST, ["eth0"], port).items()}
    try:
        yield [{**common, **create_slot_env_vars(slot)} for slot in slots]
    finally:
        server.stop()


def run_mode(mode: str, num_nodes: int, steps: int, timeout_s: float) -> dict[str, Any]:
    """One mode on all nodes: median step and bytes that node 0 sent a step."""
    if not mode.startswith("horovod"):
        return run_workers(mode, [{}] * num_nodes, steps, timeout_s)
    if importlib.util.find_spec("horovod") is None:
        return {"skipped": "Horovod is not there; build it: bash launch/horovod.sh"}
    with horovod_environments(num_nodes) as environments:
        return run_workers(mode, environments, steps, timeout_s)


def run_workers(mode: str, environments: list[dict[str, str]], steps: int, timeout_s: float) -> dict[str, Any]:
    """A process in each namespace, with what its environment has beside torch's."""
    num_nodes = len(environments)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(num_nodes),
        "MASTER_ADDR": f"{SUBNET}.1",
        "MASTER_PORT": "29555",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"eft{rank}", sys.executable, __file__, "--worker", mode, "--steps", str(steps)],
            env={**environment, "RANK": str(rank), **environments[rank]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_nodes)
    ]
    try:
        output, errors = workers[0].communicate(timeout=timeout_s)
        for other in workers[1:]:
            other.wait(timeout=60)
    except subprocess.TimeoutExpired:
        return {"failed": f"no end after {timeout_s:.0f} s"}
    finally:
        for one in workers:
            one.kill()
    if workers[0].returncode:
        return {"failed": (errors.strip().splitlines() or ["no message"])[-1]}
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def summarize(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each mode the median of its steps, the means of the rest, and its ratios to other modes of the same turn."""
    modes: dict[str, Any] = {}
    for name, found in turns.items():
        unable = next((turn for turn in found if "step_s" not in turn), None)
        if unable is not None:
            modes[name] = unable
            continue
        means = {key: mean(turn[key] for turn in found) for key in found[0] if key != "step_s"}
        steps_s = [second for turn in found for second in turn["step_s"]]
        against = {}
        for other in ("no exchange", "fp32"):
            pairs = list(zip(found, turns.get(other, []), strict=False))
            if pairs and all("step_s" in reference for _, reference in pairs):
                ratios = [median(turn["step_s"]) / median(reference["step_s"]) for turn, reference in pairs]
                against[other] = {"median": median(ratios), "turns": ratios}
        modes[name] = {**means, "step_s": median(steps_s), "steps_s": steps_s, "against": against}
    return modes


def render(report: dict[str, Any]) -> str:
    """The Markdown report."""
    modes = report["modes"]
    plain = modes.get("fp32", {"failed": "not run"})
    rows = []
    for name, mode in modes.items():
        if "skipped" in mode:
            rows.append(f"| {name} | not run: {mode['skipped']} | | | | | | |")
            continue
        if "failed" in mode:
            rows.append(f"| {name} | failed: {mode['failed']} | | | | | | |")
            continue
        ratios = " | ".join(_ratio(mode["against"].get(other)) for other in ("fp32", "no exchange"))
        less = (
            "-"
            if mode["wire_bytes"] < 1000 or "step_s" not in plain
            else f"{plain['wire_bytes'] / mode['wire_bytes']:.1f}x"
        )
        times = f"{1000 * mode['step_s']:.0f} | {1000 * min(mode['steps_s']):.0f} | {1000 * mode['cpu_s']:.0f}"
        rows.append(f"| {name} | {times} | {ratios} | {mode['wire_bytes'] / 1e6:.3f} | {less} |")
    lines = [
        f"# A step on limited links: {report['nodes']} nodes, {report['rate']}",
        "",
        f"`{report['command']}`, {report['date']}",
        "",
        f"`mlp-10m` (10.05 M parameters), batch {BATCH} a node, one thread a process. {report['turns']} turns of all "
        f"modes, {report['steps']} steps each after {WARM_UP}: median of all steps, and median over the turns of a "
        "mode's median step against that of the other in the same turn, with the least and the largest. Network "
        "namespaces, token bucket on each node's sending, gloo. Bytes from the interface counter of node 0, frames and "
        "acknowledgements included. CPU: of all threads of node 0, which other "
        "work on the machine disturbs less than it does the clock.",
        "",
        "| mode | ms a step | fastest | ms of CPU a step | against fp32 | against no exchange | MB sent a step | "
        "fewer bytes |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Environment: `{json.dumps(report['environment']['versions'])}`, {report['environment']['cpu']}, "
        f"{report['environment']['num_cpus']} CPUs. Load average of the machine when it began: {report['load']:.1f}.",
    ]
    return "\n".join(lines) + "\n"


def _ratio(against: dict[str, Any] | None) -> str:
    if against is None:
        return "-"
    turns = against["turns"]
    spread = f" ({min(turns):.2f} to {max(turns):.2f})" if len(turns) > 1 else ""
    return f"{against['median']:.2f}x{spread}"


def main() -> int:
    """Run all modes on one network and write the report; 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rate", default="100mbit", help="as tc writes it: 100mbit, 1gbit")
    parser.add_argument("--steps", type=int, default=10, help="of each mode in a turn")
    parser.add_argument("--turns", type=int, default=1, help="how often all modes are run")
    parser.add_argument("--timeout", type=float, default=150, help="seconds a mode may take")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--hardware", default=f"{os.cpu_count()}core_{platform.machine().replace('x86_64', 'x86')}")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.steps)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)  # before the minutes that a report takes, not after
    if os.geteuid() or shutil.which("ip") is None or shutil.which("tc") is None:
        print(
            "limited_link needs root and iproute2 on Linux: namespaces and rates are made by the kernel",
            file=sys.stderr,
        )
        return 2
    from efftrain.report.run import environment

    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in args.modes}
    load = os.getloadavg()[0]
    with network(args.nodes, args.rate):
        for _ in range(args.turns):
            for name in args.modes:
                found = run_mode(MODES[name], args.nodes, args.steps, args.timeout)
                turns[name].append(found)
                shown = {**found, "step_s": median(found["step_s"])} if "step_s" in found else found
                print(name, shown, file=sys.stderr, flush=True)
    modes = summarize(turns)
    report = {
        "command": f"python benchmarks/limited_link.py --nodes {args.nodes} --rate {args.rate} --steps {args.steps} "
        f"--turns {args.turns}",
        "turns": args.turns,
        "nodes": args.nodes,
        "rate": args.rate,
        "steps": args.steps,
        "date": args.date,
        "modes": modes,
        "load": load,
        "environment": environment(),
    }
    path = args.out / f"limited_link_{args.nodes}nodes_{args.rate}_{args.hardware}_{args.date}"
    Path(f"{path}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(render(report), encoding="utf-8")
    print(f"{path}.md")
    return int(any("failed" in mode for mode in modes.values()))


if __name__ == "__main__":
    sys.exit(main())
