"""The model card, read back as the Hub reads it; and the push, at the boundary of huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from lorasuite.errors import ConfigError, OutputError
from lorasuite.reporting import _hub as hub
from lorasuite.reporting import model_card
from tests.records import content, record


def test_the_metadata_survives_the_hubs_own_reading(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card(record()))
    found = metadata_load(tmp_path / "README.md")
    assert found is not None
    data = ModelCardData(**found, ignore_metadata_errors=False)  # raises where the model-index is malformed
    assert ModelCard((tmp_path / "README.md").read_text()).data.to_dict() == data.to_dict()
    validate_repo_id(str(data.base_model))
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/new", "adapter", "peft")

    name, results = model_index_to_eval_results(found["model-index"])
    assert name == "mirror for org/new"
    scores = {(r.dataset_name, r.metric_type): r for r in results}
    held_out = scores["test.jsonl", "exact_match"]
    assert held_out.metric_value == 0.9 and held_out.metric_args["samples"] == 200
    low, high = held_out.metric_args["confidence_interval_95"]
    assert 0.84 < low < 0.9 < high < 0.95
    assert scores["boolq", "acc"].metric_value == 0.7
    for result in found["model-index"][0]["results"]:  # what the Hub requires of each
        assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
        assert all(isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"])


def test_provenance_and_no_results() -> None:
    text = model_card(record())
    for part in ("old_base", "new_base", "adapter"):
        assert content()[part]["fingerprint"] in text
    assert "algorithm version 1" in text and "`functional`" in text and "**needs-finetune**" in text
    assert "Prompts are made" not in text  # a record of before
    asked = model_card(record(prompts={"template": "alpaca"}))
    assert "Prompts are made by the tokenizer of" in asked and "by the template `alpaca`." in asked
    bare = model_card(record(evaluation={}, tasks={}, comparisons=[]))
    assert "model-index" not in bare and "±" not in bare
    assert "by lorasuite, " in model_card(record(versions={"torch": "2.13.0"})), "from a checkout, not installed"


class Fake:
    """HfApi, as far as a push needs it."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.calls = fails, []  # type: ignore[var-annotated]

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, repo: str, **given: Any) -> None:
        self.calls.append(("create", repo, given["private"]))

    def upload_folder(self, **given: Any) -> Any:
        if self.fails:
            raise OSError("no network")
        self.calls.append(("upload", given["repo_id"], tuple(given["allow_patterns"])))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})()


def test_a_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Fake()
    monkeypatch.setattr(hub, "_api", lambda: api)
    with pytest.raises(OutputError, match="has no adapter_model"):
        hub.push(tmp_path, "me/it")
    assert api.calls == []
    for name in hub.PUSHED:
        (tmp_path / name).write_text("x")
    assert hub.push(tmp_path, "me/it") == "https://hub/commit/1"
    assert api.calls == [("create", "me/it", True), ("upload", "me/it", hub.PUSHED)]

    api.fails = True
    with pytest.raises(hub.PushError, match=r"lorasuite push .* me/it"):
        hub.push(tmp_path, "me/it")
    assert all((tmp_path / name).is_file() for name in hub.PUSHED)


def test_what_cannot_be_pushed_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody(Fake):
        def whoami(self) -> dict[str, str]:
            raise OSError("401")

    monkeypatch.setattr(hub, "_api", Nobody)
    with pytest.raises(ConfigError) as caught:
        hub.check_target("not/a/repo", str(tmp_path))
    assert len(caught.value.problems) == 3
    monkeypatch.setattr(hub, "_api", Fake)
    hub.check_target("me/it", "org/new")


HOSTILE = "x](javascript:alert(1)) <script>alert(2)</script> `c` | *b* _i_ ![p](http://e/)\n# head\n\n```\nend"


def test_names_are_no_markup_of_the_card() -> None:
    """Rendered as the Hub does: no link, image, script or heading of a name; tables keep their cells."""
    from html.parser import HTMLParser

    from markdown_it import MarkdownIt

    changes: dict[str, Any] = {}
    for part in ("old_base", "new_base", "adapter"):
        changes[part] = {**content()[part], "name": HOSTILE}
    changes["new_base"] |= {"id": HOSTILE + '"""', "revision": '"); import os #\n```'}
    text = model_card(record(**changes))
    _, _, body = text.partition("\n---\n")
    renderer = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    html = renderer.render(body)
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: seen.append(tag)  # type: ignore[method-assign]
    parser.feed(html)
    assert not {"a", "img", "script", "em"} & set(seen) and seen.count("h1") == 1 and seen.count("h2") == 1
    assert seen.count("pre") == 1
    plain = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(
        model_card(record()).partition("\n---\n")[2]
    )
    assert html.count("<td>") == plain.count("<td>") and html.count("<th>") == plain.count("<th>")
