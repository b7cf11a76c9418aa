"""What the loaders that an adapter may be served with do with the published one."""

from __future__ import annotations

from pathlib import Path

from flows.context import Context
from lorasuite.evaluation import Served, check, llama_cpp_missing, llama_cpp_versions
from lorasuite.planning import MigrationConfig
from tasks.evaluation_stages import llama_cpp, serving
from tasks.fingerprints import fingerprint_file
from tasks.folders import adapter_folder
from tasks.stage import Ref


def served(context: Context, settings: MigrationConfig, adapter: Ref, rows: Ref | None) -> dict[str, Served]:
    """By loader: PEFT and plain transformers, which are run; vLLM and llama.cpp, whose rules are read; llama.cpp is run
    where the new base's GGUF file is given and what that needs is there.

    Args:
        rows: the held-out rows, if there are any.
    """
    inputs = {**context.base("new"), **({"rows": rows} if rows is not None else {}), "adapter": adapter}
    paths = context.base_path("new")
    found = _info(context, context.run(serving, inputs, {}, paths=paths))
    found |= check(adapter_folder(context.open(adapter)), context.where.path("new_base"))
    if settings.serving_gguf is None:
        return found
    why = llama_cpp_missing()
    if why is not None:
        return {**found, "llama.cpp": found["llama.cpp"].model_copy(update={"not_run": why})}
    gguf = Path(settings.serving_gguf)
    inputs["gguf"] = fingerprint_file(gguf)
    return found | _info(context, context.run(llama_cpp, inputs, llama_cpp_versions(), paths={**paths, "gguf": gguf}))


def _info(context: Context, ref: Ref) -> dict[str, Served]:
    return {loader: Served.model_validate(found) for loader, found in context.open(ref).info.items()}
