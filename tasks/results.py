"""Prefect's records of what stages returned: read only where they are what a stage here writes."""

from __future__ import annotations

import json
from pathlib import Path

from prefect.serializers import JSONSerializer


def drop_foreign_record(record: Path, ref: dict[str, str]) -> bool:
    """Remove the record of a stage's result that is anything but a plain JSON reference; whether there was one.

    A record names the serializer that Prefect reads it with. One that says pickle, or JSON with objects in it, would
    run code when it is read.

    Args:
        record: its file, which need not exist.
        ref: the stage's name and the key of its artifact: what a sound record holds.
    """
    try:
        found = json.loads(record.read_bytes())
        plain = JSONSerializer().model_dump(mode="json")
        sound = found.keys() == {"metadata", "result"} and found["metadata"]["serializer"] == plain
        if sound and json.loads(found["result"]) == ref:
            return False
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    record.unlink(missing_ok=True)
    return True
