from ._assembled import abandoned, assembled
from ._card import model_card
from ._console import (
    arm_seconds,
    show_artifacts,
    show_cells,
    show_evaluation,
    show_experiment,
    show_fleet,
    show_inspection,
    show_migration,
    show_pair,
    show_timings,
)
from ._figures import heat_map_png
from ._files import FLEET_RECORD, RECORD, REPORT
from ._fleet_report import fleet_rows, write_fleet
from ._gguf import export_gguf
from ._hub import check_target, push
from ._names import code_span, markdown, wilson
from ._publication import copy_samples, publish
from ._published import NEW_START, OWN_ROWS_START, Published
from ._record import ArmResults, MigrationRecord, PairRecord, StageTiming
from ._report import render, write_report
from ._results import RESULTS, kept, read_results, write_results
from ._results_tables import Measurement, Score
from ._tables import comparison, task_comparison

__all__ = [
    "FLEET_RECORD",
    "NEW_START",
    "OWN_ROWS_START",
    "RECORD",
    "REPORT",
    "RESULTS",
    "ArmResults",
    "Measurement",
    "MigrationRecord",
    "PairRecord",
    "Published",
    "Score",
    "StageTiming",
    "abandoned",
    "arm_seconds",
    "assembled",
    "check_target",
    "code_span",
    "comparison",
    "copy_samples",
    "export_gguf",
    "fleet_rows",
    "heat_map_png",
    "kept",
    "markdown",
    "model_card",
    "publish",
    "push",
    "read_results",
    "render",
    "show_artifacts",
    "show_cells",
    "show_evaluation",
    "show_experiment",
    "show_fleet",
    "show_inspection",
    "show_migration",
    "show_pair",
    "show_timings",
    "task_comparison",
    "wilson",
    "write_fleet",
    "write_report",
    "write_results",
]
