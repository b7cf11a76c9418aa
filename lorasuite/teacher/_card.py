"""What an adapter's card says of its prompts: read as text, from its README.md; nothing in it is run or followed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

from lorasuite.bases import parse_yaml
from lorasuite.data import Message, Row, known_templates
from lorasuite.teacher._shapes import templated_shape

FILE = "README.md"
#: Training settings as text that trainers save beside an adapter. Pickled ones are not read.
SETTINGS = ("training_args.yaml", "training_args.json", "axolotl_config.yaml", "axolotl_config.yml")
#: Bytes of a card that are read, prompts that are taken from it, and characters of one, at most.
MOST_BYTES, MOST_PROMPTS, LONGEST = 200_000, 50, 4_000
#: Places in a template, at most: what has more is none.
MOST_PLACES = 8
#: Names under which a snippet holds a prompt, as under those that end in "prompt" or "template".
PROMPT_NAMES = frozenset(
    [
        "prompt",
        "prompts",
        "text",
        "texts",
        "input",
        "inputs",
        "input_text",
        "instruction",
        "question",
        "query",
        "sentence",
        "message",
        "user_input",
    ]
)
#: Calls whose first argument is a prompt, where it is a string; that of ``pipeline`` itself is the name of a task.
CALLS = frozenset(["pipe", "generator", "tokenizer", "tok", "generate", "chat", "predict", "classifier"])
#: What the place of the answer is called in a template.
ANSWER_NAMES = frozenset(["answer", "completion", "label", "output", "response"])
#: Languages of blocks that may be Python, and that may be a template.
_PYTHON = frozenset(["", "python", "py", "python3", "pycon"])
_PLAIN = frozenset(["", "text", "txt", "jinja", "jinja2", "plaintext", "markdown"])
#: A line of code, where a template is expected.
_CODE = re.compile(r"^[ \t]*(?:import \w|from [\w.]+ import |[\w.]+ = [^\s{<])", re.MULTILINE)
#: What stands for the body in a prompt template of a card.
_PLACE = re.compile(
    r"\{\{\s*[\w.]+\s*\}\}|\{[\w ]*\}|<(?:your |user )?(?:text|input|prompt|question|instruction)>", re.I
)
#: What the Hub's template has where nothing was filled in.
_EMPTY = "[More Information Needed]"
#: Sentences that Trainer, TRL and Unsloth write into every card: they say how an adapter was trained, not for what.
_OF_TRAINERS = re.compile(
    r"This model (?:is a fine-tuned version of \S+|was trained from scratch)(?: on (?:an|the) .*datasets?)?\."
    r"|It has been trained using TRL\."
    r"|This model was trained with [A-Z][\w-]*(?: [A-Z]+)?(?:, a method introduced in .*)?\."
    r"|This .*model was trained 2x faster with .*"
)
#: The question that TRL's cards ask, whatever the adapter is for.
_OF_TRL = "If you had a time machine, but could only go to the past or the future"
#: The line that begins a block, with its marks and its language.
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)")


@dataclass(frozen=True)
class Card:
    """What was found: prompts as they are used, what stands before and behind one, and what the adapter does."""

    prompts: tuple[Row, ...] = ()
    #: Before and behind the body, of every template that is shown.
    frames: tuple[tuple[str, str], ...] = ()
    description: str = ""
    #: Whether its first block, where widget examples are, could not be read.
    unread: bool = field(default=False, compare=False)
    #: Blocks and strings that should hold a prompt or a template, and could not be read as one.
    left_out: int = field(default=0, compare=False)

    def __bool__(self) -> bool:
        return bool(self.prompts or self.frames or self.description)


def card_texts(folder: Path) -> tuple[str, str]:
    """The card in an adapter's directory, and the training settings beside it; "" for what is not there."""
    settings = [_beginning(folder / name) for name in SETTINGS]
    return _beginning(folder / FILE), "\n\n".join(text for text in settings if text)


def _beginning(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return opened.read(MOST_BYTES).decode("utf-8", "replace")


def parsed_card(text: str, settings: str = "") -> Card:
    """A card's prompts: widget examples, strings of usage snippets, and templates with a place for the text.

    Args:
        text: of the card.
        settings: of training, as text. Those that name a known template (``template: alpaca``, ``type: alpaca``), here
            or in the card, count as showing it; nothing else is read of them.
    """
    head, body = _split(text.replace("\r\n", "\n"))
    blocks, prose = _blocks(_without_comments(body))
    prompts = list(_widgets(head or {}))
    frames: list[tuple[str, str]] = []
    left_out = 0
    for name in _named_templates(f"{text}\n\n{settings}"):
        frames += [(shape.before, shape.after) for shape in templated_shape(name, known_templates()[name])]
    for language, block in blocks:
        for found in _of_block(language, block):
            if found is None:
                left_out += 1
            elif isinstance(found, Row):
                prompts.append(found)
            else:
                frames.append(found)
    usable = [row for row in prompts if _written(row) and _is_usable(row.prompt or _said(row))]
    framed = [frame for frame in frames if _is_text("".join(frame))]
    kept, shapes = tuple(dict.fromkeys(usable))[:MOST_PROMPTS], tuple(dict.fromkeys(framed))
    description = "" if _is_ours(head or {}) else _description(prose)
    return Card(kept, shapes, description, unread=head is None, left_out=left_out)


def _named_templates(text: str) -> list[str]:
    """Known templates of instruction rows that training settings in a card name."""
    key = r"[\"']?(?:template|type|chat_template|prompt_template)[\"']?"
    found = re.findall(rf"(?:^|[{{,])[ \t]*(?:-[ \t]*)?{key}\s*:\s*[\"']?(\w+)", text, re.MULTILINE)
    return [name for name in dict.fromkeys(found) if name in known_templates()]


def _split(text: str) -> tuple[dict[str, Any] | None, str]:
    """The YAML block at the beginning, None where it cannot be read, and the rest."""
    match = re.match(r"---\n(.*?)\n---\s*\n", text, re.DOTALL)
    if match is None:
        return {}, text
    try:
        head = parse_yaml(match.group(1))
    except ValueError:  # someone else's text, which need be no YAML
        return None, text[match.end() :]
    return head if isinstance(head, dict) else {}, text[match.end() :]


def _without_comments(text: str) -> str:
    """The text without HTML's comments."""
    kept, at = [], 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start)) >= 0:
        kept.append(text[at:start])
        at = end + len("-->")
    return "".join([*kept, text[at:]])


def _blocks(text: str) -> tuple[list[tuple[str, str]], str]:
    """Fenced blocks, each with its language in small letters and without common indentation, and the rest of the text.

    As in CommonMark, one that is not closed goes on to the end.
    """
    blocks: list[tuple[str, list[str]]] = []
    prose: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        if fence:
            closes = line.strip()
            if len(closes) >= len(fence) and closes == fence[0] * len(closes):
                fence = ""
            else:
                blocks[-1][1].append(line)
        elif (match := _FENCE.match(line)) is not None:
            fence = match.group(1)
            blocks.append((match.group(2).lower(), []))
        else:
            prose.append(line)
    return [(language, dedent("".join(lines))) for language, lines in blocks], "".join(prose)


def _widgets(head: dict[str, Any]) -> Iterator[Row]:
    widgets = head.get("widget")
    for one in widgets if isinstance(widgets, list) else []:
        if isinstance(one, dict) and isinstance(one.get("text"), str):
            yield Row("completion", prompt=one["text"])
        elif isinstance(one, dict) and isinstance(one.get("messages"), list):
            row = _conversation(one["messages"])
            if row is not None:
                yield row


def _conversation(turns: list[Any]) -> Row | None:
    """A conversation up to its last user's turn."""
    known = [turn for turn in turns if isinstance(turn, dict)]
    said = [(turn.get("role"), turn.get("content")) for turn in known]
    messages = [Message(role, text) for role, text in said if isinstance(role, str) and isinstance(text, str)]
    while messages and messages[-1].role != "user":
        messages.pop()
    return Row("messages", messages=tuple(messages)) if messages else None


def _said(row: Row) -> str:
    return row.messages[-1].content if row.messages else ""


def _written(row: Row) -> bool:
    return _is_text(row.prompt) and all(_is_text(turn.role) and _is_text(turn.content) for turn in row.messages)


def _is_usable(prompt: str) -> bool:
    return bool(prompt.strip()) and len(prompt) <= LONGEST and not prompt.startswith(_OF_TRL)


def _is_text(text: str) -> bool:
    """Whether it can be stored and tokenized: an escape in a snippet may be half of a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


#: What a snippet holds: a prompt; what stands before and behind one; None for what cannot be read as either.
_Found = Row | tuple[str, str] | None


def _of_block(language: str, text: str) -> Iterator[_Found]:
    """Prompts and templates in a block of code, or of text with places for input."""
    tree = _tree(text) if language in _PYTHON else None
    if tree is not None and (language or _does_something(tree)):
        yield from _of_code(tree)
    elif language in _PLAIN and not _CODE.search(text):
        yield from _frames(text.strip("\n"))
    elif language in _PYTHON | _PLAIN:
        yield None


def _tree(text: str) -> ast.AST | None:
    """A snippet in Python, without what only a session or a notebook understands; None if it is none."""
    lines = text.splitlines(keepends=True)
    if any(line.startswith(">>>") for line in lines):
        lines = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
    for code in ("".join(lines), "".join(line for line in lines if not line.lstrip().startswith(("!", "%")))):
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _does_something(tree: ast.AST) -> bool:
    """Whether it is code or data, and not text that happens to parse, such as one word or ``{instruction}``."""
    return any(
        isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Call)
        or (isinstance(node, ast.Dict) and bool(node.keys))
        for node in ast.walk(tree)
    )


def _frames(text: str) -> Iterator[_Found]:
    """What stands before and behind each place for input, up to the answer's own; the other places are left empty."""
    places = list(_PLACE.finditer(text))
    if not places:
        return
    if len(text) > LONGEST or len(places) > MOST_PLACES or "{%" in text:
        yield None
        return
    for place in places[1:]:
        name = _name(place)
        if name in ANSWER_NAMES or (not _is_prompt(name) and not text[place.end() :].strip()):
            text = text[: place.start()].rstrip(" ")
            break
    inputs = [place for place in places if place.end() <= len(text) and not re.search("system|token", _name(place))]
    frames = [(_PLACE.sub("", text[: place.start()]), _PLACE.sub("", text[place.end() :])) for place in inputs]
    found: list[_Found] = [frame for frame in frames if "".join(frame).strip()]
    yield from found or [None]


def _is_prompt(name: str) -> bool:
    """Whether a prompt goes by this name, in code or in a template."""
    return name in PROMPT_NAMES or (name.endswith("prompt") and "system" not in name)


def _name(place: re.Match[str]) -> str:
    """What goes to a place, in a word."""
    words: list[str] = re.findall(r"\w+", place.group().lower())
    return words[-1] if words else ""


def _of_code(tree: ast.AST) -> Iterator[_Found]:
    """Strings that a snippet gives to the model; the snippet is parsed and not run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            named = {target.id.lower() for target in node.targets if isinstance(target, ast.Name)}
            if any(map(_is_prompt, named)):
                yield from _prompts(node.value)
            elif any(name.endswith("template") for name in named):  # a string without a place is the name of one
                yield from (found for found in _prompts(node.value) if not isinstance(found, Row))
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name.lower() in CALLS:
                yield from _prompts(node.args[0])
        elif isinstance(node, ast.List) and node.elts and all(isinstance(one, ast.Dict) for one in node.elts):
            row = _conversation([_plain(one) for one in node.elts])
            if row is not None:
                yield row


def _prompts(value: ast.expr) -> Iterator[_Found]:
    match value:
        case ast.Constant(value=str()) | ast.JoinedStr() | ast.BinOp(op=ast.Add()):
            text = "".join(map(_text_or_place, _parts(value)))
            yield from list(_frames(text)) or [Row("completion", prompt=text)]
        case ast.BinOp(op=ast.Mod()):
            yield None
        case ast.Call(func=ast.Attribute(value=ast.Constant() as template, attr="format")):
            yield from _prompts(template)
        case ast.List(elts=items):
            for item in items:
                if isinstance(item, ast.Constant):
                    yield from _prompts(item)


def _parts(value: ast.expr) -> list[ast.expr]:
    """What a string is put together of."""
    parts: list[ast.expr] = []
    while isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        parts.append(value.right)
        value = value.left
    parts.append(value)
    return [one for part in reversed(parts) for one in (part.values if isinstance(part, ast.JoinedStr) else [part])]


def _text_or_place(part: ast.expr) -> str:
    """A part of a string that is put together: as it is, or as a place by the name of what goes there."""
    match part:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) | ast.FormattedValue(value=ast.Name(id=name)):
            return f"{{{name}}}"
    return "{}"


def _plain(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_ours(head: dict[str, Any]) -> bool:
    """Whether a migration wrote the card: its sentences are about the migration."""
    tags = head.get("tags")
    return isinstance(tags, list) and "adapter-migration" in tags


def _description(body: str) -> str:
    """The first sentences of prose that somebody wrote, without headings, lists, links' addresses and HTML."""
    for part in re.split(r"\n\s*\n", body):
        lines = [line for line in part.splitlines() if not re.match(r"\s*(#|[-*|>]|\d+\.|<|!\[|\[[!<])", line)]
        sentences = re.split(r"(?<=[.!?])\s", _plain_text(" ".join(lines)))
        said = [sentence for sentence in sentences if not _is_boilerplate(sentence)]
        if len(" ".join(said).split()) >= 4:
            return " ".join(said[:2])[:300]
    return ""


def _is_boilerplate(sentence: str) -> bool:
    """Whether it says nothing of the task: a tool wrote it, or it begins a list, which is not read."""
    if sentence.endswith(":") or _EMPTY in sentence or _OF_TRAINERS.fullmatch(sentence) is not None:
        return True
    return sentence in _hub_template()


@cache
def _hub_template() -> str:
    """The text of the card that the Hub's library writes, as PEFT does beside every adapter."""
    from huggingface_hub import ModelCard

    return _plain_text(ModelCard.default_template_path.read_text(encoding="utf-8"))


def _plain_text(text: str) -> str:
    """On one line, with links' words alone."""
    return re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", " ".join(text.split()))
