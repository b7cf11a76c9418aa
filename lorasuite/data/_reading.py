"""Rows, texts and prompts read from files, every malformed row reported with its place; and rows written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorasuite.data._columns import KNOWN_KEYS, lacking, renamed
from lorasuite.data._containers import read_text, records, suffix
from lorasuite.data._limits import check_rows, enough
from lorasuite.data._refused import accepted
from lorasuite.data._rows import Kind, Message, Row, unanswered, whole_text
from lorasuite.data._tables import HUB
from lorasuite.data._templates import Template, templated
from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHAPES = 'Use {"instruction","input","output"}, {"prompt","completion"}, {"messages":[{"role","content"}]} or {"text"}'
#: Keys of instruction rows that some trainers put into the prompt, and that the rendering here has no place for.
UNRENDERED = ("system", "history")
#: Keys that may be missing or empty.
OPTIONAL = ("input", "end_of_answer")
#: Who speaks in ShareGPT's conversations, as roles of chat templates.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model"), "assistant"),
    **{name: name for name in ("system", "tool")},
}
#: Fields that are a row's answer, which prompts may lack.
ANSWERS = ("completion", "output")
_AS_NAMED: Mapping[str, str] = MappingProxyType({})


def read_rows(source: str | Path, columns: Mapping[str, str] = _AS_NAMED) -> list[Row]:
    """Read rows of JSON, JSON Lines, CSV, Parquet, a data set on disk or of the Hub or, for ``.txt``, paragraphs.

    The suffix tells CSV, TSV, Parquet and text; of other files one that starts with ``[`` is a JSON array, and any
    else JSON Lines. Each may be packed with gzip, bzip2, xz or Zstandard. Paragraphs are separated by blank lines. A
    data set of the Hub is ``hf://org/name[@revision][/config][:split]``.

    Args:
        source: where they are.
        columns: fields of rows to the columns they are called in the source.

    Raises:
        DataError: the file is missing, empty or not UTF-8, the data set cannot be loaded, or some rows are malformed or
            empty, or lack a column. Every bad row is reported, with its line (JSONL) or its number counted from 1.
    """
    return _rows(source, columns)


def _rows(
    source: str | Path,
    columns: Mapping[str, str],
    prepare: Callable[[Any], Any] = lambda record: record,
    *,
    strict: bool = True,
) -> list[Row]:
    """The rows of a file, each record prepared before it is checked; raises as :func:`read_rows`.

    Args:
        strict: whether a record may not lack a column.
    """
    source = source if str(source).startswith(HUB) else Path(source)
    if isinstance(source, Path) and suffix(source) == ".txt":
        return _paragraphs(source, read_text(source))
    rows: list[Row] = []
    problems: list[Problem] = []
    for where, record in records(source, problems):
        if enough(problems, source):
            break
        if columns and isinstance(record, dict):
            if strict and (what := lacking(record, columns)):
                problems.append(Problem(where, what, "Name columns that there are with --columns"))
                continue
            record = renamed(record, columns)
        row = _to_row(where, prepare(record), problems)
        if row is not None:
            rows.append(replace(row, where=where))
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([Problem(str(source), "has no rows", _SHAPES)])
    return rows


def calibration_texts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: Mapping[str, str] = _AS_NAMED,
    skip: bool = False,
    template: Template | None = None,
) -> list[str]:
    """The texts of a data file, to be read by a model for its activations: prompt and completion as one string.

    Conversations are rendered by the tokenizer's chat template where one is given and has it. Otherwise their
    contents are joined by newlines: calibration reads the *same* text with two tokenizers, which may disagree
    on templates. Rows that lack one of the ``columns`` are read as they are: texts may have another shape than rows.

    Args:
        skip: leave out conversations that the template refuses.
        template: renders instruction rows.

    Raises:
        DataError: as :func:`read_rows` and :func:`lorasuite.data.templated`; naming every conversation that the chat
            template refuses, where none is left or they may not be skipped.
    """
    rows = _rows(source, columns, strict=False)
    rows = rows if template is None else templated(rows, template)
    if getattr(tokenizer, "chat_template", None) is not None and tokenizer is not None:
        rows, problems = accepted(rows, [tokenizer])
        if problems and not (skip and rows):
            raise DataError(problems)
    return [whole_text(row, tokenizer) for row in rows]


def read_prompts(
    source: str | Path, columns: Mapping[str, str] = _AS_NAMED, template: Template | None = None
) -> list[Row]:
    """The prompts of a data file, whose rows may lack their answers: unanswered rows, text rows whole.

    A conversation without an answer ends with the user's turn.

    Args:
        template: renders instruction rows.

    Raises:
        DataError: as :func:`read_rows` and :func:`lorasuite.data.templated`.
    """
    asked = {field: column for field, column in columns.items() if field not in ANSWERS}
    rows = _rows(source, asked, _with_answer)
    rows = rows if template is None else templated(rows, template)
    return [row if row.kind == "text" else unanswered(row) for row in rows]


def _with_answer(record: Any) -> Any:
    """The record with something in the place of its answer, so that it passes for a row."""
    if not isinstance(record, dict):
        return record
    record = _conversation(record)
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") != "assistant":
            return {**record, "messages": [*messages, {"role": "assistant", "content": "-"}]}
        return record
    if "instruction" in record:
        return {**record, "output": "-"}
    if "prompt" in record and not isinstance(record["prompt"], list):
        return {**record, "completion": "-"}
    return record


def _paragraphs(source: Path, text: str) -> list[Row]:
    """Text rows of the blocks between blank lines.

    Raises:
        DataError: if there are more than are read.
    """
    rows: list[Row] = []
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            block.append(line)
        elif block:
            rows.append(Row(kind="text", text="\n".join(block)))
            check_rows(source, len(rows))
            block = []
    return rows


def _to_row(where: str, record: Any, problems: list[Problem]) -> Row | None:
    """One record as a row, or None with the reasons appended to ``problems``."""
    if not isinstance(record, dict):
        problems.append(Problem(where, f"is a {_json_type(record)}, not an object", _SHAPES))
        return None
    record = _conversation(record)
    kind = _kind_of(record)
    if kind is None:
        keys = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        problems.append(Problem(where, f"has no known shape (its keys: {keys})", _SHAPES))
        return None
    before = len(problems)
    extra = {key: value for key, value in record.items() if key not in KNOWN_KEYS[kind]}
    if kind == "messages":
        messages = _messages(where, record["messages"], problems)
        return Row(kind=kind, messages=messages, extra=extra) if len(problems) == before else None
    if kind == "completion" and isinstance(record.get("prompt"), list):
        # TRL's conversational prompt-completion rows: two lists of messages.
        completion = record.get("completion")
        both = record["prompt"] + completion if isinstance(completion, list) else record["prompt"]
        messages = _messages(where, both, problems)
        return Row(kind="messages", messages=messages, extra=extra) if len(problems) == before else None
    if kind == "instruction":
        for name in (key for key in UNRENDERED if extra.get(key)):
            what = f"has {name!r}, for which an instruction row has no place in its prompt"
            problems.append(Problem(where, what, "Write it as messages, or take the key out"))
    values: dict[str, Any] = {
        name: _string(where, name, record.get(name), problems, required=name not in OPTIONAL)
        for name in sorted(KNOWN_KEYS[kind])
    }
    return Row(kind=kind, extra=extra, **values) if len(problems) == before else None


def _kind_of(record: Mapping[str, Any]) -> Kind | None:
    """The shape a record has, or seems to be meant to have; several may apply (Alpaca rows carry a ``text`` too)."""
    if "messages" in record:
        return "messages"
    if "instruction" in record:
        return "instruction"
    if "prompt" in record and ("completion" in record or "text" not in record):
        return "completion"
    if "text" in record:
        return "text"
    return "completion" if "completion" in record else None


def _string(where: str, name: str, value: Any, problems: list[Problem], *, required: bool) -> str:
    """``value`` as a non-blank string (or "" where it is not required); otherwise a problem is recorded."""
    if value is None and not required:
        return ""
    if value is None:
        problems.append(Problem(where, f"has no {name!r}", f"Add {name!r}, or drop the row"))
    elif not isinstance(value, str):
        problems.append(Problem(where, f"{name!r} is a {_json_type(value)}", f"Make {name!r} a string"))
    elif required and not value.strip():
        problems.append(Problem(where, f"{name!r} is empty", f"Fill in {name!r}, or drop the row"))
    else:
        return value
    return ""


def _conversation(record: dict[str, Any]) -> dict[str, Any]:
    """A ShareGPT record, ``{"conversations": [{"from", "value"}], "system"}``, as one of messages; others as they are.

    Left alone are conversations whose turns have other keys, or speakers that ShareGPT does not name.
    """
    name = "messages" if "messages" in record else "conversations"
    turns = record.get(name)
    if not isinstance(turns, list):
        return record
    messages = [_turn(turn) for turn in turns]
    if not messages or None in messages:
        return record
    if isinstance(system := record.get("system"), str) and system:
        messages.insert(0, {"role": "system", "content": system})
    rest = {key: value for key, value in record.items() if key not in (name, "system")}
    return {"messages": messages, **rest}


def _turn(turn: Any) -> dict[str, Any] | None:
    """One turn of a ShareGPT conversation as a message (some tools write messages under its name); None for others."""
    if not isinstance(turn, dict):
        return None
    if {"role", "content"} <= turn.keys():
        return turn
    role = SPEAKERS.get(str(turn.get("from")))
    if role is None or "value" not in turn:
        return None
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": role, "content": turn["value"], **rest}


def _messages(where: str, value: Any, problems: list[Problem]) -> tuple[Message, ...]:
    """Validated messages; the last one must be the assistant's and have content."""
    remedy = 'Write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if not isinstance(value, list) or not value:
        what = "is empty" if value == [] else f"is a {_json_type(value)}, not a list"
        problems.append(Problem(where, f"'messages' {what}", remedy))
        return ()
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        message = _message(item)
        if message is None:
            problems.append(Problem(where, f"message {number} has no text role and content", remedy))
            return ()
        messages.append(message)
    if messages[-1].role != "assistant":
        problems.append(Problem(where, "the last message is not the assistant's", "End with the answer to learn"))
    elif not messages[-1].content.strip() and not messages[-1].fields.get("tool_calls"):
        problems.append(Problem(where, "the assistant's last message is empty", "Fill it in, or drop it"))
    elif len(messages) < 2:
        problems.append(Problem(where, "has an answer but no question", "Put the user's message before it"))
    return tuple(messages)


def _message(item: Any) -> Message | None:
    """One message; None where its content is neither text, nor text in parts, nor null beside other keys."""
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        return None
    content, fields = item.get("content"), {k: v for k, v in item.items() if k not in ("role", "content")}
    if isinstance(content, str):
        return Message(item["role"], content, fields)
    if content is None and any(fields.values()):
        return Message(item["role"], "", {**fields, "content": None})
    parts = content if isinstance(content, list) else []
    texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in parts]
    if texts and all(isinstance(text, str) for text in texts):
        return Message(item["role"], "".join(map(str, texts)), {**fields, "content": content})
    return None


def _json_type(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def rows_to_jsonl(rows: Sequence[Row]) -> bytes:
    """Rows as JSONL, for :func:`lorasuite.data.read_rows`."""
    return "".join(json.dumps(_record(row), ensure_ascii=False) + "\n" for row in rows).encode()


def _record(row: Row) -> dict[str, Any]:
    """A row as the JSON object it is written as."""
    match row.kind:
        case "instruction":
            fields: dict[str, Any] = {"instruction": row.instruction, "input": row.input, "output": row.output}
        case "completion":
            fields = {"prompt": row.prompt, "completion": row.completion}
            if row.end_of_answer:
                fields["end_of_answer"] = row.end_of_answer
        case "messages":
            fields = {"messages": [message.turn() for message in row.messages]}
        case "text":
            fields = {"text": row.text}
    return {**fields, **row.extra}
