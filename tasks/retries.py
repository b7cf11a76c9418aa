"""Which failures are worth another try: those that can pass by themselves. Bad input never does."""

from __future__ import annotations

import errno
import threading
import traceback
from typing import Any

import httpx
import torch

from artifacts import ArtifactError
from lorasuite.bases import release_models
from lorasuite.errors import LoRASuiteError

#: Seconds before each further attempt.
DELAYS = (2.0, 8.0, 30.0)

#: What the file system will say again, however often it is asked.
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_LASTING_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL}


def can_pass(error: BaseException) -> bool:
    """Whether trying again may help: disk and network, the Hub, CUDA out of memory. Never errors raised on purpose."""
    if isinstance(error, (LoRASuiteError, ArtifactError)):
        return False
    if isinstance(error, (torch.OutOfMemoryError, httpx.TransportError)):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status == 429 or status >= 500
    if not isinstance(error, OSError) or isinstance(error, _LASTING) or error.errno in _LASTING_ERRNO:
        return False
    return type(error).__name__ != "OfflineModeIsEnabled"


def retry_stage(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition of the stages."""
    return can_pass(state.data) if isinstance(state.data, BaseException) else False


def retry_download(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition of a download: the library says that one failed, its cause why."""
    error = state.data
    while isinstance(error, BaseException) and not can_pass(error):
        error = error.__cause__
    return isinstance(error, BaseException)


# How often each stage ran out of memory in this process: its next attempts take smaller micro-batches.
_halvings: dict[str, int] = {}
_guard = threading.Lock()


def halvings(key: str) -> int:
    """How often the micro-batch of the stage ``key`` is to be halved."""
    with _guard:
        return _halvings.get(key, 0)


def note_out_of_memory(key: str, error: BaseException) -> None:
    """Halve the next attempt's micro-batch, and let go of what the failed one holds on the device."""
    with _guard:
        _halvings[key] = _halvings.get(key, 0) + 1
    # the frames of a traceback keep their tensors alive, and Prefect keeps the traceback
    traceback.clear_frames(error.__traceback__)
    release_models()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved(size: int, times: int) -> int:
    """``size`` halved so often, as a divisor of it: the largest not above, at least 1."""
    wanted = max(1, size >> times)
    return next(part for part in range(wanted, 0, -1) if size % part == 0)
