"""What makes a migration another one: what lies beside the adapter, too, where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasuite.planning import MigrationConfig
from tasks.fingerprints import fingerprint_migration


def test_what_lies_beside_the_adapter_counts_where_it_is_read(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    given = {"adapter": str(tmp_path), "old_base": "old", "new_base": "new", "output": "out"}

    def key(**settings: Any) -> str:
        return fingerprint_migration(MigrationConfig(**given, **settings), {"adapter": "same"})

    told: list[dict[str, Any]] = [{}, {"prompt_sources": ("card",), "method": "copy"}]
    others: list[dict[str, Any]] = [{"prompts": str(prompts)}, {"describe": "x"}, {"prompt_sources": ("adapter",)}]
    before, untouched = [key(**one) for one in told], [key(**one) for one in others]
    (tmp_path / "README.md").write_text("It names the intent of a message.")
    assert all(key(**one) != first for one, first in zip(told, before, strict=True))
    before = [key(**one) for one in told]
    (tmp_path / "training_args.json").write_text('{"template": "alpaca"}')
    assert all(key(**one) != first for one, first in zip(told, before, strict=True))
    assert [key(**one) for one in others] == untouched
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert all(key(**one) != first for one, first in zip(others, untouched, strict=True))
