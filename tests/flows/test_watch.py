"""The watcher's look at the Hub, with the Hub's answers made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flows.watch_base_models import Seen, _look
from lorasuite.errors import ConfigError

MODELS = {
    "org/whole": ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "org/half": ["config.json", "model-00001-of-00002.safetensors"],
    "org/single": ["config.json", "model.safetensors"],
    "org/pickled": ["config.json", "pytorch_model.bin"],
}


class Hub:
    def list_models(self, author: str, **options: Any) -> list[Any]:
        return [SimpleNamespace(id=name) for name in MODELS if name.startswith(f"{author}/")]

    def model_info(self, name: str) -> Any:
        return SimpleNamespace(sha=f"sha-{name[4:]}", siblings=[SimpleNamespace(rfilename=f) for f in MODELS[name]])


def test_repositories_and_organisations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    unfinished: list[str] = []
    seen = list(_look("org/*", 0, unfinished))
    assert seen == [Seen("org/whole@sha-whole", "sha-whole"), Seen("org/single@sha-single", "sha-single")]
    assert unfinished == ["org/half", "org/pickled"]
    assert list(_look("org/single", 0, [])) == seen[1:]
    with pytest.raises(ConfigError, match="no such directory, and not a Hub name"):
        list(_look("./nowhere", 0, []))
