from ._card import Card, card_texts, parsed_card
from ._discovery import DRAFTS, Asked, Discovered, asked_for, choose_prompts, general_level, resembling
from ._from_adapter import first_line
from ._given import Given
from ._on_policy import OnPolicy
from ._own_texts import own_texts
from ._probe import Probe, Pull, farthest
from ._prompts import frame, prompt_frame
from ._second_step import Distilling, second_step
from ._settings import HANDFUL, TeacherSettings, chosen_sources
from ._shapes import Shape, shape_of
from ._sources import PromptSource, prompt_source, register_source, source_names
from ._template_fit import ROWS, TemplateFit, TemplateFits, candidates, judge_templates, rendered
from ._vllm import VLLMTeacher, chosen, unusable
from ._worth import (
    MOST_JUDGED,
    TextLoss,
    Worth,
    judge_teacher,
    judged,
    losses_of_some,
    read_losses,
    text_losses,
    total,
    write_losses,
)
from ._writing import TeacherRows, write_rows

__all__ = [
    "DRAFTS",
    "HANDFUL",
    "MOST_JUDGED",
    "ROWS",
    "Asked",
    "Card",
    "Discovered",
    "Distilling",
    "Given",
    "OnPolicy",
    "Probe",
    "PromptSource",
    "Pull",
    "Shape",
    "TeacherRows",
    "TeacherSettings",
    "TemplateFit",
    "TemplateFits",
    "TextLoss",
    "VLLMTeacher",
    "Worth",
    "asked_for",
    "candidates",
    "card_texts",
    "choose_prompts",
    "chosen",
    "chosen_sources",
    "farthest",
    "first_line",
    "frame",
    "general_level",
    "judge_teacher",
    "judge_templates",
    "judged",
    "losses_of_some",
    "own_texts",
    "parsed_card",
    "prompt_frame",
    "prompt_source",
    "read_losses",
    "register_source",
    "rendered",
    "resembling",
    "second_step",
    "shape_of",
    "source_names",
    "text_losses",
    "total",
    "unusable",
    "write_losses",
    "write_rows",
]
