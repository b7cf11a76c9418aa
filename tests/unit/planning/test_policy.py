"""What is done with rows, as a table: settings and counts in, a plan out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasuite.data import Row
from lorasuite.errors import PreflightError, Problem
from lorasuite.planning import MigrationConfig, RowCounts, RowPlan, _preflight, fits, plan_rows
from lorasuite.planning._inspection import Inspection
from lorasuite.transforms import names

NAMES = dict.fromkeys(("adapter", "old_base", "new_base", "output"), "x")
#: What most cases have in common: no source of prompts, no evaluation, no teacher.
NOTHING = RowPlan(
    requested_rows=0,
    own_rows=0,
    synthetic_train_rows=0,
    selection_rows=0,
    teacher_rows=0,
    has_prompt_source=False,
    few_labels=False,
    rates=(),
    searches=False,
    compares_starts=False,
    measures_controls=False,
    own_rows_decide=False,
)
RATES = (1e-4, 1e-3)
SWEPT = {"searches": True, "compares_starts": True}
FEW = {"has_prompt_source": True, "few_labels": True}
IMITATE = {"imitate": True}
DISCOVERED = {**FEW, **SWEPT, "synthetic_train_rows": 300, "teacher_rows": 300}
BOTH = ("examples", "description")
FRAMED = {"prefix": "mirror :", "suffix": " ="}


def settings(**given: Any) -> MigrationConfig:
    return MigrationConfig(**NAMES, **{"finetune": {"learning_rate": 1e-3}, **given})


@pytest.mark.parametrize(
    ("given", "counts", "expected"),
    [
        # No data at all: auto looks for prompts, of which the adapter's card may tell; another method needs nothing.
        ({}, {}, {**DISCOVERED, "prompt_sources": ("adapter",)}),
        ({}, {"card": True}, {**DISCOVERED, "prompt_sources": ("card", "adapter")}),
        ({"teacher_samples": 0}, {}, {"selection_rows": 320, "teacher_rows": 320}),
        ({"prompt_sources": ("card",)}, {}, {**DISCOVERED, "prompt_sources": ("card",)}),
        ({"describe": "d"}, {}, {**DISCOVERED, "prompt_sources": ("description",)}),
        ({"describe": "d", "method": "procrustes"}, {}, {"has_prompt_source": True, "few_labels": True}),
        (
            {"describe": "d", "method": "procrustes", "teacher_samples": 9},
            {},
            {**FEW, "synthetic_train_rows": 9, "teacher_rows": 9, "prompt_sources": ("description",)},
        ),
        # A handful of prompts are examples; more are answered as they are, unless a task is described beside them.
        ({"prompts": "p"}, {"prompts": 10}, {**DISCOVERED, "prompt_sources": ("examples",)}),
        ({"prompts": "p"}, {"prompts": 11}, {**DISCOVERED, "teacher_rows": 11}),
        ({"prompts": "p", "describe": "d"}, {"prompts": 11}, {**DISCOVERED, "prompt_sources": BOTH}),
        ({"prompts": "p", "describe": "d"}, {"prompts": 300}, DISCOVERED),
        ({"prompts": "p", "teacher": IMITATE}, {"prompts": 5}, DISCOVERED),
        ({"prompts": "p"}, {"prompts": 5, "running_text": True}, DISCOVERED),
        ({"method": "procrustes"}, {}, {}),
        ({"method": "sequential"}, {}, {"selection_rows": 320, "teacher_rows": 320}),
        # Prompts and no rows: the teacher writes rows to train on, one answer a prompt unless it is running text.
        ({"prompts": "p"}, {}, {**FEW, **SWEPT, "synthetic_train_rows": 300, "teacher_rows": 300}),
        ({"prompts": "p"}, {"prompts": 40}, {**FEW, **SWEPT, "synthetic_train_rows": 300, "teacher_rows": 40}),
        (
            {"prompts": "p"},
            {"prompts": 40, "running_text": True},
            {**FEW, **SWEPT, "synthetic_train_rows": 300, "teacher_rows": 300},
        ),
        ({"prompts": "p", "method": "procrustes"}, {"prompts": 40}, FEW),
        (
            {"prompts": "p", "method": "sequential"},
            {"prompts": 40},
            {**FEW, "selection_rows": 320, "teacher_rows": 320},
        ),
        # Asked for by number: so many are written, or none to train on.
        ({"prompts": "p", "teacher_samples": 0}, {}, {**FEW, "selection_rows": 320, "teacher_rows": 320}),
        (
            {"prompts": "p", "teacher_samples": 50},
            {"prompts": 40},
            {**FEW, **SWEPT, "synthetic_train_rows": 50, "teacher_rows": 50},
        ),
        ({"prompts": "p", "teacher_samples": 9}, {}, {**FEW, "synthetic_train_rows": 9, "teacher_rows": 9}),
        (
            {"method": "procrustes", "teacher_samples": 50},
            {},
            {"synthetic_train_rows": 50, "teacher_rows": 50},
        ),
        # Told how prompts are made: as many as are wanted.
        ({"teacher": FRAMED}, {}, {**FEW, **SWEPT, "synthetic_train_rows": 300, "teacher_rows": 300}),
        ({"teacher": IMITATE}, {"prompts": 40}, {**FEW, **SWEPT, "synthetic_train_rows": 300, "teacher_rows": 300}),
        # Training rows: 100 unless said otherwise, as many as there are; nobody has the teacher write.
        ({"train_data": "t"}, {}, {**SWEPT, "requested_rows": 100, "own_rows": 100, "own_rows_decide": True}),
        ({"train_data": "t"}, {"own": 30}, {**SWEPT, "requested_rows": 100, "own_rows": 30}),
        ({"train_data": "t"}, {"own": 49}, {**SWEPT, "requested_rows": 100, "own_rows": 49}),
        ({"train_data": "t"}, {"own": 50}, {**SWEPT, "requested_rows": 100, "own_rows": 50, "own_rows_decide": True}),
        ({"train_data": "t"}, {"own": 10}, {**SWEPT, "requested_rows": 100, "own_rows": 10}),
        ({"train_data": "t"}, {"own": 9}, {"requested_rows": 100, "own_rows": 9}),
        ({"train_data": "t", "finetune_samples": 0}, {"own": 0}, {"selection_rows": 320, "teacher_rows": 320}),
        ({"train_data": "t", "method": "procrustes"}, {"own": 30}, {"requested_rows": 100, "own_rows": 30}),
        ({"train_data": "t", "method": "sequential"}, {"own": 30}, {"requested_rows": 100, "own_rows": 30}),
        # Few of them, and prompts for more.
        (
            {"train_data": "t", "prompts": "p"},
            {"own": 9, "prompts": 40},
            {**FEW, **SWEPT, "requested_rows": 100, "own_rows": 9, "synthetic_train_rows": 300, "teacher_rows": 40},
        ),
        (
            {"train_data": "t", "teacher": IMITATE},
            {"own": 60, "prompts": 60},
            {**FEW, **SWEPT, "requested_rows": 100, "own_rows": 60, "own_rows_decide": True}
            | {"synthetic_train_rows": 300, "teacher_rows": 300},
        ),
        (
            {"train_data": "t", "prompts": "p", "teacher_samples": 0},
            {"own": 9, "prompts": 40},
            {**FEW, "requested_rows": 100, "own_rows": 9, "selection_rows": 320, "teacher_rows": 40},
        ),
        (
            {"train_data": "t", "prompts": "p", "method": "sequential"},
            {"own": 9, "prompts": 400},
            {**FEW, "requested_rows": 100, "own_rows": 9, "selection_rows": 320, "teacher_rows": 320},
        ),
        (
            {"train_data": "t", "prompts": "p", "method": "procrustes"},
            {"own": 9, "prompts": 40},
            {**FEW, "requested_rows": 100, "own_rows": 9},
        ),
        # 320 rows are not few; what was asked for decides, not what there is.
        (
            {"train_data": "t", "prompts": "p", "finetune_samples": 319},
            {"own": 319, "prompts": 400},
            {**FEW, **SWEPT, "requested_rows": 319, "own_rows": 319, "own_rows_decide": True}
            | {"synthetic_train_rows": 400, "teacher_rows": 400, "epochs": 2},
        ),
        (
            {"train_data": "t", "prompts": "p", "finetune_samples": 320},
            {"own": 30, "prompts": 40},
            {**SWEPT, "has_prompt_source": True, "requested_rows": 320, "own_rows": 30},
        ),
        ({"train_data": "t", "effort": "thorough"}, {"own": 30}, {**SWEPT, "requested_rows": 100, "own_rows": 30}),
        ({"train_data": "t", "effort": "quick"}, {"own": 30}, {"requested_rows": 100, "own_rows": 30}),
        # Learning rates that are named are not searched; one of them is no sweep, and starts are compared in none.
        (
            {"train_data": "t", "learning_rates": (1e-2, 1e-3)},
            {"own": 30},
            {"requested_rows": 100, "own_rows": 30, "rates": (1e-2, 1e-3), "compares_starts": True},
        ),
        (
            {"train_data": "t", "learning_rates": (1e-2,)},
            {"own": 30},
            {"requested_rows": 100, "own_rows": 30, "rates": (1e-2,)},
        ),
        (
            {"train_data": "t", "learning_rates": (1e-2, 1e-3), "method": "procrustes"},
            {"own": 30},
            {"requested_rows": 100, "own_rows": 30, "rates": (1e-2, 1e-3)},
        ),
        # Controls need something to be measured by.
        (
            {"train_data": "t", "method": "procrustes"},
            {"own": 30, "evaluation": 5},
            {"requested_rows": 100, "own_rows": 30, "measures_controls": True},
        ),
        (
            {"train_data": "t", "method": "procrustes", "eval_tasks": ("boolq",)},
            {"own": 30},
            {"requested_rows": 100, "own_rows": 30, "measures_controls": True},
        ),
        (
            {"train_data": "t", "method": "procrustes", "controls": False},
            {"own": 30, "evaluation": 5},
            {"requested_rows": 100, "own_rows": 30},
        ),
        # A teacher that is of no use: the user's rows alone, or its rows only to choose by where there are no others.
        (
            {"train_data": "t", "prompts": "p"},
            {"own": 9, "prompts": 40, "teacher_usable": False},
            {**FEW, "requested_rows": 100, "own_rows": 9, "teacher_rows": 40},
        ),
        (
            {"prompts": "p"},
            {"prompts": 40, "teacher_usable": False},
            {**FEW, "selection_rows": 300, "teacher_rows": 40},
        ),
        (
            {"train_data": "t", "prompts": "p", "teacher_samples": 0},
            {"own": 30, "prompts": 40, "teacher_usable": False},
            {**FEW, **SWEPT, "requested_rows": 100, "own_rows": 30, "teacher_rows": 40},
        ),
    ],
)
def test_plan(given: dict[str, Any], counts: dict[str, Any], expected: dict[str, Any]) -> None:
    found = plan_rows(settings(**given), RowCounts(**counts))
    assert replace(found, notices=()) == replace(NOTHING, **expected)


@pytest.mark.parametrize(
    ("given", "counts", "trains", "control", "alone", "competes"),
    [
        ({}, {}, True, False, False, False),
        ({"teacher_samples": 0}, {}, False, False, False, False),
        # A search has no control of its own; one is trained where it is measured.
        ({"train_data": "t"}, {"own": 60}, True, False, False, False),
        ({"train_data": "t"}, {"own": 60, "evaluation": 5}, True, True, False, False),
        ({"train_data": "t", "learning_rates": (1e-3, 1e-2)}, {"own": 60}, True, True, False, False),
        ({"train_data": "t", "method": "procrustes"}, {"own": 60}, True, False, False, False),
        ({"train_data": "t", "method": "procrustes"}, {"own": 60, "evaluation": 5}, True, True, False, False),
        # Rows of both kinds: what the user's alone come to is measured, and published if they are enough to say so.
        ({"train_data": "t", "prompts": "p"}, {"own": 60}, True, False, True, True),
        ({"train_data": "t", "prompts": "p"}, {"own": 49}, True, False, False, False),
        ({"train_data": "t", "prompts": "p"}, {"own": 49, "evaluation": 5}, True, True, True, False),
        ({"train_data": "t", "prompts": "p", "learning_rates": (1e-3,)}, {"own": 60}, True, False, False, False),
        ({"train_data": "t", "prompts": "p"}, {"own": 60, "teacher_usable": False}, True, False, False, False),
        ({"prompts": "p"}, {"evaluation": 5}, True, True, False, False),
        ({"prompts": "p"}, {"evaluation": 5, "teacher_usable": False}, False, True, False, False),
    ],
)
def test_fine_tunes(
    given: dict[str, Any], counts: dict[str, Any], trains: bool, control: bool, alone: bool, competes: bool
) -> None:
    found = plan_rows(settings(**given), RowCounts(**counts))
    assert (found.fine_tunes, found.trains_control, found.trains_own_alone, found.own_alone_competes) == (
        trains,
        control,
        alone,
        competes,
    )


@pytest.mark.parametrize(
    ("given", "counts", "said"),
    [
        ({"train_data": "t"}, {"own": 100}, []),
        ({"train_data": "t"}, {"own": 99}, ["only 99 training rows for 100", "99 training rows are few"]),
        ({"train_data": "t", "teacher_samples": 0}, {"own": 99}, ["only 99 training rows for 100"]),
        ({"train_data": "t", "method": "procrustes"}, {"own": 99}, ["only 99 training rows for 100"]),
        ({"train_data": "t", "finetune_samples": 50}, {"own": 60}, ["50 training rows are few"]),
        ({"prompts": "p"}, {"prompts": 40}, ["writes up to 40 rows"]),
        ({"prompts": "p"}, {"prompts": 300}, ["writes up to 300 rows"]),
        ({"prompts": "p"}, {"prompts": 900}, ["writes up to 900 rows", "fewer times (1 in place of 3)"]),
        ({"prompts": "p", "finetune": {"epochs": 3}}, {"prompts": 900}, ["writes up to 900 rows"]),
        (
            {"prompts": "p"},
            {"prompts": 2000},
            ["writes up to 900 rows", "fewer times (1 in place", "2000 prompts are given, and 900 are answered"],
        ),
        ({"prompts": "p", "teacher_samples": 50}, {"prompts": 900}, []),
        ({"prompts": "p", "teacher_samples": 50}, {"prompts": 40}, []),
        ({"teacher_samples": 50}, {}, ["no prompts for the teacher"]),
        ({}, {}, ["writes up to 300 rows", "prompts, from: adapter"]),
        ({"prompts": "p"}, {"prompts": 5}, ["writes up to 300 rows", "prompts beside the 5 given, from: examples"]),
        (
            {"prompts": "p", "describe": "d", "teacher_samples": 9},
            {"prompts": 9},
            ["describe not used: there is a prompt for each of the 9 rows"],
        ),
        ({"describe": "d", "method": "procrustes"}, {}, ["describe not used: no rows"]),
        (
            {"describe": "d", "prompt_sources": ("adapter",), "teacher_samples": 9},
            {},
            ["prompts, from: adapter", "describe is not used: description is not among prompt_sources"],
        ),
        (
            {"prompts": "p", "prompt_sources": ("examples",), "teacher_samples": 9},
            {"prompts": 40},
            ["prompt_sources not used: there is a prompt for each of the 9 rows"],
        ),
        ({"teacher_samples": 50, "teacher": FRAMED}, {}, []),
        ({"prompts": "p", "teacher_samples": 50, "teacher": {"temperature": 0}}, {"prompts": 40}, ["one answer each"]),
        ({"prompts": "p", "teacher_samples": 50, "teacher": {"temperature": 0}}, {"prompts": 50}, []),
        ({"prompts": "p", "teacher_samples": 50, "teacher": {"temperature": 0, **IMITATE}}, {"prompts": 40}, []),
        ({"method": "procrustes"}, {}, []),
        ({"method": "procrustes", "second_step_rate": 0.3}, {}, ["second_step_rate not used: there is no second step"]),
        ({"prompts": "p", "second_step": "cached", "second_step_epochs": 1}, {"prompts": 40}, ["writes up to 40 rows"]),
        ({"method": "procrustes", "rehearsal": 0.5}, {}, ["rehearsal not used: there are no rows"]),
        ({"method": "procrustes", "rehearsal": 0}, {}, []),
        ({"method": "procrustes", "effort": "quick"}, {}, ["effort not used: it is of auto, and the method is proc"]),
        ({"train_data": "t", "effort": "thorough"}, {"own": 100}, []),
        ({"train_data": "t", "effort": "quick"}, {"own": 100}, []),
        (
            {"train_data": "t", "effort": "thorough", "finetune_samples": 9, "teacher_samples": 0},
            {"own": 9},
            ["effort not used: a search takes 10 training rows, and there are 9"],
        ),
        (
            {"train_data": "t", "effort": "thorough", "learning_rates": RATES},
            {"own": 100},
            ["effort not used: learning_"],
        ),
        ({"train_data": "t", "starts": 4, "learning_rates": RATES}, {"own": 100}, []),
        (
            {"train_data": "t", "starts": 4, "learning_rates": RATES[:1]},
            {"own": 100},
            ["starts not used"],
        ),
        (
            {"train_data": "t", "starts": 4},
            {"own": 100},
            ["starts not used: it is of auto with several"],
        ),
    ],
)
def test_notices(given: dict[str, Any], counts: dict[str, Any], said: list[str]) -> None:
    found = plan_rows(settings(**given), RowCounts(**counts)).notices
    assert len(found) == len(said) and all(part in notice for part, notice in zip(said, found, strict=True)), found


@pytest.mark.parametrize(
    ("given", "counts", "written", "passes"),
    [
        ({"prompts": "p"}, {}, 300, 3),
        ({"prompts": "p"}, {"prompts": 300}, 300, 3),
        ({"prompts": "p"}, {"prompts": 350}, 350, 3),
        ({"prompts": "p"}, {"prompts": 400}, 400, 2),
        ({"prompts": "p"}, {"prompts": 600}, 600, 2),
        ({"prompts": "p"}, {"prompts": 601}, 601, 1),
        ({"prompts": "p"}, {"prompts": 5000}, 900, 1),
        ({"prompts": "p", "train_data": "t"}, {"prompts": 5000, "own": 100}, 900, 1),
        ({"prompts": "p", "finetune": {"epochs": 2}}, {"prompts": 5000}, 900, 2),
        ({"prompts": "p", "teacher_samples": 1000}, {"prompts": 5000}, 1000, 3),
        ({"prompts": "p", "teacher": IMITATE}, {"prompts": 5000}, 300, 3),
        ({"prompts": "p"}, {"prompts": 5000, "running_text": True}, 300, 3),
        ({"prompts": "p"}, {"prompts": 5000, "teacher_usable": False}, 0, 3),
        ({"train_data": "t", "finetune_samples": 5000}, {"own": 5000}, 0, 3),
    ],
)
def test_of_more_prompts_more_rows_are_written_and_read_fewer_times(
    given: dict[str, Any], counts: dict[str, Any], written: int, passes: int
) -> None:
    """Unless somebody says how many rows, or how often; nobody's labelled rows are read less for it."""
    asked = settings(**given)
    plan = plan_rows(asked, RowCounts(**counts))
    tuned = plan.tuned(asked)
    assert (plan.synthetic_train_rows, tuned.finetune.passes) == (written, passes)
    assert tuned.finetune.computed()["epochs"] == passes
    assert tuned.model_dump(exclude={"finetune"}) == asked.model_dump(exclude={"finetune"})


def test_counts_of_rows() -> None:
    prompt = [Row(kind="completion", prompt=f"say {n % 2}", completion=" it") for n in range(5)]
    text = Row(kind="text", text="a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert RowCounts.of(prompt, None, [], 16) == RowCounts(own=5)
    assert RowCounts.of([], prompt, prompt, 16) == RowCounts(own=0, prompts=2, evaluation=5)
    assert RowCounts.of([], [text, *prompt], [], 16) == RowCounts(own=0, prompts=3, running_text=True)


@pytest.mark.parametrize(
    ("given", "kind", "asked"),
    [
        ({}, "completion", 300),  # so few are examples
        ({"teacher_samples": 0, "train_data": "rows"}, "completion", 3),
        ({"teacher_samples": 7}, "completion", 7),
        ({"teacher": IMITATE}, "completion", 300),  # more prompts are made
        ({}, "text", 300),  # another text from the same beginning is another row
        ({"teacher_samples": 0, "train_data": "rows"}, "text", 3),
    ],
)
def test_how_many_rows_the_teacher_is_asked_for(given: dict[str, Any], kind: str, asked: int) -> None:
    prompts = [Row(kind="text", text=f"{n} on") for n in range(3)]
    if kind == "completion":
        prompts = [Row(kind="completion", prompt=f"{n} =") for n in range(3)]
    told = settings(prompts="p", **given)
    counts = RowCounts.of([], prompts, [], told.teacher.text_prefix)
    assert plan_rows(told, counts).teacher_rows == asked


@pytest.mark.parametrize(
    ("given", "prepared"),
    [
        ({}, ["copy"]),
        ({"candidates": ("all",)}, names()),
        ({"candidates": ("none",)}, []),
        ({"candidates": ("procrustes", "lorasuite")}, ["procrustes", "lorasuite"]),
        ({"method": "sequential"}, ["sequential"]),
    ],
    ids=str,
)
def test_what_a_pair_is_prepared_for_is_what_is_counted(
    given: dict[str, Any], prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rows, which only the adapters to come have."""
    seen: list[MigrationConfig] = []

    def survey(config: MigrationConfig, *_: Any, **__: Any) -> Inspection:
        seen.append(config)
        return Inspection("old", "new", problems=[Problem("x", "is not looked at", "")])

    monkeypatch.setattr(_preflight, "survey", survey)
    config = settings(**given)
    with pytest.raises(PreflightError):
        fits(config, Path())
    assert config.prepared == prepared
    assert seen[0].method == config.method and (seen[0].method != "auto" or seen[0].tried(False) == prepared)
