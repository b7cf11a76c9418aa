"""A pair of tiny random bases, six adapters (one broken) and data, for tests of flows that only need to run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests import models

NAMES = ("one", "two", "three", "four", "five")
BROKEN = "broken"


@dataclass(frozen=True)
class Small:
    """Where everything lies."""

    root: Path

    @property
    def old(self) -> Path:
        return self.root / "bases" / "small-old"

    @property
    def new(self) -> Path:
        return self.root / "bases" / "small-new"

    @classmethod
    def build(cls, root: Path) -> Small:
        made = cls(root)
        models.build(made.old, "llama", seed=1)
        models.build(made.new, "llama", seed=2, hidden=48, layers=4, heads=6, kv_heads=2)
        for seed, name in enumerate(NAMES):
            models.build_adapter(root / "adapters" / name, made.old, seed=seed, targets=["q_proj", "o_proj"])
        shutil.copytree(root / "adapters" / "one", root / "adapters" / BROKEN)
        (root / "adapters" / BROKEN / "adapter_model.safetensors").write_bytes(b"not a safetensors file")

        def sentence(n: int) -> str:
            return " ".join(f"w{(n * 7 + k * k) % 90}" for k in range(6))

        made._write("texts", [{"text": sentence(n)} for n in range(12)])
        made._write("train", [{"prompt": sentence(n), "completion": f" w{n}"} for n in range(8)])
        made._write("test", [{"prompt": sentence(n), "completion": f" w{n}"} for n in range(20, 24)])
        return made

    def _write(self, name: str, rows: list[dict[str, str]]) -> None:
        (self.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def settings(self, name: str, output: Path, **changes: Any) -> dict[str, Any]:
        """Settings of one adapter's migration."""
        return {
            "adapter": str(self.root / "adapters" / name),
            "old_base": str(self.old),
            "new_base": str(self.new),
            "output": str(output),
            "calibration": str(self.root / "texts.jsonl"),
            "method": "lorasuite",
            **changes,
        }

    def fleet(self, path: Path, names: tuple[str, ...] = (*NAMES, BROKEN), **changes: Any) -> Path:
        """A fleet file; its outputs go to ``migrated`` beside it."""
        content = {
            "defaults": {
                "method": "lorasuite",
                "calibration": str(self.root / "texts.jsonl"),
                "eval_data": str(self.root / "test.jsonl"),
                "evaluation": {"generate": False},
            },
            "pairs": [
                {
                    "old_base": str(self.old),
                    "new_base": str(self.new),
                    "adapters": [{"adapter": str(self.root / "adapters" / name)} for name in names],
                }
            ],
            **changes,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return path
