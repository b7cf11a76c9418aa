from ._columns import parse_columns
from ._containers import source_digest
from ._drawing import HELD_OUT, MIN_OWN_HOLDOUT_ROWS, SPLIT, RowSplit, draw, split_rows
from ._encoding import IGNORED, Encoded, RowEncoder, encode, encode_pair, encode_rows, end_tokens, prompt_ids
from ._reading import calibration_texts, read_prompts, read_rows, rows_to_jsonl
from ._refused import accepted, endless
from ._rows import (
    CONTEXT_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    UNFINISHED,
    Kind,
    Message,
    Row,
    fingerprint_rows,
    unanswered,
    unread_keys,
    whole_text,
)
from ._tables import HUB
from ._templates import DEFAULT_TEMPLATE, Template, known_templates, read_template, templated

__all__ = [
    "CONTEXT_TEMPLATE",
    "DEFAULT_TEMPLATE",
    "HELD_OUT",
    "HUB",
    "IGNORED",
    "INSTRUCTION_TEMPLATE",
    "MIN_OWN_HOLDOUT_ROWS",
    "SPLIT",
    "UNFINISHED",
    "Encoded",
    "Kind",
    "Message",
    "Row",
    "RowEncoder",
    "RowSplit",
    "Template",
    "accepted",
    "calibration_texts",
    "draw",
    "encode",
    "encode_pair",
    "encode_rows",
    "end_tokens",
    "endless",
    "fingerprint_rows",
    "known_templates",
    "parse_columns",
    "prompt_ids",
    "read_prompts",
    "read_rows",
    "read_template",
    "rows_to_jsonl",
    "source_digest",
    "split_rows",
    "templated",
    "unanswered",
    "unread_keys",
    "whole_text",
]
