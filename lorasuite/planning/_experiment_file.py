"""What an experiment file may say: the pair of bases, the tasks, how adapters are trained, and the tables."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lorasuite.bases import StandardRole
from lorasuite.evaluation import Arm
from lorasuite.planning._reading import Strict
from lorasuite.training import FinetuneSettings

#: The seven rows of the paper's tables, in their order.
ARMS = (Arm.OLD, Arm.OLD_ADAPTER, Arm.NEW, Arm.MIGRATED, Arm.SCRATCH, Arm.MIGRATED_LFT, Arm.RETRAINED)
#: Arms that a table may have: the paper's, and the refresh without labels.
ALLOWED = (*ARMS, Arm.REFRESHED)


def _allowed(arm: Any) -> Any:
    if arm not in ALLOWED:
        names = [repr(known.value) for known in ALLOWED]
        raise ValueError(f"Input should be {', '.join(names[:-1])} or {names[-1]}")
    return arm


#: An arm of an experiment; a migration's own arm ``scratch-own`` is none.
ExperimentArm = Annotated[Arm, BeforeValidator(_allowed)]
Kind = Literal["lora", "dora", "adalora"]


class ExperimentPair(Strict):
    """The two bases: by directory or Hub id, or a miniature pair by name."""

    zoo: str | None = Field(None, description="miniature pair: llama or neox")
    old_base: str | None = Field(None, description="base of the adapters: directory or hub-id[@revision]")
    new_base: str | None = Field(None, description="base to move them to: directory or hub-id[@revision]")


class ExperimentTask(Strict):
    """What an adapter is for: rows to train on, and how it is measured."""

    zoo: str | None = Field(None, description="task of the miniature pair, which makes all its data")
    ready: bool = Field(False, description="use the adapters shipped with the miniature pair instead of training them")
    eval_rows: int = Field(200, ge=2, description="held-out rows of a miniature task")
    train_data: str | None = Field(None, description="rows for every training")
    calibration: str | None = Field(None, description="texts to compare layers with; the training data if unset")
    eval_data: str | None = Field(None, description="held-out rows")
    columns: dict[str, str] = Field(
        {}, description="fields of rows that the data calls otherwise, each with its column"
    )
    eval_tasks: tuple[str, ...] = Field((), description="lm-eval tasks, by name; the score is their mean")
    eval_dir: str | None = Field(None, description="rows of the paper's tasks, as <task>/test.json")
    include_path: str | None = Field(None, description="directory of lm-eval task files")
    adapter: str | None = Field(None, description="adapter of the old base to migrate, instead of training one")
    retrained: str | None = Field(None, description="adapter of the new base to compare with, instead of training one")
    set: dict[str, Any] = Field({}, description="settings of this task's cells, by dotted name")

    @property
    def trains(self) -> bool:
        """Whether the adapters to migrate and to compare with are trained here."""
        return not (self.ready or self.adapter or self.retrained)


class Lora(Strict):
    """The adapters: the paper's, if nothing else is said."""

    kind: Kind = Field("lora", description="lora, dora or adalora; the control is of the same kind")
    rank: int = Field(32, ge=1)
    scaling: float = Field(1.0, gt=0, description="alpha / rank, kept where the rank varies")
    targets: tuple[StandardRole, ...] = Field(
        ("q", "k", "v", "o"), min_length=1, description="q, k, v, o, gate, up, down"
    )


class FullFinetune(FinetuneSettings):
    """A whole training; the paper's learning rate for it."""

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")


class Training(Strict):
    """How an adapter is trained on all the data: the one to migrate on the old base, and again on the new one."""

    rows: int = Field(10_000, ge=1, description="training rows, drawn from the task's data")
    learning_rates: tuple[float, ...] = Field((), description="sweep these, chosen on a held-out fifth")
    finetune: FullFinetune = FullFinetune()


class Given(Strict):
    """What there is of the task where a teacher writes rows: prompts for it, and labelled rows beside its own."""

    prompts: int | None = Field(
        None, ge=0, description="prompts of the training rows, drawn by the seed; those of all rows if unset"
    )
    labelled: int = Field(0, ge=0, description="training rows, drawn by the seed, that the fine-tune reads beside them")


class Paper(Strict):
    """Published numbers that stand beside a table, by arm."""

    label: str
    values: dict[ExperimentArm, float]


class ExperimentTable(Strict):
    """One table, and its figure."""

    title: str
    kind: Literal["scores", "cost"] = Field("scores", description="scores by arm, or what each arm costs to make")
    tasks: tuple[str, ...] = Field((), description="the experiment's, if unset")
    seeds: tuple[int, ...] = Field((), description="the experiment's, if unset")
    arms: tuple[ExperimentArm, ...] = Field(ARMS, min_length=1)
    set: dict[str, Any] = Field({}, description="settings of this table's cells, by dotted name")
    factors: dict[str, tuple[Any, ...]] = Field({}, description="dotted name → its levels; all combinations are run")
    figure: Literal["score", "loss", "none"] = Field("score", description="what the figure shows")
    paper: tuple[Paper, ...] = ()
    note: str = Field("", description="said under the table")


class ExperimentConfig(Strict):
    """The experiment file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="lower-case letters, digits, dashes and dots")
    pair: ExperimentPair
    tasks: dict[str, ExperimentTask] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of row draws, fresh weights and data order")
    settings: dict[str, Any] = Field({}, description="settings of a migration (docs/configuration.md)")
    lora: dict[str, Any] = Field({}, description="kind, rank, scaling, targets")
    retrain: dict[str, Any] = Field({}, description="rows, learning_rates, finetune")
    given: dict[str, Any] = Field({}, description="prompts, labelled: what there is of the task beside the adapter")
    tables: dict[str, ExperimentTable] = Field(min_length=1)
