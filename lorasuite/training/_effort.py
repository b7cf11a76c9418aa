"""How much a search for a start and a learning rate tries, and what it reports. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

#: Rows whose search costs most. Where there are more, runs are compared on as many as these leave beside a held-out
#: fifth, spread over all: a rate shows on them as well, and more passes are better spent on the final run.
MOST_COMPARED = 400
#: What a search may cost.
Effort = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True)
class Extent:
    """How much a search tries."""

    #: Optimizer steps of the search and the final run, in those of a final run over :data:`MOST_COMPARED` rows at most.
    budget: float
    #: Learning rates of starts near the task and far from it, likely ones first, in units of
    #: ``finetune.learning_rate``.
    near: tuple[float, ...]
    far: tuple[float, ...]
    #: Fifths of the rows that are held out in turn.
    folds: int = 1


#: Of ``quick``, one fine-tune, there is none.
EXTENTS: dict[Effort, Extent] = {
    "normal": Extent(2.5, near=(1, 0.3, 0.1), far=(3, 10, 1)),
    "thorough": Extent(8, near=(1, 0.3, 3, 0.1), far=(3, 10, 1, 30), folds=3),
}


class SearchedArm(BaseModel):
    """A start at a learning rate, and its held-out loss where it was paused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: str
    learning_rate: float
    losses: dict[int, float | None] = Field(
        description="optimizer step → held-out loss, nats per label token; of a search with several folds the start's "
        "own on the first, and the mean change since; None: diverged"
    )

    @property
    def best(self) -> float | None:
        """The least loss, None where every one diverged."""
        return min((loss for loss in self.losses.values() if loss is not None), default=None)


class Search(BaseModel):
    """What a search found, and what it cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: str
    learning_rate: float
    epochs: int | None = Field(description="after how many the final run ends; None: all")
    steps: int = Field(description="optimizer steps of the runs that were compared")
    schedule: int = Field(description="optimizer steps of a whole one of them")
    cost: float = Field(description="optimizer steps of these and the final run, in those of a whole final run")
    held_out: int = Field(description="rows compared by")
    arms: list[SearchedArm] = Field(description="the winner first, then who went furthest")
