"""Starting jobs: a typed job file becomes a torchrun or horovodrun command, a Slurm script, a Kubernetes manifest."""

from efftrain.launch.job import Job
from efftrain.launch.start import Prepared, prepare, start

__all__ = ["Job", "Prepared", "prepare", "start"]
