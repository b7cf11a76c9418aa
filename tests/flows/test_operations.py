"""The commands of docs/operations.md, as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.small import Small
from tests.flows.upped import ROOT, Up

BLOCKS = re.findall(r"^```bash([^\n]*)\n(.*?)^```", (ROOT / "docs" / "operations.md").read_text(), flags=re.M | re.S)


def test_every_block_says_who_runs_it() -> None:
    assert len(BLOCKS) > 5
    for flag, text in BLOCKS:
        if flag.strip() == "run":
            continue
        first = text.splitlines()[0]
        assert first.startswith(("# run by tests/", "# not run by a test")), first
        for named in re.findall(r"tests/\w+/\w+\.py", first):
            assert (ROOT / named).is_file()


def test_the_commands(up: Up, environment: dict[str, str], small: Small, tmp_path: Path) -> None:
    for name in ("deploy", "flows"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models").symlink_to(small.root / "bases")
    small.fleet(tmp_path / "fleet.yaml", ("one",))
    programs = {"prefect": "-m prefect", "lorasuite": "-c 'from flows.command_line import main; main()'"}
    (tmp_path / "bin").mkdir()
    for name, arguments in programs.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    script = "".join(text for flag, text in BLOCKS if flag.strip() == "run")
    done = subprocess.run(
        ["bash", "-euxc", script],
        cwd=tmp_path,
        env={**environment, "PREFECT_API_URL": up.api, "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    if done.returncode != 0:
        pytest.fail(done.stdout[-3000:] + done.stderr[-3000:])
    assert "gpu-61" in done.stdout
