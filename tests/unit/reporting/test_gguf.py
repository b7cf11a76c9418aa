"""A GGUF LoRA by llama.cpp's converter, of which a small stand-in takes the same arguments."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

from flows.command_line import app
from lorasuite.errors import AdapterError, ConfigError, OutputError
from lorasuite.evaluation import find_converter
from lorasuite.reporting import export_gguf
from tests.gguf_files import write_converter


@pytest.fixture
def adapter(base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path) -> Path:
    """An adapter that names its base."""
    folder = tmp_path / "adapter"
    shutil.copytree(lora(base("llama")), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base("llama"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    return write_converter(tmp_path / "llama.cpp")


def test_an_adapter_is_converted(adapter: Path, llama_cpp: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "adapter.gguf"
    done = CliRunner().invoke(app, ["export", str(adapter), "--output", str(out), "--llama-cpp", str(llama_cpp)])
    assert done.exit_code == 0, done.output
    read = gguf.GGUFReader(out)
    assert len(read.tensors) > 0 and read.fields["adapter.lora.alpha"].contents() > 0
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (out.parent / "Modelfile").read_text() == f"FROM {named}\nADAPTER ./adapter.gguf\n"
    assert sorted(path.name for path in out.parent.iterdir()) == ["Modelfile", "adapter.gguf"]
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(adapter, out, llama_cpp=llama_cpp)


def test_where_the_converter_is_not(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ConfigError, match=r"is not found. Get it with `git clone .*--llama-cpp DIR"):
        export_gguf(adapter, tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match=r"holds no convert_lora_to_gguf\.py"):
        find_converter(tmp_path)
    script = tmp_path / "llama-convert-lora-to-gguf"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert find_converter() == [str(script)]
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        find_converter()


def test_what_cannot_be_converted(
    adapter: Path, llama_cpp: Path, base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "made" / "a.gguf"
    (llama_cpp / "convert_lora_to_gguf.py").write_text("import sys; sys.exit('Model FooForCausalLM is not supported')")
    with pytest.raises(AdapterError, match="ended with 1 and wrote no GGUF file: Model FooForCausalLM"):
        export_gguf(adapter, out, llama_cpp=llama_cpp)
    assert not out.exists() and not list(out.parent.iterdir())
    with pytest.raises(AdapterError, match=r"llama\.cpp does not take it"):
        export_gguf(lora(base("gpt2")), out, base=str(base("gpt2")), llama_cpp=llama_cpp)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_config.json"):
        export_gguf(adapter, out, llama_cpp=llama_cpp)
