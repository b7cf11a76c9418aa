"""Side files: what is damaged is said and made again, and never believed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from artifacts import SideFile


def test_entries_are_kept_and_set(tmp_path: Path) -> None:
    told: list[str] = []
    side = SideFile(tmp_path / "home" / "memory.json", told.append)
    assert side.read() == {}
    side.update({"a": "1", "b": {"c": ["é"]}})
    side.update({"a": "2"})
    assert side.read() == {"a": "2", "b": {"c": ["é"]}} and told == []
    assert sorted(path.name for path in side.path.parent.iterdir()) == ["memory.json", "memory.json.lock"]


def damages(whole: bytes) -> dict[str, bytes]:
    at = whole.index(b"01234")
    return {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "a digit": whole[:at] + b"1" + whole[at + 1 :],
        "no digest": json.dumps({"file": "01234"}).encode(),
        "a list": b"[1]",
        "no object": json.dumps({"sha256": "0", "content": [1]}).encode(),
        "not text": b"\xff\xfe\0",
        "too deep": b"[" * 100_000,
        "an integer too long": b"1" * 5_000,
    }


@pytest.mark.parametrize("kind", damages(b'"01234"'))
def test_what_is_damaged_is_said_once_and_made_again(kind: str, tmp_path: Path) -> None:
    told: list[str] = []
    side = SideFile(tmp_path / "memory.json", told.append)
    side.update({"file": "01234"})
    side.path.write_bytes(damages(side.path.read_bytes())[kind])
    assert side.read() == {}
    side.update({"other": "5"})
    assert side.read() == {"other": "5"} and len(told) == 1 and str(side.path) in told[0]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = SideFile(tmp_path / "memory.json", pytest.fail)
    side.update({"a": "1"})

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("artifacts.side_file.fsync", full)
        with pytest.raises(OSError, match="No space"):
            side.update({"a": "2"})
    (tmp_path / ".memory.json.killed.partial").write_text("left by a writer that was killed")
    assert side.read() == {"a": "1"}
    side.update({"b": "2"})
    assert side.read() == {"a": "1", "b": "2"} and list(tmp_path.glob(".*")) == []


def _set(path: Path, number: int) -> None:
    for entry in range(5):
        SideFile(path, print).update({f"{number}.{entry}": os.getpid()})


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_set, args=(tmp_path / "memory.json", n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(SideFile(tmp_path / "memory.json", pytest.fail).read()) == 20
