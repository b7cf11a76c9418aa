"""Many adapters, one or more pairs of bases: each pair prepared once, each adapter migrated, one table of verdicts."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.logging.loggers import get_run_logger
from prefect.runtime import flow_run

from artifacts import default_home
from flows.allowed import Allowed, deployed
from flows.context import check_stages, fetch, ready_adapter
from flows.finished import finished, finished_record
from flows.migrate_adapter import migrate_adapter
from flows.migrate_adapter import run_name as migrate_adapter_name
from flows.prepare_pair import prepare_pair
from flows.prepare_pair import run_name as prepare_pair_name
from flows.teach import write_ahead
from lorasuite.adapters import open_adapters, sources
from lorasuite.bases import Checkpoint, Role, resolve
from lorasuite.errors import LoRASuiteError, OutputError, Problem, foreseen
from lorasuite.planning import (
    AUTO,
    MigrationConfig,
    RowCounts,
    build,
    chosen,
    fleet_output,
    plan_rows,
    read_fleet,
    usable,
)
from lorasuite.reporting import RECORD, REPORT, MigrationRecord, write_fleet
from tasks.fingerprints import fingerprint_bases

#: Deployments that a fleet's runs go to when it is spread over workers.
MIGRATE, PREPARE = "migrate-adapter/migrate-adapter", "prepare-pair/prepare-pair"

#: Seconds between two looks at the runs of a fleet.
POLL = 1.0

Fleet = Mapping[str, MigrationConfig]
#: Starts runs of a deployment by name, waits for all of them, and gives each one's outcome, None where it went well.
Start = Callable[[str, Mapping[str, dict[str, Any]]], dict[str, "Failure | None"]]


class Failure(Exception):
    """Why one adapter failed, and the command that tries it again where it is not the fleet's own."""

    def __init__(self, reason: str, retry: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.retry = reason, retry


class FleetIncomplete(LoRASuiteError, RuntimeError):
    """Some adapters failed; ``result`` holds every adapter's verdict."""

    def __init__(self, result: dict[str, Any]) -> None:
        failed = [row for row in result["adapters"] if row["verdict"] == "failed"]
        problems = [Problem(row["name"], row["reason"], f"Retry: {row['retry']}") for row in failed]
        super().__init__(problems)
        self.result = result


def _run_name() -> str:
    given = flow_run.parameters
    source = given.get("fleet")
    name = Path(source).stem if isinstance(source, str) else "fleet"
    return f"{name} → {Path(given['new_base']).name}" if given.get("new_base") else name


@flow(name="migrate-fleet", flow_run_name=_run_name, validate_parameters=False)
def migrate_fleet(
    fleet: str | dict[str, Any],
    new_base: str | None = None,
    old_base: str | None = None,
    only: Sequence[str] = (),
    workers: bool = False,
    refresh: Sequence[str] = (),
) -> dict[str, Any]:
    """Migrate what is missing of a fleet, and give a verdict on every adapter.

    Args:
        fleet: the YAML file, or its content; in a run of a deployment the name of a fleet that is registered with its
            worker, and nothing else.
        new_base: take this new base in place of the file's.
        old_base: only the pairs with this old base.
        only: names of adapters.
        workers: run pairs and adapters as runs of their deployments, on the workers of those; else in this process.
        refresh: names of stages to compute again, in adapters that are not done yet.

    Returns:
        ``adapters``: a row each with ``name``, ``verdict``, ``reason``, ``output``, ``cached``, ``seconds``, ``retry``;
        ``verdicts``: how many of each; ``report``: the fleet's own page.

    Raises:
        ConfigError: if the fleet is not registered, cannot be read, or asks for what its worker does not allow.
        FleetIncomplete: if adapters failed, after all others were migrated.
    """
    new_base, old_base = new_base or None, old_base or None  # an event without one gives an empty text
    refreshed = tuple(sorted(check_stages(tuple(refresh))))
    allowed = Allowed.here() if deployed() else None
    if allowed is not None:
        fleet = str(allowed.fleet(fleet))
    parts = chosen(read_fleet(fleet, old_base=old_base, new_base=new_base), tuple(only))
    if allowed is not None:
        allowed.check(parts.values())
    log = get_run_logger()
    start: Start = _deployed if workers else _in_process
    done, failures, missing = _look(parts)
    log.info("%d adapters: %d done before, %d to migrate", len(parts), len(done), len(missing))
    failures |= _prepare(missing, start, refreshed)
    todo = {name: config for name, config in missing.items() if name not in failures}
    if not workers:
        write_ahead(todo.values(), frozenset(refreshed))
    begun = time.perf_counter()
    outcomes = start(
        MIGRATE,
        {name: {"config": c.model_dump(mode="json"), "refresh": list(refreshed)} for name, c in todo.items()},
    )
    log.info("%d adapters migrated in %.1f s", len(todo), time.perf_counter() - begun)
    failures |= {name: failure for name, failure in outcomes.items() if failure is not None}
    again = _retry_command(fleet, old_base, new_base)
    rows = [_row(name, config, failures.get(name), name in done, again) for name, config in parts.items()]
    result = {
        "adapters": rows,
        "verdicts": {v: sum(row["verdict"] == v for row in rows) for v in dict.fromkeys(r["verdict"] for r in rows)},
    }
    name = Path(fleet).name if isinstance(fleet, str) else None
    result["report"] = str(write_fleet(fleet_output(fleet), result, name))
    create_table_artifact(
        [{key: row[key] for key in SHOWN} for row in rows], key="fleet-verdicts", description="Verdicts of the fleet"
    )
    for row in rows:
        log.info("%s: %s (%s)", row["name"], row["verdict"], row["reason"])
    if failures:
        raise FleetIncomplete(result)
    return result


SHOWN = ("name", "pair", "verdict", "reason", "cached", "output", "retry")


def _look(parts: Fleet) -> tuple[set[str], dict[str, Failure], dict[str, MigrationConfig]]:
    """Which adapters are done, which cannot be begun, and which are to be migrated."""
    done: set[str] = set()
    failures: dict[str, Failure] = {}
    missing: dict[str, MigrationConfig] = {}
    bases: dict[tuple[str, str], dict[str, str]] = {}
    for name, config in parts.items():
        try:
            pair = (config.old_base, config.new_base)
            fetch(*pair, *sources(config.adapter))
            if pair not in bases:
                bases[pair] = fingerprint_bases.fn(default_home(), resolve(pair[0]), resolve(pair[1]))
            base = Checkpoint(config.old_base)
            # one that cannot be read is told now
            ready_adapter(config.adapter, base, bases[pair]["old_model"], config.allow_pickle)
            if _finished(config, bases[pair]):
                done.add(name)
            else:
                missing[name] = config
        except Exception as error:  # one adapter's trouble is not another's
            failures[name] = Failure(_reason(error))
    return done, failures, missing


def _finished(config: MigrationConfig, bases: Mapping[str, str]) -> bool:
    """Whether the output is there already, made of the same inputs.

    Raises:
        OutputError: if the directory holds anything else, which a migration would not overwrite.
    """
    output = Path(config.output)
    if not output.exists():
        return False
    if finished_record(config, bases) is None:
        raise OutputError(
            Problem(str(output), "holds something other than these inputs' migration", "Move it, or change `output`.")
        )
    return True


def _prepare(parts: Fleet, start: Start, refresh: tuple[str, ...]) -> dict[str, Failure]:
    """Compute each pair's artifacts once, before adapters race for them; the adapters of pairs that failed.

    Maps are of the projections that adapters have updates of: adapters of others have a run of their own, which finds
    what both share.
    """
    groups: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    failures: dict[str, Failure] = {}
    for name, config in parts.items():
        try:
            roles, methods = _read(config)
        except Exception as error:  # one adapter's trouble is not another's
            failures[name] = Failure(_reason(error))
            continue
        given = {
            "old_base": config.old_base,
            "new_base": config.new_base,
            "calibration": config.calibration_data,
            "settings": config.pair.model_dump(mode="json"),
            "device": config.device,
            "trust_remote_code": config.trust_remote_code,
            "columns": config.columns,
            "template": config.template,
            "roles": roles,
        }
        group = repr(given)
        known = groups.setdefault(group, {**given, "methods": [], "refresh": list(refresh)})
        known["methods"] += [method for method in methods if method not in known["methods"]]
        members.setdefault(group, []).append(name)
    outcomes = start(PREPARE, groups)
    for group, failure in outcomes.items():
        if failure is not None:
            failures |= dict.fromkeys(members[group], failure)
    return failures


def _read(config: MigrationConfig) -> tuple[list[Role], list[str]]:
    """The roles of one adapter, and the transforms that its migration tries, by what is known before rows are read."""
    old, new = Checkpoint(config.old_base), Checkpoint(config.new_base)
    adapter = open_adapters(config.adapter, config.allow_pickle)
    roles = list(adapter.roles(old.architecture))
    if config.method != AUTO:
        return roles, [config.method]
    trains, texts = plan_rows(config, RowCounts()).fine_tunes, config.calibration_data is not None
    given = {"plain": adapter.plain(old.architecture), "texts": texts, "trains": trains}
    return roles, usable(config.tried(trains), old, new, roles, **given, mapped=config.maps_layers)


def _in_process(deployment: str, runs: Mapping[str, dict[str, Any]]) -> dict[str, Failure | None]:
    """One run after another, as subflows of this one."""
    started: Any = {MIGRATE: migrate_adapter, PREPARE: prepare_pair}[deployment]
    outcomes: dict[str, Failure | None] = {}
    for name, parameters in runs.items():
        state: State[Any] = started(**parameters, return_state=True)
        outcomes[name] = None
        if state.is_completed():
            continue
        # what failed behind the publication is no failure of the adapter
        if deployment != MIGRATE or finished(build(MigrationConfig, parameters["config"])) is None:
            error = state.result(raise_on_failure=False)
            outcomes[name] = Failure(_reason(error) if isinstance(error, Exception) else str(state.message))
    return outcomes


def _deployed(deployment: str, runs: Mapping[str, dict[str, Any]]) -> dict[str, Failure | None]:
    """All runs at once, as runs of a deployment: its workers take them as they are free."""
    attempt = f"{flow_run.id}-{flow_run.run_count}"
    naming = {MIGRATE: migrate_adapter_name, PREPARE: prepare_pair_name}[deployment]
    waiting: dict[str, Any] = {}
    for name, parameters in runs.items():
        run: Any = run_deployment(
            deployment,
            parameters=parameters,
            flow_run_name=naming(parameters),  # until a worker starts it, the dashboard shows it under this name, too
            timeout=0,
            idempotency_key=f"{attempt}-{deployment}-{name}",
        )
        waiting[name] = run.id
    outcomes: dict[str, Failure | None] = {}
    with get_client(sync_client=True) as client:
        while waiting:
            for name, run_id in list(waiting.items()):
                state = client.read_flow_run(run_id).state
                if state is not None and state.is_final():
                    del waiting[name]
                    why = (state.message or state.name or "").removeprefix("Flow run encountered an exception: ")
                    retry = f"prefect flow-run retry {run_id}"
                    outcomes[name] = None if state.is_completed() else Failure(_one_line(why), retry)
            if waiting:
                time.sleep(POLL)
    return outcomes


def _row(name: str, config: MigrationConfig, failure: Failure | None, cached: bool, again: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "pair": f"{Path(config.old_base).name} → {Path(config.new_base).name}",
        "adapter": config.adapter,
        "output": config.output,
        "cached": cached,
        "seconds": 0.0,
        "retry": None,
    }
    if failure is None:
        try:
            record = MigrationRecord.read(Path(config.output) / RECORD)
        except LoRASuiteError as error:  # made by a worker whose disk is not this one's
            failure = Failure(_reason(error))
        else:
            # judged here, so that a changed gate needs no new migration
            judged = record.judge(config.gate)
            if not cached:
                row["seconds"] = round(sum(run.seconds for run in record.timings), 2)
            report = str(Path(config.output) / REPORT)
            return row | {
                "verdict": judged.verdict,
                "reason": record.reason(judged),
                "kept": judged.kept,
                "kept_interval": judged.kept_interval,
                "report": report,
            }
    retry = failure.retry or f"{again} --only {shlex.quote(name)}"
    return row | {"verdict": "failed", "reason": failure.reason, "kept": None, "report": None, "retry": retry}


def _retry_command(fleet: str | dict[str, Any], old_base: str | None, new_base: str | None) -> str:
    """The command that migrates what is missing."""
    source = shlex.quote(fleet) if isinstance(fleet, str) else "FLEET.yaml"
    options = {"--old-base": old_base, "--new-base": new_base}
    return f"lorasuite fleet {source}" + "".join(f" {k} {shlex.quote(v)}" for k, v in options.items() if v)


def _reason(error: BaseException) -> str:
    named = foreseen(error) or error
    return _one_line(f"{type(named).__name__}: {named}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else line[:399] + "…"
