"""The arms of a migration and of an experiment: which base is measured, and with which adapter."""

from __future__ import annotations

from enum import StrEnum


class Arm(StrEnum):
    """One arm; the value is its name in ``migration.json`` and in experiment files, in the order tables list them."""

    label: str
    """Name in the tables of a migration."""
    paper_label: str
    """Name in the tables of an experiment, where "small" means the rows of the light fine-tune (LFT), "full" all."""

    OLD = "old", "old base"
    OLD_ADAPTER = "old+adapter", "old base + adapter", "old base + LoRA (full)"
    NEW = "new", "new base"
    MIGRATED = "migrated", "migrated, no LFT", "migrated, w/o LFT"
    SCRATCH_OWN = "scratch-own", "LoRA from scratch, without the written rows"
    SCRATCH = "scratch", "LoRA from scratch, same samples", "LoRA (small)"
    MIGRATED_LFT = "migrated+lft", "migrated + LFT", "migrated, w LFT"
    RETRAINED = "retrained", "LoRA from scratch, all samples", "LoRA (full)"
    REFRESHED = "refreshed", "LoRA from scratch, written rows only", "refreshed (no labels)"

    def __new__(cls, value: str, label: str = "", paper_label: str = "") -> Arm:
        """A member of its value, carrying its two labels; ``paper_label`` is ``label`` if not given."""
        arm = str.__new__(cls, value)
        arm._value_ = value
        arm.label, arm.paper_label = label, paper_label or label
        return arm

    @property
    def on_old_base(self) -> bool:
        """Whether the old base is measured."""
        return self in (Arm.OLD, Arm.OLD_ADAPTER)


#: Arms that a migration may publish, the preferred one first.
PUBLISHED_ARMS = (Arm.MIGRATED_LFT, Arm.MIGRATED)
