"""What a migration published: a moved adapter, a moved and fine-tuned one, or a new LoRA; and how that is said."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.evaluation import Arm

#: ``finetune.start`` of a fine-tune that began from a new LoRA, and of one that read the user's rows alone besides.
NEW_START = "fresh"
OWN_ROWS_START = "fresh, without the teacher's rows"


class Published(BaseModel):
    """What the published adapter is and which rows it was trained on.

    ``kind`` is "moved" (a transform's output as it is), "tuned" (the same, fine-tuned), "new" (a new LoRA that no
    transform started) or "empty" (no transform helped and there were no rows to train a new LoRA on).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["moved", "tuned", "new", "empty"]
    transform: str | None = Field(description="the transform it began from; None for a new LoRA")
    samples: int = Field(0, description="rows trained on")
    synthetic: int | None = Field(0, description="of those, rows the old adapter wrote; None: some, number not known")
    rehearsed: int = Field(0, description="texts of the new base's own that were read beside them")
    steps: int = Field(0, description="optimiser steps")
    learning_rate: float | None = None
    synthetic_rejected: bool = Field(False, description="rows the old adapter wrote were there, and did not help")
    tried: bool = Field(True, description="whether any transform was tried")

    @property
    def arm(self) -> Arm | None:
        """The arm that measures it; None where it is empty."""
        return {"moved": Arm.MIGRATED, "tuned": Arm.MIGRATED_LFT, "new": Arm.MIGRATED_LFT}.get(self.kind)

    @property
    def is_new(self) -> bool:
        """Whether it is a LoRA that nothing of the old adapter was moved to."""
        return self.kind == "new"

    @property
    def label(self) -> str:
        """Its name in the tables."""
        if self.is_new:
            return "new LoRA + LFT"
        return self.arm.label if self.arm is not None else "nothing"

    @property
    def rows(self) -> str:
        """The rows it was trained on, in words."""
        told = f"{self.samples} samples"
        if self.synthetic is None:
            told += ", some of them written by the old base with the adapter"
        elif self.synthetic >= self.samples > 0:
            told += " that the old base with the adapter wrote"
        elif self.synthetic:
            told += f", {self.synthetic} of them written by the old base with the adapter"
        texts = "a text" if self.rehearsed == 1 else f"{self.rehearsed} texts"
        return f"{told}, beside {texts} of the new base's own" if self.rehearsed else told

    @property
    def headline(self) -> str:
        """One sentence, without a full stop: what was published."""
        if self.kind == "empty":
            return "No transform helped, and there were no rows to train a new LoRA on: this adapter changes nothing"
        if self.kind == "new":
            rejected = ", nor did the rows that the old adapter wrote" if self.synthetic_rejected else ""
            untried = "No transform was tried" if not self.tried else "No transform helped"
            return f"{untried}{rejected}: a new LoRA trained on {self.rows}"
        moved = f"Moved with method {self.transform}"
        return f"{moved}, then fine-tuned on {self.rows}" if self.kind == "tuned" else f"{moved}, not fine-tuned"
