"""What the command line loads before it has anything to compute."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "prefect", "peft", "lm_eval", "matplotlib", "scipy")
CODE = """
import sys
sys.argv = ["lorasuite", *{arguments}]
from flows.command_line import main
try:
    main()
finally:
    sys.stderr.write("loaded: " + ",".join(sorted({heavy} & set(sys.modules))))
"""


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["migrate", "--help"], set()),
        (["migrate", "--adapter", "a"], set()),  # a setting is missing
        (["migrate", "--adapter", "./a", "--old-base", "./b", "--new-base", "./c", "--output", "d"], {"torch"}),
        (["inspect", "--old-base", "./b", "--new-base", "./c"], {"torch"}),
    ],
)
def test_what_is_loaded(arguments: list[str], allowed: set[str]) -> None:
    """Help and a missing setting need nothing heavy; a missing directory is told without Prefect or transformers."""
    code = CODE.format(arguments=arguments, heavy=set(HEAVY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    loaded = {name for name in done.stderr.rpartition("loaded: ")[2].split(",") if name}
    assert loaded <= allowed
