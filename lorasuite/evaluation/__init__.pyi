from ._answers import extract, extract_choice, extract_letter, extract_number, matches
from ._arms import PUBLISHED_ARMS, Arm
from ._comparison import Comparison, compare, compare_arms, mcnemar, metrics, read_samples, sample_id
from ._gate import Gate, Judgement, as_served, fails, judge
from ._general import (
    General,
    GeneralCost,
    GeneralSettings,
    evaluate_text,
    general_cost,
    held_out_texts,
)
from ._held_out import evaluate
from ._llama_cpp import check_gguf, compare_gguf, convert, find_converter, llama_cpp_missing, llama_cpp_versions
from ._measures import BOTH, TASK_METRICS
from ._results import BEYOND_LONGEST, EvaluationResult, EvaluationSettings, EvaluationSummary
from ._served import Served
from ._serving import LLAMA_CPP_ARCHITECTURES, TEXT, VLLM_ARCHITECTURES, check, compare_merged
from ._tasks import TaskScore, TaskSummary, check_tasks, evaluate_tasks, group_score, write_task_samples

__all__ = [
    "BEYOND_LONGEST",
    "BOTH",
    "LLAMA_CPP_ARCHITECTURES",
    "PUBLISHED_ARMS",
    "TASK_METRICS",
    "TEXT",
    "VLLM_ARCHITECTURES",
    "Arm",
    "Comparison",
    "EvaluationResult",
    "EvaluationSettings",
    "EvaluationSummary",
    "Gate",
    "General",
    "GeneralCost",
    "GeneralSettings",
    "Judgement",
    "Served",
    "TaskScore",
    "TaskSummary",
    "as_served",
    "check",
    "check_gguf",
    "check_tasks",
    "compare",
    "compare_arms",
    "compare_gguf",
    "compare_merged",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "evaluate_text",
    "extract",
    "extract_choice",
    "extract_letter",
    "extract_number",
    "fails",
    "find_converter",
    "general_cost",
    "group_score",
    "held_out_texts",
    "judge",
    "llama_cpp_missing",
    "llama_cpp_versions",
    "matches",
    "mcnemar",
    "metrics",
    "read_samples",
    "sample_id",
    "write_task_samples",
]
