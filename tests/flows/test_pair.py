"""A pair's artifacts: what their keys depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from flows.context import Context
from flows.pair import Pair
from lorasuite.bases import MLP
from lorasuite.planning import PairSettings
from lorasuite.transforms import names
from tasks.stage import Ref, Stage, Where
from tests.flows.small import Small

FINGERPRINTS = {name: name for name in ("old_model", "new_model", "old_tokenizer", "new_tokenizer")}
TEXTS = Ref(stage="texts", key="0" * 64)


def keys(small: Small, monkeypatch: pytest.MonkeyPatch, **loading: Any) -> dict[str, str]:
    """Keys of every artifact of the pair, by stage and label, where bases that are run are loaded so."""
    found: dict[str, str] = {}

    def run(
        self: Context, stage: Stage, inputs: Mapping[str, Any], settings: Mapping[str, Any], label: str = "", **_: Any
    ) -> Ref:
        found[f"{stage.name} {label}"] = stage.key(inputs, settings)
        return Ref(stage=stage.name, key=stage.key(inputs, settings))

    monkeypatch.setattr(Context, "run", run)
    where = Where(paths={"old_base": small.old, "new_base": small.new}, options={"loading": loading})
    Pair(Context(where, FINGERPRINTS), PairSettings(), TEXTS, ("q", "o", *MLP)).prepare(names())
    return found


@pytest.mark.parametrize("loading", [{"dtype": "bfloat16"}, {"load_in_4bit": True}, {"device_map": "auto"}], ids=str)
def test_they_do_not_depend_on_how_bases_that_are_run_are_loaded(
    small: Small, monkeypatch: pytest.MonkeyPatch, loading: dict[str, Any]
) -> None:
    found = keys(small, monkeypatch)
    stages = {name.split()[0] for name in found}
    assert stages >= {"activations", "similarity", "layer_mapping", "head_mapping", "alignment", "state_map"}
    assert keys(small, monkeypatch, **loading) == found
