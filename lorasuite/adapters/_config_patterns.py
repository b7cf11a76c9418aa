"""Regular expressions in an adapter's config, tried within a time limit, and the modules they name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from lorasuite.errors import Problem

#: Seconds of a processor that all regular expressions of a config may take on the names they are matched with.
TIME_LIMIT = 5
#: Seconds that they may take where others have the processor, too.
PATIENCE = 10
#: Names that are tried with a wrong ending, too: what nearly matches takes longest.
ENDINGS = 40


def unmatched(config: Mapping[str, Any], modules: Iterable[str], where: str) -> list[Problem]:
    """Whether ``target_modules`` names none of the modules in the file: PEFT would load none of them.

    Args:
        config: one that :func:`pattern_problems` finds nothing in.
        modules: paths of the modules that have factors.
    """
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return []
    if isinstance(targets, str):
        found = any(re.fullmatch(targets, name) for module in modules for name in _names(module))
    else:
        found = any(module == name or module.endswith(f".{name}") for module in modules for name in targets)
    if found:
        return []
    return [Problem(f"{where}: target_modules", "names no module of the file beside it", "The two do not belong.")]


def _names(module: str) -> list[str]:
    """A module's path, and what it is called where the language model is a part of a larger one."""
    inner = module.removeprefix("model.")
    return [module, f"model.language_model.{inner}", f"language_model.{module}", f"model.{module}"]


#: Run in a process of its own, as Python's expressions can be stopped in no other way: says each field it begins with.
_TRY = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1]) + 1))
given = json.load(sys.stdin)
for field, pattern in given["patterns"]:
    print(json.dumps([field, None]), flush=True)
    try:
        compiled = re.compile(pattern)
        for name in given["names"]:
            compiled.fullmatch(name)
    except Exception as error:
        print(json.dumps([field, f"{type(error).__name__}: {error}"]), flush=True)
print("done", flush=True)
"""


def pattern_problems(config: Mapping[str, Any], names: Iterable[str], where: str) -> list[Problem]:
    """Regular expressions that are none, or take too long on names of modules.

    Args:
        config: one that the check of types finds nothing in.
        names: of tensors or modules, of an adapter or of its base; what they lie in is tried as well.
    """
    patterns = tuple(_patterns(config))
    if not patterns:
        return []
    modules = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    tried = [form for module in sorted(modules) for form in _names(module)]
    endings = [f"{name}!" for name in sorted(modules, key=len)[-ENDINGS:]]
    wrong = _refused(patterns, (*tried, *endings))
    return [Problem(f"{where}: {field}", what, "Name the modules in a simpler way.") for field, what in wrong.items()]


@lru_cache(maxsize=16)
def _refused(patterns: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> dict[str, str]:
    """Fields with an expression that is none, or takes too long on these names, and which of it."""
    given = {"patterns": patterns, "names": names}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRY, str(TIME_LIMIT)],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as error:
        done = error.stdout or b""
    lines = done.decode().splitlines()
    said = [json.loads(line) for line in lines if line != "done"]
    wrong = {field: f"is no regular expression ({why})" for field, why in said if why}
    if lines[-1:] != ["done"]:
        field = said[-1][0] if said else patterns[0][0]
        wrong[field] = f"has a regular expression that takes more than {TIME_LIMIT} seconds, or more than 1 GiB"
    return wrong


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``(field, expression)`` as PEFT matches them with names of modules; without plain names, which are none."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            yield from _expressions(field, [config[field]], "{}")
    yield from _expressions("modules_to_save", config.get("modules_to_save"), r"(^|.*\.){}($|\..*)")
    yield from _expressions("layers_pattern", config.get("layers_pattern"), r"(?:^|.*?\.){}\.(\d+)\..*")
    for field in ("rank_pattern", "alpha_pattern"):
        yield from _expressions(field, config.get(field), r"(.*\.)?({})")


def _expressions(field: str, given: Any, frame: str) -> Iterator[tuple[str, str]]:
    for text in [given] if isinstance(given, str) else given or ():
        if not re.fullmatch(r"[\w.\-]*", text):
            yield field, frame.replace("{}", text)
