"""Where prompts come from when the user has none of the task: one interface, and the sources by name.

Each source is one module (``_from_*.py``). A source drafts prompts and says how much the adapter changes the answer to
each; which drafts are used is decided over all sources together (:mod:`lorasuite.teacher._discovery`).
"""

from __future__ import annotations

from typing import Protocol

from lorasuite.errors import ConfigError, Problem, did_you_mean
from lorasuite.teacher._from_adapter import AdapterAlone
from lorasuite.teacher._from_card import AdapterCard
from lorasuite.teacher._from_description import Description
from lorasuite.teacher._from_examples import Examples
from lorasuite.teacher._given import Given
from lorasuite.teacher._probe import Probe, Pull


class PromptSource(Protocol):
    """A way to come by prompts of an adapter's task.

    Attributes:
        name: as settings and records call it.
        needs: what must be given for it, in words; "" where nothing need be.
        control: a control of a benchmark: its drafts are drawn at random, and not chosen by the adapter's signal.
    """

    name: str
    needs: str
    control: bool

    def can(self, given: Given) -> bool:
        """Whether what it needs is given."""
        ...

    def drafts(self, probe: Probe, given: Given, count: int) -> list[Pull]:
        """About ``count`` drafts of prompts with the adapter's signal on each; none where it finds none.

        Texts that are given are other people's: they are shown to the model and nothing else is done with them.
        """
        ...


#: In the order in which they are preferred where the settings name none.
_REGISTRY: dict[str, PromptSource] = {
    source.name: source for source in (Examples(), Description(), AdapterCard(), AdapterAlone())
}


def register_source(source: PromptSource) -> None:
    """Make a source available by its name. Harmless if done before.

    Raises:
        ConfigError: if another source has its name.
    """
    known = _REGISTRY.setdefault(source.name, source)
    if type(known) is not type(source):
        what = f"is called {source.name!r}, as {type(known).__module__}.{type(known).__qualname__} is"
        raise ConfigError(Problem(type(source).__qualname__, what, "Give it another name."))


def prompt_source(name: str) -> PromptSource:
    """The source of that name.

    Raises:
        ConfigError: for an unknown one.
    """
    if name not in _REGISTRY:
        what = f"unknown source of prompts {name!r}"
        raise ConfigError(Problem("prompt_sources", what, did_you_mean(name, source_names())))
    return _REGISTRY[name]


def source_names(controls: bool = False) -> list[str]:
    """The sources' names; the controls' only if asked for."""
    return [name for name, source in _REGISTRY.items() if controls or not source.control]
