"""Instruction rows by a template, through a migration and an evaluation; and the word on which template fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.evaluate_adapters import evaluate_adapters
from flows.migrate_adapter import migrate_adapter
from lorasuite import zoo
from lorasuite.data import known_templates
from lorasuite.errors import PreflightError
from lorasuite.reporting import MigrationRecord
from lorasuite.teacher import _template_fit

pytestmark = pytest.mark.usefixtures("home")

#: Makes of a row what the miniature adapter was trained on.
HOUSE = "{{ instruction }} ={% if input %} {{ input }}{% endif %} {{ output }}"


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A migration that is only measured, on rows whose template it was not trained with by default."""
    pair = zoo.pair("neox")
    rows = [
        {"instruction": row["prompt"].removesuffix(" ="), "output": row["completion"]}
        for row in zoo.rows("neox", "mirror", "test", 12)
    ]
    zoo.write_rows(rows, tmp_path / "rows.jsonl")
    zoo.write_rows([{"text": text} for text in zoo.texts("neox", 8)], tmp_path / "texts.jsonl")
    (tmp_path / "house.jinja").write_text(HOUSE)
    return {
        "adapter": str(pair.adapter("mirror")), "old_base": str(pair.old), "new_base": str(pair.new),
        "calibration": str(tmp_path / "texts.jsonl"), "eval_data": str(tmp_path / "rows.jsonl"),
        "evaluation": {"generate": False}, "method": "procrustes", "teacher_samples": 0,
    }  # fmt: skip


def test_the_template_that_fits_is_named_and_used(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = migrate_adapter({**given, "output": str(tmp_path / "lost")})
    (said,) = [notice for notice in lost["notices"] if "template" in notice]
    assert "under the template question" in said and "not clearly better" in said and "as a Jinja file" in said
    # were it known, it would be named
    with monkeypatch.context() as patch:
        patch.setattr(_template_fit, "known_templates", lambda: {**known_templates(), "house": HOUSE})
        told = migrate_adapter({**given, "output": str(tmp_path / "told")})
    assert any("give --template house" in notice for notice in told["notices"])
    found = migrate_adapter({**given, "output": str(tmp_path / "found"), "template": str(tmp_path / "house.jinja")})
    assert not any("template" in notice for notice in found["notices"])
    prompts = MigrationRecord.read(tmp_path / "found" / "migration.json").prompts
    assert prompts is not None and prompts.template == "house.jinja" and prompts.template_text == HOUSE
    assert prompts.fit is not None and prompts.fit.used == prompts.fit.best == "house.jinja" and prompts.fit.rows == 12
    assert prompts.fit.fits["house.jinja"].adapter < 0.5 < prompts.fit.fits["question"].adapter
    for arm in ("old", "old+adapter", "new", "migrated"):
        file = tmp_path / "found" / "samples" / f"{arm}.jsonl"
        first = json.loads(file.read_text().splitlines()[0])
        assert first["prompt"].startswith("mirror :") and first["prompt"].endswith(" =")
    # the same template from another place changes no key, another text does
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "house.jinja").write_text(HOUSE)
    again = migrate_adapter(
        {**given, "output": str(tmp_path / "again"), "template": str(tmp_path / "elsewhere" / "house.jinja")}
    )
    assert all(row["cached"] for row in again["timings"]) and again["key"] == found["key"] != lost["key"]
    (tmp_path / "elsewhere" / "house.jinja").write_text(HOUSE.replace(" =", " >"))
    other = migrate_adapter(
        {**given, "output": str(tmp_path / "other"), "template": str(tmp_path / "elsewhere" / "house.jinja")}
    )
    cached = {(row["stage"], row["label"]): row["cached"] for row in other["timings"]}
    assert {stage for (stage, _), found_ in cached.items() if not found_} == {"template_fit", "evaluate", "serving"}
    assert other["key"] != found["key"]


def test_evaluate_by_a_template(given: dict[str, Any], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"settings": {"generate": False}, "template": str(tmp_path / "house.jinja")}
    found = evaluate_adapters(given["old_base"], (given["adapter"],), given["eval_data"], **asked)
    assert found["results"]["mirror"]["bits_per_byte"] < 0.5 and found["template"] == asked["template"]
    texts = str(tmp_path / "texts.jsonl")
    unused = evaluate_adapters(given["old_base"], (), texts, **asked)
    assert ["there are no instruction rows" in notice for notice in unused["notices"]] == [True]


def test_a_template_that_cannot_be_used_is_said_first(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "wrong.jinja").write_text("{{ instruction }} {{ topic }} {{ output }}")
    for template, said in (("wrong.jinja", "'topic' is undefined"), ("none.jinja", "neither the name of a template")):
        wrong = str(tmp_path / template)
        with pytest.raises(PreflightError, match=said):
            migrate_adapter({**given, "output": str(tmp_path / "out"), "template": wrong})
        with pytest.raises(PreflightError, match=said):
            evaluate_adapters(given["old_base"], (), given["eval_data"], template=wrong)
