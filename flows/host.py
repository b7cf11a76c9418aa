"""``lorasuite up``: server, work pool, queues, workers, deployments and the crash automation on one host."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from artifacts import default_home, private_directory
from flows import watchdog
from flows.allowed import Allowed
from flows.interruption import take_time
from flows.server import HOSTS
from lorasuite.errors import ConfigError, Problem

POOL = "lorasuite"
CONTROL, ANY_GPU = "control", "any-gpu"
CRASH_AUTOMATION = "lorasuite: a run without a heartbeat has crashed"

#: Seconds between two heartbeats of a worker's flow run.
HEARTBEAT = 30

#: Seconds without a heartbeat until a run counts as crashed. More than 180, Prefect's own interval, which runs have
#: that a command line started outside `lorasuite up`: these must not be taken for dead.
CRASH_AFTER = 240


@dataclass(frozen=True)
class WorkerPlan:
    """One worker: the queues it takes runs from, how many at once, and the GPU it sees."""

    name: str
    queues: tuple[str, ...]
    limit: int
    #: CUDA_VISIBLE_DEVICES of the worker, and so of every run it starts. None leaves the variable alone.
    devices: str | None


def visible_gpus() -> list[str]:
    """Every GPU this process may use, as CUDA_VISIBLE_DEVICES names it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() and part.strip() != "-1"]
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


def plan_workers(gpus: Sequence[str]) -> list[WorkerPlan]:
    """A worker for each GPU, or one for the CPU; and one for the flows that only start and watch others."""
    plans = [WorkerPlan(f"gpu-{gpu}", (f"gpu-{gpu}", ANY_GPU), 1, gpu) for gpu in gpus]
    plans = plans or [WorkerPlan("cpu", (ANY_GPU,), 1, None)]
    # a fleet waits for its adapters: on their worker it would wait for itself
    return [*plans, WorkerPlan("control", (CONTROL,), 4, "" if gpus else None)]


def project_root() -> Path:
    """The checkout that holds ``prefect.yaml``.

    Raises:
        ConfigError: if lorasuite was installed without it.
    """
    for folder in (Path.cwd(), Path(__file__).parents[1]):
        if (folder / "prefect.yaml").is_file() and (folder / "flows" / "migrate_adapter.py").is_file():
            return folder
    raise ConfigError(Problem("prefect.yaml", "is not here", "Run `lorasuite up` in a checkout of lorasuite."))


#: What the API's requests must show, where the operator has chosen it.
GIVEN_AUTH = "PREFECT_SERVER_API_AUTH_STRING"


def auth_file() -> Path | None:
    """Where what requests to the API must show is kept, for its owner alone; None if the environment gives it."""
    return None if os.environ.get(GIVEN_AUTH) else default_home() / "api-auth"


def api_auth() -> str:
    """``PREFECT_SERVER_API_AUTH_STRING``, or what is kept in :func:`auth_file`, made at the first start.

    Raises:
        ConfigError: if others can read the file, or it belongs to another user.
    """
    path = auth_file()
    if path is None:
        return os.environ[GIVEN_AUTH]
    private_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"lorasuite:{secrets.token_urlsafe(32)}")
    kept = path.lstat()
    sound = stat.S_ISREG(kept.st_mode) and kept.st_uid == os.getuid() and not kept.st_mode & 0o077
    if not sound or not path.read_text().strip():
        what = "is empty or no regular file, can be read by others, or belongs to another user"
        raise ConfigError(Problem(str(path), what, "Remove it: another one is made."))
    return path.read_text().strip()


def in_address(host: str) -> str:
    """A host's name or address as web addresses and the header ``Host`` have it: of IPv6 in square brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


@dataclass
class Host:
    """The processes of one host."""

    host: str = "127.0.0.1"
    port: int = 4200
    root: Path = field(default_factory=project_root)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    #: What every request to the API must show.
    auth: str = field(default_factory=lambda: api_auth(), repr=False)
    #: What runs on the workers may do.
    allowed: Allowed = field(default_factory=Allowed)
    #: More names that requests may be for.
    names: Sequence[str] = ()

    @property
    def dashboard(self) -> str:
        """Its address for this host's own processes, also where the server listens on every interface."""
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{in_address(here)}:{self.port}"

    @property
    def api(self) -> str:
        """Address of the server's API."""
        return f"{self.dashboard}/api"

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of every process started here."""
        settings = {
            **self.allowed.environment(),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_UI_API_URL": "/api",  # where the browser found the page, whatever host name it used
            GIVEN_AUTH: self.auth,
            "PREFECT_API_AUTH_STRING": self.auth,
            # pages of other origins get no answer from the API
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"{self.dashboard},http://localhost:{self.port}",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
            HOSTS: ",".join(dict.fromkeys(map(in_address, ["127.0.0.1", "::1", "localhost", self.host, *self.names]))),
            # runs import the packages of this checkout, wherever Prefect starts them
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")])),
        }
        return {**os.environ, **settings, **more}

    def start(self, name: str, *arguments: str, env: Mapping[str, str]) -> None:
        """Start a module of Python, named first, with these arguments as a process of this name."""
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=self.root,
            env=dict(env),
            stdout=sys.stderr,  # standard output is the command's own
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the others in order
        )
        watchdog.keep(self.processes[name].pid)

    def start_server(self, timeout: float = 120) -> None:
        """Start the server, and wait until it answers.

        Args:
            timeout: seconds to wait at most.

        Raises:
            ConfigError: if the port is taken, or the server does not answer.
        """
        if _answers(self.api):
            raise ConfigError(
                Problem(self.dashboard, "a Prefect server is there already", "Stop it, or give another --port.")
            )
        application = ("--factory", "flows.server:application", "--log-level", "warning")
        address = ("--host", self.host, "--port", str(self.port))
        self.start("server", "uvicorn", *application, *address, env=self.environment())
        deadline = time.monotonic() + timeout
        while not _answers(self.api):
            if self.processes["server"].poll() is not None or time.monotonic() > deadline:
                raise ConfigError(Problem(self.dashboard, "the server did not start", "Is the port free?"))
            time.sleep(0.2)

    def start_worker(self, plan: WorkerPlan) -> None:
        """Start one worker, which sees the devices of its plan only."""
        queues = [part for queue in plan.queues for part in ("--work-queue", queue)]
        env = self.environment() if plan.devices is None else self.environment(CUDA_VISIBLE_DEVICES=plan.devices)
        self.start(
            f"worker {plan.name}",
            *("prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", plan.name),
            *(*queues, "--limit", str(plan.limit)),
            env=env,
        )

    def deploy(self) -> None:
        """Register every deployment of ``prefect.yaml``.

        Raises:
            ConfigError: with what Prefect said, if it refuses.
        """
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise ConfigError(Problem("prefect deploy --all", (done.stdout + done.stderr)[-2000:], "Fix prefect.yaml."))

    def stop(self, grace: float = 20) -> None:
        """Stop the workers, then the server; kill what does not end by itself."""
        for name in reversed(list(self.processes)):
            process = self.processes.pop(name)
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # its session: what it left behind, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            watchdog.release(process.pid)


def _answers(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def set_up(api: str, plans: Sequence[WorkerPlan], crash_after: float = CRASH_AFTER, auth: str | None = None) -> None:
    """Create, or bring up to date, the work pool, its queues and the crash automation.

    Args:
        auth: what requests show; ``PREFECT_API_AUTH_STRING`` if None.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    # shared queues have no limit of their own: each worker has one, and other hosts may take from them as well
    limits = {queue: None if queue in (CONTROL, ANY_GPU) else 1 for plan in plans for queue in plan.queues}
    settings: dict[Any, Any] = {PREFECT_API_URL: api} | ({} if auth is None else {PREFECT_API_AUTH_STRING: auth})
    with temporary_settings(settings), get_client(sync_client=True) as client:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=_job_template()))
        for name, limit in limits.items():
            try:
                client.create_work_queue(name=name, work_pool_name=POOL, concurrency_limit=limit)
            except ObjectAlreadyExists:
                queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
                client.update_work_queue(queue.id, concurrency_limit=limit)
        for old in client.read_automations_by_name(CRASH_AUTOMATION):
            client.delete_automation(old.id)
        client.create_automation(crash_automation(crash_after))


def _job_template() -> dict[str, Any]:
    from prefect.workers.process import ProcessWorker

    template: dict[str, Any] = ProcessWorker.get_default_base_job_template()
    return template


def crash_automation(after: float = CRASH_AFTER) -> Any:
    """A run that began, or has sent a heartbeat, and then sends none for ``after`` seconds without ending, has Crashed.

    That it began counts as well: a process that dies in its first second has not sent a heartbeat yet.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events import AutomationCore, EventTrigger, Posture
    from prefect.events.actions import ChangeFlowRunState

    ends = ("Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Paused", "Suspended", "AwaitingRetry")
    return AutomationCore(
        name=CRASH_AUTOMATION,
        description="Without it, a run whose worker was killed stays Running and cannot be retried.",
        trigger=EventTrigger(
            after={"prefect.flow-run.Running", "prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=after),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"no heartbeat for {after:.0f} seconds: its worker died",
            )
        ],
    )


@contextlib.contextmanager
def running(
    host: str = "127.0.0.1",
    port: int = 4200,
    plans: Sequence[WorkerPlan] | None = None,
    crash_after: float = CRASH_AFTER,
    allowed: Allowed | None = None,
    names: Sequence[str] = (),
) -> Iterator[Host]:
    """Everything up inside the block, and stopped after it.

    Args:
        allowed: what runs on the workers may do; nothing of it if None.
        names: more names that requests may be for.

    Raises:
        ConfigError: if the server or the deployments fail.
    """
    chosen = list(plans) if plans is not None else plan_workers(visible_gpus())
    started = Host(host, port, allowed=allowed or Allowed(), names=names)
    take_time(60 * (len(chosen) + 1))
    try:
        started.start_server()
        set_up(started.api, chosen, crash_after, started.auth)
        started.deploy()
        for plan in chosen:
            started.start_worker(plan)
        yield started
    finally:
        started.stop()


def stay(started: Host) -> int:
    """Wait for Ctrl-C or SIGTERM; 0, or 1 if the server ended by itself."""
    over = threading.Event()
    before = {number: signal.signal(number, lambda *_: over.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not over.wait(0.5):
            if started.processes["server"].poll() is not None:
                return 1
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
