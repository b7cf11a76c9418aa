"""A data row: one example, its prompt and its completion.

It has any of four shapes, which may be mixed in a file:

* ``{"instruction", "input", "output"}`` — LLM-Adapters (arXiv 2304.01933) and Alpaca. Rendered as
  ``Question: …\\nAnswer: …`` with ``input``, where there is one, on a ``Context: …`` line first (LoRASuite,
  arXiv 2505.13515, and its released scripts);
* ``{"prompt", "completion"}`` — used verbatim; with ``end_of_answer``, the text that ends the answer in place of the
  tokenizer's end-of-text token;
* ``{"messages": [{"role", "content"}, …]}`` — rendered by the tokenizer's chat template, which is given the messages'
  other keys (``tool_calls``, ``reasoning_content``, …) as they are, and the row's ``tools``, ``documents`` and
  ``chat_template_kwargs`` as its arguments;
* ``{"text"}`` — plain text.

Where the prompt ends and the completion starts, the space belongs to the completion: ``"…\\nAnswer:"`` and
``" 42"``. That is how BPE vocabularies spell a word in running text and what lm-eval expects, so the prompt's tokens
are the same in training, in evaluation and when the model is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lorasuite.bases import chat_values
from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["instruction", "completion", "messages", "text"]

#: Key of a row whose text is cut off before its end: in training no EOS follows it.
UNFINISHED = "unfinished"

#: Keys of a conversation's row that its chat template takes as arguments.
TEMPLATE_ARGUMENTS = ("tools", "documents", "chat_template_kwargs")

#: How an instruction row is rendered; its hash is recorded with every evaluation.
CONTEXT_TEMPLATE = "Context: {input}\n"
INSTRUCTION_TEMPLATE = "Question: {instruction}\nAnswer:"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    ``fields`` are its other keys, for the chat template (and ``content`` where that is null or in parts, of which the
    attribute holds the text).
    """

    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def turn(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True)
class Row:
    """One example. Only the fields of its ``kind`` are filled; keys of no shape are kept in ``extra``."""

    kind: Kind
    instruction: str = ""
    input: str = ""
    output: str = ""
    prompt: str = ""
    completion: str = ""
    end_of_answer: str = ""
    messages: tuple[Message, ...] = ()
    text: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    #: The file and the line or number it was read from, for messages.
    where: str = field(default="", compare=False)

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
            case _:
                prompt, answer, suffix = self.target(tokenizer)
                return prompt, answer + suffix

    def target(self, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, str, str]:
        """``(prompt, scored, suffix)``: what evaluation conditions on, scores, and what only ends the turn.

        ``scored + suffix`` is the completion of :meth:`prompt_and_completion`; ``suffix`` is empty but for
        the end-of-turn text of a template, which is the template's and not the answer's.

        Raises:
            DataError: as :meth:`prompt_and_completion`.
        """
        if self.kind == "messages":
            return _render_chat(self, tokenizer)
        if self.kind == "completion":
            prompt = self.prompt.rstrip(" ")
            end = "" if self.extra.get(UNFINISHED) else self.end_of_answer
            return prompt, self.prompt[len(prompt) :] + self.completion, end
        return *self.prompt_and_completion(tokenizer), ""


#: Stands for the answer while a template is asked where it puts one: nothing of a template's own, nothing to strip.
_PLACEHOLDER = "\u241f\u241e\u241f"


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str, str]:
    """Prompt (with generation prompt), answer and end of turn of a conversation, by the tokenizer's chat template.

    Where the answer is, the template itself says, with a placeholder in the answer's place: searched for, a short
    answer might be found in the words of the prompt or in an end-of-turn token.
    """
    where, messages = row.where or "messages row", row.messages
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
    given = _arguments(row)
    try:
        prompt, whole, marked = (
            str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answering, **given))
            for turns, answering in _conversations(messages)
        )
    except Exception as error:  # a template is code of the checkpoint's author and raises what it likes
        raise DataError(
            [
                Problem(
                    where,
                    f"the chat template refused it ({error})",
                    "Use the roles and order it accepts, or go on without such rows: --skip-refused-rows",
                )
            ]
        ) from error
    continues = whole.startswith(prompt)
    span = _answer_span(whole, marked)
    answer = messages[-1].content.strip()
    if span is None and not continues and answer in whole:
        span = whole.rfind(answer), whole.rfind(answer) + len(answer)
    if span is not None:
        # Some templates open a block in the generation prompt that they drop from finished turns (a reasoning
        # tag, say). The prompt of generation is then the one that matters: what follows it is the answer and the
        # end of the turn.
        return prompt, whole[len(prompt) if continues else span[0] : span[1]], whole[span[1] :]
    if continues:  # the template rewrote the answer: score all it wrote
        return prompt, whole[len(prompt) :], ""
    raise DataError(
        [
            Problem(
                where,
                "the chat template does not render the assistant's answer",
                "Use a template that does, or rows of prompt and completion",
            )
        ]
    )


def _conversations(messages: Sequence[Message]) -> list[tuple[list[dict[str, Any]], bool]]:
    """What a chat template is given of a conversation, and whether an answer is to follow: all but the answer, the
    whole, and the whole with the placeholder in the answer's place.
    """
    turns = [message.turn() for message in messages]
    marked = [*turns[:-1], {"role": messages[-1].role, "content": _PLACEHOLDER}]
    return [(turns[:-1], True), (turns, False), (marked, False)]


def _arguments(row: Row) -> dict[str, Any]:
    """What a conversation gives its chat template beside its messages."""
    found = {name: row.extra[name] for name in TEMPLATE_ARGUMENTS[:2] if row.extra.get(name)}
    return found | (row.extra.get(TEMPLATE_ARGUMENTS[2]) or {})


def chat_renderings(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The names that the chat template is given when :meth:`Row.target` renders a conversation."""
    given = _arguments(row)
    return [chat_values(tokenizer, turns, answering, **given) for turns, answering in _conversations(row.messages)]


def _answer_span(whole: str, marked: str) -> tuple[int, int] | None:
    """Where the answer stands in a rendered conversation; ``marked`` is the same one with the placeholder in its place.

    None where the template writes something else around this answer than around the placeholder.
    """
    before, found, behind = marked.rpartition(_PLACEHOLDER)
    if found and whole.startswith(before) and whole.endswith(behind) and len(before) + len(behind) <= len(whole):
        return len(before), len(whole) - len(behind)
    return None


def whole_text(row: Row, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A row's prompt and completion as one string; conversations as in :func:`calibration_texts`.

    Raises:
        DataError: for conversations that the chat template refuses.
    """
    if row.kind == "messages" and getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(message.content for message in row.messages)
    return "".join(row.prompt_and_completion(tokenizer))


def unread_keys(rows: Sequence[Row]) -> dict[str, int]:
    """Keys of rows that nothing reads, such as identifiers, and in how many rows each is."""
    found: Counter[str] = Counter()
    for row in rows:
        read = {UNFINISHED, *(TEMPLATE_ARGUMENTS if row.kind == "messages" else ())}
        found.update(key for key in row.extra if key not in read)
    return dict(found)


def unanswered(row: Row, words: int = 0) -> Row:
    """The row without its answer, and without keys of its own, which might hold one.

    What a conversation's template takes as arguments stays. Of a text row the first ``words`` words are kept, with the
    spaces between them.
    """
    match row.kind:
        case "instruction":
            return replace(row, output="", extra={})
        case "completion":
            return replace(row, completion="", extra={})
        case "messages":
            answered = bool(row.messages) and row.messages[-1].role == "assistant"
            arguments = {name: row.extra[name] for name in TEMPLATE_ARGUMENTS if name in row.extra}
            return replace(row, messages=row.messages[:-1] if answered else row.messages, extra=arguments)
        case "text":
            found = re.match(rf"\s*(?:\S+\s*){{0,{words}}}", row.text)
            return replace(row, text=found.group().rstrip() if found else "", extra={})


def fingerprint_rows(rows: Sequence[Row]) -> str:
    """SHA-256 (hex) over the rows' content and order; the same rows in another file or format hash the same."""
    digest = hashlib.sha256()
    for row in rows:
        content = {
            "kind": row.kind,
            "fields": [row.instruction, row.input, row.output, row.prompt, row.completion, row.text]
            + ([row.end_of_answer] if row.end_of_answer else []),
            "messages": [[m.role, m.content, *([m.fields] if m.fields else [])] for m in row.messages],
            "extra": row.extra,
        }
        line = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
