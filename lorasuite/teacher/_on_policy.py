"""On-policy distillation: the student answers, the old base with the adapter judges what it wrote.

Per-token reverse KL on the student's own samples (Agarwal et al., arXiv 2306.13649; across tokenizers as in GOLD of TRL
and SimCT, arXiv 2605.07711), in place of cross-entropy on the teacher's: what the student gets wrong is what it is
taught.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorasuite.data import Row, encode_rows, fingerprint_rows
from lorasuite.errors import DataError
from lorasuite.teacher._generation import AnswerGenerator, Prompt
from lorasuite.teacher._settings import TeacherSettings
from lorasuite.training import RowAligner, SoftLabels, soft_labels

if TYPE_CHECKING:
    from peft import PeftModel

#: Sampling temperature of the student's answers: its own distribution, which reverse KL is the expectation over.
TEMPERATURE = 1.0


class OnPolicy:
    """Writes the rows of an optimizer step with the student, and has the teacher judge them.

    Every answer draws from a seed of its step and place, so a step's rows depend on the student's weights alone, and a
    run that is gone on with writes what it would have written. It costs a generation by the student and a forward pass
    of the teacher a step; both models are in memory.

    Args:
        teacher: the old base with its adapter, on its device.
        aligner: of the teacher's tokenizer and the student's.
        prompts: rows without answers.
        common: paired ids of the tokens that both vocabularies hold.
        settings: of which ``max_new_tokens`` and ``batch_size`` count.
        seed: of the sampling.
    """

    def __init__(
        self,
        teacher: Any,
        aligner: RowAligner,
        prompts: Sequence[Row],
        common: tuple[Tensor, Tensor],
        settings: TeacherSettings,
        seed: int,
    ) -> None:
        self._teacher, self._aligner, self._prompts, self._common = teacher, aligner, list(prompts), common
        self._settings, self._seed = settings.model_copy(update={"top_p": 1.0}), seed

    def __call__(
        self, model: PeftModel, places: Sequence[int], step: int
    ) -> tuple[list[dict[str, list[int]]], SoftLabels | None]:
        """See :class:`lorasuite.training.StepRows`."""
        student = self._aligner.new
        writer = AnswerGenerator(model, student, self._settings, TEMPERATURE, f"{self._seed} {step}")
        prompts: list[Prompt] = []
        for place in sorted(set(places)):
            with contextlib.suppress(DataError):  # it leaves the student no room for an answer
                prompts.append(writer.prompt(place, self._prompts[place]))
        answers = {answer.prompt.number: answer for batch in writer.generate(prompts) for answer in batch}
        rows = [answers[number].row() for number in sorted(answers)]
        try:
            soft = soft_labels(self._teacher, self._aligner, rows, self._common, batch_size=self._settings.batch_size)
            written = encode_rows(rows, student, self._aligner.cutoff).examples
        except DataError:  # nothing but empty answers, or none that the tokenizers cut alike anywhere
            return [], None
        return [example for example in written if example["input_ids"] in soft], soft

    def digest(self) -> str:
        """See :class:`lorasuite.training.StepRows`; the teacher is known by its adapter's and base's parameters."""
        found = hashlib.sha256(f"{fingerprint_rows(self._prompts)} {self._settings} {self._seed}".encode())
        for name, parameter in sorted(self._teacher.named_parameters()):
            found.update(name.encode() + parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
        return found.hexdigest()
