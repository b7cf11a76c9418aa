"""An adapter as a GGUF LoRA for llama.cpp and Ollama, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorasuite.adapters import CONFIG
from lorasuite.bases import read_json, resolve
from lorasuite.errors import AdapterError, ConfigError, OutputError, Problem
from lorasuite.evaluation import check
from lorasuite.reporting._files import RECORD
from lorasuite.reporting._record import MigrationRecord

#: llama.cpp's converter, in a checkout of it.
CONVERTER = "convert_lora_to_gguf.py"
#: The same, where its scripts are installed.
INSTALLED = "llama-convert-lora-to-gguf"
#: Names the directory of a checkout.
LLAMA_CPP = "LLAMA_CPP"
_HOW = (
    f"Get it with `git clone https://github.com/ggml-org/llama.cpp` and `pip install gguf`, and give the directory: "
    f"--llama-cpp DIR, or {LLAMA_CPP} in the environment."
)
#: Lines of what a failed converter said that are shown.
SHOWN = 5


def find_converter(given: Path | None = None) -> list[str]:
    """The command that runs llama.cpp's converter.

    Args:
        given: a checkout of llama.cpp, or the script itself; if None ``$LLAMA_CPP``, or what is on the path.

    Raises:
        ConfigError: it is not there.
    """
    named = given if given is not None else Path(os.environ[LLAMA_CPP]) if os.environ.get(LLAMA_CPP) else None
    if named is not None:
        script = named / CONVERTER if named.is_dir() else named
        if not script.is_file():
            raise ConfigError(Problem(str(named), f"holds no {CONVERTER}", _HOW))
        return [sys.executable, str(script)]
    if (script_on_path := shutil.which(CONVERTER)) is not None:
        return [sys.executable, script_on_path]
    if (installed := shutil.which(INSTALLED)) is not None:
        return [installed]
    raise ConfigError(Problem("llama.cpp", f"its {CONVERTER} is not found", _HOW))


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
        llama_cpp: as of :func:`find_converter`.
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
    refused = check(folder, path)["llama.cpp"].problems
    if refused:
        remedy = "Merge the adapter into its base (PEFT's merge_and_unload), and convert that."
        raise AdapterError([Problem(str(folder), f"llama.cpp does not take it: {what}", remedy) for what in refused])
    command = find_converter(llama_cpp)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        made = Path(scratch) / output.name
        _convert([*command, "--base", str(path), "--outtype", outtype, "--outfile", str(made), str(folder)], made)
        made.rename(output)
    modelfile.write_text(f"FROM {path}\nADAPTER ./{output.name}\n", encoding="utf-8")
    return modelfile


def _convert(command: Sequence[str], made: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and made.is_file() and made.read_bytes()[:4] == b"GGUF":
        return
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-SHOWN:]
    what = f"ended with {done.returncode} and wrote no GGUF file: " + " / ".join(said)
    remedy = "Its own requirements must be installed (pip install gguf), and it must know the base: try a newer one."
    raise AdapterError(Problem(command[-1], f"{CONVERTER} {what}", remedy))
