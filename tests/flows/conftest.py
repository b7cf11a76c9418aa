"""One Prefect server for all flow tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# before Prefect is imported: it reads its settings then
os.environ.update(
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    PREFECT_LOGGING_LEVEL="WARNING",
    PREFECT_LOGGING_TO_API_ENABLED="false",
)

import pytest

from tests.flows.served import served
from tests.flows.small import Small
from tests.flows.upped import environment, server_up, up

__all__ = ["environment", "server_up", "up"]


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Its address and process: one server for all workers of a test run, whose start takes a core many seconds."""
    folder = tmp_path_factory.getbasetemp()
    with served(folder.parent / "served" if "PYTEST_XDIST_WORKER" in os.environ else folder / "served") as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def prefect_server(shared_server: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, for the flows that tests start in processes of their own."""
    from prefect.context import _temporary_global_settings_context, get_settings_context
    from prefect.events.worker import EventsWorker
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        temporary_settings,
    )

    updates: dict[Any, Any] = {
        PREFECT_HOME: tmp_path_factory.mktemp("prefect"),
        PREFECT_API_URL: shared_server["api"],
        # each flow run would wait a second for its heartbeat's thread to end
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    # whatever thread asks for them
    with temporary_settings(updates), _temporary_global_settings_context(get_settings_context()):
        yield shared_server["api"]
        EventsWorker.drain_all()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LORASUITE_HOME."""
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A pair of tiny bases, adapters of the old one, and data. Read-only."""
    return Small.build(tmp_path_factory.mktemp("small"))
