"""A content-addressed, typed, verified store of artifacts.

One object is one directory, ``home/objects/<ab>/<key>/``, holding ``data.safetensors``, ``manifest.json``
and, when the stage made any, plain files under ``files/``. It is written elsewhere, flushed to disk and
renamed into place, and never changes afterwards; so a directory is also the unit that a mirror elsewhere
would copy, under the same names.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.artifact import Artifact
from artifacts.collection import GcReport, Listed, collect
from artifacts.errors import ArtifactDamaged, ArtifactMissing
from artifacts.files import DATA, OBJECTS, copy_files, flush, fsync, private_directory, size
from artifacts.keys import check_key, plain
from artifacts.leases import Leases
from artifacts.manifest import FileEntry, Manifest, library_versions

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
LAST_USED = "last-used"

#: A file changed this shortly before it was checked may change again without a new time stamp.
_RACY_SECONDS = 0.1

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[str, int, int, int], ...]

#: Objects this process has checked in full: directory to what their files looked like then.
_verified: dict[str, _Stamp] = {}


def default_home() -> Path:
    """``LORASUITE_HOME``, or ``~/.cache/lorasuite``. Raises ``ValueError`` for a remote address."""
    home = os.environ.get("LORASUITE_HOME")
    if not home:
        return Path.home() / ".cache" / "lorasuite"
    if "://" in home:
        raise ValueError(f"LORASUITE_HOME={home}: give a local directory, and the shared store as LORASUITE_STORE")
    return Path(home).expanduser().absolute()


class Store:
    """The artifacts under one ``home`` directory. Safe to use from several processes at once."""

    def __init__(self, home: Path | str | None = None) -> None:
        self.home = Path(home).expanduser().absolute() if home is not None else default_home()
        self._objects = self.home / OBJECTS
        self._tmp = self.home / "tmp"
        self._leases = Leases(self.home)

    def __repr__(self) -> str:
        return f"Store({str(self.home)!r})"

    def path(self, key: str) -> Path:
        """The directory of the object ``key``, which need not exist."""
        return self._objects / check_key(key)[:2] / key

    def manifest(self, key: str) -> Manifest:
        """The manifest of ``key``, checked. Raises :class:`ArtifactMissing`, :class:`ArtifactDamaged`."""
        directory = self.path(key)
        where = f"artifact {key}"
        try:
            text = (directory / MANIFEST).read_bytes()
        except FileNotFoundError:
            if directory.exists():
                raise ArtifactDamaged(f"{where}: no manifest. {_remedy(key)}") from None
            raise ArtifactMissing(f"{where} is not in {self.home}. Run the stage that makes it.") from None
        manifest = Manifest.from_json(text, where)
        if manifest.key != key:
            raise ArtifactDamaged(f"{where}: its manifest is that of {manifest.key}. {_remedy(key)}")
        return manifest

    def has(self, key: str) -> bool:
        """Whether ``key`` is there and looks whole: the manifest is sound and every file has its size."""
        try:
            self._stamp(key, self.manifest(key))
        except (ArtifactMissing, ArtifactDamaged):
            return False
        return True

    def verify(self, key: str) -> None:
        """Read every byte of ``key`` and compare.

        Raises :class:`ArtifactMissing`, or :class:`ArtifactDamaged` saying what is wrong and what to do.
        """
        self._check(key, self.manifest(key), again=True)

    def open(self, key: str, verify: bool = True) -> Artifact:
        """The object ``key``, checked in full the first time this process opens it, and marked as used.

        :meth:`gc` does not remove it as long as this process lives. ``verify=False`` checks the manifest and the file
        sizes only. Raises :class:`ArtifactMissing`, :class:`ArtifactDamaged`.
        """
        self.use(key)
        manifest = self.manifest(key)
        if verify:
            self._check(key, manifest)
        else:
            self._stamp(key, manifest)
        directory = self.path(key)
        with contextlib.suppress(OSError):  # a store on a read-only disk can be read all the same
            (directory / LAST_USED).touch()
        return Artifact(directory, manifest)

    def use(self, name: str) -> None:
        """Keep a key, or a directory such as ``work/x``, from :meth:`gc` as long as this process lives."""
        self._leases.use(name)

    def _stamp(self, key: str, manifest: Manifest) -> _Stamp:
        """What the files of ``key`` look like from outside. :class:`ArtifactDamaged` on a wrong size."""
        directory = self.path(key)
        stamps = []
        for name, entry in manifest.files.items():
            try:
                stat = (directory / name).stat()
            except FileNotFoundError:
                raise ArtifactDamaged(f"artifact {key}: {name} is missing. {_remedy(key)}") from None
            if stat.st_size != entry.size:
                raise ArtifactDamaged(
                    f"artifact {key}: {name} has {stat.st_size} bytes instead of {entry.size}. {_remedy(key)}"
                )
            stamps.append((name, stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(stamps)

    def _check(self, key: str, manifest: Manifest, again: bool = False) -> None:
        begun = time.time()
        directory = self.path(key)
        stamp = self._stamp(key, manifest)
        if not again and _verified.get(str(directory)) == stamp:
            return
        _verified.pop(str(directory), None)
        for name, entry in manifest.files.items():
            with (directory / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                raise ArtifactDamaged(f"artifact {key}: the bytes of {name} have changed. {_remedy(key)}")
        if all(mtime_ns / 1e9 < begun - _RACY_SECONDS for _, _, mtime_ns, _ in stamp):
            _verified[str(directory)] = stamp

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
        """Store an object and return its manifest.

        ``tensors`` may be an iterator of pairs: one tensor at a time is held in memory. ``info`` (results),
        ``files`` (names to bytes, to a file or to a directory to copy) and ``run`` (how it went) are read
        after the tensors, so a generator may still fill them in. A valid object already there is kept, unless
        ``replace``; a damaged one is moved aside. Readers see the whole object or none. ``before_it_counts`` is
        called when everything is written and nothing can be seen yet; where it raises, nothing is stored.

        Raises ``TypeError`` or ``ValueError`` for what cannot be stored (a name that leaves the object, data
        that is not JSON, NaN in ``info``) and ``OSError`` when the disk refuses; then nothing is stored.
        """
        target = self.path(key)
        self.use(key)
        if not replace and (existing := self._sound(key)) is not None:
            return existing
        scratch = self._temporary(f"put-{key[:12]}")
        try:
            from artifacts.tensors import write_tensors  # torch, which nothing else here needs

            digest, sha256 = write_tensors(tensors, scratch / DATA)
            entries = {DATA: FileEntry(size=(scratch / DATA).stat().st_size, sha256=sha256)}
            entries.update(copy_files(files or {}, scratch))
            manifest = Manifest(
                stage=stage,
                version=version,
                key=key,
                inputs=dict(inputs),
                settings=plain(settings, "settings"),
                info=plain(info or {}, "info"),
                run=plain(run or {}, "run"),
                libraries=library_versions(),
                created=datetime.now(UTC),
                size=sum(entry.size for entry in entries.values()),
                files=entries,
                digest=digest,
            )
            flush(scratch)
            (scratch / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            fsync(scratch / MANIFEST)
            fsync(scratch)
            if before_it_counts is not None:
                before_it_counts()
            return self._install(scratch, target, manifest, replace)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _install(self, scratch: Path, target: Path, manifest: Manifest, replace: bool) -> Manifest:
        """Rename ``scratch`` to ``target``; keep a sound object that another writer put there first."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._exclusive():
            aside = None
            if target.exists():
                existing = self._sound(manifest.key)
                if existing is not None and (not replace or _same(existing, manifest)):
                    return existing
                aside = self._aside(target, "replaced" if existing is not None else "damaged")
            try:
                scratch.rename(target)
            except BaseException:
                if aside is not None:
                    aside.rename(target)  # what was there is there again
                    aside.parent.rmdir()
                raise
        self._dispose(aside)
        try:
            fsync(target.parent)
        except OSError as error:  # it is there, whole; a failing disk may yet lose it, and then it is computed again
            logger.warning("artifact %s: %s could not be flushed (%s)", manifest.key, target.parent, error)
        return manifest

    def _sound(self, key: str) -> Manifest | None:
        """The manifest of ``key`` when the object is there and every byte is right."""
        try:
            manifest = self.manifest(key)
            self._check(key, manifest)
        except (ArtifactMissing, ArtifactDamaged):
            return None
        return manifest

    def _aside(self, target: Path, why: str) -> Path:
        """Move an object out of the way; where to."""
        aside = self._temporary(why) / target.name
        try:
            target.rename(aside)
        except BaseException:
            aside.parent.rmdir()
            raise
        return aside

    @staticmethod
    def _dispose(aside: Path | None) -> None:
        """An object that was moved out of the way: a damaged one stays in ``tmp`` for a day, others go at once."""
        if aside is None:
            return
        if aside.parent.name.startswith("damaged"):
            logger.warning("damaged artifact moved to %s", aside)
            os.utime(aside.parent)
        else:
            shutil.rmtree(aside.parent, ignore_errors=True)

    def remove(self, key: str) -> None:
        """Remove the object ``key``, damaged or not, in use or not. Raises :class:`ArtifactMissing`."""
        target = self.path(key)
        with self._exclusive():
            if not target.exists():
                raise ArtifactMissing(f"artifact {key} is not in {self.home}")
            aside = self._aside(target, "removed")
        self._dispose(aside)

    def _temporary(self, name: str) -> Path:
        private_directory(self.home)
        directory = self._tmp / f"{name}-{uuid.uuid4().hex}"
        directory.mkdir(parents=True)
        return directory

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One writer at a time moves objects in or out; the kernel frees the lock of a killed process."""
        private_directory(self.home)
        with (self.home / "objects.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def ls(self) -> Iterator[Listed]:
        """Every object, damaged ones too (checked as :meth:`has` checks), in the order of their keys."""
        for directory in sorted(self._objects.glob("??/" + "[0-9a-f]" * 64)):
            key = directory.name
            manifest, problem = None, None
            try:
                manifest = self.manifest(key)
                self._stamp(key, manifest)
            except ArtifactMissing:  # removed meanwhile
                continue
            except ArtifactDamaged as error:
                manifest, problem = None, str(error)
            yield Listed(key, manifest, problem, size(directory), self.last_used(key))

    def gc(self, keep_days: float = 30, dry_run: bool = True, stages: Collection[str] | None = None) -> GcReport:
        """Remove objects not opened for ``keep_days``, and what killed processes left behind under ``home``.

        What a living process has opened, and what is younger than the oldest of those processes, stays. ``stages``
        limits it to objects of those stages. Damaged objects go as well, when no stage is asked for. Returns what was
        removed; by default nothing is, and the report says what would be.

        Raises:
            ValueError: for ``keep_days`` that are negative or no number.
        """
        return collect(self, self._leases, keep_days, dry_run, stages)

    def last_used(self, key: str) -> datetime:
        """When ``key`` was opened last, or made."""
        directory = self.path(key)
        for path in (directory / LAST_USED, directory):
            with contextlib.suppress(OSError):
                return datetime.fromtimestamp(path.stat().st_mtime, UTC)
        return datetime.now(UTC)


def _same(one: Manifest, other: Manifest) -> bool:
    """Whether two objects hold the same results, however they were computed."""
    return one.digest == other.digest and one.files == other.files and one.info == other.info


def _remedy(key: str) -> str:
    return f"Run its stage again, or remove it: lorasuite artifacts gc, or objects/{key[:2]}/{key}."
