"""What holds for every file: private ones stay inside their room, and public definitions say what they are.

ruff's D1 rules look at no file whose name begins with an underscore, which in the rooms is every one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("lorasuite", "artifacts", "tasks", "flows", "benchmarks")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
#: Longest file of code.
LINES = 400


def module(file: Path) -> tuple[str, ...]:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


#: Modules that are one file: a private name of such a one belongs to the package it lies in.
SINGLE = {module(file) for file in FILES if file.name != "__init__.py"}


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """The dotted path of everything that a file imports by an absolute or relative import."""
    package = module(file) if file.name == "__init__.py" else module(file)[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield tuple(name.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            start = (*start, *(node.module.split(".") if node.module else ()))
            for name in node.names:
                yield (*start, name.name)


def private_imports(file: Path) -> list[str]:
    """Imports of private files or names of a package that the file does not lie in."""
    found = []
    for path in imported(file):
        if path[0] not in PACKAGES:
            continue
        for n, part in enumerate(path):
            owner = path[: n - 1] if path[:n] in SINGLE else path[:n]
            if part.startswith("_") and module(file)[: len(owner)] != owner:
                found.append(".".join(path))
                break
    return found


def undocumented(file: Path) -> Iterator[str]:
    """Public definitions without a docstring: modules, classes, functions and methods."""
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def walk(node: ast.Module | ast.ClassDef, path: str) -> Iterator[str]:
        if not ast.get_docstring(node):
            yield path
        for inner in node.body:
            if not isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or inner.name[0] == "_":
                continue
            name = f"{path}.{inner.name}"
            if isinstance(inner, ast.ClassDef):
                yield from walk(inner, name)
            elif not ast.get_docstring(inner) and not overloads(inner):
                yield name

    yield from walk(tree, ".".join(module(file)))


def overloads(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a definition is one of several signatures, or says the same as the method it overrides."""
    return any(isinstance(d, ast.Name) and d.id in ("overload", "override") for d in function.decorator_list)


def names(files: list[Path]) -> list[str]:
    return [file.relative_to(ROOT).as_posix() for file in files]


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_private_files_are_imported_in_their_room_only(file: Path) -> None:
    assert private_imports(file) == []


def test_a_private_import_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check itself: imports from another room, from the same one, and of a name."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "lorasuite" / "data" / "_made.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from lorasuite.bases._files import resolve\nimport lorasuite.bases._weights\n"
        "from lorasuite.data import _rows\n"
        "from lorasuite.data._rows import Row\nfrom lorasuite.bases import Checkpoint, _tracing\nfrom os import _exit\n"
    )
    assert private_imports(file) == [
        "lorasuite.bases._files.resolve",
        "lorasuite.bases._weights",
        "lorasuite.bases._tracing",
    ]


CODE = [file for file in FILES if module(file)[0] != "benchmarks"]


@pytest.mark.parametrize("file", CODE, ids=names(CODE))
def test_public_definitions_say_what_they_are(file: Path) -> None:
    assert list(undocumented(file)) == []


@pytest.mark.parametrize("file", CODE, ids=names(CODE))
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LINES
