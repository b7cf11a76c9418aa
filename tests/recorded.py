"""What the commands say, recorded: ``python -m tests.recorded`` writes docs/session.md, and a test holds it."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from flows.command_line import app
from lorasuite import zoo

PAGE = Path(__file__).parents[1] / "docs" / "session.md"
#: Columns of the terminal that the page was recorded in.
WIDTH = 100
HEAD = """<!-- Written by python -m tests.recorded: run it again rather than edit this. -->
# A session

What the commands say, recorded with the miniature pair `neox` that is shipped with lorasuite, and a dozen rows. A test
runs them again; it passes over times, sizes and scores, which depend on the machine.
"""
#: Heading, what is said of it, the command, and how many lines of a file are shown behind it.
STEPS = (
    ("Help", "What everyone needs has no heading of its own.", "lorasuite --help", None),
    (
        "A configuration to begin with",
        "The file holds every setting with its meaning; only what was given is switched on.",
        "lorasuite init --adapter ADAPTER --old-base OLD --new-base NEW --output OUT "
        "--train-data train.jsonl --eval-data test.jsonl --calibration texts.jsonl",
        ("migration.yaml", 24),
    ),
    (
        "Before anything heavy",
        "The two bases, what of the adapter would move, every problem, and what it would cost on this machine.",
        "lorasuite inspect --config migration.yaml",
        None,
    ),
    (
        "A migration that cannot run",
        "Every problem at once, before a model is loaded; the command ends with 2 and nothing is written.",
        "lorasuite migrate --config migration.yaml --train-data broken.jsonl --eval-data none.jsonl --device tpu",
        None,
    ),
    (
        "A migration",
        "In a terminal one line says how far it is while it runs, and how long the whole run will still take. With "
        "`--verbose` there are logs, and more tables at the end. A dozen rows teach little, which the verdict says.",
        "lorasuite migrate --config migration.yaml --finetune-samples 12 --method lorasuite",
        None,
    ),
)


def prepare() -> None:
    """The miniature pair and its data, in the working directory."""
    pair = zoo.pair("neox")
    for name, target in {"OLD": pair.old, "NEW": pair.new, "ADAPTER": pair.adapter("mirror")}.items():
        Path(name).symlink_to(target, target_is_directory=True)
    for name, count in (("texts", 12), ("other", 40)):
        zoo.write_rows([{"text": text} for text in zoo.texts("neox", count)], Path(f"{name}.jsonl"))
    zoo.write_rows(
        [{"prompt": row["prompt"]} for row in zoo.rows("neox", "mirror", "train", 12)], Path("prompts.jsonl")
    )
    for name, count in (("train", 12), ("test", 4)):
        zoo.write_rows(zoo.rows("neox", "mirror", name, count, seed=5), Path(f"{name}.jsonl"))
    rows = ['{"prompt": "a"}'] * 3 + ['{"question": "a", "answer": "b"}', "{"]
    Path("broken.jsonl").write_text("\n".join(rows) + "\n")


def session() -> Iterator[tuple[str, int]]:
    """Each step's part of the page, and the exit code of its command."""
    for heading, told, command, file in STEPS:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        # a person in a terminal sees no logs; of a command that fails, the message is on standard error
        said = done.stdout if done.exit_code == 0 else done.output
        lines = "\n".join(line.rstrip() for line in said.strip("\n").splitlines())
        shown = "$ " + command.replace(" --", " \\\n    --") if len(command) > WIDTH else f"$ {command}"
        text = f"\n## {heading}\n\n{told}\n\n```console\n{shown}\n{lines}\n```\n"
        if file is not None:
            name, count = file
            head = "\n".join(Path(name).read_text().splitlines()[:count])
            text += f"\n`{name}` begins so:\n\n```yaml\n{head}\n```\n"
        yield text, done.exit_code


def stable(text: str) -> str:
    """A page without what another machine or another day has otherwise: numbers, rules and widths of tables, the
    estimated cost, what was measured on real pairs so far."""
    text = re.sub(r"cost, here.*?within about a factor", "cost, here", text, flags=re.DOTALL)
    text = re.sub(r"measured elsewhere.*?docs/evidence\.md", "measured elsewhere", text, flags=re.DOTALL)
    text = re.sub(r"[─━╇╈┼╪]+", "─", text)
    text = re.sub(r"[-+−]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?", "#", text)
    return re.sub(r"\s+", " ", text)


def write(home: Path) -> str:
    """The whole page, recorded in a directory of its own."""
    os.environ |= {"COLUMNS": str(WIDTH), "LORASUITE_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1"}
    os.chdir(home)
    prepare()
    return HEAD + "".join(text for text, _ in session())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(write(Path(folder)), encoding="utf-8")
