"""Commands: torchrun and horovodrun, the training that they start, and the variables of its processes."""

import shlex
import sys
from collections.abc import Mapping, Sequence

from efftrain.launch.job import Job


def training(job: Job) -> list[str]:
    """``-m efftrain train RECIPE ...``: what every worker runs."""
    options = [word for change in job.set for word in ("--set", change)]
    if job.launcher == "horovodrun":
        options += ["--set", "parallel.backend=horovod"]
    resume = ["--resume"] if job.resume else []
    return ["-m", "efftrain", "train", job.recipe, *options, "--out", job.out, *resume]


def environment(job: Job) -> dict[str, str]:
    """Variables of the workers, in a fixed order; those of the job win."""
    found = {"OMP_NUM_THREADS": str(job.workers.threads)}
    interface = job.network.interface
    if interface is None and job.workers.nodes == 1 and job.launcher in ("torchrun", "horovodrun"):
        # gloo takes the address behind the machine's own name, which on laptops often leads nowhere.
        interface = "lo0" if sys.platform == "darwin" else "lo"
    if interface is not None:
        found |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return {**found, **job.environment}


def torchrun(job: Job, endpoint: str | None, launch: str) -> list[str]:
    """torchrun of one machine.

    Args:
        job: The job.
        endpoint: Where machines meet; ``None``: this is the only one.
        launch: Name of the meeting.
    """
    workers = job.workers
    nodes = f"{workers.min_nodes}:{workers.nodes}" if workers.is_elastic else str(workers.nodes)
    words = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={workers.per_node}"]
    words.append(f"--max-restarts={workers.max_restarts}")
    if endpoint is None:
        words.append("--standalone")
    else:
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={launch}"]
    return [*words, *training(job)]


def horovodrun(job: Job) -> list[str]:
    """horovodrun of all machines, from one of them."""
    hosts = ["-H", ",".join(job.horovod.hosts)] if job.horovod.hosts else []
    count = job.workers.nodes * job.workers.per_node
    return ["horovodrun", "--gloo", "-np", str(count), *hosts, "python", *training(job)]


def shell_line(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """One line for any POSIX shell; ``shlex.split`` of it gives ``env``, the variables and the words back."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *words])
