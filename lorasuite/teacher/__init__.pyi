from ._prompts import frame, prompt_frame
from ._settings import TeacherSettings
from ._worth import TextLoss, Worth, judge_teacher, read_losses, text_losses, total, write_losses
from ._writing import write_rows

__all__ = [
    "TeacherSettings",
    "TextLoss",
    "Worth",
    "frame",
    "judge_teacher",
    "prompt_frame",
    "read_losses",
    "text_losses",
    "total",
    "write_losses",
    "write_rows",
]
