"""Content addresses: canonical JSON and the key of a stage."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

_KEY = re.compile(r"[0-9a-f]{64}")


def plain(value: Any, where: str = "value") -> Any:
    """``value`` as plain JSON data: dictionaries with text keys, lists, text, finite numbers, booleans, None.

    Raises ``TypeError`` for anything else and ``ValueError`` for NaN and infinities, naming the place. Keys
    that are not text are refused because ``{1: x}`` and ``{"1": x}`` would become the same JSON.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}, which JSON cannot hold")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; only text keys are allowed")
        return {str.__str__(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which is not JSON data")


def canonical_json(value: Any, where: str = "value") -> bytes:
    """``value`` as JSON with sorted keys, no whitespace, ASCII only and floats by ``repr``.

    Raises ``TypeError`` or ``ValueError`` as :func:`plain` does.
    """
    text = json.dumps(plain(value, where), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def stage_key(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The address of what ``stage`` makes from ``inputs`` (name to fingerprint or key) under ``settings``.

    Returns 64 hexadecimal digits. Nothing that is not part of the computation may be given: no path, device,
    date or run id. Raises ``TypeError`` for what is not JSON data, ``ValueError`` for NaN, infinities and an
    empty fingerprint.
    """
    if not isinstance(stage, str) or not stage:
        raise TypeError(f"a stage is named by a text, not {stage!r}")
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"the version of stage {stage!r} is a whole number, not {version!r}")
    for name, fingerprint in inputs.items():
        if not isinstance(fingerprint, str):
            raise TypeError(f"input {name!r} of stage {stage!r} needs a fingerprint text, not {fingerprint!r}")
        if not fingerprint:
            raise ValueError(f"input {name!r} of stage {stage!r} has an empty fingerprint")
    document = {"stage": stage, "version": version, "settings": settings, "inputs": inputs}
    return hashlib.sha256(canonical_json(document, stage)).hexdigest()


def check_key(key: str) -> str:
    """``key`` itself. Raises ``ValueError`` when it is not one: keys become directory names."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not an artifact key: 64 hexadecimal digits expected")
    return key
