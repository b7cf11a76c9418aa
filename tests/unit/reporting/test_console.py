"""What is printed last, by which people go."""

from __future__ import annotations

from typing import Any

import pytest

from lorasuite.reporting import _console


@pytest.mark.parametrize(
    ("shortages", "last"),
    [
        ([], "no problems found"),
        (["serving", "model_fit", "serving"], "no problems found, but too large for what is free: model_fit, serving"),
    ],
)
def test_what_does_not_fit_is_said_last_as_well(
    shortages: list[str], last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_console, "_show_cost", lambda console, cost: None)
    monkeypatch.setenv("COLUMNS", "120")
    empty: dict[str, Any] = {name: [] for name in ("factors", "modules", "notices", "problems")}
    found = {
        **empty, "old_base": "a", "new_base": "b", "vocabulary": None, "outlook": None, "proposal": {},
        "cost": {"shortages": [{"stage": stage} for stage in shortages]},
    }  # fmt: skip
    _console.show_inspection(found)
    assert capsys.readouterr().out.strip().splitlines()[-1] == last
