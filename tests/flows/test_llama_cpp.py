"""A migration whose adapter is run in llama.cpp as well."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from flows.migrate_adapter import migrate_adapter
from lorasuite.errors import PreflightError
from tests.flows.small import Small
from tests.gguf_files import write_base, write_converter


def test_what_is_served_by_llama_cpp(home: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_base(tmp_path / "new.gguf", small.new)
    asked = {"serving_gguf": str(gguf), "eval_data": str(small.root / "test.jsonl"), "evaluation": {"generate": False}}
    with pytest.raises(PreflightError, match="is no GGUF file"):
        migrate_adapter(small.settings("one", tmp_path / "no", serving_gguf=str(small.root / "test.jsonl")))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    first = migrate_adapter(small.settings("one", tmp_path / "first", **asked))
    found = first["serving"]["llama.cpp"]
    assert found["ok"] and not found["ran"] and "convert_lora_to_gguf.py is not found" in found["not_run"]
    assert any("is not run in llama.cpp" in notice for notice in first["notices"])
    assert "not run: " in (tmp_path / "first" / "report.html").read_text()

    if find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp, of the dev extra, is not installed")
    monkeypatch.setenv("LLAMA_CPP", str(write_converter(tmp_path / "llama.cpp")))
    second = migrate_adapter(small.settings("one", tmp_path / "second", **asked))
    found = second["serving"]["llama.cpp"]
    assert found["ok"] and found["ran"] and "4 of 4 answers equal" in found["notes"][0]
    assert [row["stage"] for row in second["timings"] if not row["cached"]] == ["llama_cpp"]
    kept = json.loads((tmp_path / "second" / "migration.json").read_text())
    assert kept["serving"] == second["serving"] and kept["key"] == first["key"]
    assert (
        "Run on held-out rows, which the verdict heeds: PEFT; merged, plain transformers; llama.cpp."
        in (tmp_path / "second" / "report.html").read_text()
    )
