"""YAML files of users, read strictly: no key twice, and no document that becomes far larger than it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

#: Values that the aliases of a document may add to those it is written with.
MOST_VALUES = 100_000


#: What PyYAML quotes, and what of that is not from the file: signs, and its own names of parts (``<stream end>``).
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_OWN = re.compile(r"'(<[a-z ]+>|[^\w']+)'")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, "a key is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The value of a file's document.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying why it is not valid: no UTF-8, or as :func:`parse_yaml`.
    """
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise ValueError("it is no regular file")
    return parse_yaml(path.read_text(encoding="utf-8"))


def parse_yaml(text: str) -> Any:
    """The value of a document.

    Raises:
        ValueError: saying why it is not valid: no YAML, a key given twice, nested too deep, or with aliases that stand
            for more than :data:`MOST_VALUES` values. It says where, and quotes nothing of the document.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            check_aliases(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deep, or contains itself") from None
    except yaml.YAMLError as error:
        raise ValueError(_why(error)) from None
    except Exception:  # of a date that is none, a number by its tag: whatever makes values raises
        raise ValueError("it has a value that is not what it is marked as, or no date") from None


def check_aliases(node: yaml.Node | None) -> None:
    """Refuse a document that becomes far larger than it is written.

    Raises:
        yaml.YAMLError: if its aliases stand for more than :data:`MOST_VALUES` values.
        RecursionError: if it contains itself.
    """
    written: dict[int, int] = {}
    if node is not None and _values(node, written) - len(written) > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES} values")


def _why(error: yaml.YAMLError) -> str:
    """What is wrong and where, without what stands there: the file may be another than was meant."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    what = _QUOTED.sub(lambda found: found[0] if _OWN.fullmatch(found[0]) else "'…'", str(error.problem))
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}"


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out."""
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
