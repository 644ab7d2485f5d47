"""The training loop, its steps and its checkpoints, for one process or many."""

from efftrain.training.exchange import Exchange, SingleProcess
from efftrain.training.job import Job, StepConfig, StepResult
from efftrain.training.loop import Evaluation, FitResult, LoopConfig, evaluate, fit, set_seed
from efftrain.training.objective import Distillation, Objective, check_distillation, check_fit, cross_entropy
from efftrain.training.optimizer import OptimizerConfig

__all__ = [
    "Distillation",
    "Evaluation",
    "Exchange",
    "FitResult",
    "Job",
    "LoopConfig",
    "Objective",
    "OptimizerConfig",
    "SingleProcess",
    "StepConfig",
    "StepResult",
    "check_distillation",
    "check_fit",
    "cross_entropy",
    "evaluate",
    "fit",
    "set_seed",
]
