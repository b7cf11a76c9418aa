"""Loading by Hub id and revision, over HTTP from a small server that answers like the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from flows.command_line import app
from lorasuite.reporting import model_card
from tests.records import record

COMMIT = {"main": "a" * 40, "v1": "b" * 40}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Hub(BaseHTTPRequestHandler):
    """``org/old`` and ``org/adapter`` at two revisions each, from the directories in ``repos``."""

    repos: dict[str, Path] = {}  # noqa: RUF012 - set by the fixture
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_write"
            return self.send(200 if known else 401, b'{"name": "me", "type": "user"}', {}, body)
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/revision/([^/]+)", path):
            folder, revision = self.repos.get(match[1]), match[2]
            revision = next((name for name, commit in COMMIT.items() if commit == revision), revision)
            if folder is not None and revision in COMMIT:
                files = [{"rfilename": str(file.relative_to(folder))} for file in listed(folder)]
                info = {"id": match[1], "sha": COMMIT[revision], "siblings": files}
                return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", path):
            entries = [
                {
                    "type": "file",
                    "path": str(file.relative_to(self.repos[match[1]])),
                    "size": file.stat().st_size,
                    "oid": digest(file),
                }
                for file in listed(self.repos[match[1]])
            ]
            return self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
        if match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            file = self.repos.get(match[1], Path("/nowhere")) / match[3]
            if file.is_file():
                headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT.get(match[2], match[2])}
                return self.send(200, file.read_bytes(), headers, body)
            if match[1] in self.repos:
                known = match[2] in {*COMMIT, *COMMIT.values()}
                code = "EntryNotFound" if known else "RevisionNotFound"
                return self.send(404, b"{}", {"X-Error-Code": code}, body)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    commits: list[dict[str, bytes]] = []  # noqa: RUF012 - what was pushed, file by file

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", self.path):
            folder = self.repos.get(match[1], Path("/nowhere"))
            found = [
                {"type": "file", "path": path, "size": (folder / path).stat().st_size, "oid": digest(folder / path)}
                for path in json.loads(body)["paths"]
                if (folder / path).is_file()
            ]
            return self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, True)
        if self.headers.get("Authorization") != "Bearer hf_write":
            return self.send(401, b"{}", {}, True)
        answer: dict[str, object] = {}
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            answer = {"url": f"{here}/me/moved", "id": "me/moved"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in sent})
            answer = {"commitUrl": f"{here}/me/moved/commit/1", "commitOid": "c" * 40, "hookOutput": ""}
        return self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, True)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that uses the server as its Hub."""
    old = base("llama")
    Hub.commits = []
    adapter = tmp_path / "adapter"
    shutil.copytree(lora(old), adapter)
    shutil.copytree(lora(old), adapter / "runs" / "second")
    Hub.repos, Hub.asked = {"org/old": old, "org/adapter": adapter}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    yield {
        **env,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "LORASUITE_HOME": str(tmp_path / "home"),
    }
    server.shutdown()


@pytest.fixture
def here(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """Runs a command in this process as if that were its environment: exit code, and what it says in JSON."""
    home = Path(hub["HF_HOME"])
    settings = {
        "ENDPOINT": hub["HF_ENDPOINT"],
        "HUGGINGFACE_CO_URL_TEMPLATE": hub["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for name, value in settings.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("LORASUITE_HOME", hub["LORASUITE_HOME"])
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(*arguments: str) -> tuple[int, Any]:
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert done.stdout, done.output
        return done.exit_code, json.loads(done.stdout)

    return run


def lorasuite(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from flows.command_line import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, check=False
    )


def test_bases_and_adapters_by_id_and_revision(hub: dict[str, str]) -> None:
    """In processes of their own, which read the Hub's address and cache from their environment."""
    arguments = ("inspect", "--json", "--old-base", "org/old@v1", "--new-base", "org/old", "--adapter", "org/adapter")
    done = lorasuite(hub, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["vocabulary"]["same"] and all(row["moves"] for row in found["modules"])
    assert any(f"/resolve/{COMMIT['v1']}/model.safetensors" in path for path in Hub.asked)
    assert any(f"/resolve/{COMMIT['main']}/config.json" in path for path in Hub.asked)

    Hub.repos = {}  # the Hub is gone: what was downloaded still serves
    again = lorasuite({**hub, "HF_HUB_OFFLINE": "1"}, *arguments)
    assert again.returncode == 0, again.stdout + again.stderr


def test_an_adapter_in_a_subfolder_at_a_revision(here: Callable[..., tuple[int, Any]]) -> None:
    bases = ("--old-base", "org/old", "--new-base", "org/old")
    code, found = here("inspect", *bases, "--adapter", "org/adapter/runs/second@v1")
    assert code == 0, found
    fetched = {path.rpartition("/resolve/")[2] for path in Hub.asked if "/org/adapter/resolve/" in path}
    assert f"{COMMIT['v1']}/runs/second/adapter_config.json" in fetched
    assert all("/runs/second/" in path for path in fetched), "nothing but the folder"
    _, found = here("inspect", *bases, "--adapter", "org/adapter/runs/third")
    assert "has no folder runs/third" in found["problems"][0]["what"]


def test_what_the_hub_does_not_have(here: Callable[..., tuple[int, Any]]) -> None:
    code, found = here("inspect", "--old-base", "org/none", "--new-base", "org/old@v9")
    assert code == 2
    assert {p["where"] for p in found["problems"]} == {"org/none", "org/old@v9"}
    assert all("revision" in p["remedy"] for p in found["problems"])


@pytest.fixture
def migrated(lora: Callable[..., Path], base: Callable[..., Path], tmp_path: Path) -> Path:
    """What a migration leaves, as far as a push reads it, with things that are not for the Hub."""
    folder = tmp_path / "out"
    shutil.copytree(lora(base("llama")), folder)
    made = record(weights_sha256=hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest())
    made.write(folder / "migration.json")
    (folder / "README.md").write_text(model_card(made))
    (folder / "report.html").write_text("held-out rows")
    (folder / "samples").mkdir()
    (folder / "samples" / "new.jsonl").write_text("held-out rows")
    return folder


def test_a_migration_is_pushed_as_one_commit_without_its_data(
    here: Callable[..., tuple[int, Any]], hub: dict[str, str], migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    assert here("push", str(migrated), "me/moved") == (0, {"pushed": f"{hub['HF_ENDPOINT']}/me/moved/commit/1"})
    (sent,) = Hub.commits
    assert set(sent) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert sent["adapter_model.safetensors"] == (migrated / "adapter_model.safetensors").read_bytes()
    assert "/api/validate-yaml" in Hub.asked, "huggingface_hub had the card checked"


def test_nobody_may_push_without_a_token(here: Callable[..., tuple[int, Any]], migrated: Path) -> None:
    code, told = here("push", str(migrated), "me/moved")
    assert code == 2 and Hub.commits == []
    assert "hf auth login" in told["problems"][0]["remedy"]
