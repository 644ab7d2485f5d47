"""Which plan for which cluster: every way to spread a run is predicted in memory and time, and the feasible ranked."""

from efftrain.parallel.planner.hardware import Hardware, load_hardware, shipped_hardware
from efftrain.parallel.planner.plans import Refusal, describe, enumerate_plans, reasons
from efftrain.parallel.planner.predict import Planner, Prediction
from efftrain.parallel.planner.setting import Setting, setting_of

__all__ = [
    "Hardware",
    "Planner",
    "Prediction",
    "Refusal",
    "Setting",
    "describe",
    "enumerate_plans",
    "load_hardware",
    "reasons",
    "setting_of",
    "shipped_hardware",
]
