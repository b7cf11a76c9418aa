from ._drawing import ENOUGH, HELD_OUT, draw, split_mixed
from ._encoding import IGNORED, encode, encode_pair, encode_rows, prompt_ids
from ._reading import calibration_texts, read_prompts, read_rows, rows_to_jsonl
from ._rows import (
    CONTEXT_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    UNFINISHED,
    Kind,
    Message,
    Row,
    fingerprint_rows,
    unanswered,
    whole_text,
)

__all__ = [
    "CONTEXT_TEMPLATE",
    "ENOUGH",
    "HELD_OUT",
    "IGNORED",
    "INSTRUCTION_TEMPLATE",
    "UNFINISHED",
    "Kind",
    "Message",
    "Row",
    "calibration_texts",
    "draw",
    "encode",
    "encode_pair",
    "encode_rows",
    "fingerprint_rows",
    "prompt_ids",
    "read_prompts",
    "read_rows",
    "rows_to_jsonl",
    "split_mixed",
    "unanswered",
    "whole_text",
]
