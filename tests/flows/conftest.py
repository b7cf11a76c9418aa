"""One Prefect server for all flow tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# before Prefect is imported: it reads its settings then
os.environ.update(
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    PREFECT_LOGGING_LEVEL="WARNING",
    PREFECT_LOGGING_TO_API_ENABLED="false",
)

import pytest

from tests.flows.small import Small
from tests.flows.upped import environment, server_up, up

__all__ = ["environment", "server_up", "up"]


@pytest.fixture(scope="session", autouse=True)
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, for the flows that tests start in processes of their own."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    updates = {
        PREFECT_HOME: tmp_path_factory.mktemp("prefect"),
        # each flow run would wait a second for its heartbeat's thread to end
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    from flows import temporary_server

    temporary_server.watch()  # a test run that is killed leaves no server
    with (
        temporary_settings(updates),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield str(PREFECT_API_URL.value())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LORASUITE_HOME."""
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A pair of tiny bases, adapters of the old one, and data. Read-only."""
    return Small.build(tmp_path_factory.mktemp("small"))
