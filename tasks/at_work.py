"""What the stages of this process have done and are doing, for what is said when it is interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

#: Name of the stage that was asked for last, and whether its function is running.
_last = ""
_computing = False
#: Stages whose artifact is in the store: name to whether it was computed now.
_done: dict[str, bool] = {}


def asked(name: str) -> None:
    """A stage begins: it is looked for, waited for or computed."""
    global _last
    _last = name


def done(name: str, computed: bool) -> None:
    """Its artifact is in the store."""
    global _last
    _done[name] = computed or _done.get(name, False)
    _last = ""


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Inside the block the function of a stage runs."""
    global _computing
    _computing = True
    try:
        yield
    finally:
        _computing = False


def is_computing() -> bool:
    """Whether the function of a stage runs now."""
    return _computing


def current() -> str:
    """The stage that is not done yet; empty between stages."""
    return _last


def kept() -> tuple[int, int]:
    """How many stages of this process are in the store, and how many of those it computed."""
    return len(_done), sum(_done.values())
