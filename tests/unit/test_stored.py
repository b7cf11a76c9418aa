"""A file that is replaced is the old one or the new one, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasuite.stored import replace_text, replacing


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    replace_text(path, "first ≥ 1")
    assert path.read_text(encoding="utf-8") == "first ≥ 1"
    with replacing(path) as scratch:
        assert scratch.parent == path.parent
        scratch.write_bytes(b"half")
        assert path.read_text(encoding="utf-8") == "first ≥ 1"
    assert path.read_bytes() == b"half" and list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    replace_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as scratch:
        scratch.write_text("half of")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".results.json.partial").write_text("left by a writer that was killed")
    replace_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["folder/results.json", "."])
def test_what_cannot_be_written_says_so(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError):
        replace_text(tmp_path / name, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
