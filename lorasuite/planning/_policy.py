"""How many rows a migration draws, has written and holds out, and what it does with them: a function of its settings
and of how many rows there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorasuite.data import MIN_OWN_HOLDOUT_ROWS, Row, unanswered
from lorasuite.errors import Problem
from lorasuite.planning._config import AUTO, MigrationConfig
from lorasuite.planning._thresholds import (
    DEFAULT_SYNTHETIC_ROWS,
    FEW_OWN_ROWS,
    LFT_SAMPLES,
    MIN_SWEEP_ROWS,
    MOST_SYNTHETIC_ROWS,
    SELECTION_ROWS,
)
from lorasuite.teacher import HANDFUL, chosen_sources
from lorasuite.training import EPOCHS
from lorasuite.transforms import ModelTransform, transform


@dataclass(frozen=True)
class RowCounts:
    """What is known of a migration's data. The defaults: nothing has been read, and the teacher can be used."""

    #: The user's training rows there are; None where they have not been read.
    own: int | None = None
    #: Different prompts for the teacher; None where there are none, or they have not been read.
    prompts: int | None = None
    #: Whether a prompt is the beginning of running text, which has no one answer.
    running_text: bool = False
    #: Held-out rows for the evaluation.
    evaluation: int = 0
    #: Whether the adapter's card says anything of its prompts.
    card: bool = False
    #: Whether the teacher could write, and its rows are worth training on: known after they were written and judged.
    teacher_usable: bool = True

    @classmethod
    def of(
        cls,
        own: Sequence[Row],
        prompts: Sequence[Row] | None,
        evaluation: Sequence[Row],
        text_prefix: int,
        card: bool = False,
    ) -> RowCounts:
        """Of rows that were read.

        Args:
            text_prefix: words of running text that are a prompt.
            card: whether the adapter's card says anything of its prompts.
        """
        asked = [unanswered(row, text_prefix) for row in prompts or ()]
        running = any(row.kind == "text" for row in asked)
        return cls(len(own), None if prompts is None else len(set(asked)), running, len(evaluation), card)


@dataclass(frozen=True)
class RowPlan:
    """What :func:`plan_rows` decides. Numbers of rows are upper bounds: a filter may drop rows that are written."""

    #: The user's training rows that are asked for, and those of them that there are, as far as is known.
    requested_rows: int
    own_rows: int
    #: Rows the teacher writes to train on, and those it writes only to be read and chosen by.
    synthetic_train_rows: int
    selection_rows: int
    #: Rows the teacher is asked to write in all; fewer than the above where it gives one answer a prompt.
    teacher_rows: int
    #: Whether somebody says what the adapter is for beside the training rows: by prompts, or how to make some.
    has_prompt_source: bool
    #: Whether training rows are few, and there is a source of prompts for more.
    few_labels: bool
    #: Learning rates of the fine-tunes; several are compared on held-out rows, none is ``finetune.learning_rate``.
    rates: tuple[float, ...]
    #: Whether start and rate are searched together (``--effort``); then no rate is named.
    searches: bool
    #: Whether fine-tunes from several starts, a fresh LoRA among them, compete for being published.
    compares_starts: bool
    #: Whether controls are asked for and there is something to measure them by.
    measures_controls: bool
    #: Whether the user's rows are enough to be the only ones held out.
    own_rows_decide: bool
    #: Sources of the prompts that are not given; none where those given are answered as they are.
    prompt_sources: tuple[str, ...] = ()
    #: Passes over the rows where nobody says how many; None: as always.
    epochs: int | None = None
    #: What the user is to know of these decisions.
    notices: tuple[str, ...] = ()

    @property
    def fine_tunes(self) -> bool:
        """Whether there are rows to train on."""
        return bool(self.own_rows or self.synthetic_train_rows)

    def tuned(self, settings: MigrationConfig) -> MigrationConfig:
        """The settings with as many passes over the rows as are planned, where they name none."""
        if self.epochs is None or settings.finetune.epochs is not None:
            return settings
        tuning = settings.finetune.model_copy(update={"epochs": self.epochs})
        return settings.model_copy(update={"finetune": tuning})

    @property
    def sweeps(self) -> bool:
        """Whether there is more than one learning rate to choose from."""
        return len(self.rates) > 1

    @property
    def trains_control(self) -> bool:
        """Whether a fresh LoRA is fine-tuned on the same rows, to compare with."""
        return self.measures_controls or (self.compares_starts and not self.searches)

    @property
    def own_alone_competes(self) -> bool:
        """Whether a fresh LoRA trained on the user's rows alone may be published: where they alone decide."""
        return bool(self.synthetic_train_rows and self.own_rows and self.compares_starts and self.own_rows_decide)

    @property
    def trains_own_alone(self) -> bool:
        """Whether a fresh LoRA is trained on the user's rows alone, where the teacher wrote others beside them."""
        return self.own_alone_competes or bool(self.synthetic_train_rows and self.own_rows and self.measures_controls)


def plan_rows(settings: MigrationConfig, counts: RowCounts) -> RowPlan:
    """Decide what is done with rows; the same arguments always give the same plan, and nothing is read.

    Whether labels are few is decided by the rows asked for, not by those there are, so that what the teacher is asked
    for is known before any file is read.
    """
    auto, told = settings.method == AUTO, settings.teacher
    requested = settings.finetune_samples
    if requested is None:
        requested = LFT_SAMPLES if settings.train_data else 0
    own = requested if counts.own is None else min(requested, counts.own)
    discovers = bool(settings.describe or settings.prompt_sources or settings.says_nothing)
    has_prompt_source = bool(settings.prompts or told.imitate or told.suffix or discovers)
    few = has_prompt_source and requested < SELECTION_ROWS

    synthetic, epochs = settings.teacher_samples, None
    if synthetic is None:
        synthetic, epochs = _unasked(counts, bool(told.imitate or told.suffix)) if auto and few else (0, None)
    # Candidates are fitted and told apart by rows; the teacher writes some where the user has none or few.
    reads_rows = auto or isinstance(transform(settings.method), ModelTransform)
    selection = SELECTION_ROWS if not synthetic and reads_rows and (not requested or few) else 0
    wanted = synthetic or selection
    sources = _sources(settings, counts, synthetic) if synthetic else ()
    several_answers = (
        sources or settings.teacher_samples or told.imitate or told.suffix or (synthetic and counts.running_text)
    )
    one_answer = (requested or synthetic) and counts.prompts is not None and not several_answers
    teacher_rows = min(wanted, counts.prompts) if one_answer and counts.prompts is not None else wanted
    notices = (
        *_idle(settings, own + synthetic),
        *_notices(settings, counts, requested, synthetic, teacher_rows, sources, epochs),
    )
    if not counts.teacher_usable:
        # Rows that are not worth training on can still tell candidates apart, where there are no others.
        synthetic, epochs, selection = 0, None, 0 if requested else wanted

    unnamed = auto and not settings.learning_rates and settings.effort != "quick"
    searches = unnamed and own + synthetic >= MIN_SWEEP_ROWS
    return RowPlan(
        requested_rows=requested,
        own_rows=own,
        synthetic_train_rows=synthetic,
        selection_rows=selection,
        teacher_rows=teacher_rows,
        has_prompt_source=has_prompt_source,
        few_labels=few,
        rates=settings.learning_rates,
        searches=searches,
        compares_starts=searches or (auto and len(settings.learning_rates) > 1),
        measures_controls=settings.controls and bool(counts.evaluation or settings.eval_tasks),
        own_rows_decide=own >= MIN_OWN_HOLDOUT_ROWS,
        prompt_sources=sources,
        epochs=epochs,
        notices=notices,
    )


def _unasked(counts: RowCounts, makes_prompts: bool) -> tuple[int, int | None]:
    """Rows that the teacher writes where nobody says how many, and passes over them, None as always.

    Args:
        makes_prompts: whether it is told to make prompts of its own of those that are given.
    """
    if counts.prompts is None or counts.prompts <= DEFAULT_SYNTHETIC_ROWS or counts.running_text or makes_prompts:
        return DEFAULT_SYNTHETIC_ROWS, None
    rows = min(counts.prompts, MOST_SYNTHETIC_ROWS)
    return rows, min(round(MOST_SYNTHETIC_ROWS / rows), EPOCHS)


def _sources(settings: MigrationConfig, counts: RowCounts, rows: int) -> tuple[str, ...]:
    """Where prompts come from for so many rows, beside those given; none where these are answered as they are."""
    told, prompts = settings.teacher, counts.prompts
    if prompts is not None and prompts >= rows:
        return ()
    if settings.prompt_sources:
        return settings.prompt_sources
    if settings.describe:
        return chosen_sources(bool(prompts), True, counts.card)
    handful = settings.prompts is not None and prompts is not None and prompts <= HANDFUL and not counts.running_text
    if handful and not (told.imitate or told.suffix):
        return chosen_sources(True, False, counts.card)
    return chosen_sources(False, False, counts.card) if settings.says_nothing else ()


def _idle(settings: MigrationConfig, rows: int) -> Iterator[str]:
    """What was asked for of steps that are not taken.

    Args:
        rows: training rows there are, the teacher's among them.
    """
    # by value: settings that a flow hands on are all set
    names = ("rehearsal", "second_step_epochs", "second_step_rate", "effort", "starts")
    asked = [name for name in names if getattr(settings, name) != MigrationConfig.model_fields[name].default]
    idle = [name for name in asked if name.startswith("second_step")]
    if idle and settings.second_step == "none":
        yield f"{' and '.join(idle)} not used: there is no second step (--second-step)"
    if "rehearsal" in asked and settings.rehearsal and not rows:
        yield "rehearsal not used: there are no rows to fine-tune on"
    auto, rates = settings.method == AUTO, settings.learning_rates
    if "effort" in asked:
        if not auto:
            yield f"effort not used: it is of auto, and the method is {settings.method}"
        elif rates:
            yield "effort not used: learning_rates are named, and there is no search"
        elif settings.effort != "quick" and rows < MIN_SWEEP_ROWS:
            yield f"effort not used: a search takes {MIN_SWEEP_ROWS} training rows, and there are {rows}"
    if "starts" in asked and not (auto and len(rates) > 1):
        yield "starts not used: it is of auto with several learning_rates"


def _notices(
    settings: MigrationConfig,
    counts: RowCounts,
    requested: int,
    synthetic: int,
    written: int,
    sources: tuple[str, ...],
    epochs: int | None,
) -> Iterator[str]:
    asked = settings.teacher_samples is not None
    if counts.own and requested:
        own = min(requested, counts.own)
        if own < requested:
            yield f"only {own} training rows for {requested} samples: all are used"
        if own < FEW_OWN_ROWS and settings.method == AUTO and not asked and not synthetic:
            yield (
                f"{own} training rows are few: with --prompts or --teacher-imitate the old base with its adapter "
                "writes more"
            )
    told = [name for name in ("describe", "prompt_sources") if getattr(settings, name)]
    if told and not synthetic:
        yield f"{' and '.join(told)} not used: no rows are to be written (--teacher-samples)"
    if not written:
        return
    if synthetic and not asked:
        yield (
            f"the old base with its adapter writes up to {written} rows, on which the new base is fine-tuned: "
            "--teacher-samples 0 keeps it from that"
        )
        if epochs is not None and epochs < EPOCHS and settings.finetune.epochs is None:
            yield (
                f"as rows are more, they are read fewer times ({epochs} in place of {EPOCHS}): with --finetune-epochs "
                f"{EPOCHS} more moved where it was measured, and cost as many times more (docs/evidence.md)"
            )
        if counts.prompts is not None and counts.prompts > synthetic >= MOST_SYNTHETIC_ROWS:
            yield f"{counts.prompts} prompts are given, and {synthetic} are answered: --teacher-samples takes more"
    if sources:
        given = f" beside the {counts.prompts} given" if counts.prompts else ""
        yield f"the old base writes prompts{given}, from: {', '.join(sources)}"
        if settings.describe and "description" not in sources:
            yield "describe is not used: description is not among prompt_sources"
        return
    if told and synthetic:
        yield f"{' and '.join(told)} not used: there is a prompt for each of the {written} rows"
    if settings.prompt_data is None:
        if not settings.teacher.suffix:
            yield "no prompts for the teacher: it writes from nothing, which suits adapters of running text"
        return
    makes_prompts = settings.teacher.imitate and not settings.teacher.suffix
    if counts.prompts and settings.teacher.temperature == 0 and not makes_prompts and counts.prompts < synthetic:
        yield (f"{counts.prompts} different prompts for {synthetic} teacher samples: greedy, there is one answer each")


def too_few_to_sweep(rows: int, where: str) -> Problem:
    """What is said where learning rates are to be compared on fewer than ``MIN_SWEEP_ROWS`` rows."""
    what = f"a sweep holds out a fifth of the training rows, and there are only {rows}"
    return Problem(where, what, f"Give one learning rate, or at least {MIN_SWEEP_ROWS} rows.")


def untaught(settings: MigrationConfig, plan: RowPlan) -> Iterator[Problem]:
    """What only rows that the teacher wrote are trained by, where it writes none to train on."""
    tuning = settings.finetune
    asked = {
        "finetune.distillation": tuning.distillation or "none",
        "finetune.token_weights": tuning.token_weights,
        "second_step": settings.second_step,
    }
    for name, told in asked.items():
        if told != "none" and not plan.synthetic_train_rows:
            what = f"{told} is for rows that the teacher wrote, and it writes none to train on"
            yield Problem(name, what, "Give --prompts or --teacher-samples, or leave it out.")
