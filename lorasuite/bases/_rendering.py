"""Run as a script, in a process that its limits end: renders a template with values, and says what came of it.

Standard input is lines of JSON: the template's text, then the values of each rendering. Standard output is a line of
JSON for each rendering that ended, a list of two: ``text`` and what the template wrote, ``refused`` and with what
error, or ``beyond`` and what of it was too large. It imports Jinja and nothing of lorasuite: it starts in a tenth of a
second.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """The block ``generation``, with which chat templates mark what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands in it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> str:
    """What templates refuse a conversation with."""
    raise TemplateError(message)


def tojson(value: Any, **options: Any) -> str:
    """As transformers has it: nothing escaped for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def row_environment() -> ImmutableSandboxedEnvironment:
    """What templates of instruction rows are rendered in: undefined names are errors."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)


def chat_environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in, near enough to do the same work."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": refuse, "strftime_now": datetime.now().strftime}
    return found


#: By what is rendered: in what, and whether the text is told or only that there is one.
KINDS: dict[str, tuple[Callable[[], ImmutableSandboxedEnvironment], bool]] = {
    "rows": (row_environment, True),
    "chat": (chat_environment, False),
}


def main(kind: str, seconds: float, every: int, memory: int, characters: int) -> None:
    """Render what standard input says.

    Args:
        kind: one of :data:`KINDS`.
        seconds: of a processor, for each rendering.
        every: the same for all together.
        memory: bytes of it.
        characters: that a rendering may have.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (every, every + 1))
    environment, told = KINDS[kind]
    lines = map(json.loads, sys.stdin)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal, which then ends the process
    template, failed = _tried(environment().from_string, next(lines))
    for values in lines:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        text, wrong = (None, failed) if template is None else _tried(template.render, values)
        if text is not None and len(text) > characters:
            wrong = ("beyond", f"more than {characters:,} characters")
        print(json.dumps(wrong or ("text", text if told else "")), flush=True)


def _tried(action: Callable[[Any], Any], given: Any) -> tuple[Any, tuple[str, str] | None]:
    """What is made of something, or why nothing."""
    try:
        return action(given), None
    except MemoryError:
        return None, ("beyond", "more memory than it may take")
    except Exception as error:  # code of its author, which raises what it likes
        return None, ("refused", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:6]))
