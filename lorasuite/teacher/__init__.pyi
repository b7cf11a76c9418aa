from ._prompts import frame, prompt_frame
from ._settings import TeacherSettings
from ._vllm import VLLMTeacher, chosen, unusable
from ._worth import TextLoss, Worth, judge_teacher, read_losses, text_losses, total, write_losses
from ._writing import TeacherRows, write_rows

__all__ = [
    "TeacherRows",
    "TeacherSettings",
    "TextLoss",
    "VLLMTeacher",
    "Worth",
    "chosen",
    "frame",
    "judge_teacher",
    "prompt_frame",
    "read_losses",
    "text_losses",
    "total",
    "unusable",
    "write_losses",
    "write_rows",
]
