from ._candidates import usable
from ._config import AUTO, TRIED, MigrationConfig, PairSettings, torch_device
from ._cost import Cost, Ops, Shape, Work, active
from ._cost_adapter import adapter_costs
from ._cost_pair import pair_costs
from ._draft import draft_config, output_name
from ._estimate import estimate, gib, shortages, unfit
from ._experiment import Cell, Experiment, read_experiment
from ._experiment_file import ARMS, ExperimentArm, ExperimentTable, ExperimentTask
from ._fleet import chosen, fleet_output, read_fleet
from ._general import GeneralTexts
from ._headings import FIRST, HEADINGS, heading_of
from ._inspection import inspect
from ._machine import Machine, Throughput, measure
from ._policy import RowCounts, RowPlan, plan_rows
from ._preflight import Plan, check, fits, survey
from ._reading import build, merged, read_config
from ._thresholds import LFT_SAMPLES

__all__ = [
    "ARMS",
    "AUTO",
    "FIRST",
    "HEADINGS",
    "LFT_SAMPLES",
    "TRIED",
    "Cell",
    "Cost",
    "Experiment",
    "ExperimentArm",
    "ExperimentTable",
    "ExperimentTask",
    "GeneralTexts",
    "Machine",
    "MigrationConfig",
    "Ops",
    "PairSettings",
    "Plan",
    "RowCounts",
    "RowPlan",
    "Shape",
    "Throughput",
    "Work",
    "active",
    "adapter_costs",
    "build",
    "check",
    "chosen",
    "draft_config",
    "estimate",
    "fits",
    "fleet_output",
    "gib",
    "heading_of",
    "inspect",
    "measure",
    "merged",
    "output_name",
    "pair_costs",
    "plan_rows",
    "read_config",
    "read_experiment",
    "read_fleet",
    "shortages",
    "survey",
    "torch_device",
    "unfit",
    "usable",
]
