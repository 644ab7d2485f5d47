"""The job file: what is to run, on how many processes, and who starts them. Checked when it is read."""

import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Launcher: TypeAlias = Literal["torchrun", "horovodrun", "slurm", "kubernetes"]

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_ENDPOINT = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}"
_SECRET = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|_KEY|APIKEY)$")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes."""

    nodes: int = 1
    """Machines; of an elastic job, the most."""
    min_nodes: int | None = None
    """An elastic job goes on with so few machines after it lost some. Left out: it needs all."""
    per_node: int = 1
    """Processes of a machine: one a GPU."""
    max_restarts: int = 0
    """How often the launcher starts all workers anew after one has died. They go on from the newest checkpoint."""
    threads: int = 1
    """CPU threads of a process. More than there are cores for makes all of them slow."""

    def __post_init__(self) -> None:
        if min(self.nodes, self.per_node, self.threads) < 1:
            raise ValueError("nodes, per_node and threads must be at least 1")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}, expected 0 or more")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}, expected 1 to nodes, which is {self.nodes}")

    @property
    def is_elastic(self) -> bool:
        """Whether the number of machines may change."""
        return self.min_nodes not in (None, self.nodes)


@dataclass(frozen=True, kw_only=True)
class Network:
    """How the processes find each other."""

    endpoint: str | None = None
    """``HOST:PORT`` of one of the machines, which all reach. torchrun on several machines needs it."""
    port: int = 29500
    """Where the first machine listens, if a cluster chooses that machine."""
    interface: str | None = None
    """Network interface of gloo and NCCL, e.g. ``eth0``. Left out: their choice; on one machine the loopback."""

    def __post_init__(self) -> None:
        if self.endpoint is not None and not re.fullmatch(_ENDPOINT, self.endpoint):
            raise ValueError(f"endpoint is {self.endpoint!r}, expected HOST:PORT")
        if not 1024 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 1024 to 65535")
        if self.interface is not None and not re.fullmatch(r"[A-Za-z0-9._:=^,-]+", self.interface):
            raise ValueError(f"interface is {self.interface!r}, expected a name such as eth0")


@dataclass(frozen=True, kw_only=True)
class HorovodConfig:
    """For ``launcher = "horovodrun"``."""

    hosts: tuple[str, ...] = ()
    """``HOST:PROCESSES`` of each machine, reached by ssh. Left out: this machine."""

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]+:[1-9]\d{0,3}", host):
                raise ValueError(f"hosts has {host!r}, expected HOST:PROCESSES")

    @property
    def slots(self) -> int:
        """Processes that the hosts take."""
        return sum(int(host.rpartition(":")[2]) for host in self.hosts)


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """For ``launcher = "slurm"``: options of sbatch."""

    time: str | None = None
    """Limit, as sbatch writes it: ``04:00:00``."""
    partition: str | None = None
    account: str | None = None
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    """Left out: threads of all processes of a machine."""
    memory: str | None = None
    """Of a machine, e.g. ``64G``."""
    options: tuple[str, ...] = ()
    """More of them, e.g. ``--constraint=a100``."""
    setup: tuple[str, ...] = ()
    """Shell lines before the start, e.g. ``module load cuda`` or ``source .venv/bin/activate``."""

    def __post_init__(self) -> None:
        if self.gpus_per_node < 0 or (self.cpus_per_node is not None and self.cpus_per_node < 1):
            raise ValueError("gpus_per_node must be 0 or more, cpus_per_node at least 1")
        for key in ("time", "partition", "account", "memory"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:,@-]*", value):
                raise ValueError(f"{key} is {value!r}, expected one word as sbatch takes it")
        for option in self.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[^\s#'\"]+)?", option):
                raise ValueError(f"options has {option!r}, expected --option or --option=value without spaces")
        for line in self.setup:
            if "\n" in line or "\0" in line:
                raise ValueError(f"setup has {line!r}, expected one line of shell each")


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """For ``launcher = "kubernetes"``."""

    image: str
    """Container image with efftrain in it."""
    kind: Literal["job", "pytorchjob"] = "job"
    """``job`` is an indexed Job with a headless Service, on any cluster; ``pytorchjob`` needs Kubeflow's operator."""
    namespace: str | None = None
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    memory: str | None = None
    """Of a pod, e.g. ``64Gi``."""
    shared_memory: str = "1Gi"
    """Of ``/dev/shm``, which NCCL and data loaders use; a container has 64 MiB otherwise."""
    volume_claim: str | None = None
    """PersistentVolumeClaim that all pods mount, for the folder of the runs. Several pods need one."""
    mount: str = "/data"
    """Where the claim appears in the pods."""
    working_dir: str | None = None
    """Relative paths of the job start here. Left out: the image's own."""
    secret: str | None = None
    """A Secret whose keys become variables of the environment."""

    def __post_init__(self) -> None:
        if self.gpus_per_node < 0 or (self.cpus_per_node is not None and self.cpus_per_node < 1):
            raise ValueError("gpus_per_node must be 0 or more, cpus_per_node at least 1")
        for key in ("memory", "shared_memory"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[1-9]\d*([KMGT]i?)?", value):
                raise ValueError(f"{key} is {value!r}, expected bytes such as 64Gi")
        for key in ("namespace", "volume_claim", "secret"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", value):
                raise ValueError(f"{key} is {value!r}, expected a Kubernetes name: lower case, digits, '-', '.'")
        if not self.mount.startswith("/"):
            raise ValueError(f"mount is {self.mount!r}, expected an absolute path")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job and its launcher. Sections of other launchers may stay: ``--set launcher=slurm`` changes over."""

    name: str
    """Of the job; letters, digits, ``.``, ``_``, ``-``."""
    recipe: str
    """Path of the recipe where the workers run."""
    launcher: Launcher = "torchrun"
    set: tuple[str, ...] = ()
    """Changes of the recipe, ``section.key=value`` each."""
    out: str = "runs"
    """Folder of the run folders; on several machines one that they share."""
    resume: bool = False
    """Go on with the newest run of the recipe's name. Restarted workers go on with their own run without it."""
    workers: Workers = field(default_factory=Workers)
    network: Network = field(default_factory=Network)
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all workers; they win over ours. No secrets: the file is printed and kept."""
    horovod: HorovodConfig = field(default_factory=HorovodConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name):
            raise ValueError(f"name is {self.name!r}, expected up to 63 letters, digits, '.', '_', '-'")
        for key, texts in (("recipe", (self.recipe,)), ("out", (self.out,)), ("set", self.set)):
            for text in texts:
                if not text or text.startswith("-") or "\0" in text:
                    raise ValueError(f"{key} has {text!r}; it must not be empty, begin with '-' or hold a zero byte")
        for name, value in self.environment.items():
            self._check_variable(name, value)
        getattr(self, f"_check_{self.launcher}")()

    def _check_variable(self, name: str, value: str) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
            raise ValueError(f"environment has {name!r} = {value!r}, expected NAME = text without a zero byte")
        if _SECRET.search(name):
            raise ValueError(
                f"environment.{name} looks like a secret, and job files are printed and kept; export it in the shell "
                "that launches, or on Kubernetes name a Secret in kubernetes.secret"
            )

    def _check_torchrun(self) -> None:
        if self.workers.nodes > 1 and self.network.endpoint is None:
            raise ValueError(
                f"torchrun on {self.workers.nodes} nodes needs a place to meet: set network.endpoint to HOST:PORT of "
                "one of them"
            )

    def _check_horovodrun(self) -> None:
        if self.workers.is_elastic or self.workers.max_restarts:
            raise ValueError(
                "horovodrun restarts no workers and changes no number of nodes here; leave out workers.min_nodes and "
                "workers.max_restarts, or set launcher=torchrun"
            )
        wanted = self.workers.nodes * self.workers.per_node
        if self.workers.nodes > 1 and not self.horovod.hosts:
            raise ValueError(f"horovodrun on {self.workers.nodes} nodes needs horovod.hosts, HOST:PROCESSES each")
        if self.horovod.hosts and (len(self.horovod.hosts), self.horovod.slots) != (self.workers.nodes, wanted):
            raise ValueError(
                f"horovod.hosts are {len(self.horovod.hosts)} with {self.horovod.slots} processes, expected "
                f"workers.nodes x workers.per_node: {self.workers.nodes} with {wanted}"
            )

    def _check_slurm(self) -> None:
        if self.workers.is_elastic:
            raise ValueError(
                "Slurm gives a job a fixed number of nodes; leave out workers.min_nodes (a job that loses a node is "
                "queued again and goes on from its newest checkpoint)"
            )
        self._check_gpus(self.slurm.gpus_per_node)

    def _check_kubernetes(self) -> None:
        config = self.kubernetes
        if config is None:
            raise ValueError('launcher kubernetes needs a section "kubernetes" with the image')
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", self.name):
            raise ValueError(f"name is {self.name!r}, expected for Kubernetes at most 42 of a-z, 0-9 and '-'")
        if self.workers.is_elastic and config.kind == "job":
            raise ValueError(
                "an indexed Job has a fixed number of pods; leave out workers.min_nodes or set "
                "kubernetes.kind=pytorchjob"
            )
        if self.workers.nodes > 1 and config.volume_claim is None:
            raise ValueError(
                f"{self.workers.nodes} pods need one folder for runs and checkpoints; set kubernetes.volume_claim to a "
                "PersistentVolumeClaim that many pods may write (ReadWriteMany)"
            )
        self._check_gpus(config.gpus_per_node)

    def _check_gpus(self, gpus: int) -> None:
        if gpus and gpus != self.workers.per_node:
            raise ValueError(
                f"{self.launcher}.gpus_per_node is {gpus}, workers.per_node {self.workers.per_node}: one process a "
                "GPU; make them equal, or gpus_per_node 0 to train on CPUs"
            )
