"""Jinja templates, which are code of a model's author, rendered within limits before they are rendered at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorasuite.errors import CheckpointError, Problem

_SCRIPT = Path(__file__).with_name("_rendering.py")
#: Seconds of a processor that one text may take.
SECONDS = 3
#: The same for each text of many, on the average: a thousand times what templates of known models take.
EACH = 0.02
#: Bytes of memory.
MEMORY = 2**30
#: Characters of a rendered text.
CHARACTERS = 10_000_000


#: Renderings that one process is given: starting it takes as long as some thousands of them.
AT_ONCE = 10_000


class Rendering(NamedTuple):
    """What a template made of the values it was given: ``text``, or what it ``refused`` or was ``beyond`` limits in."""

    kind: Literal["text", "refused", "beyond"]
    said: str


def rendered(
    template: str, renderings: Iterable[Mapping[str, Any]], here: Callable[[Mapping[str, Any]], Rendering]
) -> Iterator[Rendering]:
    """What a template of instruction rows makes of values, within limits: up to the first that is beyond them.

    It is rendered in a process of its own, as nothing else ends a template in the middle of one long operation.

    Args:
        template: its text.
        renderings: the names that each gives it.
        here: renders it in this process, which is faster, and is done with values that were within limits before.
    """
    for some, given in _portions(template, renderings):
        if (digest := hashlib.sha256(given).digest()) in _WITHIN["rows"]:
            yield from map(here, some)
            continue
        told = list(_run("rows", given, len(some)))
        last = next((number for number, one in enumerate(told) if one.kind == "beyond"), None)
        if last is not None:
            yield from told[: last + 1]
            return
        _WITHIN["rows"].add(digest)
        yield from told


def beyond_limits(template: str, renderings: Iterable[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The first of some renderings that a chat template takes too long for, or that is too large; None without one.

    They are tried as :func:`rendered` does. What a template refuses is not looked at, and what it writes not kept:
    transformers renders it.

    Args:
        template: its text.
        renderings: the names that each gives it.

    Returns:
        its index, and what is wrong.
    """
    before = 0
    for some, given in _portions(template, renderings):
        if (digest := hashlib.sha256(given).digest()) not in _WITHIN["chat"]:
            for number, one in enumerate(_run("chat", given, len(some)), start=before):
                if one.kind == "beyond":
                    return number, one.said
            _WITHIN["chat"].add(digest)
        before += len(some)
    return None


#: Digests of what was found within limits: tokenizers are loaded, and data is checked, several times in a process.
_WITHIN: dict[str, set[bytes]] = {"rows": set(), "chat": set()}


def _portions(
    template: str, renderings: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[list[Mapping[str, Any]], bytes]]:
    """Renderings as one process takes them, and what it is given."""
    encoded, rest = json.JSONEncoder(default=str).encode, iter(renderings)
    while some := list(islice(rest, AT_ONCE)):
        yield some, "".join(f"{encoded(value)}\n" for value in (template, *some)).encode()


def _run(kind: Literal["rows", "chat"], given: bytes, count: int) -> Iterator[Rendering]:
    """What the script says of each rendering; where its limits end it, one that is beyond them is the last."""
    every = math.ceil(SECONDS + 1 + EACH * count)
    limits = [str(limit) for limit in (SECONDS, every, MEMORY, CHARACTERS)]
    told = 0
    # files and no pipes: communicate() writes 512 bytes at a time, and wakes for every line that is read
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as said:
        source.write(given)
        source.seek(0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, "-I", str(_SCRIPT), kind, *limits],
                stdin=source,
                stdout=said,
                stderr=subprocess.DEVNULL,
                timeout=2 * every,
                check=False,
            )
        said.seek(0)
        for line in said:
            if not line.endswith(b"\n"):
                break
            what, text = json.loads(line)
            if what == "beyond":
                text = f"writes {text}" if text.endswith("characters") else f"takes {_MEMORY}"
            told += 1
            yield Rendering(what, text)
    if told < count:
        yield Rendering("beyond", f"takes more than {SECONDS} seconds, or {_MEMORY}")


_MEMORY = f"more than {MEMORY // 2**30} GiB of memory"


def template_texts(tokenizer: Any) -> list[str]:
    """The chat templates of a tokenizer: none, one, or several by name."""
    found = getattr(tokenizer, "chat_template", None)
    values = found.values() if isinstance(found, Mapping) else [found]
    return [value for value in values if isinstance(value, str)]


def check_chat_template(tokenizer: Any, where: str) -> None:
    """See that a tokenizer's chat templates end.

    Raises:
        CheckpointError: if one takes too long, or writes too much, for a conversation of two words.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    tried = [chat_values(tokenizer, [question], True), chat_values(tokenizer, [question, answer], False)]
    for text in template_texts(tokenizer):
        if found := beyond_limits(text, tried):
            what = f"its chat template {found[1]} for a conversation of two words"
            raise CheckpointError(Problem(where, what, "Mend the template, or take another copy of the model."))


def chat_values(tokenizer: Any, messages: Sequence[Mapping[str, Any]], answering: bool, **given: Any) -> dict[str, Any]:
    """The names that transformers gives a chat template."""
    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    special = {name: str(token) for name, token in (getattr(tokenizer, "special_tokens_map", None) or {}).items()}
    given = {"tools": None, "documents": None, **special, **given}
    return {**given, "messages": turns, "add_generation_prompt": answering}
