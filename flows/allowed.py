"""What runs on the workers here may do, as their operator said when they were started.

A run of a deployment has its parameters from the API, and an event from whoever posts it. What would let them run code
or read any file is taken from the worker's environment alone, which ``lorasuite up`` sets from its own flags.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from prefect.runtime import deployment

from lorasuite.adapters import sources
from lorasuite.errors import ConfigError, Problem, examples
from lorasuite.planning import MigrationConfig

#: Environment variables of a worker, each with a list as of ``PATH``: files and directories of fleets; directories, Hub
#: repositories and organisations whose code is trusted; directories of task files.
FLEETS, CODE, TASK_FILES = "LORASUITE_FLEETS", "LORASUITE_TRUSTED_CODE", "LORASUITE_TASK_FILES"


def deployed() -> bool:
    """Whether this flow run was started through a deployment, with parameters from the API."""
    return deployment.id is not None


@dataclass(frozen=True)
class Allowed:
    """What an operator allows: ``fleets`` by name, models that run ``code``, directories of ``task_files``."""

    fleets: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    task_files: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Allowed:
        """What the environment of this process says."""
        return cls(*(tuple(filter(None, os.environ.get(name, "").split(os.pathsep))) for name in _NAMES))

    def environment(self) -> dict[str, str]:
        """The variables that say it to a worker, with absolute paths.

        Raises:
            ConfigError: naming each directory or file that is not there, and each fleet that cannot be registered.
        """
        problems = [
            Problem(path, "is not there", "Give a fleet file, or a directory of them.")
            for path in self.fleets
            if not Path(path).exists()
        ]
        problems += [
            Problem(path, "is no directory", "Give a directory of lm-eval task files.")
            for path in self.task_files
            if not Path(path).is_dir()
        ]
        problems += [
            Problem(entry, f"holds {os.pathsep!r}, which stands between entries", "Give it another name.")
            for entry in (*self.fleets, *self.code, *self.task_files)
            if os.pathsep in entry
        ]
        if problems:
            raise ConfigError(problems)
        code = [str(Path(entry).resolve()) if Path(entry).is_dir() else entry for entry in self.code]
        fleets, tasks = ([str(Path(entry).absolute()) for entry in given] for given in (self.fleets, self.task_files))
        said = Allowed(tuple(fleets), tuple(code), tuple(tasks))
        problems = [problem for path in said.registered().values() for problem in _owned(path)]
        if problems:
            raise ConfigError(problems)
        return {name: os.pathsep.join(given) for name, given in zip(_NAMES, astuple(said), strict=True)}

    def registered(self) -> dict[str, Path]:
        """Fleet files by name: that of the file without its ending. Of a directory, each YAML file in it.

        Raises:
            ConfigError: if two have one name.
        """
        files: list[Path] = []
        for entry in map(Path, self.fleets):
            inside = sorted(entry.iterdir()) if entry.is_dir() else [entry]
            files += [file for file in inside if not entry.is_dir() or file.suffix in (".yaml", ".yml")]
        found: dict[str, Path] = {}
        for file in files:
            if found.setdefault(file.stem, file) != file:
                what = f"has the name {file.stem!r}, as {found[file.stem]} has"
                raise ConfigError(Problem(str(file), what, "Rename one of them: fleets are named by their files."))
        return found

    def fleet(self, name: object) -> Path:
        """The file of a registered fleet.

        Raises:
            ConfigError: for a name that no fleet is registered under, and for a file that others can change.
        """
        known = self.registered()
        if not isinstance(name, str) or name not in known:
            remedy = f"Registered here: {examples(sorted(known)) or 'none'} (`lorasuite up --fleet FILE`)."
            raise ConfigError(Problem("fleet", f"{str(name)[:80]!r} is not the name of a registered fleet", remedy))
        if problems := _owned(known[name]):
            raise ConfigError(problems)
        return known[name]

    def check(self, configs: Iterable[MigrationConfig]) -> None:
        """Refuse migrations that would run code, or read task files, that are not allowed here.

        Raises:
            ConfigError: naming each model, adapter and directory.
        """
        code: dict[str, None] = {}
        folders: dict[str, None] = {}
        for config in configs:
            if config.trust_remote_code:
                code |= dict.fromkeys([config.old_base, config.new_base, *sources(config.adapter)])
            files = [task for task in config.every_task if Path(task).is_file()]
            folders |= dict.fromkeys([*([config.include_path] if config.include_path else []), *files])
        self.check_code(code)
        problems = [
            Problem(f"include_path: {path}", "is not allowed on this worker", "`lorasuite up --include-path DIR` does.")
            for path in folders
            if not any(_inside(path, folder) for folder in self.task_files)
        ]
        if problems:
            raise ConfigError(problems)

    def check_code(self, models: Iterable[str]) -> None:
        """Refuse ``trust_remote_code`` for models and adapters whose code is not allowed here.

        Raises:
            ConfigError: naming each.
        """
        remedy = "`lorasuite up --trust-remote-code-of MODEL` does, where you trust that code."
        problems = [
            Problem(f"trust_remote_code: {model}", "is not allowed on this worker", remedy)
            for model in models
            if not any(_covers(entry, model) for entry in self.code)
        ]
        if problems:
            raise ConfigError(problems)


_NAMES = (FLEETS, CODE, TASK_FILES)


def _covers(entry: str, model: str) -> bool:
    """Whether ``directory``, ``org/name`` or ``org/*`` stands for a model: what is in it, or any revision of it."""
    if Path(model).expanduser().is_dir():
        return Path(entry).is_absolute() and _inside(model, entry)
    hub_id, _, _ = model.partition("@")
    organisation, _, name = entry.partition("/")
    parts = hub_id.split("/")
    return parts[:2] == [organisation, name] or (name == "*" and parts[0] == organisation and len(parts) > 1)


def _inside(path: str, folder: str) -> bool:
    """Whether a path is a directory or lies in it, whatever links lead there."""
    return Path(path).expanduser().resolve().is_relative_to(Path(folder).resolve())


def _owned(file: Path) -> list[Problem]:
    """Why a fleet file is not its operator's own: another user's, or one that others can write to."""
    try:
        link, kept = file.lstat(), file.stat()
    except OSError as error:
        return [Problem(str(file), f"cannot be read ({error.strerror})", "Check it and its permissions.")]
    if not stat.S_ISREG(kept.st_mode):
        return [Problem(str(file), "is no regular file", "Register YAML files.")]
    if {link.st_uid, kept.st_uid} - {os.getuid(), 0}:
        return [Problem(str(file), "belongs to another user", "Register files of your own: they may name any path.")]
    if kept.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return [Problem(str(file), "can be changed by other users", f"chmod go-w {file}")]
    return []
