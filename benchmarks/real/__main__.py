"""Really pretrained bases and real tasks: the cells of a grid, run where they are missing, and kept one file each.

    python -m benchmarks.real run --old-base OLD --new-base NEW --task NAME --train ROWS --test ROWS \\
        --grid all-linear --work DIR [--adapter DIR] [--calibration TEXTS] [--describe TEXT] [--only TABLE …]
    python -m benchmarks.real collect …                the same arguments: cells of a run that goes on or was killed
    python -m benchmarks.real tables
    python -m benchmarks.real pair --name OLD--NEW --old-base OLD --new-base NEW --calibration TEXTS
    python -m benchmarks.real predict
    python -m benchmarks.real keep --task NAME OUTPUT

``OLD`` and ``NEW`` are directories or Hub ids, ``ROWS`` and ``TEXTS`` files that ``lorasuite migrate`` reads. A grid
is an experiment file without a pair and tasks (docs/experiments.md): one of this directory by name, or any file. Every
cell is made of the stages of a migration, so a run that is killed goes on where it was, and artifacts of the pair that
are in the store already are used. ``--work`` takes the experiment file with its paths, and its tables. What was
measured goes into ``benchmarks/real/cells``: one JSON file a cell, without a path of this machine. ``tables`` writes
the tables of ``docs/evidence.md`` and the picture beside them from those files. ``predict`` asks whether cheap
statistics tell beforehand what a way will do, cells and pairs left out in turn, and writes the answer into the same
page and into what ``lorasuite inspect --calibration`` shows (``tables`` does that, too); ``pair`` computes the
statistics of a pair that it reads. ``keep`` keeps the record of a whole ``lorasuite migrate``, from the directory that
it wrote, for the page's table of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plugins import register_plugins

HERE = Path(__file__).parent
CELLS = HERE / "cells"
PAGE = HERE.parents[1] / "docs" / "evidence.md"
README = HERE.parents[1] / "README.md"


def main(given: Sequence[str] | None = None) -> None:
    """Run a command of this module.

    Args:
        given: its arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "collect"):
        one = commands.add_parser(name)
        one.add_argument(
            "--grid",
            required=True,
            type=_grid,
            help="one of this directory by name (all-linear, paper, discovery), or a file",
        )
        one.add_argument("--old-base", required=True)
        one.add_argument("--new-base", required=True)
        one.add_argument("--task", required=True, help="its name in the results")
        one.add_argument("--train", required=True)
        one.add_argument("--test", required=True)
        one.add_argument("--adapter", help="of the old base; one is trained if not given")
        one.add_argument("--calibration", help="texts; the training rows if not given")
        one.add_argument("--describe", help="what the task is, in a sentence, for prompts that are made from it")
        one.add_argument("--max-new-tokens", type=int, help="of an answer; the grid's if not given")
        one.add_argument("--seeds", nargs="*", type=int, help="the grid's if not given")
        one.add_argument("--work", type=Path, required=True)
        one.add_argument("--cells", type=Path, default=CELLS)
        one.add_argument("--only", nargs="*", default=(), help="tables of the grid")
    tables = commands.add_parser("tables")
    tables.add_argument("--cells", type=Path, default=CELLS)
    tables.add_argument(
        "--page", type=Path, help="with marked places that the tables go to; docs/evidence.md and README"
    )
    predict = commands.add_parser("predict")
    predict.add_argument("--cells", type=Path, default=CELLS)
    predict.add_argument("--page", type=Path, default=PAGE, help="the file with the marked place that the tables go to")
    pair = commands.add_parser("pair")
    pair.add_argument("--name", required=True, help="of its cells: OLD--NEW without directories, or a miniature pair")
    pair.add_argument("--old-base", required=True)
    pair.add_argument("--new-base", required=True)
    pair.add_argument("--calibration", required=True)
    kept = commands.add_parser("keep")
    kept.add_argument("--task", required=True, help="what the held-out rows are of")
    kept.add_argument("output", type=Path, help="the directory that lorasuite migrate wrote")
    arguments = parser.parse_args(given)
    if arguments.command == "keep":
        from benchmarks.real.default import keep

        print(keep(arguments.output, arguments.task))
        return
    if arguments.command in ("tables", "predict", "pair"):
        from benchmarks.real import predict as prediction
    if arguments.command in ("predict", "pair"):
        if arguments.command == "predict":
            prediction.write(arguments.cells, arguments.page)
        else:
            bases = (arguments.old_base, arguments.new_base)
            print(prediction.describe(arguments.name, *bases, arguments.calibration))
        return
    if arguments.command == "tables":
        from benchmarks.real.tables import filled, read, write

        write(arguments.cells, arguments.page or PAGE)
        if arguments.page is None:
            prediction.write(arguments.cells, PAGE)
            README.write_text(filled(README.read_text(encoding="utf-8"), read(arguments.cells)), encoding="utf-8")
        return
    from benchmarks.real.grid import collect, experiment_file
    from flows.run_experiment import run_experiment

    register_plugins()
    file = experiment_file(
        arguments.grid,
        arguments.work,
        (arguments.old_base, arguments.new_base),
        arguments.task,
        {
            "train_data": arguments.train,
            "eval_data": arguments.test,
            "adapter": arguments.adapter,
            "calibration": arguments.calibration,
        },
        {"describe": arguments.describe, "evaluation.max_new_tokens": arguments.max_new_tokens},
        arguments.seeds,
    )
    try:
        if arguments.command == "run":
            run_experiment(str(file), str(file.with_suffix("")), only=tuple(arguments.only))
    finally:
        print(f"{collect(file, arguments.cells)} cells in {arguments.cells}")


def _grid(name: str) -> Path:
    """The file of a grid of this directory by name, or the file named."""
    known = {path.stem: path for path in HERE.glob("*.yaml")}
    if name not in known and not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"no grid {name!r}: there are {', '.join(sorted(known))}; or give a file")
    return known.get(name, Path(name))


if __name__ == "__main__":
    main()
