"""A stored object as it is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from artifacts.errors import ArtifactMissing
from artifacts.files import DATA, FILES, relative_name
from artifacts.manifest import Manifest

if TYPE_CHECKING:
    import torch


class Artifact:
    """One stored object, read lazily. Tensors are mapped from the file: treat them as read-only."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._handles: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Artifact({self.manifest.stage!r}, {self.manifest.key[:12]})"

    @property
    def key(self) -> str:
        """Its address: 64 hexadecimal digits."""
        return self.manifest.key

    @property
    def info(self) -> dict[str, Any]:
        """The results that are not tensors."""
        return self.manifest.info

    def _open(self, device: str) -> Any:
        if device not in self._handles:
            self._handles[device] = safe_open(self.directory / DATA, framework="pt", device=device)
        return self._handles[device]

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._open("cpu").keys())

    def tensor(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """One tensor.

        Raises:
            ArtifactMissing: when there is none of that name.
        """
        handle = self._open(str(device))
        if name not in handle.keys():  # noqa: SIM118 - the handle is no dictionary
            raise ArtifactMissing(f"{self!r} has no tensor {name!r}; it has {', '.join(self.keys()[:8]) or 'none'}")
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: self.tensor(name, device) for name in self.keys()}

    def file(self, name: str) -> Path:
        """The path of a plain file, or of a directory of them.

        Raises:
            ArtifactMissing: when there is none of that name.
            ValueError: for a name that leaves the artifact.
        """
        stored = f"{FILES}/{relative_name(name)}"
        names = self.manifest.files
        if stored not in names and not any(other.startswith(f"{stored}/") for other in names):
            raise ArtifactMissing(f"{self!r} has no file {name!r}")
        return self.directory / stored
