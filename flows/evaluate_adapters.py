"""Evaluation outside a migration: one base, bare and with any number of adapters, in one model load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging.loggers import get_run_logger

from artifacts import default_home
from flows.context import Context, attachable, base_record, check_stages, fetch, tag_run, timings
from flows.measure import Asked, Measured
from lorasuite.adapters import OwnTokenizer, attachment_problems, own_tokenizer
from lorasuite.bases import Checkpoint, LoadSettings, load_tokenizer, resolve
from lorasuite.data import DEFAULT_TEMPLATE, Row, accepted, parse_columns, read_rows, read_template, templated
from lorasuite.errors import (
    AdapterError,
    ConfigError,
    LoRASuiteError,
    PreflightError,
    Problem,
)
from lorasuite.evaluation import EvaluationSettings, check_tasks
from lorasuite.planning import torch_device
from lorasuite.reporting import assembled, copy_samples
from tasks.fingerprints import fingerprint_any_adapter, fingerprint_bases
from tasks.stage import Recorder, Where

#: Name of the arm without an adapter.
BARE = "base"
RESULTS = "results.json"


@flow(name="evaluate-adapters", validate_parameters=False)
def evaluate_adapters(
    base: str,
    adapters: tuple[str, ...] = (),
    eval_data: str | None = None,
    tasks: tuple[str, ...] = (),
    eval_dir: Path | None = None,
    include_path: Path | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    output: Path | None = None,
    refresh: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    loading: dict[str, Any] | None = None,
    columns: tuple[str, ...] = (),
    template: str = DEFAULT_TEMPLATE,
) -> dict[str, Any]:
    """Results by arm (``base`` and each adapter's directory name) on rows and on lm-eval tasks, and arms compared.

    Cached by model, adapter and what is asked, and nothing is loaded where everything is. With ``output``, the
    directory gets ``results.json`` (what is returned) and ``samples/``.

    Raises:
        PreflightError: with everything that is wrong with the input, before a model is loaded.
    """
    options = EvaluationSettings.model_validate(settings or {})
    asked = LoadSettings.model_validate(loading or {})
    given = (base, tuple(adapters), eval_data, tuple(tasks), eval_dir, include_path, output, device, asked)
    checked = check(*given, trust_remote_code, tuple(columns), template)
    refreshed = check_stages(tuple(refresh))
    tag_run(base=Path(base).name)
    fetch(base, *adapters)
    path = resolve(base)
    where = Where(
        home=default_home(),
        device=torch_device(device),
        paths={"new_base": path},
        options={"trust_remote_code": trust_remote_code, "loading": asked.model_dump(mode="json")},
    )
    context = Context(where, fingerprint_bases(where.home, path, path), refreshed)
    measured = Measured(context, Asked.of(context, options, checked.rows, tasks, eval_dir, include_path))
    named: dict[str, dict[str, str]] = {}
    with Recorder() as recorder:
        measured.measure(BARE, "new", own_tokenizer=checked.bare)
        for adapter in adapters:
            folder = attachable(adapter, Checkpoint(path), context.fingerprints["new_model"])
            if folder != resolve(adapter):
                checked.notices.append(f"{adapter}: PEFT does not find its modules by their names; a copy is measured")
            name = resolve(adapter).resolve().name
            arm = name if name not in (BARE, *named) else f"{name}-{len(named) + 1}"
            own = checked.own.get(adapter)
            named[arm] = {
                "id": adapter,
                "fingerprint": fingerprint_any_adapter(folder),
                "tokenizer": "adapter" if own is not None and own.whole else "base",
                "chat_template": "adapter" if own is not None and own.has_template else "base",
            }
            measured.measure(arm, "new", named[arm]["fingerprint"], {"adapter": folder}, own)
    for notice in checked.notices:
        get_run_logger().warning("%s", notice)
    record = {
        "base": base_record(base, context.fingerprints["new_model"]),
        "adapters": named,
        "results": measured.evaluation,
        "tasks": measured.scores,
        "comparisons": measured.comparisons(),
        "template": template,
        "notices": checked.notices,
        "settings": options.model_dump(mode="json"),
        "timings": timings(recorder),
    }
    if output is not None:
        _write(output, record, measured)
    return {**record, "output": None if output is None else str(output)}


@dataclass
class Checked:
    """What :func:`check` found: the held-out rows, tokenizers in place of the base's, and what the user is to know."""

    rows: list[Row] = field(default_factory=list)
    #: Of adapters, by what they were given as; None is the base's.
    own: dict[str, OwnTokenizer | None] = field(default_factory=dict)
    #: Of the bare base, where its own cannot render the rows and an adapter's can.
    bare: OwnTokenizer | None = None
    notices: list[str] = field(default_factory=list)


def check(
    base: str,
    adapters: tuple[str, ...],
    eval_data: str | None,
    tasks: tuple[str, ...],
    eval_dir: Path | None,
    include_path: Path | None,
    output: Path | None,
    device: str,
    loading: LoadSettings,
    trust_remote_code: bool = False,
    columns: tuple[str, ...] = (),
    template: str = DEFAULT_TEMPLATE,
) -> Checked:
    """The held-out rows, if there are any, and the tokenizers that arms are measured with.

    Raises:
        PreflightError: with every problem.
    """
    problems: list[Problem] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except LoRASuiteError as error:
            problems.extend(error.problems)

    if not eval_data and not tasks:
        problems.append(Problem("evaluate", "there is nothing to evaluate on", "Give --eval-data or --tasks."))
    attempt(lambda: loading.check(torch_device(device)))
    opened = attempt(lambda: _readable(base))
    readable = tuple(adapter for adapter in adapters if attempt(partial(_adapter, adapter, opened)))
    renders = attempt(lambda: read_template(template))
    rows = (attempt(lambda: read_rows(eval_data, parse_columns(columns))) if eval_data else None) or []
    found = Checked(rows if renders is None else attempt(lambda: templated(rows, renders)) or [])
    if template != DEFAULT_TEMPLATE and not any(row.kind == "instruction" for row in rows):
        found.notices.append(f"template {template}: there are no instruction rows, and it is not used")
    if template != DEFAULT_TEMPLATE and tasks:
        found.notices.append(f"template {template}: tasks by name have prompts of their own, and do not use it")
    if opened is not None:
        attempt(lambda: _readers(found, base, readable, trust_remote_code))
    if include_path is not None and not include_path.is_dir():
        problems.append(Problem(str(include_path), "is not a directory", "Give one with lm-eval task files."))
    elif tasks:
        attempt(lambda: check_tasks(tasks, eval_dir, include_path, trust_remote_code))
    if output is not None and output.exists():
        problems.append(Problem(str(output), "exists already", "Give a new directory: nothing is overwritten."))
    if problems:
        raise PreflightError(problems)
    return found


def _readers(found: Checked, base: str, adapters: tuple[str, ...], trust_remote_code: bool) -> None:
    """Which tokenizer each arm is measured with, and whether they render the rows.

    Raises:
        LoRASuiteError: with every problem.
    """
    checkpoint, problems = Checkpoint(base), list[Problem]()
    reader = load_tokenizer(checkpoint.path, trust_remote_code)
    for adapter in dict.fromkeys(adapters):
        try:
            own = found.own[adapter] = own_tokenizer(resolve(adapter), reader, trust_remote_code)
        except AdapterError as error:
            problems += error.problems
            continue
        if own is not None:
            problems += own.problems(checkpoint.dims.vocab_size)
            found.notices.append(own.notice("the arm with this adapter"))
    chat = any(row.kind == "messages" for row in found.rows)
    if chat and reader.chat_template is None:
        found.bare = next((own for own in found.own.values() if own is not None and own.has_template), None)
        if found.bare is not None:
            found.notices.append(f"the bare base has no chat template: it is measured with that of {found.bare.folder}")
    every = {id(own): own for own in (found.bare, *found.own.values())}
    for own in every.values():
        problems += accepted(found.rows, [reader if own is None else own.tokenizer])[1]
    if problems:
        raise PreflightError(problems)


def _readable(base: str) -> Checkpoint:
    """
    Raises:
        CheckpointError: if the base cannot be read.
    """
    checkpoint = Checkpoint(base)
    checkpoint.check_readable()
    return checkpoint


def _adapter(source: str, base: Checkpoint | None) -> bool:
    """True.

    Raises:
        LoRASuiteError: if there is no adapter, or PEFT is not to be given it for this base.
    """
    folder = resolve(source)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(Problem(source, "holds no adapter_config.json", "Give a PEFT adapter directory."))
    if base is not None and (found := attachment_problems(folder, base)):
        raise AdapterError(found)
    return True


def _write(output: Path, record: dict[str, Any], measured: Measured) -> None:
    """The output directory, which appears only when it is whole."""
    with assembled(output) as scratch:
        copy_samples(measured.samples(), scratch)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (scratch / RESULTS).write_text(text, encoding="utf-8")
