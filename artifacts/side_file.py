"""A small JSON file beside the objects that several processes read and change."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from artifacts.files import fsync, private_directory
from artifacts.keys import canonical_json


class SideFile:
    """What can be found out again, and is kept so that it need not be: a JSON object with its digest.

    It is replaced as a whole, by one process at a time. One that is damaged reads as empty, and ``warn`` is told.
    """

    def __init__(self, path: Path, warn: Callable[[str], object]) -> None:
        self.path = path
        self._warn, self._told = warn, False

    def read(self) -> dict[str, Any]:
        """Its content; empty where there is none, or none that can be believed."""
        try:
            stored = json.loads(self.path.read_bytes())
            content: dict[str, Any] = stored["content"]
            if not isinstance(content, dict) or stored["sha256"] != _digest(content):
                raise ValueError("its digest is another")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = str(error) if isinstance(error, OSError | ValueError) else "it has another form"
            if not self._told:  # it is read again where it is replaced
                self._warn(f"{self.path} is damaged, and is made again ({reason})")
            self._told = True
            return {}
        return content

    def update(self, changes: Mapping[str, Any]) -> None:
        """Set entries, whatever other processes set meanwhile.

        Raises:
            OSError: where it cannot be written; then it is as it was.
        """
        private_directory(self.path.parent)
        with self.path.with_name(f"{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a writer that was killed
                left.unlink(missing_ok=True)
            content = {**self.read(), **changes}
            text = json.dumps({"sha256": _digest(content), "content": content}, indent=0, sort_keys=True)
            scratch = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
            try:
                scratch.write_text(text, encoding="utf-8")
                fsync(scratch)
                scratch.replace(self.path)
            finally:
                with contextlib.suppress(OSError):
                    scratch.unlink(missing_ok=True)
            fsync(self.path.parent)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()
