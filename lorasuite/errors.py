"""Errors of the library. Each derives from :class:`LoRASuiteError` and from the builtin a caller would expect.

An error that comes from checking input carries *every* problem found, each with where it is, what is wrong and what
to do about it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import shutil
import tempfile
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


#: What an address shows who may use it with: user and password, or the like in what is asked of it.
#: In a data set's address, ``hf://name@revision``, there is none.
_SECRET = re.compile(
    r"(?<=://)(?<!hf://)[^/\s?#]*@|(?i:(?<=[?&])[\w-]*(?:password|secret|token|signature|credential|key)=)[^&#\s]+"
)
#: Characters of one line of a message.
LINE = 2000


def told(text: str) -> str:
    """A text as messages have it: no password of an address, no line longer than :data:`LINE`, bytes that are no text
    (of a file's name) as ``\\udc80``.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    lines = _SECRET.sub(lambda found: "***@" if found[0].endswith("@") else "***", text).split("\n")
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


class EngineError(LoRASuiteError, RuntimeError):
    """An engine that is to write answers does not start."""


class MachineError(LoRASuiteError, OSError):
    """What the machine or its network refused: room on a disk, a permission, memory, a connection."""


class PushError(LoRASuiteError, OSError):
    """The Hub did not take a finished migration; it is whole where it was published."""


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """``"did you mean 'x'?"`` or the list of choices, for use in a remedy."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Choose one of: " + ", ".join(sorted(choices)) + "."


_KEPT = "then run the same command again: stages that were computed are kept."
#: Number of an error of the operating system → what is wrong, and what to do.
_REFUSED: dict[int, tuple[str, str]] = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        ("the disk is full", f"Free room there, or set LORASUITE_HOME and the output to another disk; {_KEPT}"),
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        ("permission is missing", f"Give this user the right to it, or name another place; {_KEPT}"),
    ),
    errno.EROFS: ("the disk is read-only", f"Make it writable, or set LORASUITE_HOME or the output elsewhere; {_KEPT}"),
    errno.EIO: ("the disk failed", f"Look at the system's log; {_KEPT}"),
    errno.ESTALE: ("the network disk is gone", f"Mount it again; {_KEPT}"),
    errno.ENOTDIR: ("a file is where a directory should be", "Name another place."),
    errno.EISDIR: ("a directory is where a file should be", "Name another place."),
    errno.ELOOP: ("its links lead in a circle", "Name another place."),
    errno.ENAMETOOLONG: ("the name is too long for this disk", "Give a shorter one."),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), ("too many files are open", f"Raise the limit (`ulimit -n 4096`); {_KEPT}")
    ),
    errno.ENOMEM: ("memory ran out", ""),
}
#: Bytes free on a disk below which it is taken for full.
_ROOM = 2**20
_MEMORY = f"Free memory, take a smaller batch size, or load in half precision or fewer bits; {_KEPT}"
_NETWORK = f"Look at the connection and the address, and at a proxy in between; {_KEPT}"
#: How libraries that are not written in Python tell an error of the operating system, and memory that ran out.
_NUMBERED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_ALLOCATION = re.compile(r"can't allocate memory|out of memory|Unable to allocate|bad_alloc")
_UNWRITTEN = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos")
#: Kinds of errors that say that somebody at the other end of a network did not answer, in Python and its HTTP clients.
_CONNECTION = {
    *("ConnectionError", "TransportError", "gaierror", "herror", "ProxyError", "SSLError", "IncompleteRead"),
    *("EndpointConnectionError", "ConnectTimeout", "ReadTimeout", "ClientConnectionError", "LocalEntryNotFoundError"),
}


def foreseen(error: BaseException) -> LoRASuiteError | None:
    """What the machine refused, where that is what an error, or one that it came from, says."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        problem = _refused(found)
        if problem is not None:
            return MachineError(problem)
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


def _refused(error: BaseException) -> Problem | None:
    text = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := _NUMBERED.search(text)):
        number = int(match[1] or match[2])
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds or number == errno.ENOMEM:
        return Problem("memory", f"it ran out ({text or type(error).__name__})", _MEMORY)
    if isinstance(error, RuntimeError) and _ALLOCATION.search(text):
        return Problem("memory", f"it ran out ({text})", _MEMORY)
    if number in _REFUSED and isinstance(number, int):
        what, remedy = _REFUSED[number]
        place = (
            " -> ".join(str(name) for name in _places(error))
            or ", ".join(_full() if number == errno.ENOSPC else [])
            or "a file"
        )
        return Problem(place, f"{what} ({os.strerror(number)})", remedy)
    if isinstance(error, RuntimeError) and _UNWRITTEN.search(text):
        return Problem(
            "a checkpoint", f"it could not be written: the disk may be full ({text})", _REFUSED[errno.ENOSPC][1]
        )
    if kinds & _CONNECTION and not isinstance(error, BrokenPipeError):
        return Problem("network", f"no answer ({type(error).__name__}: {text})", _NETWORK)
    return None


def _places(error: BaseException) -> Sequence[object]:
    """The file or files that an error of the operating system names."""
    names = (getattr(error, "filename", None), getattr(error, "filename2", None))
    return [os.fsdecode(name) if isinstance(name, bytes) else name for name in names if name is not None]


def _full() -> list[str]:
    """Of the directories that are written to, those on a disk without room: where an error names no file."""
    written = (os.environ.get("LORASUITE_HOME") or "~/.cache/lorasuite", tempfile.gettempdir(), ".")
    found = []
    for path in map(os.path.expanduser, written):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(path).free < _ROOM:
                found.append(path)
    return found
