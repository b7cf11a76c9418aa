"""Forks a process for each migration asked for on standard input: imports are paid once, kills are real.

A request is one JSON line: ``config`` of the migration, ``home``, ``out`` (where the record goes), ``log`` (a line a
computed stage), ``name`` of the flow run, and what is to go wrong: ``kill``, ``hang`` or ``fail`` a stage by name, or
``slow`` seconds for every stage; ``env`` is added to the environment. The process's id is printed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

import flows.migrate_adapter as main
from flows.context import STAGES
from lorasuite.reporting import _publication as publication

#: What a migration imports only where it needs it, from its first stage to its report: most of a short one's time.
LATER = (
    "lm_eval.models.huggingface",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",
    "scipy.optimize",
    "scipy.stats",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
)


def work(request: dict[str, Any]) -> None:
    os.environ.update(LORASUITE_HOME=request["home"], **request.get("env", {}))
    for stage in STAGES.values():
        stage.fn = disturbed(stage.name, stage.fn, request)
    if request.get("kill") == "publish":
        publication.write_report = lambda folder: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    flow = main.migrate_adapter.with_options(flow_run_name=request["name"])
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):  # its thread takes a second to end
        record = flow(request["config"])
    Path(request["out"]).write_text(json.dumps(record))


def disturbed(name: str, fn: Callable[..., Any], request: dict[str, Any]) -> Callable[..., Any]:
    def wrapped(inputs: Any, settings: Any, where: Any) -> Any:
        with Path(request["log"]).open("a") as file:
            file.write(f"{os.getpid()} {name}\n")
        made = fn(inputs, settings, where)
        if request.get("fail") == name:
            raise RuntimeError("a failure on purpose")
        if request.get("hang") == name:
            time.sleep(300)
        if request.get("kill") == name:
            os.kill(os.getpid(), signal.SIGKILL)  # computed, and not yet stored
        time.sleep(request.get("slow", 0))
        return made

    return wrapped


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for module in LATER:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = 1
            try:
                work(json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
