"""The commands for what a migration wrote: ``report``, ``push`` and ``export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.cli_output import RUN, Json, errors, print_json
from lorasuite import reporting

Private = Annotated[
    bool, typer.Option("--private/--public", help="of a Hub repository that is created", rich_help_panel=RUN)
]


class Outtype(StrEnum):
    """Precisions of a GGUF LoRA."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


def report(
    folder: Annotated[Path, typer.Argument(help="output directory of a migration or of a fleet")],
    as_json: Json = False,
) -> None:
    """Build, or build again, the HTML report of a migration or of a fleet."""
    with errors(as_json):
        path = reporting.write_report(folder)
        print_json({"report": str(path)}) if as_json else Console().print(str(path))


def push(
    folder: Annotated[Path, typer.Argument(help="output directory of a migration")],
    repo: Annotated[str, typer.Argument(help="Hub repository, as owner/name")],
    private: Private = True,
    as_json: Json = False,
) -> None:
    """Upload the adapter and the card of a finished migration to the Hub, as one commit."""
    with errors(as_json):
        reporting.check_target(repo, reporting.MigrationRecord.read(folder / reporting.RECORD).new_base.id)
        url = reporting.push(folder, repo, private=private)
        print_json({"pushed": url}) if as_json else Console().print(url)


def export(
    folder: Annotated[Path, typer.Argument(help="output directory of a migration, or any PEFT adapter")],
    output: Annotated[Path, typer.Option(help="GGUF file to write; a Modelfile for Ollama is put beside it")],
    base: Annotated[str | None, typer.Option(help="base it is for; the one its directory names if unset")] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp",
            help="checkout of llama.cpp, or its convert_lora_to_gguf.py; if unset $LLAMA_CPP, or what is on the path",
        ),
    ] = None,
    outtype: Annotated[Outtype, typer.Option(help="precision of the factors in the file")] = Outtype.F16,
    as_json: Json = False,
) -> None:
    """Convert an adapter to a GGUF LoRA for llama.cpp (`--lora`) and Ollama (`ADAPTER`), by llama.cpp's converter."""
    with errors(as_json):
        modelfile = reporting.export_gguf(folder, output, base=base, llama_cpp=llama_cpp, outtype=outtype.value)
        if as_json:
            print_json({"gguf": str(output), "modelfile": str(modelfile)})
        else:
            Console().print(f"written to {output}, and {modelfile} for Ollama", highlight=False, soft_wrap=True)
