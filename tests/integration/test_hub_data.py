"""Rows of a data set of the Hub, over HTTP from a small server that answers like it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_hub import Hub

CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: train.jsonl
  - split: test
    path: test.jsonl
- config_name: other
  data_files: other.jsonl
dataset_info:
- config_name: main
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': bad
          '1': good
  - name: id
    dtype: int64
---
"""
FILES = {
    "README.md": CARD,
    "train.jsonl": '{"text": "q1", "label": 1, "id": 7}\n{"text": "q2", "label": 0, "id": 8}\n',
    "test.jsonl": '{"text": "q3", "label": 1, "id": 9}\n',
    "other.jsonl": '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null, '
    '"tool_calls": [{"name": "f"}]}], "made": "2026-01-01"}\n',
}
READ = """
import json, sys
from lorasuite.data import parse_columns, read_rows, rows_to_jsonl
from lorasuite.errors import DataError
for source, columns in json.loads(sys.argv[1]):
    try:
        print(json.dumps(rows_to_jsonl(read_rows(source, parse_columns(columns))).decode()))
    except DataError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that uses the server as its Hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content)
    Hub.repos, Hub.asked = {"org/set": folder}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    yield {**plain, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    server.shutdown()


def read(environment: dict[str, str], *asked: tuple[str, list[str]]) -> list[Any]:
    """Each data set's rows as written to a file, or why there are none."""
    command = [sys.executable, "-c", READ, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        [json.loads(line) for line in answer.splitlines()] if answer.startswith("{") else answer for answer in answers
    ]


def test_rows_by_name_configuration_revision_and_split(environment: dict[str, str]) -> None:
    named = ["prompt=text", "completion=label"]
    train, test, part, other, wrong, split, config, revision, nobody, address = read(
        environment,
        ("hf://org/set", named),
        ("hf://org/set:test", named),
        ("hf://org/set@v1/main:train[1:]", ["text=text"]),
        ("hf://org/set/other", []),
        ("hf://org/set", ["prompt=question"]),
        ("hf://org/set:dev", []),
        ("hf://org/set/none", []),
        ("hf://org/set@v9", []),
        ("hf://org/none", []),
        ("hf://set", []),
    )
    assert [(row["prompt"], row["completion"], row["id"]) for row in train] == [("q1", "good", 7), ("q2", "bad", 8)]
    assert [row["completion"] for row in test] == ["good"]
    assert [row["text"] for row in part] == ["q2"], "a slice, at another revision"
    assert other[0]["messages"][0] == {"role": "user", "content": "q"}, "no keys without a value"
    assert other[0]["messages"][1]["tool_calls"] == [{"name": "f"}]
    assert "row 1: has no column 'question' (its columns: 'text', 'label', 'id') (and 1 more" in wrong
    assert "hf://org/set:dev: cannot be loaded" in split and "['train', 'test']" in split
    assert "'main', 'other'" in config
    assert "Revision 'v9' doesn't exist" in revision
    assert "hf://org/none: cannot be loaded (Dataset 'org/none' doesn't exist" in nobody
    assert "is no address of a data set. Write hf://org/name" in address

    Hub.repos = {}  # the Hub is gone: what was loaded once still serves, and nothing else
    away = {**environment, "HF_HUB_OFFLINE": "1"}
    again, pinned, never = read(
        away, ("hf://org/set/main", named), ("hf://org/set@v2/main", named), ("hf://org/none", [])
    )
    assert again == train
    assert "does not say which revision it holds" in pinned
    assert "Couldn't reach 'org/none' on the Hub" in never and "offline, only what was loaded once" in never


def test_a_folder_of_the_same_name_is_not_taken_for_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasuite.data import read_rows
    from lorasuite.errors import DataError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "set").mkdir(parents=True)
    with pytest.raises(DataError, match="there is a local folder org/set"):
        read_rows("hf://org/set")
