"""Data rows: reading them, turning them into prompts, and encoding them for training.

One row is one example in any of four shapes, which may be mixed in a file:

* ``{"instruction", "input", "output"}`` — LLM-Adapters (arXiv 2304.01933) and Alpaca. Rendered as
  ``Question: …\\nAnswer: …`` with ``input``, where there is one, on a ``Context: …`` line first (LoRASuite,
  arXiv 2505.13515, and its released scripts);
* ``{"prompt", "completion"}`` — used verbatim;
* ``{"messages": [{"role", "content"}, …]}`` — rendered by the tokenizer's chat template;
* ``{"text"}`` — plain text.

Where the prompt ends and the completion starts, the space belongs to the completion: ``"…\\nAnswer:"`` and
``" 42"``. That is how BPE vocabularies spell a word in running text and what lm-eval expects, so the prompt's tokens
are the same in training, in evaluation and when the model is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Kind = Literal["instruction", "completion", "messages", "text"]

#: Label of a position that takes no part in the loss (PyTorch's ``ignore_index``, which transformers uses
#: too).
IGNORED = -100

#: Key of a row whose text was cut off and goes on: in training no EOS follows it.
UNFINISHED = "unfinished"

#: How an instruction row is rendered; its hash is recorded with every evaluation.
CONTEXT_TEMPLATE = "Context: {input}\n"
INSTRUCTION_TEMPLATE = "Question: {instruction}\nAnswer:"

_SHAPES = 'Use {"instruction","input","output"}, {"prompt","completion"}, {"messages":[{"role","content"}]} or {"text"}'
_KNOWN_KEYS: dict[Kind, frozenset[str]] = {
    "instruction": frozenset({"instruction", "input", "output"}),
    "completion": frozenset({"prompt", "completion"}),
    "messages": frozenset({"messages"}),
    "text": frozenset({"text"}),
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One example. Only the fields of its ``kind`` are filled; keys of no shape are kept in ``extra``."""

    kind: Kind
    instruction: str = ""
    input: str = ""
    output: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    text: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def prompt_and_completion(self, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, str]:
        """The text the model is given and the text it should write.

        The prompt never ends in a space: trailing spaces move to the start of the completion (newlines stay,
        since a prompt such as ``"### Response:\\n"`` means them). For ``messages`` the completion is what the
        chat template puts after the generation prompt, its end-of-turn tokens included. For ``text`` the
        prompt is empty.

        Raises:
            DataError: for ``messages`` without a tokenizer or chat template, whose last message is not the
                assistant's, or that the template refuses.
        """
        match self.kind:
            case "text":
                return "", self.text
            case "instruction":
                context = CONTEXT_TEMPLATE.format(input=self.input.strip()) if self.input.strip() else ""
                prompt = context + INSTRUCTION_TEMPLATE.format(instruction=self.instruction.strip())
                return prompt, " " + self.output.strip()
            case "completion":
                prompt = self.prompt.rstrip(" ")
                return prompt, self.prompt[len(prompt) :] + self.completion
            case "messages":
                return _render_chat(self.messages, tokenizer)

    def target(self, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, str, str]:
        """``(prompt, scored, suffix)``: what evaluation conditions on, scores, and what only ends the turn.

        ``scored + suffix`` is the completion of :meth:`prompt_and_completion`; ``suffix`` is empty but for
        the end-of-turn text of a chat template, which is the template's and not the answer's.

        Raises:
            DataError: as :meth:`prompt_and_completion`.
        """
        prompt, completion = self.prompt_and_completion(tokenizer)
        if self.kind != "messages":
            return prompt, completion, ""
        content = self.messages[-1].content.strip()
        start = completion.rfind(content)
        if start < 0:  # the template rewrote the content; score all it wrote
            return prompt, completion, ""
        end = start + len(content)
        return prompt, completion[:end], completion[end:]


def _render_chat(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    """Prompt (with generation prompt) and completion of a conversation, by the tokenizer's chat template."""
    where = "messages row"
    if tokenizer is None:
        raise DataError([Problem(where, "needs a tokenizer with a chat template", "Pass the base's tokenizer")])
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            [
                Problem(
                    where,
                    "the base's tokenizer has no chat template",
                    "Use a chat model's tokenizer, or rows of prompt and completion",
                )
            ]
        )
    if not messages or messages[-1].role != "assistant":
        raise DataError(
            [Problem(where, "the last message is not the assistant's", "End each conversation with the answer")]
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        prompt = str(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    except Exception as error:  # a template is code of the checkpoint's author and raises what it likes
        raise DataError(
            [Problem(where, f"the chat template refused it ({error})", "Use the roles and order it accepts")]
        ) from error
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    # Some templates open a block in the generation prompt that they drop from finished turns (a reasoning
    # tag, say). The prompt of generation is then the one that matters: what follows it is the content and the
    # end of the turn.
    content = messages[-1].content.strip()
    start = whole.rfind(content)
    if start < 0:
        raise DataError(
            [
                Problem(
                    where,
                    "the chat template does not render the assistant's answer",
                    "Use a template that does, or rows of prompt and completion",
                )
            ]
        )
    return prompt, whole[start:]


# ---------------------------------------------------------------------------------------------- reading


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSON array, a JSONL file or, for ``.txt``, paragraphs separated by blank lines.

    A file that starts with ``[`` is an array whatever its suffix; any other file that is not ``.txt`` is
    JSONL.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or some rows are malformed or empty. Every bad row
            is
            reported, with its line (JSONL) or its number counted from 1 (array).
    """
    return _rows(Path(path), lambda record: record)


def _rows(path: Path, prepare: Callable[[Any], Any]) -> list[Row]:
    """The rows of a file, each record prepared before it is checked; raises as :func:`read_rows`."""
    text = _read_text(path)
    if path.suffix.lower() == ".txt":
        return _paragraphs(path, text)
    rows: list[Row] = []
    problems: list[Problem] = []
    for where, record in _records(path, text, problems):
        row = _to_row(where, prepare(record), problems)
        if row is not None:
            rows.append(row)
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([Problem(str(path), "has no rows", _SHAPES)])
    return rows


def calibration_texts(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The texts of a data file, to be read by a model for its activations: prompt and completion as one
    string.

    Conversations are rendered by the tokenizer's chat template where one is given and has it. Otherwise their
    contents are joined by newlines: calibration reads the *same* text with two tokenizers, which may disagree
    on templates.

    Raises:
        DataError: as :func:`read_rows`.
    """
    return [whole_text(row, tokenizer) for row in read_rows(path)]


def whole_text(row: Row, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A row's prompt and completion as one string; conversations as in :func:`calibration_texts`."""
    if row.kind == "messages" and getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(message.content for message in row.messages)
    return "".join(row.prompt_and_completion(tokenizer))


def draw(rows: Sequence[Row], samples: int, seed: int) -> list[Row]:
    """At most ``samples`` rows, a seeded draw without replacement, in the order they were given."""
    if samples >= len(rows):
        return list(rows)
    return [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), samples))]


def unanswered(row: Row, words: int = 0) -> Row:
    """The row without its answer, and without keys of its own, which might hold one.

    Of a text row the first ``words`` words are kept, with the spaces between them.
    """
    match row.kind:
        case "instruction":
            return replace(row, output="", extra={})
        case "completion":
            return replace(row, completion="", extra={})
        case "messages":
            answered = bool(row.messages) and row.messages[-1].role == "assistant"
            return replace(row, messages=row.messages[:-1] if answered else row.messages, extra={})
        case "text":
            found = re.match(rf"\s*(?:\S+\s*){{0,{words}}}", row.text)
            return replace(row, text=found.group().rstrip() if found else "", extra={})


def read_prompts(path: str | Path) -> list[Row]:
    """The prompts of a data file, whose rows may lack their answers: unanswered rows, text rows whole.

    A conversation without an answer ends with the user's turn.

    Raises:
        DataError: as :func:`read_rows`.
    """
    return [row if row.kind == "text" else unanswered(row) for row in _rows(Path(path), _with_answer)]


def _with_answer(record: Any) -> Any:
    """The record with something in the place of its answer, so that it passes for a row."""
    if not isinstance(record, dict):
        return record
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


def fingerprint_rows(rows: Sequence[Row]) -> str:
    """SHA-256 (hex) over the rows' content and order; the same rows in another file or format hash the
    same.
    """
    digest = hashlib.sha256()
    for row in rows:
        content = {
            "kind": row.kind,
            "fields": [row.instruction, row.input, row.output, row.prompt, row.completion, row.text],
            "messages": [[message.role, message.content] for message in row.messages],
            "extra": row.extra,
        }
        line = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _read_text(path: Path) -> str:
    """The file's text without its byte-order mark; DataError where there is none to read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError([Problem(str(path), what, "Give a JSON, JSONL or text file")]) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            [Problem(f"{path}, line {line}", f"is not UTF-8 (byte {error.start})", "Save the file as UTF-8")]
        ) from error
    if not text.strip():
        raise DataError([Problem(str(path), "is empty", _SHAPES)])
    return text


def _paragraphs(path: Path, text: str) -> list[Row]:
    """Text rows of the blocks between blank lines."""
    rows: list[Row] = []
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            block.append(line)
        elif block:
            rows.append(Row(kind="text", text="\n".join(block)))
            block = []
    return rows


def _records(path: Path, text: str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """``(where, value)`` of each record; what cannot be parsed goes to ``problems``."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            what = f"is not valid JSON ({error.msg}, column {error.colno})"
            problems.append(Problem(f"{path}, line {error.lineno}", what, "Correct it, or use JSONL"))
            return
        for number, value in enumerate(values, start=1):
            yield f"{path}, row {number}", value
        return
    if path.suffix.lower() == ".json":
        # One object spread over several lines is a legal .json file, but not JSONL.
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            pass
        else:
            yield f"{path}, row 1", value
            return
    # Not splitlines(): JSON strings may hold U+2028 and others that it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"is not valid JSON ({error.msg}, column {error.colno})"
            problems.append(Problem(where, what, "Write one JSON object a line"))
            continue
        yield where, value


def _to_row(where: str, record: Any, problems: list[Problem]) -> Row | None:
    """One record as a row, or None with the reasons appended to ``problems``."""
    if not isinstance(record, dict):
        problems.append(Problem(where, f"is a {_json_type(record)}, not an object", _SHAPES))
        return None
    kind = _kind_of(record)
    if kind is None:
        keys = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        problems.append(Problem(where, f"has no known shape (its keys: {keys})", _SHAPES))
        return None
    before = len(problems)
    extra = {key: value for key, value in record.items() if key not in _KNOWN_KEYS[kind]}
    if kind == "messages":
        messages = _messages(where, record["messages"], problems)
        return Row(kind=kind, messages=messages, extra=extra) if len(problems) == before else None
    if kind == "completion" and isinstance(record.get("prompt"), list):
        # TRL's conversational prompt-completion rows: two lists of messages.
        completion = record.get("completion")
        both = record["prompt"] + completion if isinstance(completion, list) else record["prompt"]
        messages = _messages(where, both, problems)
        return Row(kind="messages", messages=messages, extra=extra) if len(problems) == before else None
    values: dict[str, Any] = {
        name: _string(where, name, record.get(name), problems, required=name != "input")
        for name in sorted(_KNOWN_KEYS[kind])
    }
    return Row(kind=kind, extra=extra, **values) if len(problems) == before else None


def _kind_of(record: Mapping[str, Any]) -> Kind | None:
    """The shape a record has, or seems to be meant to have; several may apply (Alpaca rows carry a ``text``
    too).
    """
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


def _messages(where: str, value: Any, problems: list[Problem]) -> tuple[Message, ...]:
    """Validated messages; the last one must be the assistant's and have content."""
    remedy = 'Write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if not isinstance(value, list) or not value:
        what = "is empty" if value == [] else f"is a {_json_type(value)}, not a list"
        problems.append(Problem(where, f"'messages' {what}", remedy))
        return ()
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("role"), str)
            or not isinstance(item.get("content"), str)
        ):
            problems.append(Problem(where, f"message {number} has no text role and content", remedy))
            return ()
        messages.append(Message(role=item["role"], content=item["content"]))
    if messages[-1].role != "assistant":
        problems.append(Problem(where, "the last message is not the assistant's", "End with the answer to learn"))
    elif not messages[-1].content.strip():
        problems.append(Problem(where, "the assistant's last message is empty", "Fill it in, or drop it"))
    elif len(messages) < 2:
        problems.append(Problem(where, "has an answer but no question", "Put the user's message before it"))
    return tuple(messages)


def _json_type(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# --------------------------------------------------------------------------------------------- encoding


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a prompt exactly as at generation.

    With ``special`` the tokenizer adds what it adds (a BOS, for most), unless ``text`` already starts with
    the BOS, as lm-eval decides too. An EOS that some tokenizers append is dropped: a prompt is not finished.
    """
    special = special and not _starts_with_bos(tokenizer, text)
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    eos = tokenizer.eos_token_id
    if special and eos is not None and len(ids) > 1 and ids[-1] == eos:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not bare or bare[-1] != eos:
            ids.pop()
    return ids


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, special: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, as at generation, and of the completion that continues it.

    Both are tokenised as one string, since that is how running text merges. If the prompt's own ids are the
    start of the result — always so when the completion begins at a word boundary — the rest is the
    completion. Otherwise some token reaches across the boundary, or the prompt's last token merges
    differently before the completion; the model will be *given* the prompt's own ids, so these are kept, and
    the completion's ids are those that start at the boundary by the offset mapping, or the completion
    tokenised on its own where a token straddles it.
    """
    head = prompt_ids(tokenizer, prompt, special=special)
    joined = prompt_ids(tokenizer, prompt + completion, special=special)
    if joined[: len(head)] == head:
        return head, joined[len(head) :]
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        boundary = len(prompt)
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        if not any(start < boundary < end for start, end in offsets):
            first = next((at for at, (start, end) in enumerate(offsets) if start >= boundary and end > start), None)
            if first is not None:
                return head, list(encoded["input_ids"])[first:]
    return head, list(tokenizer(completion, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Encoded:
    """Training examples, and the indices of the rows left out because the cut-off took their whole
    completion.
    """

    examples: list[dict[str, list[int]]]
    cut_off: list[int]


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, cutoff: int = 256) -> Encoded:
    """Encode rows for training; see :func:`encode`. Also says which rows had to be left out.

    Raises:
        DataError: ``rows`` is empty, ``cutoff`` is below 2 tokens, no row keeps any of its completion, or
            (for
            ``messages``) as :meth:`Row.prompt_and_completion`.
    """
    if not rows:
        raise DataError([Problem("training rows", "there are none", "Give at least one row")])
    if cutoff < 2:
        raise DataError([Problem("cutoff", f"is {cutoff} tokens", "Use at least 2")])
    eos = tokenizer.eos_token_id
    examples: list[dict[str, list[int]]] = []
    cut_off: list[int] = []
    for index, row in enumerate(rows):
        prompt, scored, suffix = row.target(tokenizer)
        # Chat templates spell out their own special tokens, so the tokenizer must not add a second BOS.
        special = row.kind != "messages"
        if prompt:
            head, tail = encode_pair(tokenizer, prompt, scored + suffix, special=special)
        else:
            head, tail = [], prompt_ids(tokenizer, scored, special=special)
        ends = not suffix.strip() and not row.extra.get(UNFINISHED)
        if eos is not None and ends and (not tail or tail[-1] != eos):
            tail = [*tail, eos]
        ids = (head + tail)[:cutoff]
        labels = list(ids)
        if row.kind in ("completion", "messages"):
            labels[: len(head)] = [IGNORED] * min(len(head), len(ids))
        # The first token is never predicted; masked, so that counting labels counts predictions.
        labels[0] = IGNORED
        if len(head) >= len(ids) or all(label == IGNORED for label in labels):
            cut_off.append(index)
            continue
        examples.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    if not examples:
        raise DataError(
            [
                Problem(
                    "training rows",
                    f"no row of {len(rows)} keeps any of its completion within {cutoff} tokens",
                    "Raise cutoff, or shorten the prompts",
                )
            ]
        )
    if cut_off:
        logger.warning(
            "%d of %d rows keep no completion within %d tokens and are left out (first: row %d)",
            len(cut_off),
            len(rows),
            cutoff,
            cut_off[0] + 1,
        )
    return Encoded(examples=examples, cut_off=cut_off)


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, cutoff: int = 256) -> list[dict[str, list[int]]]:
    """Encode rows for causal-LM training: ``input_ids``, ``labels`` and ``attention_mask``, each
    ``(tokens,)``.

    Labels equal the input ids (the model shifts them) and are -100 where no loss is taken: the first token,
    and the prompt of ``completion`` and ``messages`` rows (as TRL does). Instruction rows learn prompt and
    answer (as the paper's scripts do), text rows all of it. BOS is added as the tokenizer adds it, EOS after
    the completion unless the chat template ends the turn itself, or the row has ``"unfinished": true``. Examples
    longer than ``cutoff`` tokens lose their end.

    Raises:
        DataError: as :func:`encode_rows`.
    """
    return encode_rows(rows, tokenizer, cutoff).examples


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the text spells out the BOS token at its start."""
    bos = tokenizer.bos_token
    return isinstance(bos, str) and bool(bos) and text.startswith(bos)
