"""What is tried again, and how."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from prefect import flow

from artifacts import ArtifactDamaged, Store
from lorasuite.errors import CheckpointError, DataError
from tasks import retries
from tasks.retries import DELAYS, can_pass, halved, retry_download
from tasks.stage import Where, stage


def hub_error(status: int) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    request = httpx.Request("GET", "https://hub")
    return HfHubHTTPError("hub", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    "error, worth",
    [
        (OSError(errno.EIO, "input/output error"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (httpx.ConnectError("no route"), True),
        (hub_error(503), True),
        (hub_error(429), True),
        (hub_error(404), False),
        (hub_error(401), False),
        (OSError(errno.ENOSPC, "no space left"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (DataError("row 3 is empty"), False),
        (CheckpointError("no config.json"), False),  # an OSError too
        (ArtifactDamaged("bytes have changed"), False),  # and so is this
        (ValueError(), False),
        (RuntimeError("a bug"), False),
    ],
)
def test_what_can_pass(error: Exception, worth: bool) -> None:
    assert can_pass(error) is worth


def test_a_download_looks_at_the_cause() -> None:
    def failed(cause: Exception) -> Any:
        error = CheckpointError("the Hub did not give it")
        error.__cause__ = cause
        return SimpleNamespace(data=error)

    assert retry_download(None, None, failed(hub_error(502)))
    assert not retry_download(None, None, failed(hub_error(404)))
    assert not retry_download(None, None, SimpleNamespace(data=CheckpointError("no such directory")))


@pytest.mark.parametrize(
    "size, times, expected", [(16, 0, 16), (16, 1, 8), (16, 9, 1), (12, 2, 3), (6, 2, 1), (9, 1, 3)]
)
def test_halving_divides_the_batch(size: int, times: int, expected: int) -> None:
    assert halved(size, times) == expected and size % expected == 0


def test_delays_grow() -> None:
    assert list(DELAYS) == sorted(DELAYS) and DELAYS[0] >= 1


def test_out_of_memory_is_tried_again_with_less(home: Path) -> None:
    seen: list[int] = []

    @stage("hungry", retry_delays=[0, 0, 0])
    def hungry(inputs: Any, settings: Any, where: Where) -> dict[str, Any]:
        seen.append(where.halvings)
        if where.halvings < 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": halved(settings["batch_size"], where.halvings)}

    @flow
    def run() -> Any:
        return Store().open(hungry.run(inputs={}, settings={"batch_size": 16}).key).info

    assert run() == {"batch": 4}
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("error", [DataError("row 3 is empty"), CheckpointError("no shard"), RuntimeError("a bug")])
def test_bad_input_and_bugs_are_not_tried_again(home: Path, error: Exception) -> None:
    calls = 0

    @stage("refusing", retry_delays=[0, 0])
    def refusing(inputs: Any, settings: Any, where: Where) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        raise error

    @flow
    def run() -> None:
        refusing.run(inputs={})

    with pytest.raises(type(error)):
        run()
    assert calls == 1


def test_attempts_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    @stage("unlucky", retry_delays=[0, 0])
    def unlucky(inputs: Any, settings: Any, where: Where) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        raise OSError("a flaky disk")

    @flow
    def run() -> None:
        unlucky.run(inputs={})

    with pytest.raises(OSError, match="flaky"):
        run()
    assert calls == 3
    assert retries.halvings("unlucky") == 0
