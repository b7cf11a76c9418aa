"""A flow with one stage that tells what its process may see; for tests of workers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from artifacts import default_home
from tasks.stage import Where, stage


@stage("probe")
def look(inputs: Mapping[str, Any], settings: Any, where: Where) -> dict[str, Any]:
    """The environment; or nothing for a long time, where a file says so."""
    wait = where.path("wait")
    (wait.parent / f"{wait.name}.pid").write_text(f"{os.getpid()} {os.getppid()}")
    while wait.exists():
        time.sleep(0.1)
    return {"devices": os.environ.get("CUDA_VISIBLE_DEVICES", "unset"), "pid": os.getpid()}


@flow
def probe(name: str, folder: str) -> dict[str, Any]:
    where = Where(paths={"wait": Path(folder, f"wait-{name}")})
    ref = look.run(inputs={"name": name}, where=where)
    found = where.store().open(ref.key).info
    Path(folder, name).write_text(f"{found['devices']} {default_home()}")
    return found
