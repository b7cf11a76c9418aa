"""A template that refuses a few rows of many: they are named, and left out where the user allows it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasuite.data import accepted, calibration_texts, read_prompts, read_rows
from lorasuite.errors import DataError, PreflightError
from lorasuite.planning import MigrationConfig, check
from tests import models
from tests.unit.data.test_data import bpe

#: As Gemma's: no system turns.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
REFUSED = (5, 40, 41, 90)


def rows(path: Path, refused: tuple[int, ...] = REFUSED, answered: bool = True) -> Path:
    lines = []
    for number in range(1, 101):
        turns = [{"role": "system", "content": "w5"}] if number in refused else []
        turns.append({"role": "user", "content": f"w{number % 80} w7"})
        turns += [{"role": "assistant", "content": f"w{number % 70}"}] if answered else []
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_refused_rows_are_told_from_the_others_with_their_places(tmp_path: Path) -> None:
    tokenizer = bpe(template=STRICT)
    path = rows(tmp_path / "chat.jsonl")
    kept, problems = accepted(read_rows(path), [tokenizer])
    assert len(kept) == 96 and [p.where for p in problems] == [f"{path}, line {n}" for n in REFUSED]
    assert all("System role not supported" in p.what and "--skip-refused-rows" in p.remedy for p in problems)
    (line,) = str(DataError(problems)).splitlines()[1:] or [str(DataError(problems))]
    assert "line 5" in line and "and 3 more of this kind" in line and "line 40" in line and "line 41" in line
    prompts = read_prompts(rows(tmp_path / "prompts.jsonl", answered=False))
    assert len(accepted(prompts, [tokenizer])[0]) == 96

    with pytest.raises(DataError, match="line 5"):
        calibration_texts(path, tokenizer)
    assert len(calibration_texts(path, tokenizer, skip=True)) == 96
    everything = rows(tmp_path / "all.jsonl", tuple(range(1, 101)))
    with pytest.raises(DataError, match="and 99 more of this kind"):
        calibration_texts(everything, tokenizer, skip=True)


def test_a_migration_goes_on_without_refused_rows_where_it_may(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    old, new = (models.build(tmp_path / name, "llama", seed=seed) for name, seed in (("old", 0), ("new", 1)))
    for path in (old, new):
        models.edit_json(path / "tokenizer_config.json", chat_template=STRICT)
    data = rows(tmp_path / "chat.jsonl")
    settings = {
        "old_base": str(old), "new_base": str(new), "adapter": str(lora(old)), "output": str(tmp_path / "out"),
        "method": "lorasuite", "train_data": str(data), "eval_data": str(data), "finetune_samples": 100,
    }  # fmt: skip
    with pytest.raises(PreflightError) as caught:
        check(MigrationConfig.model_validate(settings))
    said = str(caught.value)
    assert "System role not supported" in said and "line 5" in said and len(said.splitlines()) == 1
    plan = check(MigrationConfig.model_validate({**settings, "skip_refused_rows": True}))
    assert (len(plan.train), len(plan.evaluation), len(plan.texts)) == (96, 96, 96)
    notices = [notice for notice in plan.inspection.notices if "left out" in notice]
    assert len(notices) == 2 and all("4 of 100 left out, such as " in n and "line 5" in n for n in notices)


@pytest.mark.parametrize("at_once", [10_000, 100])
def test_a_template_that_does_not_end_for_one_row_renders_none(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasuite.bases._template_limits.AT_ONCE", at_once)
    tokenizer = bpe(template=STRICT + "{% if messages[0]['content'] == 'w40 w7' %}{{ 'a' * 10 ** 10 }}{% endif %}")
    path = rows(tmp_path / "chat.jsonl", refused=())
    own = bpe(template=STRICT)
    kept, (problem,) = accepted(read_rows(path), [own, tokenizer, tokenizer])
    assert not kept and problem.where == f"{path}, line 40"
    assert re.fullmatch(r"the chat template of .* takes more than 1 GiB of memory for it", problem.what)
    with pytest.raises(DataError, match="line 40"):
        calibration_texts(path, tokenizer, skip=True)


def test_several_templates_of_which_none_is_for_a_conversation_refuse_it(tmp_path: Path) -> None:
    tokenizer = bpe(template={"one": STRICT, "tool_use": STRICT})
    path = rows(tmp_path / "chat.jsonl", refused=())
    kept, problems = accepted(read_rows(path), [tokenizer])
    assert not kept and len(problems) == 100 and "refused it" in problems[0].what
