"""An adapter with a tokenizer and chat template of its own: what reads by it, what does not, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.evaluate_adapters import BARE, evaluate_adapters
from flows.migrate_adapter import migrate_adapter
from lorasuite.bases import load_tokenizer
from lorasuite.errors import PreflightError
from lorasuite.reporting import MigrationRecord
from tests import models
from tests.flows.small import Small

pytestmark = pytest.mark.usefixtures("home")

OWN = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
BASES = "{% for m in messages %}w4 {{ m.content }} w5 {% endfor %}{% if add_generation_prompt %}w6 {% endif %}"


def templated(source: Path, target: Path, template: str | None) -> Path:
    """A copy of a base, or of an adapter with the base's tokenizer, with this chat template."""
    shutil.copytree(source, target)
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    return target


@pytest.fixture
def chat(small: Small, tmp_path: Path) -> dict[str, str]:
    rows = [
        {"messages": [{"role": "user", "content": f"w{n + 10}"}, {"role": "assistant", "content": f"w{n + 20}"}]}
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "old": str(templated(small.old, tmp_path / "old", BASES)),
        "plain": str(small.old),
        "new": str(templated(small.new, tmp_path / "new", BASES)),
        "adapter": str(templated(small.root / "adapters" / "one", tmp_path / "adapter", OWN)),
        "rows": str(tmp_path / "rows.jsonl"),
    }


def prompts(folder: Path, arm: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (folder / "samples" / f"{arm}.jsonl").read_text().splitlines()]


def test_old_arms_and_the_teacher_read_by_the_adapters_own(chat: dict[str, str], small: Small, tmp_path: Path) -> None:
    settings = {
        **small.settings("one", tmp_path / "out"),
        "adapter": chat["adapter"], "old_base": chat["plain"], "new_base": chat["new"],
        "eval_data": chat["rows"], "prompts": chat["rows"], "teacher_samples": 4, "controls": False,
        "teacher": {"max_new_tokens": 4, "truncated": "keep", "min_kept": 0.0, "filter": False},
        "finetune": {"epochs": 1, "batch_size": 4}, "evaluation": {"generate": False},
    }  # fmt: skip
    record = migrate_adapter(settings)
    for arm in ("old", "old+adapter"):
        assert prompts(tmp_path / "out", arm)[0] == "w1 w10 w2 w3 "
    assert prompts(tmp_path / "out", "new")[0] == "w4 w10 w5 w6 "
    said = MigrationRecord.read(tmp_path / "out" / "migration.json").prompts
    assert said is not None and (said.old.tokenizer, said.old.chat_template) == ("base", "adapter")
    assert (said.new.tokenizer, said.new.chat_template, said.new.differences) == ("base", "base", ())
    assert any("its own chat template is used for the old base" in notice for notice in record["notices"])
    # what was written by one template is not what another one gives
    (Path(chat["adapter"]) / "chat_template.jinja").write_text(OWN.replace("w3", "w7"))
    again = migrate_adapter({**settings, "output": str(tmp_path / "again")})
    cached = {(row["stage"], row["label"]): row["cached"] for row in again["timings"]}
    assert not cached["teacher", None] and not cached["evaluate", "old+adapter"] and cached["evaluate", "new"]
    assert prompts(tmp_path / "again", "old+adapter")[0] == "w1 w10 w2 w7 "


def test_evaluate(chat: dict[str, str], tmp_path: Path) -> None:
    quick = {"generate": False}
    found = evaluate_adapters(chat["old"], (chat["adapter"],), chat["rows"], settings=quick, output=tmp_path / "a")
    assert prompts(tmp_path / "a", "adapter")[0] == "w1 w10 w2 w3 "
    assert prompts(tmp_path / "a", BARE)[0] == "w4 w10 w5 w6 "
    assert "another chat template" in found["notices"][0]
    assert found["adapters"]["adapter"]["chat_template"] == "adapter"
    # a base without a template is measured by the adapter's, as nothing else renders the rows
    found = evaluate_adapters(chat["plain"], (chat["adapter"],), chat["rows"], settings=quick, output=tmp_path / "b")
    assert prompts(tmp_path / "b", BARE) == prompts(tmp_path / "b", "adapter")
    assert any("the bare base has no chat template" in notice for notice in found["notices"])
    # where the two are the same there is nothing to say
    models.build_tokenizer(tmp_path / "same", load_tokenizer(chat["plain"]).convert_ids_to_tokens(range(96)))
    same = templated(Path(chat["adapter"]), tmp_path / "c", BASES)
    for file in (tmp_path / "same").iterdir():
        shutil.copy(file, same / file.name)
    assert evaluate_adapters(chat["old"], (str(same),), chat["rows"], settings=quick)["notices"] == []


def test_what_cannot_be_rendered_or_read_is_said_first(chat: dict[str, str], tmp_path: Path) -> None:
    (Path(chat["adapter"]) / "chat_template.jinja").unlink()
    with pytest.raises(PreflightError, match="no chat template"):
        evaluate_adapters(chat["plain"], (chat["adapter"],), chat["rows"])
    beyond = models.build_tokenizer(Path(chat["adapter"]), [*models.words(96), "<|end|>"])
    beyond.eos_token = "<|end|>"
    beyond.save_pretrained(chat["adapter"])
    with pytest.raises(PreflightError, match="1 tokens beyond the old base's 96 embedding rows"):
        evaluate_adapters(chat["old"], (chat["adapter"],), chat["rows"])
    (Path(chat["adapter"]) / "tokenizer.json").write_text("{")
    with pytest.raises(PreflightError, match="holds a tokenizer that cannot be loaded"):
        evaluate_adapters(chat["old"], (chat["adapter"],), chat["rows"])


def test_rows_with_tokens_that_the_base_lacks(chat: dict[str, str], small: Small, tmp_path: Path) -> None:
    models.build_tokenizer(Path(chat["adapter"]), [*models.words(96), "<|x|>"])
    rows: list[dict[str, Any]] = [{"prompt": "w1 <|x|>", "completion": " w2"}]
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0]) + "\n")
    settings = small.settings("one", tmp_path / "out", adapter=chat["adapter"], eval_data=str(tmp_path / "x.jsonl"))
    with pytest.raises(PreflightError, match="1 rows hold '<|x|>'".replace("|", r"\|")):
        migrate_adapter(settings)
