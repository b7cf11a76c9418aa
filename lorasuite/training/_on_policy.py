"""What a fine-tune asks of rows that the student writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from peft import PeftModel

    from lorasuite.training._distillation import SoftLabels

#: Key of an example: which of the rows given to the fine-tune it is.
PLACE = "place"


class StepRows(Protocol):
    """The rows of an optimizer step: what the student makes of some prompts, and what the teacher says to that.

    A function of the student's weights, the places and the step alone, so that a run that is gone on with from a
    checkpoint is the same as one that never stopped.
    """

    def __call__(
        self, model: PeftModel, places: Sequence[int], step: int
    ) -> tuple[list[dict[str, list[int]]], SoftLabels | None]:
        """Encoded rows, and the teacher's distributions on them; no rows and None where nothing can be used.

        Args:
            model: the student; its mode is restored.
            places: of the prompts.
            step: optimizer steps done.
        """

    def digest(self) -> str:
        """Hash of the prompts, the teacher and how rows are written."""
