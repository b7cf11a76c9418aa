"""Names and outputs of a fleet stay below its output directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasuite.errors import ConfigError
from lorasuite.planning import read_fleet


def fleet(folder: Path, *names: Any, new_base: str = "org/new", **changes: Any) -> Path:
    adapters = [{"adapter": "org/adapter", "name": name} for name in names]
    content = {"pairs": [{"old_base": "org/old", "new_base": new_base, "adapters": adapters}], **changes}
    (folder / "fleet.yaml").write_text(yaml.safe_dump(content))
    return folder / "fleet.yaml"


@pytest.mark.parametrize(
    "name", ["../up", "a/../../up", "/etc/x", "..", ".", "a\0b", "a\nb", "x" * 256, "é" * 200, "a/" + "x" * 300]
)
def test_names_that_leave_the_output_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_fleet(fleet(tmp_path, name, "sound"))
    assert all("\0" not in str(problem) and len(str(problem)) < 500 for problem in caught.value.problems)


def test_what_lies_below_is_allowed(tmp_path: Path) -> None:
    found = read_fleet(fleet(tmp_path, "one", "team/two", "..three", "javascript:alert(1)"))
    assert [Path(config.output).relative_to(tmp_path / "migrated" / "new").as_posix() for config in found.values()] == [
        "one", "team/two", "..three", "javascript:alert(1)",
    ]  # fmt: skip


def test_bases_and_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not below the fleet's output"):
        read_fleet(fleet(tmp_path, "x", new_base="models/.."))
    (tmp_path / "migrated").mkdir()
    (tmp_path / "migrated" / "new").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not below the fleet's output"):
        read_fleet(fleet(tmp_path, "x"))
    with pytest.raises(ConfigError):
        read_fleet(fleet(tmp_path, "x", output="a\0b"))
