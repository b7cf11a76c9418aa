"""Typed stages: what they take is checked before anything runs, and makes the same key as plain mappings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from artifacts import Artifact, Store, stage_key
from tasks.inputs import Models
from tasks.stage import Ref, StageOutput, Where, stage


@dataclass(frozen=True)
class Given:
    model: str
    rows: Artifact
    adapter: Artifact | str | None = None
    state: Artifact | None = None
    transforms: dict[str, Artifact] = field(default_factory=dict)


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rank: int
    scale: float = 1.0


@stage("typed", version=3)
def typed(inputs: Given, settings: Told, where: Where) -> StageOutput:
    return StageOutput(info={"rank": settings.rank, "transforms": sorted(inputs.transforms)})


@stage("typed", version=3)
def untyped(inputs: Any, settings: Any, where: Where) -> StageOutput:
    return StageOutput()


ROWS, COPY, STATE = (Ref(stage=name, key=digit * 64) for name, digit in (("rows", "1"), ("copy", "2"), ("state", "3")))
TOLD = {"rank": 4}


def test_the_key_is_that_of_the_flat_inputs_and_all_settings() -> None:
    given = {"model": "m", "rows": ROWS, "transforms": {"copy": COPY}, "state": STATE}
    flat = {"model": "m", "rows": ROWS.key, "transforms.copy": COPY.key, "state": STATE.key}
    key = typed.key(given, TOLD)
    assert key == stage_key("typed", 3, {"rank": 4, "scale": 1.0}, flat)
    assert key == typed.key(given, Told(rank=4)) == untyped.key(flat, {"rank": 4, "scale": 1.0})
    assert key == typed.key({**given, "rows": ROWS.model_dump()}, TOLD)


def test_optional_inputs_that_are_none_or_empty_are_left_out() -> None:
    given = {"model": "m", "rows": ROWS}
    assert typed.key({**given, "state": None, "adapter": None, "transforms": {}}, TOLD) == typed.key(given, TOLD)
    assert typed.key({**given, "adapter": "f"}, TOLD) != typed.key({**given, "adapter": COPY}, TOLD)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "m"}, "'rows' is missing"),
        ({"model": "m", "rows": None}, "'rows' is missing"),
        ({"model": "m", "rows": ROWS, "row": ROWS}, "'row' is not an input"),
        ({"model": "m", "rows": ROWS, "row": None}, "'row' is not an input"),
        ({"model": ROWS, "rows": ROWS}, "'model' needs a fingerprint, not"),
        ({"model": "m", "rows": "r"}, "'rows' needs an earlier stage's artifact, not 'r'"),
        ({"model": "m", "rows": {"a": ROWS}}, "'rows' needs an earlier stage's artifact, not"),
        ({"model": "m", "rows": ROWS, "adapter": 3}, "'adapter' needs an earlier stage's artifact or a fingerprint"),
        ({"model": "m", "rows": ROWS, "transforms": COPY}, "'transforms' needs artifacts by name"),
        ({"model": "m", "rows": ROWS, "transforms": {"copy": "c"}}, "'transforms' needs artifacts by name"),
    ],
)
def test_wrong_inputs_are_named_before_anything_runs(given: dict[str, Any], said: str) -> None:
    for call in (lambda: typed.key(given, TOLD), lambda: typed.run(inputs=given, settings=TOLD)):
        with pytest.raises(TypeError) as raised:
            call()
        assert said in str(raised.value) and "stage 'typed'" in str(raised.value)


def test_every_wrong_input_is_named() -> None:
    with pytest.raises(TypeError, match="'other' is not an input; 'model' is missing; 'rows' is missing"):
        typed.key({"other": "x"}, TOLD)


@pytest.mark.parametrize("settings", [{}, {"rank": "many"}, {"rank": 4, "ranks": 4}])
def test_wrong_settings_are_errors_before_anything_runs(settings: dict[str, Any]) -> None:
    given = {"model": "m", "rows": ROWS}
    with pytest.raises(ValidationError):
        typed.key(given, settings)
    with pytest.raises(ValidationError):
        typed.run(inputs=given, settings=settings)


def test_the_function_gets_models_with_opened_artifacts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(COPY.key, stage="copy", version=1, inputs={}, settings={}, info={"n": 2})
    store.put(ROWS.key, stage="rows", version=1, inputs={}, settings={}, info={"n": 1})
    plain = typed.models.plain_inputs("typed", {"model": "m", "rows": ROWS, "transforms": {"copy": COPY}})
    found = typed.models.resolve(store, plain)
    assert isinstance(found, Given) and found.model == "m" and found.state is None
    assert (found.rows.info, found.transforms["copy"].info) == ({"n": 1}, {"n": 2})
    assert typed.models.parse({"rank": 4, "scale": 2.0}) == Told(rank=4, scale=2.0)


def test_models_that_cannot_be_a_stages() -> None:
    @dataclass
    class Numbers:
        count: int

    class Loose(BaseModel):
        rank: int

    def counted(inputs: Any, settings: Any, where: Where) -> StageOutput:
        return StageOutput()

    counted.__annotations__["inputs"] = Numbers
    with pytest.raises(TypeError, match=r"Numbers.count is <class 'int'>: use Artifact, str or dict"):
        Models.of(counted)
    counted.__annotations__ |= {"inputs": Any, "settings": Loose}
    with pytest.raises(TypeError, match="Loose takes unknown settings"):
        Models.of(counted)
