"""The sbatch script: one torchrun a machine, which meet at the first."""

import shlex

from efftrain.launch.commands import environment, torchrun
from efftrain.launch.job import Job

_HEAD, _ID = "HEAD_NODE", "JOB_ID"  # stand where the shell puts in what Slurm says


def slurm_script(job: Job) -> str:
    """For ``sbatch``, which reads its options from the comments."""
    config, workers = job.slurm, job.workers
    options = [
        f"--job-name={job.name}",
        f"--nodes={workers.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={config.cpus_per_node or workers.per_node * workers.threads}",
        *([f"--gpus-per-node={config.gpus_per_node}"] if config.gpus_per_node else []),
        *([f"--mem={config.memory}"] if config.memory else []),
        *([f"--time={config.time}"] if config.time else []),
        *([f"--partition={config.partition}"] if config.partition else []),
        *([f"--account={config.account}"] if config.account else []),
        f"--output={job.name}-%j.log",
        "--open-mode=append",
        "--requeue",
        *config.options,
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        *config.setup,
        "",
        "# Since Slurm 22.05 srun does not take it from sbatch, and would start on one core.",
        'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(job).items()),
        "# The number stays when the job is queued again: it goes on with the run that it began.",
        'export EFFTRAIN_LAUNCH_ID="slurm-$SLURM_JOB_ID"',
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        _start(job),
    ]
    return "\n".join(lines) + "\n"


def _start(job: Job) -> str:
    """Quoted word by word, but for the two that the shell must read."""
    words = torchrun(job, f"{_HEAD}:{job.network.port}", _ID)
    live = {
        f"--rdzv-endpoint={_HEAD}:{job.network.port}": f'--rdzv-endpoint="$head:{job.network.port}"',
        f"--rdzv-id={_ID}": '--rdzv-id="$SLURM_JOB_ID"',
    }
    own = len(words) - words.index("-m")  # the words of the training stay as they are, whatever they say
    start = [live.get(word, shlex.quote(word)) for word in words[:-own]]
    return " ".join(["srun", "--kill-on-bad-exit=1", *start, *map(shlex.quote, words[-own:])])
