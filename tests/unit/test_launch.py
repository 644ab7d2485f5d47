"""Job files: what each launcher is given, word for word, and what is refused."""

import importlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efftrain.config import load_recipe
from efftrain.config.load import from_dict
from efftrain.errors import ConfigError
from efftrain.launch import Job, prepare
from efftrain.launch.commands import shell_line
from efftrain.launch.kubernetes import to_yaml
from tests.conftest import ROOT, Run

JOBS = sorted((ROOT / "launch").glob("*.toml"))
NASTY = "a b'c\"d$HOME`id`\\;&|>#*~!{x,y}\té\n"


def job(**changes: Any) -> Job:
    """A small job; ``workers__nodes=2`` changes a key of a section."""
    table: dict[str, Any] = {"name": "j", "recipe": "r.toml"}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (table.setdefault(section, {}) if section else table)[name] = value
    return from_dict(Job, table)


def kubernetes(**changes: Any) -> Job:
    return job(launcher="kubernetes", kubernetes__image="i", **changes)


# The files that ship ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_is_prepared_and_names_a_shipped_recipe(path: Path) -> None:
    found = load_recipe(Job, path)
    assert (ROOT / found.recipe).is_file()
    assert f"efftrain launch launch/{path.name}" in path.read_text()
    assert prepare(found).text.endswith("\n")


@pytest.mark.parametrize(
    ("source", "written"), [("slurm.toml", "slurm.sbatch"), ("kubernetes.toml", "kubernetes.yaml")]
)
def test_a_written_example_is_what_its_job_prints(source: str, written: str) -> None:
    expected = prepare(load_recipe(Job, ROOT / "launch" / source)).text
    assert (ROOT / "launch" / written).read_text() == expected, (
        f"efftrain launch launch/{source} --print > launch/{written}"
    )


# Commands ---------------------------------------------------------------------------------------------------------


def test_torchrun_on_one_machine() -> None:
    found = prepare(job(workers__per_node=2, workers__max_restarts=3, set=["loop.epochs=1"], resume=True))
    assert " ".join(found.words) == (
        "torchrun --nnodes=1 --nproc-per-node=2 --max-restarts=3 --standalone "
        "-m efftrain train r.toml --set loop.epochs=1 --out runs --resume"
    )
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    assert found.variables == {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback
    }  # fmt: skip


def test_torchrun_on_many_machines_and_elastic() -> None:
    more: dict[str, Any] = {"workers__nodes": 4, "network__endpoint": "h:1234", "network__interface": "eth0"}
    found = prepare(job(**more))
    assert found.words[:7] == (
        "torchrun", "--nnodes=4", "--nproc-per-node=1", "--max-restarts=0", "--rdzv-backend=c10d",
        "--rdzv-endpoint=h:1234", "--rdzv-id=j",
    )  # fmt: skip
    assert found.variables["NCCL_SOCKET_IFNAME"] == found.variables["GLOO_SOCKET_IFNAME"] == "eth0"
    assert prepare(job(**more, workers__min_nodes=2)).words[1] == "--nnodes=2:4"
    assert prepare(job(**more, workers__min_nodes=4)).words[1] == "--nnodes=4"
    assert "GLOO_SOCKET_IFNAME" not in prepare(job(workers__nodes=2, network__endpoint="h:1234")).variables


def test_horovodrun_here_and_on_hosts() -> None:
    assert " ".join(prepare(job(launcher="horovodrun", workers__per_node=2)).words) == (
        "horovodrun --gloo -np 2 python -m efftrain train r.toml --set parallel.backend=horovod --out runs"
    )
    found = prepare(job(launcher="horovodrun", workers__nodes=2, workers__per_node=4, horovod__hosts=["a:4", "b:4"]))
    assert found.words[:6] == ("horovodrun", "--gloo", "-np", "8", "-H", "a:4,b:4")


def test_variables_of_the_job_win() -> None:
    assert prepare(job(environment={"OMP_NUM_THREADS": "7", "X": "y"})).variables["OMP_NUM_THREADS"] == "7"


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(words=st.lists(texts, min_size=1), variables=st.dictionaries(st.from_regex(r"[A-Z_]+", fullmatch=True), texts))
def test_a_printed_command_parses_back(words: list[str], variables: dict[str, str]) -> None:
    expected = ["env", *(f"{name}={value}" for name, value in variables.items()), *words]
    assert shlex.split(shell_line(words, variables)) == expected


@given(changes=st.lists(texts.filter(lambda text: not text.startswith("-")), max_size=3), out=texts)
def test_any_job_prints_a_command_that_parses_back(changes: list[str], out: str) -> None:
    out = out.lstrip("-") or "runs"
    for launcher in ("torchrun", "horovodrun"):
        found = prepare(job(launcher=launcher, set=changes, out=out))
        assert tuple(shlex.split(found.text)[1 + len(found.variables) :]) == found.words
        assert [*changes, out] == [word for word in found.words if word in {*changes, out}][: len(changes) + 1]


# Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """Programs of a cluster: each writes its words, its stdin and its variables into a file of its name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "sbatch", "kubectl"):
        program = folder / name
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"facts = [sys.argv[1:], dict(os.environ), '' if {name == 'srun'} else sys.stdin.read()]\n"
            f"open({str(tmp_path / name)!r}, 'w').write(json.dumps(facts))\n"
            f"print('{name} took it')\nsys.exit(int(os.environ.get('FAKE_STATUS', '0')))\n"
        )
    (folder / "scontrol").write_text("#!/bin/sh\necho first\necho second\n")
    for program in folder.iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def seen(tmp_path: Path, name: str) -> tuple[list[str], dict[str, str], str]:
    words, variables, text = json.loads((tmp_path / name).read_text())
    return words, variables, text


@pytest.mark.parametrize("text", ["plain", NASTY, "HEAD_NODE:29500", "--rdzv-id=JOB_ID"])
def test_a_slurm_script_gives_srun_the_very_words(tmp_path: Path, fakes: Path, text: str) -> None:
    found = job(
        launcher="slurm", workers__nodes=2, workers__per_node=4, set=[f"x={text}"], environment={"X": text},
        slurm__setup=["export DONE=yes"], out="a folder",
    )  # fmt: skip
    environment = {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "8",
    }
    subprocess.run(["bash"], input=prepare(found).text, text=True, check=True, env=environment, timeout=30)
    words, variables, _ = seen(tmp_path, "srun")
    assert words == [
        "--kill-on-bad-exit=1", "torchrun", "--nnodes=2", "--nproc-per-node=4", "--max-restarts=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=first:29500", "--rdzv-id=77",
        "-m", "efftrain", "train", "r.toml", "--set", f"x={text}", "--out", "a folder",
    ]  # fmt: skip
    assert variables["X"] == text
    assert (variables["EFFTRAIN_LAUNCH_ID"], variables["DONE"]) == ("slurm-77", "yes")
    assert variables["SRUN_CPUS_PER_TASK"] == "8"


def test_options_of_sbatch() -> None:
    text = prepare(
        job(
            launcher="slurm", workers__per_node=4, workers__threads=2, slurm__gpus_per_node=4, slurm__memory="64G",
            slurm__time="1:00:00", slurm__partition="gpu", slurm__account="me", slurm__options=["--constraint=a100"],
        )
    ).text  # fmt: skip
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert options == [
        "--job-name=j", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=8", "--gpus-per-node=4", "--mem=64G",
        "--time=1:00:00", "--partition=gpu", "--account=me", "--output=j-%j.log", "--open-mode=append", "--requeue",
        "--constraint=a100",
    ]  # fmt: skip


# Kubernetes -------------------------------------------------------------------------------------------------------

yaml: Any = importlib.import_module("yaml")
plain = st.recursive(
    texts | st.integers() | st.booleans(),
    # A key of more than 1,024 characters, escapes included, is another syntax.
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts.filter(lambda t: len(t) < 80), inner, max_size=3),
    max_leaves=6,
)


@given(plain)
def test_yaml_reads_back_what_was_written(value: Any) -> None:
    assert yaml.safe_load(to_yaml(value)) == value


@pytest.mark.parametrize(
    "text", ["yes", "No", "1e3", "0x1f", "~", "1:30", "2024-01-01", "<<", "=", "a: b", "x #y", "..."]
)
def test_a_text_stays_a_text(text: str) -> None:
    assert yaml.safe_load(to_yaml({text: [text]})) == {text: [text]}


def manifest(found: Job) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(prepare(found).text))


def expand(text: str) -> str:
    """As Kubernetes does with a container's command, for variables that it does not know."""
    return text.replace("$$", "$")


def test_an_indexed_job_meets_at_its_first_pod() -> None:
    service, batch = manifest(
        kubernetes(
            name="train-1", workers__nodes=2, workers__per_node=4, workers__max_restarts=2, set=[f"x={NASTY}"],
            environment={"X": "$(HOME)"}, kubernetes__volume_claim="runs", kubernetes__gpus_per_node=4,
            kubernetes__namespace="ml", kubernetes__secret="keys", kubernetes__working_dir="/src",
        )
    )  # fmt: skip
    assert [part["metadata"] for part in (service, batch)] == [{"name": "train-1", "namespace": "ml"}] * 2
    spec, pod = batch["spec"], batch["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    (container,) = pod["containers"]
    words = [expand(word) for word in container["command"]]
    assert f"--rdzv-endpoint=train-1-0.train-1:{service['spec']['ports'][0]['port']}" in words
    assert f"x={NASTY}" in words
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert expand(variables["X"]) == "$(HOME)"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert container["workingDir"] == "/src"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "OnFailure"


def test_a_pytorchjob_may_be_elastic() -> None:
    (found,) = manifest(
        kubernetes(
            workers__nodes=4, workers__min_nodes=2, kubernetes__kind="pytorchjob", kubernetes__volume_claim="runs"
        )
    )
    policy, worker = found["spec"]["elasticPolicy"], found["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert (policy["minReplicas"], policy["maxReplicas"], worker["replicas"]) == (2, 4, 4)
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"
    assert container["command"][:2] == ["torchrun", "--nnodes=2:4"]
    assert worker["restartPolicy"] == "Never"


def test_a_pytorchjob_that_is_submitted_again_is_another_launch() -> None:
    again = kubernetes(kubernetes__kind="pytorchjob")
    words = set()
    for _ in range(2):
        prepared = prepare(again)
        assert prepared.words == ("kubectl", "create", "-f", "-")
        worker = yaml.safe_load(prepared.text)["spec"]["pytorchReplicaSpecs"]["Worker"]
        variables = {entry["name"]: entry for entry in worker["template"]["spec"]["containers"][0]["env"]}
        words.add(variables["EFFTRAIN_LAUNCH_ID"]["value"])
    assert len(words) == 2
    assert all(word.startswith("j-") for word in words)


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers__nodes": 0}, "section 'workers': nodes, per_node and threads must be at least 1"),
        ({"workers__max_restarts": -1}, "max_restarts is -1, expected 0 or more"),
        ({"workers__min_nodes": 2}, "min_nodes is 2, expected 1 to nodes, which is 1"),
        ({"workers__nodes": 2}, "set network.endpoint to HOST:PORT"),
        ({"network__endpoint": "host"}, "expected HOST:PORT"),
        ({"network__port": 80}, "expected 1024 to 65535"),
        ({"network__interface": "a b"}, "expected a name such as eth0"),
        ({"name": "a b"}, "name is 'a b', expected up to 63"),
        ({"recipe": "-x"}, "must not be empty, begin with '-'"),
        ({"set": [""]}, "must not be empty"),
        ({"environment": {"A B": "1"}}, "expected NAME = text"),
        ({"environment": {"WANDB_API_KEY": "1"}}, "looks like a secret"),
        ({"launcher": "horovodrun", "workers__max_restarts": 1}, "set launcher=torchrun"),
        ({"launcher": "horovodrun", "workers__nodes": 2, "workers__min_nodes": 1}, "set launcher=torchrun"),
        ({"launcher": "horovodrun", "workers__nodes": 2}, "needs horovod.hosts"),
        ({"launcher": "horovodrun", "horovod__hosts": ["a:2"]}, "1 with 2 processes, expected .* 1 with 1"),
        ({"launcher": "horovodrun", "horovod__hosts": ["a"]}, "expected HOST:PROCESSES"),
        ({"launcher": "slurm", "workers__nodes": 2, "workers__min_nodes": 1}, "leave out workers.min_nodes"),
        ({"launcher": "slurm", "slurm__gpus_per_node": 2}, "one process a GPU; make them equal"),
        ({"launcher": "slurm", "slurm__time": "1 h\n#SBATCH --x"}, "expected one word as sbatch takes it"),
        ({"launcher": "slurm", "slurm__options": ["--x=1 --y"]}, "without spaces"),
        ({"launcher": "slurm", "slurm__setup": ["a\nb"]}, "expected one line of shell each"),
        ({"launcher": "kubernetes"}, 'needs a section "kubernetes" with the image'),
        ({"launcher": "kubernetes", "kubernetes__image": "i", "name": "A"}, "expected for Kubernetes at most 42"),
        ({"launcher": "kubernetes", "kubernetes__image": "i", "workers__nodes": 2}, "set kubernetes.volume_claim"),
        (
            {"launcher": "kubernetes", "kubernetes__image": "i", "workers__nodes": 2, "workers__min_nodes": 1},
            "set kubernetes.kind=pytorchjob",
        ),
        ({"launcher": "kubernetes", "kubernetes__image": "i", "kubernetes__memory": "a lot"}, "expected bytes such as"),
        ({"launcher": "pbs"}, "'launcher' is 'pbs', expected one of 'torchrun', 'horovodrun', 'slurm', 'kubernetes'"),
        ({"worker": {}}, "unknown key 'worker'; nearest is 'workers'"),
    ],
)  # fmt: skip
def test_an_impossible_job_is_refused_with_the_remedy(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job(**changes)


# The command line -------------------------------------------------------------------------------------------------

SMALL = (
    'name = "r"\n[model]\nname = "{file}:Net"\n[data]\nname = "{file}:Digits"\n'
    "[loop]\nepochs = 1\nbatch_size = 66\nlog_every = 1\n[parallel]\ntimeout_s = 30\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A job of two processes, with its recipe, in the folder where commands run."""
    (tmp_path / "r.toml").write_text(SMALL.format(file=ROOT / "tests" / "distributed" / "workload.py"))
    (tmp_path / "j.toml").write_text('name = "j"\nrecipe = "r.toml"\n[workers]\nper_node = 2\n')
    return tmp_path / "j.toml"


def test_print_shows_and_starts_nothing(efftrain: Run, file: Path, tmp_path: Path) -> None:
    shown = efftrain("launch", file, "--print", "--set", "workers.per_node=3")
    assert shown.returncode == 0, shown.stderr
    assert "--nproc-per-node=3" in shlex.split(shown.stdout)
    facts = json.loads(efftrain("launch", file, "--print", "--json").stdout)
    assert facts["words"][0] == facts["launcher"] == "torchrun"
    assert shlex.split(facts["text"])[1 + len(facts["variables"]) :] == facts["words"]
    assert not (tmp_path / "runs").exists()


def test_a_local_job_runs_and_gives_its_status(efftrain: Run, file: Path, tmp_path: Path) -> None:
    done = efftrain("launch", file)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "r" / "result.json").read_text())["world_size"] == 2
    failed = efftrain("launch", file, "--set", "recipe=no.toml")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"efftrain: recipe no.toml of {file} does not exist here")


def test_a_signal_ends_the_whole_job(file: Path, tmp_path: Path) -> None:
    from tests.distributed.test_torchrun import descendants

    command = [sys.executable, "-m", "efftrain", "launch", str(file), "--set", 'set=["loop.epochs=1000"]']
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, env={**os.environ, "TEST_SLEEP_S": "0.01"}
    )
    try:
        metrics, deadline = tmp_path / "runs" / "r" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        family = list(descendants(process.pid))
        assert len(family) == 3, "torchrun took the place of efftrain launch: the agent and two workers"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("launcher", "tool"), [("slurm", "sbatch"), ("kubernetes", "kubectl")])
def test_a_cluster_gets_what_print_shows(
    efftrain: Run, file: Path, tmp_path: Path, fakes: Path, launcher: str, tool: str
) -> None:
    arguments = ("launch", file, "--set", f"launcher={launcher}", "--set", "kubernetes.image=i")
    path = f"{fakes}:{os.environ['PATH']}"
    done = efftrain(*arguments, PATH=path)
    assert (done.returncode, done.stdout) == (0, f"{tool} took it\n"), done.stderr
    job_file = load_recipe(Job, file, [f"launcher={launcher}", "kubernetes.image=i"])
    assert seen(tmp_path, tool)[2] == prepare(job_file).text
    refused = efftrain(*arguments, PATH=path, FAKE_STATUS="3")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"{tool} did not take the job (status 3)" in refused.stderr
    missing = efftrain(*arguments, PATH="/nonexistent")
    assert missing.returncode == 1
    assert (
        f"efftrain: {tool} is not installed here; where it is: efftrain launch {file} --print | {tool}"
        in missing.stderr
    )
