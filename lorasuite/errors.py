"""Errors of the library. Each derives from :class:`LoRASuiteError` and from the builtin a caller would expect.

An error that comes from checking input carries *every* problem found, each with where it is, what is wrong and what
to do about it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

#: Kinds of problems printed in a message before the rest is only counted.
SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input: ``where`` (file, field or tensor), ``what`` is wrong, the ``remedy``."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """The three fields by name, as JSON-able values."""
        return asdict(self)

    def shown(self) -> Problem:
        """The same without passwords of addresses, and with lines of bounded length."""
        return Problem(*(told(text) for text in (self.where, self.what, self.remedy)))


#: User and password in an address.
_SECRET = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*@")
#: Characters of one line of a message.
LINE = 2000


def told(text: str) -> str:
    """A text as messages have it: no password of an address, no line longer than :data:`LINE`."""
    lines = _SECRET.sub("***@", text).split("\n")
    return "\n".join(line if len(line) <= LINE else f"{line[: LINE - 1]}…" for line in lines)


#: What sets problems of one kind apart: the path of a module, or a number.
_PARTICULAR = re.compile(r"\b\w+(?:\.\w+){2,}\b|\d+")


def grouped(problems: Iterable[Problem]) -> list[Problem]:
    """One problem a kind, in the order of their first ones: with a count of the others, and two of them as examples.

    Of one kind are problems with one remedy whose places and words differ in numbers and module paths only.
    """
    kinds: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        key = (_PARTICULAR.sub("#", problem.where), _PARTICULAR.sub("#", problem.what), problem.remedy)
        kinds.setdefault(key, []).append(problem)
    return [_counted(members) for members in kinds.values()]


def examples(names: Sequence[str]) -> str:
    """``"a, b, c and 9 more"``: names, three of them where there are more than four."""
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def _counted(members: Sequence[Problem]) -> Problem:
    first, *others = members
    if not others:
        return first
    examples = []
    for other in others[:2]:
        place = other.where.rpartition(", ")[2] if other.where != first.where else other.what
        particular = _PARTICULAR.search(place)
        examples.append(particular.group() if other.where == first.where and particular else place)
    more = f"and {len(others)} more of this kind: {', '.join(examples)}" + (", ..." if len(others) > 2 else "")
    return Problem(first.where, f"{first.what} ({more})", first.remedy)


class LoRASuiteError(Exception):
    """Base class of every error lorasuite raises on purpose.

    Accepts a sentence or the list of problems found; ``problems`` is always a list.
    """

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            self.problems: list[Problem] = []
            super().__init__(told(problems))
            return
        given = [problems] if isinstance(problems, Problem) else list(problems)
        self.problems = [problem.shown() for problem in given]
        kinds = grouped(self.problems)
        lines = [str(problem) for problem in kinds[:SHOWN]]
        if len(kinds) > SHOWN:
            lines.append(f"... and {len(kinds) - SHOWN} more")
        head = "" if len(lines) == 1 else f"{len(self.problems)} problems found:\n  - "
        super().__init__(head + "\n  - ".join(lines))

    def __str__(self) -> str:  # a KeyError would print its argument's repr
        return str(self.args[0]) if self.args else ""


class ConfigError(LoRASuiteError, ValueError):
    """A setting that cannot be used."""


class ArchitectureError(LoRASuiteError, ValueError):
    """A model whose layout is unknown, or does not match its architecture file."""


class CheckpointError(LoRASuiteError, OSError):
    """A base model that cannot be read: missing files, shards or tensors."""


class AdapterError(LoRASuiteError, ValueError):
    """An adapter that cannot be read or does not fit its base model."""


class DataError(LoRASuiteError, ValueError):
    """Rows or texts that cannot be used."""


class InputChanged(LoRASuiteError, RuntimeError):
    """A model, adapter or directory of data that changed while it was read."""


class OutputError(LoRASuiteError, FileExistsError):
    """An output directory that cannot be written."""


class PreflightError(LoRASuiteError, ValueError):
    """Everything found wrong before any heavy work began."""


class NumericalError(LoRASuiteError, ArithmeticError):
    """A computation that gave NaN, Inf or an empty result."""


class PushError(LoRASuiteError, OSError):
    """The Hub did not take a finished migration; it is whole where it was published."""


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """``"did you mean 'x'?"`` or the list of choices, for use in a remedy."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Choose one of: " + ", ".join(sorted(choices)) + "."
