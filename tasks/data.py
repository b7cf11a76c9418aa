"""Rows and texts as the files of artifacts: drawn once, by the flow that checked them, and read by every stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from artifacts import Artifact
from lorasuite.data import SPLIT, Row, RowSplit, read_prompts, read_rows, rows_to_jsonl

ROWS, TEXTS = "rows.jsonl", "texts.json"


def rows_files(rows: Sequence[Row]) -> Mapping[str, bytes]:
    """The files of an artifact of rows."""
    return {ROWS: rows_to_jsonl(rows)}


def texts_files(texts: Sequence[str]) -> Mapping[str, bytes]:
    """The files of an artifact of texts."""
    return {TEXTS: json.dumps(list(texts), ensure_ascii=False).encode()}


def stored_rows(artifact: Artifact) -> list[Row]:
    """The rows of an artifact that keeps some: given ones, prompts, or those the teacher wrote."""
    return read_rows(artifact.file(ROWS))


def stored_prompts(artifact: Artifact) -> list[Row]:
    """The rows of an artifact of prompts, which lack their answers."""
    return read_prompts(artifact.file(ROWS))


def stored_texts(artifact: Artifact) -> list[str]:
    """The texts of an artifact of texts."""
    texts: list[str] = json.loads(artifact.file(TEXTS).read_text(encoding="utf-8"))
    return texts


def stored_split(artifact: Artifact) -> RowSplit:
    """The split of an artifact that the stage ``split`` made."""
    return RowSplit.read(artifact.file(SPLIT).parent)
