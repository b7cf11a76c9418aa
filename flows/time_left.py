"""How long a whole run will still take: its estimate, held against what its stages have taken so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping


class TimeLeft:
    """Told of the stages of a run and of their steps, as :data:`tasks.progress.Watcher`.

    Stages that were computed take some multiple of what was estimated, and those to come are taken to take the same. A
    stage that was found in the store took nothing: it says nothing of that multiple.

    Args:
        seconds: estimated, by the name of each stage.
        clock: in seconds.
    """

    #: Share of its estimate below which a stage was found, and not computed.
    FOUND = 0.02

    def __init__(self, seconds: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = dict(seconds)
        self._clock = clock
        self._stage, self._begun, self._share = "", clock(), 0.0
        self._spent = defaultdict[str, float](float)

    def told(self, what: str, done: int, total: int) -> None:
        """A stage begins (``total`` 0; its name, with a label in brackets or without), or a step of it is done."""
        if total:
            self._share = done / total
            return
        now = self._clock()
        self._spent[self._stage] += now - self._begun
        self._stage, self._begun, self._share = what.partition(" (")[0], now, 0.0

    def left(self) -> float | None:
        """Seconds; None where nothing was estimated."""
        if not self.seconds:
            return None
        elapsed = self._clock() - self._begun
        behind = {name: spent for name, spent in self._spent.items() if name in self.seconds and name != self._stage}
        computed = [name for name, spent in behind.items() if spent > self.FOUND * self.seconds[name]]
        estimated = sum(self.seconds[name] for name in computed)
        times = sum(behind[name] for name in computed) / estimated if estimated > 0 else 1.0
        to_come = sum(seconds for name, seconds in self.seconds.items() if name not in behind and name != self._stage)
        here = self.seconds.get(self._stage, 0.0) * times - self._spent[self._stage] - elapsed
        if self._share > 0:
            here = max(here, elapsed * (1 - self._share) / self._share)
        return times * to_come + max(here, 0.0)
