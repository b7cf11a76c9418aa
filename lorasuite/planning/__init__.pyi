from ._config import AUTO, MigrationConfig, PairSettings, Strict, build, read_config, torch_device
from ._estimate import Throughput, active, estimate, measure
from ._experiment import ARMS, Cell, Experiment, ExperimentArm, ExperimentTable, ExperimentTask, read_experiment
from ._fleet import chosen, fleet_output, read_fleet
from ._inspection import inspect
from ._policy import RowCounts, RowPlan, plan_rows
from ._preflight import Plan, check
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
    "Strict",
    "Throughput",
    "active",
    "build",
    "check",
    "chosen",
    "estimate",
    "fleet_output",
    "inspect",
    "measure",
    "plan_rows",
    "read_config",
    "read_experiment",
    "read_fleet",
    "torch_device",
]
