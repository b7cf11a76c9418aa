"""The pair's artifacts, before any adapter asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from artifacts import default_home
from flows.allowed import Allowed, deployed
from flows.context import Context, base_record, check_stages, fetch, tag_run, timings
from flows.dashboard import show_pair
from flows.pair import Pair, pair_name
from lorasuite.bases import Role, load_tokenizer, resolve
from lorasuite.data import DEFAULT_TEMPLATE, calibration_texts, parse_columns, read_template
from lorasuite.planning import TRIED, PairSettings, inspect, torch_device
from lorasuite.reporting import PairRecord
from tasks.fingerprints import fingerprint_bases
from tasks.stage import Recorder, Where


def run_name(parameters: Mapping[str, Any] | None = None) -> str:
    """``old→new``; of this flow run, where no parameters are given."""
    given = flow_run.parameters if parameters is None else parameters
    return pair_name(str(given.get("old_base")), str(given.get("new_base")))


@flow(name="prepare-pair", flow_run_name=run_name, validate_parameters=False)
def prepare_pair(
    old_base: str,
    new_base: str,
    calibration: str | None = None,
    settings: dict[str, Any] | None = None,
    methods: Sequence[str] = TRIED,
    device: str = "auto",
    refresh: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    roles: Sequence[Role] | None = None,
    architectures: str | None = None,
    columns: tuple[str, ...] = (),
    template: str = DEFAULT_TEMPLATE,
) -> dict[str, Any]:
    """Compute, or find, what transforms read of a pair of bases, and what every record of a migration shows.

    Args:
        methods: names of the transforms.
        architectures: a directory of architecture files beside this package's.
        columns, template: as in a migration's settings.
        roles: the projections that the adapters to come have updates of; all of the architecture's if None.

    Returns:
        the pair's layer map, transfer matrix, artifact keys and timings, as JSON.
    """
    if deployed() and trust_remote_code:
        Allowed.here().check_code([old_base, new_base])
    refreshed = check_stages(tuple(refresh))
    chosen = PairSettings.model_validate(settings or {})
    name = pair_name(old_base, new_base)
    tag_run(pair=name)
    fetch(old_base, new_base)
    inspect(old_base, new_base, trust_remote_code=trust_remote_code, architectures=architectures).raise_problems()
    home = default_home()
    paths = {"old_base": resolve(old_base), "new_base": resolve(new_base)}
    where = Where(home=home, device=torch_device(device), paths=paths, options={"trust_remote_code": trust_remote_code})
    fingerprints = fingerprint_bases(home, paths["old_base"], paths["new_base"])
    context = Context(where, fingerprints, refreshed, pair=name)
    texts = None
    if calibration is not None:
        # Chat rows become text through the new base's template, so that both bases read the same texts.
        reader = load_tokenizer(paths["new_base"], trust_remote_code)
        read = calibration_texts(calibration, reader, parse_columns(columns), template=read_template(template))
        texts = context.keep_texts(read[: chosen.calibration_samples])
    with Recorder() as recorder:
        every = context.architecture("old").roles
        pair = Pair(context, chosen, texts, every if roles is None else roles)
        pair.prepare(methods)
    bases = {
        "old_base": base_record(old_base, fingerprints["old_model"]),
        "new_base": base_record(new_base, fingerprints["new_model"]),
    }
    record = PairRecord.model_validate({**bases, **pair.record()})
    show_pair(context, record, pair.similarity)
    return {
        **record.model_dump(mode="json"),
        "artifacts": {name: ref.key for name, ref in pair.made().items()},
        "timings": timings(recorder),
    }
