"""What orchestration costs: the wall time of a migration in which every stage is cached, and where it goes.

    python benchmarks/overhead.py [--runs 3]

Builds a tiny random pair, migrates once to fill the store, then migrates again and again with a server running, each
time in a process of its own as a user would; and once without a server, where Prefect starts one for the command.
Figures are seconds, the median of the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CHILD = """
import json, sys, time
begun = float(sys.argv[1])
spent = {"interpreter": time.time() - begun}
mark = time.perf_counter()
import flows.migrate_adapter as main
spent["imports"] = time.perf_counter() - mark

def timed(owner, name):
    inner = getattr(owner, name)
    def wrapped(*args, **kwargs):
        mark = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0) + time.perf_counter() - mark
    setattr(owner, name, wrapped)

for name in ("check", "publish", "migration_context", "show_pair", "show_migration"):
    timed(main, name)
timed(main.Measured, "comparisons")
mark = time.perf_counter()
record = main.migrate_adapter(json.loads(sys.argv[2]))
spent["flow"] = time.perf_counter() - mark
spent["stages"] = sum(row["seconds"] for row in record["timings"])
assert "--fill" in sys.argv or all(row["cached"] for row in record["timings"])
print(json.dumps({"spent": spent, "stages": len(record["timings"])}))
"""


def migrate(config: dict[str, Any], environment: dict[str, str], *flags: str) -> dict[str, Any]:
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(begun), json.dumps(config), *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall = time.time() - begun
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found["spent"], "wall": wall, "number": found["stages"]}


@contextlib.contextmanager
def server(environment: dict[str, str], port: int) -> Iterator[str]:
    import httpx

    api = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    process = subprocess.Popen(
        command, env={**environment, "PREFECT_API_URL": api}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{api}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield api
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--port", type=int, default=4299)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.flows.small import Small

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = Small.build(root / "small")
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
            "LORASUITE_HOME": str(root / "home"),
            "PREFECT_HOME": str(root / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        data = {"eval_data": str(small.root / "test.jsonl"), "evaluation": {"generate": False}}

        def config(name: str) -> dict[str, Any]:
            return small.settings("one", root / name, **data)

        with server(environment, arguments.port) as api:
            served = {**environment, "PREFECT_API_URL": api}
            migrate(config("fill"), served, "--fill")
            runs = [migrate(config(f"run-{n}"), served) for n in range(arguments.runs)]
        alone = migrate(config("alone"), environment)
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    library = sum(found[name] for name in ("imports", "check", "comparisons", "publish"))
    rest = found["flow"] - sum(
        found[name] for name in ("check", "comparisons", "publish", "migration_context", "stages")
    )
    rest -= found["show_pair"] + found["show_migration"]
    rows = {
        "wall time": found["wall"],
        "  the library's own: imports of torch, transformers, peft, Prefect": found["imports"],
        "  the library's own: checks before the run (imports transformers' models)": found["check"],
        "  the library's own: arms compared, intervals (imports scipy.stats)": found["comparisons"],
        "  the library's own: publishing, report": found["publish"],
        f"  {int(found['number'])} cached stages as Prefect tasks": found["stages"],
        "  fingerprints of models and adapter": found["migration_context"],
        "  artifacts for the dashboard": found["show_pair"] + found["show_migration"],
        "  flow run: states, heartbeat, logs": rest,
        "  interpreter, exit": found["wall"] - found["imports"] - found["flow"],
        "overhead: all but the library's own": found["wall"] - library,
        "wall time without a running server": alone["wall"],
    }
    for name, seconds in rows.items():
        print(f"{name:72s}{seconds:7.2f}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
