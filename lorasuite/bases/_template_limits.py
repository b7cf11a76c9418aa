"""Jinja templates, which are code of a model's author, rendered within limits before they are rendered at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

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


def beyond_limits(template: str, renderings: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The first of some renderings that a template takes too long for, or that is too large; None where there is none.

    They are tried in a process of their own, as nothing else ends a template in the middle of one long operation. What
    a template refuses is not looked at.

    Args:
        template: its text.
        renderings: the names that each gives it.

    Returns:
        its index, and what is wrong.
    """
    given = "".join(json.dumps(value, default=str) + "\n" for value in (template, *renderings))
    return _tried(given, len(renderings))


@lru_cache(maxsize=16)
def _tried(given: str, count: int) -> tuple[int, str] | None:
    every = math.ceil(SECONDS + 1 + EACH * count)
    limits = [str(limit) for limit in (SECONDS, every, MEMORY, CHARACTERS)]
    try:
        said = subprocess.run(
            [sys.executable, "-I", str(_SCRIPT), *limits],
            input=given.encode("utf-8", "surrogatepass"),
            capture_output=True,
            timeout=2 * every,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
    lines = said.decode().splitlines()
    wrong = next(((number, line) for number, line in enumerate(lines) if line not in ("ok", "done")), None)
    if wrong is not None:
        return wrong[0], f"writes {wrong[1]}" if wrong[1].startswith("more than") else f"takes {_MEMORY}"
    if lines[-1:] != ["done"]:
        return min(len(lines), max(count - 1, 0)), f"takes more than {SECONDS} seconds, or {_MEMORY}"
    return None


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
