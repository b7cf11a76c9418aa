"""An adapter as a GGUF LoRA for llama.cpp and Ollama, by llama.cpp's own converter."""

from __future__ import annotations

from pathlib import Path

from lorasuite.adapters import CONFIG
from lorasuite.bases import read_json, resolve
from lorasuite.errors import AdapterError, ConfigError, OutputError, Problem
from lorasuite.evaluation import convert
from lorasuite.reporting._files import RECORD
from lorasuite.reporting._record import MigrationRecord


def base_of(folder: Path) -> str:
    """The base that an adapter's directory names: in the record of its migration, or its config.

    Raises:
        ConfigError: it names none.
        AdapterError: it is no adapter's directory.
    """
    if (folder / RECORD).is_file():
        base = MigrationRecord.read(folder / RECORD).new_base
        return base.id + (f"@{base.revision}" if base.revision else "")
    if not (folder / CONFIG).is_file():
        raise AdapterError(Problem(str(folder), f"holds no {CONFIG}", "Give the output directory of a migration."))
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not named:
        raise ConfigError(Problem(str(folder), "names no base", "Give --base."))
    return str(named)


def export_gguf(
    folder: Path, output: Path, *, base: str | None = None, llama_cpp: Path | None = None, outtype: str = "f16"
) -> Path:
    """Convert an adapter, and write an Ollama ``Modelfile`` beside it.

    Args:
        folder: a PEFT adapter's directory, such as a migration's output.
        output: the GGUF file, in a directory of its own or in one that is there.
        base: the base it is for, if not the one its directory names; of it only configs and tokenizer are read.
        llama_cpp: as of :func:`lorasuite.evaluation.find_converter`.
        outtype: precision of the factors in the file: f32, f16, bf16 or q8_0.

    Returns:
        the Modelfile.

    Raises:
        OutputError: the file or the Modelfile exists.
        ConfigError: the converter is not there, or no base is named.
        AdapterError: llama.cpp cannot hold the adapter, or its converter fails.
        CheckpointError: the base cannot be read.
    """
    modelfile = output.parent / "Modelfile"
    taken = [path for path in (output, modelfile) if path.exists()]
    if taken:
        raise OutputError([Problem(str(path), "exists already", "Give another --output.") for path in taken])
    path = resolve(base or base_of(folder))
    convert(folder, path, output, llama_cpp=llama_cpp, outtype=outtype)
    modelfile.write_text(f"FROM {path}\nADAPTER ./{output.name}\n", encoding="utf-8")
    return modelfile
