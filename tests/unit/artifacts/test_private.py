"""A home is its owner's alone, also one that was made before that was so."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from artifacts import Store, private_directory, stage_key


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0o755, 0o700),
        (0o700, 0o700),
        (0o750, 0o700),
        (0o777, 0o770),
        (0o2775, 0o2770),
        (0o770, 0o770),
        (0o1777, 0o1777),
    ],
)
def test_a_home_of_before(before: int, after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "home")
    put = {"stage": "s", "version": 1, "inputs": {}, "settings": {}, "files": {"a": b"a"}}
    store.put(stage_key("s", 1, {}, {"a": "1"}), **put)
    assert mode(store.home) == 0o700
    store.home.chmod(before)
    store.put(stage_key("s", 1, {}, {"a": "2"}), **put)
    assert mode(store.home) == after
    assert ("closed to them" in caplog.text) == (before != after)


def test_other_directories_stay_as_they_are(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    private_directory(tmp_path)
    assert mode(tmp_path) == 0o755
    private_directory(tmp_path / "a" / "b")
    assert mode(tmp_path / "a" / "b") == 0o700
