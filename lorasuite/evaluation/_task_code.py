"""Code in task files: what lm-eval would run of a file that is neither its own nor this package's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lorasuite.bases import check_aliases
from lorasuite.errors import ConfigError, Problem

#: What lm-eval reads as "import this function".
FUNCTION = "!function"
_REMEDY = "Read that code, and give --trust-remote-code if you trust it."


def _problem(where: str, name: str) -> Problem:
    return Problem(where, f"runs code of its own ({FUNCTION} {name})", _REMEDY)


def task_file_problems(tasks: Sequence[str], include_path: Path | None, trusted: bool = False) -> list[Problem]:
    """What is wrong with task files before lm-eval reads them: of a directory, those named, and those they include.

    Files that may never end, aliases that make a file far larger than it is and, unless ``trusted``, code.
    """
    files = [Path(task) for task in tasks if _is_there(Path(task))]
    if include_path is not None and include_path.is_dir():
        files += sorted(include_path.rglob("*.yaml"))
    problems: list[Problem] = []
    seen: set[Path] = set()
    while files:
        file = files.pop(0).resolve()
        if file in seen or not _is_there(file):
            continue
        seen.add(file)
        if not file.is_file():
            problems.append(Problem(str(file), "is no regular file", "Take it out of the directory of task files."))
            continue
        try:
            root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
            continue  # lm-eval passes over it, or says so when it is asked for
        try:
            check_aliases(root)
        except (yaml.YAMLError, RecursionError) as error:
            what = "is nested too deep, or contains itself" if isinstance(error, RecursionError) else str(error)
            problems.append(Problem(str(file), what, "Write its values out, or fewer of them."))
        named = next((node.value for node in _nodes(root) if node.tag == FUNCTION), None)
        if named is not None and not trusted:
            problems.append(_problem(str(file), str(named)))
        files += [file.parent / included for included in _includes(root)]
    return problems


def _is_there(path: Path) -> bool:
    """Whether a file of any kind, and no directory, has this name; a text that can be no path has none."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """A document's nodes, each once: aliases make one a child of many."""
    waiting, seen = [root] if root is not None else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _includes(root: yaml.Node | None) -> list[str]:
    if not isinstance(root, yaml.MappingNode):
        return []
    found: list[str] = []
    for key, value in root.value:
        if key.value == "include":
            found += [str(node.value) for node in _nodes(value) if isinstance(node, yaml.ScalarNode)]
    return found


@contextlib.contextmanager
def trusted_code_only(trust_remote_code: bool, trusted: Iterable[Path] = ()) -> Iterator[None]:
    """Inside, lm-eval imports functions of its own and this package's task files alone, and its templates run no code.

    Jinja templates of task files reach every attribute of Python's objects; in Jinja's sandbox they do not.

    Args:
        trust_remote_code: leave lm-eval as it is.
        trusted: more directories whose functions may be imported.
    """
    if trust_remote_code:
        yield
        return
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import tasks, utils
    from lm_eval.tasks import _yaml_loader

    from lorasuite.evaluation.eval_tasks import TASK_FILES

    folders = [folder.resolve() for folder in (*trusted, TASK_FILES, Path(tasks.__file__).parent)]
    imported, env = _yaml_loader._import_func_in_yml, utils.env

    def guarded(name: str, folder: Path) -> Any:
        if not any(folder.resolve().is_relative_to(known) for known in folders):
            raise ConfigError(_problem(str(folder), name))
        return imported(name, folder)

    sandbox = SandboxedEnvironment(
        loader=env.loader, undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline
    )
    sandbox.filters.update(env.filters)
    _yaml_loader._import_func_in_yml, utils.env = guarded, sandbox
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml, utils.env = imported, env
