"""What the store knows about an object: ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from artifacts.errors import ArtifactDamaged
from artifacts.keys import canonical_json

#: Raised when the layout of an object changes so that older programs cannot read it.
FORMAT = 1

_PACKAGES = ("lorasuite", "torch", "transformers", "peft", "safetensors", "numpy", "scipy")


class FileEntry(BaseModel):
    """Size and SHA-256 of one file of an object."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """One object: what it is, what it was made from and with, and what its bytes must be."""

    model_config = ConfigDict(frozen=True)

    #: Layout of the object.
    format: int = FORMAT
    stage: str
    #: Version of the stage's algorithm.
    version: int
    key: str
    #: Name to fingerprint, or to the key of another object.
    inputs: dict[str, str]
    settings: dict[str, Any]
    #: Results that are numbers and text rather than tensors.
    info: dict[str, Any]
    #: How the computation went (seconds, memory): differs from run to run.
    run: dict[str, Any]
    #: Library name to version.
    libraries: dict[str, str]
    created: AwareDatetime
    #: Bytes of all files except the manifest.
    size: int
    #: Name inside the object to size and SHA-256.
    files: dict[str, FileEntry]
    #: Over tensor names, dtypes, shapes and bytes, whatever their order in the file.
    digest: str

    def to_json(self) -> str:
        """The text of ``manifest.json``, with a checksum over all the rest."""
        document = self.model_dump(mode="json")
        return json.dumps({**document, "checksum": _checksum(document)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """The manifest in ``text``. Raises :class:`ArtifactDamaged` when it cannot be trusted."""
        try:
            document = json.loads(text)
            checksum = document.pop("checksum")
            if checksum != _checksum(document):
                raise ArtifactDamaged(f"{where}: the checksum of the manifest does not match")
            if document["format"] != FORMAT:
                raise ArtifactDamaged(f"{where}: object format {document['format']}, this program reads {FORMAT}")
            return cls.model_validate(document)
        except (ValueError, TypeError, KeyError, AttributeError, ValidationError) as error:
            raise ArtifactDamaged(f"{where}: unreadable manifest ({type(error).__name__}: {error})") from error


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(document, "manifest")).hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries a result may depend on."""
    return dict(_versions())
