"""Adapters in llama.cpp itself, on a tiny Llama that the tests write as a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasuite.bases import load_tokenizer
from lorasuite.data import Row
from lorasuite.errors import ConfigError
from lorasuite.evaluation import Served, check_gguf, compare_gguf, convert, llama_cpp_missing, llama_cpp_versions
from lorasuite.evaluation._llama_cpp import _judged
from lorasuite.evaluation._served import SAME
from tests import models
from tests.gguf_files import write_base, write_converter

Make = Callable[..., Path]
WHY = "xllamacpp, of the dev extra, is not installed"


def rows() -> list[Row]:
    words = models.words(90)
    texts = [" ".join(words[n : n + 6]) for n in range(4, 68, 8)]
    return [Row(kind="completion", prompt=t, completion=" " + " ".join(words[n : n + 4])) for n, t in enumerate(texts)]


@pytest.fixture
def run(base: Make, lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Served]:
    """An adapter of a tiny Llama compared; its GGUF file may be that of another one."""
    pytest.importorskip("xllamacpp", reason=WHY)
    model = base("llama", layers=2, kv_heads=2)

    def compared(scale: float = 1.0, gguf_of: Path = model, given: list[Row] | None = None) -> Served:
        monkeypatch.setenv("LLAMA_CPP", str(write_converter(tmp_path / "llama.cpp", scale)))
        gguf = write_base(tmp_path / "base.gguf", gguf_of)
        adapter = lora(model, alpha=12)
        return compare_gguf(
            models.load(model), load_tokenizer(model), adapter, gguf, rows() if given is None else given, base=model
        )

    return compared


def test_the_same_answers(run: Callable[..., Served]) -> None:
    found = run()
    assert found.ok and found.ran and not found.problems
    first, second = (re.findall(r"(\d+) of (\d+)", note) for note in found.notes)
    assert [one == other for one, other in (*first, *second)] == [True] * 3 and first[1][1] == "8"
    assert int(first[0][1]) > 20
    assert run(given=[]).ok


def test_an_adapter_that_is_not_applied_or_otherwise(run: Callable[..., Served], base: Make) -> None:
    assert run(scale=0.0).problems[0] == SAME
    found = run(scale=-3.0)
    assert (
        not found.ok and "tokens of PEFT's answers are the most likely ones, and 75 % have to be" in found.problems[0]
    )
    found = run(gguf_of=base("llama", layers=2, kv_heads=2, seed=5))
    assert not found.ok and re.match(r"without the adapter \d of \d\d tokens", found.notes[1])


def test_a_file_that_llama_cpp_does_not_load(run: Callable[..., Served], base: Make, tmp_path: Path) -> None:
    found = run(gguf_of=base("llama", layers=2, kv_heads=2, hidden=48))
    assert not found.ok and found.ran and "llama.cpp ended with 1" in found.problems[0]
    assert "Traceback" not in found.problems[0]


def test_what_decides() -> None:
    def judged(wanted: list[int], bare: list[int], found: list[int], without: list[int], effect: float = 0.1) -> Served:
        return _judged([wanted], [bare], [[(n, -1.0) for n in found]], [[(n, -1.0 - effect) for n in without]])

    assert judged([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4], [5, 6, 7, 8]).ok
    assert judged([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 9], [5, 6, 7, 8]).ok, "three of four"
    assert "2 of 4 tokens" in judged([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 9, 9], [5, 6, 7, 8]).problems[0]
    # the tokens do not show it, and the probabilities do
    assert judged([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]).ok
    assert judged([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], effect=0).problems == [SAME]
    # one token shows it, and there it does what the base does, or something else
    assert judged([1, 2, 3, 4], [1, 2, 3, 8], [1, 2, 3, 8], [1, 2, 3, 8]).problems[0] == SAME
    assert "0 of 1 tokens that" in judged([1, 2, 3, 4], [1, 2, 3, 8], [1, 2, 3, 9], [1, 2, 3, 8]).problems[0]
    # a quantized base that answers as the adapter already
    assert judged([1, 2, 3, 4], [1, 2, 3, 8], [1, 2, 3, 4], [1, 2, 3, 4]).ok


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Make, lora: Make) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr("lorasuite.evaluation._llama_cpp.find_spec", lambda name: None)
    why = llama_cpp_missing()
    assert why is not None and "xllamacpp is not installed" in why and "convert_lora_to_gguf.py is not found" in why
    monkeypatch.setenv("LLAMA_CPP", str(write_converter(tmp_path / "llama.cpp")))
    why = llama_cpp_missing()
    assert why is not None and "convert_lora" not in why
    monkeypatch.setattr("lorasuite.evaluation._llama_cpp.find_spec", lambda name: name)
    assert llama_cpp_missing() is None
    for name, content in (("gone", None), ("text", b"GGU"), ("", None)):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=r"is no GGUF file|is not there"):
            check_gguf(tmp_path / name)
    made = tmp_path / "a.gguf"
    convert(lora(base("llama")), base("llama"), made)
    check_gguf(made)


def test_another_converter_is_another_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    monkeypatch.setenv("LLAMA_CPP", str(write_converter(tmp_path)))
    first = llama_cpp_versions()
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "llama.py").write_text("")
    second = llama_cpp_versions()
    assert first["binding"] == second["binding"] == "1" and first["converter"] != second["converter"]
