"""Run as a script, in a process that its limits end: renders a template with values, and says how far it came.

Standard input is lines of JSON: the template's text, then the values of each rendering. Standard output is a line for
each rendering that ended: ``ok``, also where the template refused the values, or what of it was too large; then
``done``. It imports Jinja and nothing of lorasuite: it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
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


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in, near enough to do the same work."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": refuse, "strftime_now": datetime.now().strftime}
    return found


def main(seconds: float, every: int, memory: int, characters: int) -> None:
    """Render what standard input says.

    Args:
        seconds: of a processor, for each rendering.
        every: the same for all together.
        memory: bytes of it.
        characters: that a rendering may have.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (every, every + 1))
    render: Callable[[dict[str, Any]], str] | None = None
    for line in sys.stdin:
        given = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal, which then ends the process
        try:
            if render is None:
                render = environment().from_string(given).render
                continue
            told = "ok" if len(render(given)) <= characters else f"more than {characters:,} characters"
        except MemoryError:
            told = "more memory than it may take"
        except Exception:  # what it refuses is found again where it is used
            if render is None:
                break
            told = "ok"
        print(told, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:5]))
