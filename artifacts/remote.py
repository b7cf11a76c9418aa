"""A store shared by several hosts: a bucket, or any other place fsspec reaches, with a local mirror.

The remote holds the same directories as the mirror, ``objects/<ab>/<key>/``. An object is published by its manifest,
which is written last and taken away first; what a host downloads is compared with it byte by byte before it enters the
mirror.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.artifact import Artifact
from artifacts.errors import ArtifactDamaged, ArtifactMissing
from artifacts.keys import check_key
from artifacts.manifest import Manifest
from artifacts.store import MANIFEST, Store

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def default_remote() -> str | None:
    """``LORASUITE_STORE``, an fsspec address such as ``s3://bucket/prefix``; None where artifacts stay on this host."""
    return os.environ.get("LORASUITE_STORE") or None


def _options(remote: str) -> dict[str, Any]:
    """s3fs tries each request five times; botocore below it would make twenty-five of them, which is six minutes where
    a server does not answer.
    """
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}}} if remote.startswith(("s3://", "s3a://")) else {}


def open_store(home: Path | str | None = None, remote: str | None = None) -> Store:
    """The store under ``home``; a mirror of ``remote`` where one is given. Raises as :class:`MirroredStore` does."""
    return Store(home) if remote is None else MirroredStore(home, remote)


class MirroredStore(Store):
    """A local mirror of a remote store: reads fill it, writes go to both.

    ``ls``, ``gc`` and ``remove`` act on the mirror alone: what is dropped there is downloaded again when needed.
    How long the remote keeps objects is for its owner to say, by a life-cycle rule of the bucket.

    Raises ``ValueError`` for an address fsspec does not know, ``ImportError`` where its driver is not installed.
    """

    def __init__(self, home: Path | str | None, remote: str) -> None:
        super().__init__(home)
        import fsspec

        #: Its address as it is shown, without a password.
        self.remote = re.sub(r"(?<=://)[^/@]*@", "***@", remote)
        # other hosts write too: a listing kept from before would hide what they made
        self._fs, root = fsspec.core.url_to_fs(remote, use_listings_cache=False, **_options(remote))
        self._root = str(root).rstrip("/")

    def __repr__(self) -> str:
        return f"MirroredStore({str(self.home)!r}, {self.remote!r})"

    def manifest(self, key: str) -> Manifest:
        """As :meth:`Store.manifest`; what the mirror does not have is downloaded."""
        try:
            return super().manifest(key)
        except (ArtifactMissing, ArtifactDamaged):
            if not self._download(key):
                raise
            return super().manifest(key)

    def open(self, key: str, verify: bool = True) -> Artifact:
        """As :meth:`Store.open`; a damaged mirror is filled again from the remote."""
        try:
            return super().open(key, verify)
        except ArtifactDamaged:
            if not self._download(key):
                raise
            return super().open(key, verify)

    def put(
        self,
        key: str,
        *,
        stage: str,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        version: int,
        tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] = (),
        info: Mapping[str, Any] | None = None,
        files: Mapping[str, Path | bytes] | None = None,
        run: Mapping[str, Any] | None = None,
        replace: bool = False,
        before_it_counts: Callable[[], None] | None = None,
    ) -> Manifest:
        """As :meth:`Store.put`, and published on the remote. Raises ``OSError`` when the remote refuses."""
        manifest = super().put(
            key,
            stage=stage,
            inputs=inputs,
            settings=settings,
            version=version,
            tensors=tensors,
            info=info,
            files=files,
            run=run,
            replace=replace,
            before_it_counts=before_it_counts,
        )
        self._upload(manifest)
        return manifest

    def _sound(self, key: str) -> Manifest | None:
        """Of the mirror alone: asked under its lock, where nothing may be downloaded."""
        try:
            manifest = Store.manifest(self, key)
            self._check(key, manifest)
        except (ArtifactMissing, ArtifactDamaged):
            return None
        return manifest

    def _address(self, key: str, name: str) -> str:
        return f"{self._root}/objects/{check_key(key)[:2]}/{key}/{name}"

    def _published(self, key: str) -> Manifest | None:
        """The remote's manifest, where there is a sound one."""
        try:
            text: bytes = self._fs.cat_file(self._address(key, MANIFEST))
        except FileNotFoundError:
            return None
        try:
            manifest = Manifest.from_json(text, f"{self.remote}: artifact {key}")
        except ArtifactDamaged as error:
            logger.warning("%s", error)
            return None
        return manifest if manifest.key == key else None

    def _upload(self, manifest: Manifest) -> None:
        """Publish an object of the mirror: its files, then its manifest."""
        there = self._published(manifest.key)
        if there is not None and there.files == manifest.files and there.info == manifest.info:
            return
        if there is not None:
            self._withdraw(manifest.key)
        directory = self.path(manifest.key)
        for name in manifest.files:
            address = self._address(manifest.key, name)
            self._fs.makedirs(address.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(directory / name), address)
        self._fs.pipe_file(self._address(manifest.key, MANIFEST), (directory / MANIFEST).read_bytes())

    def _withdraw(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._address(key, MANIFEST))

    def _download(self, key: str) -> bool:
        """Bring an object into the mirror; whether the remote has it whole. A damaged one is withdrawn there."""
        manifest = self._published(key)
        if manifest is None:
            return False
        scratch = self._temporary(f"get-{key[:12]}")
        try:
            for name, entry in manifest.files.items():
                target = scratch / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._fs.get_file(self._address(key, name), str(target))
                except FileNotFoundError:
                    return self._refuse(key, f"{name} is missing")
                with target.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                        return self._refuse(key, f"the bytes of {name} are not those that were stored")
            (scratch / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            self._install(scratch, self.path(key), manifest, replace=False)
            return True
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _refuse(self, key: str, why: str) -> bool:
        logger.warning("%s: artifact %s: %s; it is withdrawn, and computed again", self.remote, key, why)
        self._withdraw(key)
        return False
