from ._prompts import frame, prompt_frame
from ._settings import TeacherSettings
from ._worth import TextLoss, Worth, judge_teacher, text_losses, total
from ._writing import write_rows

__all__ = [
    "TeacherSettings",
    "TextLoss",
    "Worth",
    "frame",
    "judge_teacher",
    "prompt_frame",
    "text_losses",
    "total",
    "write_rows",
]
