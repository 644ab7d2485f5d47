"""From a job to what is started: shown, or done."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from efftrain.errors import ConfigError, ToolError
from efftrain.launch.commands import environment, horovodrun, shell_line, torchrun
from efftrain.launch.job import Job
from efftrain.launch.kubernetes import kubernetes_manifest
from efftrain.launch.slurm import slurm_script

_SUBMIT_LIMIT_S = 120.0


@dataclass(frozen=True)
class Prepared:
    """What a job comes down to.

    Attributes:
        words: Of the command: of a local job the launcher, else what reads ``text`` from stdin.
        variables: For a local job's environment.
        text: To show: one line of shell, a script, a manifest.
        is_local: Whether this machine's processes are started; else a cluster is asked to.
    """

    words: tuple[str, ...]
    variables: dict[str, str]
    text: str
    is_local: bool


def prepare(job: Job) -> Prepared:
    """What the launcher of the job is given. Starts nothing."""
    if job.launcher == "slurm":
        return Prepared(("sbatch",), {}, slurm_script(job), is_local=False)
    if job.launcher == "kubernetes":
        # A PyTorchJob that runs must not be changed in the middle: its manifest is another one each time.
        verb = "create" if job.kubernetes is not None and job.kubernetes.kind == "pytorchjob" else "apply"
        return Prepared(("kubectl", verb, "-f", "-"), {}, kubernetes_manifest(job), is_local=False)
    endpoint = job.network.endpoint if job.workers.nodes > 1 else None
    words = horovodrun(job) if job.launcher == "horovodrun" else torchrun(job, endpoint, job.name)
    variables = environment(job)
    return Prepared(tuple(words), variables, shell_line(words, variables) + "\n", is_local=True)


def start(job: Job, file: Path) -> None:
    """Submit the job, or become its launcher: a local job's command takes the place of this process.

    So its exit status and its signals are the launcher's own, and no process stands between that could be orphaned.

    Args:
        job: The job.
        file: Where it was read, for the messages.

    Raises:
        ConfigError: A local job's recipe does not exist.
        ToolError: The launcher is not installed, or refused the job.
    """
    prepared = prepare(job)
    if prepared.is_local:
        if not Path(job.recipe).is_file():
            raise ConfigError(f"recipe {job.recipe} of {file} does not exist here ({Path.cwd()})")
        _become(prepared)
    tool = prepared.words[0]
    if shutil.which(tool) is None:
        raise ToolError(
            f"{tool} is not installed here; where it is: efftrain launch {file} --print | {' '.join(prepared.words)}"
        )
    try:
        done = subprocess.run(prepared.words, input=prepared.text, text=True, check=False, timeout=_SUBMIT_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{tool} gave no answer in {_SUBMIT_LIMIT_S:.0f} s; look whether the job is there") from error
    if done.returncode:
        raise ToolError(f"{tool} did not take the job (status {done.returncode}); its own message is above")


def _become(prepared: Prepared) -> NoReturn:
    # As in an activated environment: the launcher beside this Python is the one of the same packages.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    tool = prepared.words[0]
    program = shutil.which(tool, path=path)
    if program is None:
        how = "bash launch/horovod.sh" if tool == "horovodrun" else "pip install torch"
        raise ToolError(f"{tool} is not installed; {how}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, prepared.words, {**os.environ, "PATH": path, **prepared.variables})
