from ._config import AUTO, MigrationConfig, PairSettings, torch_device
from ._estimate import Throughput, active, estimate, measure
from ._experiment import Cell, Experiment, read_experiment
from ._experiment_file import ARMS, ExperimentArm, ExperimentTable, ExperimentTask
from ._fleet import chosen, fleet_output, read_fleet
from ._inspection import inspect
from ._policy import RowCounts, RowPlan, plan_rows
from ._preflight import Plan, check
from ._reading import build, merged, read_config
from ._thresholds import LFT_SAMPLES

__all__ = [
    "ARMS",
    "AUTO",
    "LFT_SAMPLES",
    "Cell",
    "Experiment",
    "ExperimentArm",
    "ExperimentTable",
    "ExperimentTask",
    "MigrationConfig",
    "PairSettings",
    "Plan",
    "RowCounts",
    "RowPlan",
    "Throughput",
    "active",
    "build",
    "check",
    "chosen",
    "estimate",
    "fleet_output",
    "inspect",
    "measure",
    "merged",
    "plan_rows",
    "read_config",
    "read_experiment",
    "read_fleet",
    "torch_device",
]
