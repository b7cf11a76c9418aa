"""One migration as the command line runs it: found done, or run, or found whole although something failed behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifacts import default_home
from flows.cli_output import err, has_progress_line, progress_line
from lorasuite import reporting
from lorasuite.planning import MigrationConfig


def migrated(settings: MigrationConfig, refresh: tuple[str, ...], as_json: bool, verbose: bool) -> dict[str, Any]:
    """What is in the output directory: its record with ``output``, and ``done_before`` where it was there already."""
    done = None if refresh else _finished(settings)
    if done is not None:
        return done
    from lorasuite.planning import check

    # before a flow run exists, and before Prefect is there: bad input should cost nothing
    plan = check(settings, default_home(), timed=has_progress_line(as_json, verbose))
    seconds = {row["stage"]: row["seconds"] for row in plan.inspection.cost["stages"] if row["seconds"] is not None}
    with progress_line(as_json, verbose, seconds):
        from flows.migrate_adapter import migrate_adapter

        try:
            return migrate_adapter(settings.model_dump(mode="json"), refresh=refresh)
        except Exception as error:
            result = _finished(settings)
            if result is None:
                raise
            told = f"note: {settings.output} is whole; something failed behind its publication ({error})"
            err.print(told, markup=False, highlight=False)
            return {name: value for name, value in result.items() if name != "done_before"}


def _finished(settings: MigrationConfig) -> dict[str, Any] | None:
    """What is in the output already, where that is what this migration would write."""
    try:
        if not (Path(settings.output) / reporting.RECORD).is_file():
            return None
    except OSError:  # no name that a directory can have: the check of the settings says so
        return None
    from flows.finished import finished

    return finished(settings)
