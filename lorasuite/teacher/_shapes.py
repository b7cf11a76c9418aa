"""How what differs between prompts becomes a prompt: words before and behind it, a user's turn, or an instruction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorasuite.data import Kind, Message, Row, Template, known_templates
from lorasuite.errors import LoRASuiteError
from lorasuite.teacher._prompts import frame

#: Names that a prompt's parts often have, of what is given and of what is asked for.
LABELS = (
    ("Question", "Answer"), ("Input", "Output"), ("Text", "Label"), ("Sentence", "Label"), ("Text", "Summary"),
    ("User", "Assistant"),
)  # fmt: skip
#: Stands for the body while a template is asked what it puts around one.
_PLACE = "\u241f\u241c\u241f"
#: Words of a description that name nothing.
_SMALL = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "given",
        "her",
        "his",
        "in",
        "into",
        "is",
        "it",
        "its",
        "kind",
        "of",
        "on",
        "or",
        "such",
        "that",
        "the",
        "their",
        "these",
        "this",
        "to",
        "what",
        "which",
        "whose",
        "with",
        "write",
        "writes",
    ]
)
#: What a letter's neighbours may be for a prompt's fixed words to end there.
_BOUNDARY = re.compile(r"[^\w\s]|\n")


@dataclass(frozen=True)
class Shape:
    """A prompt but for its body, the part that differs; ``example`` lends what else a row has."""

    kind: Kind
    before: str = ""
    after: str = ""
    example: Row | None = None

    def row(self, body: str) -> Row:
        """The prompt of a body."""
        text = f"{self.before}{body}{self.after}"
        model = self.example
        match self.kind:
            case "completion":
                return Row("completion", prompt=text, end_of_answer="" if model is None else model.end_of_answer)
            case "messages":
                earlier = () if model is None else model.messages[:-1]
                extra = {} if model is None else model.extra
                return Row("messages", messages=(*earlier, Message("user", text)), extra=extra)
            case "instruction":
                first, mark, rest = body.partition(_INPUT)
                return Row("instruction", instruction=first.strip(), input=rest.strip() if mark else "")
            case "text":
                return Row("text", text=text)

    def body(self, row: Row) -> str:
        """The body of a prompt of this shape."""
        text = _text(row)
        return text.removeprefix(self.before).removesuffix(self.after).strip()

    def __str__(self) -> str:
        return f"{self.kind} {self.before!r} … {self.after!r}"


#: Between instruction and input of an instruction row in a list.
_INPUT = "\nInput: "


def _text(row: Row) -> str:
    match row.kind:
        case "completion":
            return row.prompt
        case "messages":
            return row.messages[-1].content if row.messages else ""
        case "instruction":
            return row.instruction.strip() + (f"{_INPUT}{row.input.strip()}" if row.input.strip() else "")
        case "text":
            return row.text


def shape_of(examples: Sequence[Row]) -> Shape:
    """The shape of given prompts, by the kind that most are of.

    What all begin with counts up to its last punctuation mark or line break only, and what all end with from its first
    one on: a few prompts may share their first word by chance.
    """
    kinds = [row.kind for row in examples]
    kind = max(dict.fromkeys(kinds), key=kinds.count)
    alike = [row for row in examples if row.kind == kind]
    if kind in ("instruction", "text"):
        return Shape(kind, example=alike[0])
    before, after = _fixed(*frame([_text(row) for row in alike]))
    return Shape(kind, before, after, alike[0])


def _fixed(begin: str, end: str) -> tuple[str, str]:
    marks = list(_BOUNDARY.finditer(begin))
    before = begin[: marks[-1].end()] if marks else ""
    if before and begin[len(before) : len(before) + 1] in ("", " "):
        before += "" if before.endswith("\n") else " "
    first = _BOUNDARY.search(end)
    after = end[first.start() :] if first is not None and end[: first.start()].strip() else end
    return before, after


def known_shapes(description: str, chat: bool, prefix: str = "", suffix: str = "") -> list[Shape]:
    """Shapes to try where no prompt is given: which of them the adapter knows, its signal tells.

    Args:
        description: of which every two words are tried as the names of what is given and what is asked for.
        chat: whether there is a chat template.
        prefix: what prompts begin with, where that is said.
        suffix: what they end with.
    """
    if suffix:
        return [Shape("completion", prefix, suffix)]
    found = [Shape("messages")] if chat else []
    words = [word.capitalize() for word in names(description)]
    pairs = [(one, other) for one in words for other in words if one != other]
    found += [Shape("completion", f"{one}: ", f"\n{other}:") for one, other in (*pairs, *LABELS)]
    return found + [shape for name, text in known_templates().items() for shape in templated_shape(name, text)]


def templated_shape(name: str, text: str) -> list[Shape]:
    """The shape of the prompts that a template of instruction rows makes, rendered in Jinja's sandbox.

    Args:
        name: as errors call it.
        text: Jinja over ``instruction``, ``input`` and ``output``.

    Returns:
        one; none where the template cannot be rendered, or drops the instruction.
    """
    try:
        row = Template(name, text).apply(Row("instruction", instruction=_PLACE, output=_PLACE))
    except LoRASuiteError:
        return []
    before, found, after = row.prompt.partition(_PLACE)
    return [Shape("completion", before, after, row)] if found else []


def names(description: str) -> list[str]:
    """Words of a description that may name a part of a prompt, at most eight."""
    words = [word.removesuffix("'s").removesuffix("’s") for word in re.findall(r"[^\W\d_][\w'’-]*", description)]
    return list(dict.fromkeys(word.lower() for word in words if word.lower() not in _SMALL))[:8]


def split_pairs(texts: Sequence[str]) -> Shape | None:
    """The shape of prompts in texts that hold prompt and answer: a short line that most of them have, ending in a
    colon, after which the answer stands. None where they have none.

    Args:
        texts: written from nothing.
    """
    counts: dict[str, int] = {}
    for text in texts:
        marks = {match.group() for match in re.finditer(r"\n+[^\n:]{1,40}:(?=\s|$)", text)}
        for mark in marks:
            counts[mark] = counts.get(mark, 0) + 1
    best = max(counts, key=lambda mark: counts[mark], default="")
    if not best or counts[best] < max(3, len(texts) // 2):
        return None
    heads = [text.split(best)[0] for text in texts if best in text]
    first = re.match(r"[^\n:]{1,40}:\s*", max(heads, key=len))
    before = first.group() if first is not None else ""
    if sum(head.startswith(before.strip()) for head in heads) < len(heads) // 2:
        before = ""
    return Shape("completion", before, best)


def cut_like(shape: Shape, text: str) -> Row | None:
    """The prompt in a text of prompt and answer; None where it is not of that shape."""
    head, mark, _ = text.partition(shape.after)
    if not mark or not head.startswith(shape.before.strip()):
        return None
    body = head.removeprefix(shape.before.strip()).strip()
    return shape.row(body) if body else None


def separators(texts: Sequence[str]) -> list[str]:
    """What may stand between prompt and answer in texts that hold both: words without a letter or digit that a third of
    them have inside, with the space before."""
    counts: dict[str, int] = {}
    for text in texts:
        for mark in set(re.findall(r"(?<=\S) [^\w\s]+(?= )", text)):
            counts[mark] = counts.get(mark, 0) + 1
    return [mark for mark, count in sorted(counts.items(), key=lambda item: -item[1]) if count >= len(texts) / 3][:3]
