from ._on_policy import OnPolicy
from ._prompts import frame, prompt_frame
from ._second_step import Distilling, second_step
from ._settings import TeacherSettings
from ._template_fit import ROWS, TemplateFit, TemplateFits, candidates, judge_templates, rendered
from ._vllm import VLLMTeacher, chosen, unusable
from ._worth import TextLoss, Worth, judge_teacher, read_losses, text_losses, total, write_losses
from ._writing import TeacherRows, write_rows

__all__ = [
    "ROWS",
    "Distilling",
    "OnPolicy",
    "TeacherRows",
    "TeacherSettings",
    "TemplateFit",
    "TemplateFits",
    "TextLoss",
    "VLLMTeacher",
    "Worth",
    "candidates",
    "chosen",
    "frame",
    "judge_teacher",
    "judge_templates",
    "prompt_frame",
    "read_losses",
    "rendered",
    "second_step",
    "text_losses",
    "total",
    "unusable",
    "write_losses",
    "write_rows",
]
