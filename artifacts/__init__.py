"""The artifact store: content-addressed, typed, verified.

    from artifacts import Store, stage_key

    store = Store()                                     # LORASUITE_HOME, or ~/.cache/lorasuite
    key = stage_key("similarity", 1, {"metric": "cka"}, {"old": "<fingerprint>", "new": "<fingerprint>"})
    store.put(key, stage="similarity", version=1, settings=..., inputs=..., tensors={"cka": matrix})
    store.open(key).tensor("cka")

Knows neither the library nor Prefect.
"""

from artifacts.artifact import Artifact
from artifacts.collection import GcReport, Listed, Removal
from artifacts.errors import ArtifactDamaged, ArtifactError, ArtifactMissing
from artifacts.files import private_directory
from artifacts.files import size as directory_size
from artifacts.keys import canonical_json, stage_key
from artifacts.manifest import FileEntry, Manifest
from artifacts.remote import MirroredStore, default_remote, open_store
from artifacts.side_file import SideFile
from artifacts.store import Store, default_home

__all__ = [
    "Artifact",
    "ArtifactDamaged",
    "ArtifactError",
    "ArtifactMissing",
    "FileEntry",
    "GcReport",
    "Listed",
    "Manifest",
    "MirroredStore",
    "Removal",
    "SideFile",
    "Store",
    "canonical_json",
    "default_home",
    "default_remote",
    "directory_size",
    "open_store",
    "private_directory",
    "stage_key",
]
