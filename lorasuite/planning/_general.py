"""The texts that adapters' costs of general ability are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorasuite.data import Row, Template, calibration_texts, whole_text
from lorasuite.errors import LoRASuiteError, Problem
from lorasuite.evaluation import held_out_texts
from lorasuite.planning._config import MigrationConfig
from lorasuite.planning._inspection import Inspection

#: Fewer spare calibration texts are not taken without being asked: they tell too little.
MIN_SPARE_TEXTS = 30


@dataclass(frozen=True)
class GeneralTexts:
    """The texts, cut, and what they are; or why there are none."""

    texts: list[str] = field(default_factory=list)
    source: str | None = None
    missing: str | None = None


def general_texts(
    result: Inspection,
    config: MigrationConfig,
    template: Template,
    calibration: Sequence[str],
    teacher_rows: int,
    rows: Sequence[Row],
) -> GeneralTexts:
    """The texts that ``general_texts`` names, or calibration texts that nothing reads where there are enough of them.

    What is chosen, and that nothing is measured, is said in a notice; a file without a text of its own is a problem.

    Args:
        calibration: every text of the calibration file, of which the first ``calibration_samples`` are read.
        teacher_rows: rows that the teacher writes.
        rows: what is trained on, and prompts.
    """
    read = [*calibration[: config.pair.calibration_samples], *(_text(row) for row in rows)]
    if (source := config.general_texts) is not None:
        # no tokenizer: conversations are read as plain text, and not by the template of one of the two bases
        reading = (None, config.renamed_columns, config.skip_refused_rows, template)
        given = result.attempt(lambda: calibration_texts(source, *reading)) or []
        kept, left_out = held_out_texts(given, read, config.general)
        if given and not kept:
            what = "has no text that is not read for calibration, trained on or answered"
            result.problems.append(Problem(source, what, "Give texts that nothing else reads."))
        if kept and left_out:
            what = f"{left_out} left out, which are read for calibration, trained on or answered"
            result.notices.append(f"general texts: {what}")
        return GeneralTexts(kept, source=f"{len(kept)} texts of general_texts")
    why = "general_texts is not set, and "
    if config.calibration is None:
        why += "there are no calibration texts beside the training data"
    elif teacher_rows and config.prompt_data == config.calibration:
        why += "the teacher answers beginnings of the calibration texts"
    else:
        kept, _ = held_out_texts(calibration[config.pair.calibration_samples :], read, config.general)
        if len(kept) >= MIN_SPARE_TEXTS:
            spare = f"{len(kept)} calibration texts beyond the {config.pair.calibration_samples} that are read"
            result.notices.append(f"general ability is measured on {spare}; general_texts names others")
            return GeneralTexts(kept, source=spare)
        why += f"there are {len(kept)} calibration texts beyond those that are read ({MIN_SPARE_TEXTS} are needed)"
    result.notices.append(f"general ability is not measured: {why}")
    return GeneralTexts(missing=f"general text: {why}")


def _text(row: Row) -> str:
    """A row as plain text."""
    try:
        return whole_text(row)
    except LoRASuiteError:  # said where rows are checked
        return ""
