"""Directories that changed while they were read are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorasuite.errors import InputChanged
from tasks.fingerprints import fingerprint_folder
from tasks.stage import Where
from tasks.unchanged import check_unchanged, folder_stamp


def test_a_changed_directory_is_named(tmp_path: Path) -> None:
    model, same = tmp_path / "model", tmp_path / "same"
    for folder in (model, same):
        (folder / "run").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"one")
    stamps = {path: folder_stamp(path) for path in (model, same, tmp_path / "nowhere")}
    (model / "run" / "adapter_model.safetensors").write_bytes(b"of a training below the base")
    check_unchanged(stamps)
    times = (model / "model.safetensors").stat()
    (model / "model.safetensors").write_bytes(b"two")
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputChanged) as caught:
        check_unchanged(stamps)
    assert [problem.where for problem in caught.value.problems] == [str(model)]


def test_what_python_compiles_beside_task_files_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one.yaml").write_text("task: one")
    before = folder_stamp(tmp_path), fingerprint_folder(tmp_path)
    (tmp_path / "tasks" / "__pycache__").mkdir()
    (tmp_path / "tasks" / "__pycache__" / "utils.pyc").write_bytes(b"compiled")
    assert (folder_stamp(tmp_path), fingerprint_folder(tmp_path)) == before
    (tmp_path / "tasks" / "one.yaml").write_text("task: two")
    assert folder_stamp(tmp_path) != before[0] and fingerprint_folder(tmp_path) != before[1]


def test_the_directory_that_a_stage_works_in_may_change(tmp_path: Path) -> None:
    """A killed fine-tune goes on from the checkpoints there."""
    for name in ("base", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    where = Where(home=tmp_path, paths={"base": tmp_path / "base", "work": tmp_path / "work"})
    (tmp_path / "work" / "config.json").write_text("changed")
    where.check_unchanged()
    (tmp_path / "base" / "config.json").write_text("changed")
    with pytest.raises(InputChanged):
        where.check_unchanged()
