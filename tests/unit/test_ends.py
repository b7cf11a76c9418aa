"""How a command ends: signals, and processes that must not outlive it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from flows import cli_output, command_line
from flows.interruption import Terminated
from lorasuite import reporting
from lorasuite.errors import ConfigError, MachineError, foreseen
from tasks import at_work

KEEPER = """
import subprocess, sys, time
from flows import watchdog
two = ["sh", "-c", "sleep 60 & echo $!; wait"]
group = subprocess.Popen(two, stdout=subprocess.PIPE, text=True, start_new_session=True)
single, released = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
for process in (group, single, released):
    watchdog.keep(process.pid)
watchdog.release(released.pid)
print(group.pid, group.stdout.readline().strip(), single.pid, released.pid, flush=True)
time.sleep(60)
"""


def started(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_what_is_kept_ends_with_its_keeper_also_after_kill_9() -> None:
    keeper = started(KEEPER)
    assert keeper.stdout is not None
    *kept, released = (psutil.Process(int(pid)) for pid in keeper.stdout.readline().split())
    keeper.kill()
    keeper.wait()
    assert psutil.wait_procs(kept, timeout=10)[1] == []
    assert released.is_running()
    released.kill()


LONG_CALL = """
import hashlib, signal
# ignored where the tests run in the background of a shell, or under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from flows.interruption import interruptible
with interruptible(lambda: {computing}, lambda number: print("stopped by", number.name, flush=True)):
    try:
        print("ready", flush=True)
        {call}
    except KeyboardInterrupt as error:
        print("unwound by", type(error).__name__, flush=True)
"""
#: One call, in which Python handles no signal, as in LAPACK.
STUCK = 'hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)'


@pytest.mark.parametrize(
    ("number", "call", "said"),
    [
        (signal.SIGTERM, STUCK, "stopped by SIGTERM"),
        (signal.SIGINT, STUCK, "stopped by SIGINT"),
        (signal.SIGTERM, "import time; time.sleep(60)", "unwound by Terminated"),
        (signal.SIGHUP, "import time; time.sleep(60)", "unwound by Terminated"),
        (signal.SIGINT, "import time; time.sleep(60)", "unwound by KeyboardInterrupt"),
    ],
)
def test_a_signal_ends_a_command_within_a_second(number: signal.Signals, call: str, said: str) -> None:
    process = started(LONG_CALL.format(computing=True, call=call))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # it is in that call by then
    begun = time.monotonic()
    process.send_signal(number)
    assert process.stdout.readline() == f"{said}\n" and time.monotonic() - begun < 2
    assert process.wait(10) == (128 + number if call == STUCK else 0)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the end of a command that fails by an error: exit code, standard output and error."""
    monkeypatch.delenv(cli_output.DEBUG, raising=False)

    def run(error: BaseException, *more: str) -> tuple[int, str, str]:
        def fail(_folder: object) -> None:
            raise error

        monkeypatch.setattr(reporting, "write_report", fail)
        found = CliRunner().invoke(command_line.app, ["report", "x", *more])
        return found.exit_code, found.stdout, found.stderr

    return run


@pytest.mark.parametrize(
    ("error", "number"), [(KeyboardInterrupt(), signal.SIGINT), (Terminated(signal.SIGTERM), signal.SIGTERM)]
)
def test_an_interruption_says_what_was_kept(
    error: BaseException, number: signal.Signals, failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "_done", {})
    code, _, said = failing(error)
    assert code == 128 + number and "No stage was done" in said
    monkeypatch.setattr(at_work, "_done", {"vocabulary": False, "transform": True})
    monkeypatch.setattr(at_work, "_last", "finetune migrated")
    code, told, said = failing(error, "--json")
    (problem,) = json.loads(told)["problems"]
    assert problem["where"] == "stage finetune migrated" and "2 stages, 1 of them computed now" in problem["remedy"]


def test_stages_are_counted_once() -> None:
    at_work.asked("a")
    with pytest.raises(ValueError), at_work.computing():
        assert at_work.is_computing() and at_work.current() == "a"
        raise ValueError
    assert not at_work.is_computing()
    before = at_work.kept()
    at_work.done("a counted once", computed=True)
    at_work.done("a counted once", computed=False)
    assert at_work.kept() == (before[0] + 1, before[1] + 1) and at_work.current() == ""
    del at_work._done["a counted once"]


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class ConnectTimeout(Exception):
    """As HTTP clients call theirs."""


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), ("/data/x", "disk is full", "Free room")),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), ("disk is full", "quota")),
        (RuntimeError("Error while serializing: I/O error: No space left (os error 28)"), ("disk is full",)),
        (chained(RuntimeError("a stage failed"), OSError(errno.ENOSPC, "full")), ("disk is full",)),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), ("may be full",)),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), ("/srv/x", "permission", "right")),
        (OSError(errno.EROFS, "Read-only file system", "x"), ("read-only", "LORASUITE_HOME")),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/x"), ("/dev/null/x", "another place")),
        (OSError(errno.EMFILE, "Too many open files", "x"), ("ulimit",)),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), ("network", "no answer", "proxy")),
        (chained(ValueError("x"), ConnectTimeout("timed out")), ("network", "ConnectTimeout: timed out")),
        (MemoryError(), ("memory", "ran out", "batch size")),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ("memory", "2 GiB")),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ("memory",)),
    ],
)
def test_what_the_machine_refuses_is_named_with_what_to_do(
    error: BaseException, words: tuple[str, ...], failing: Any
) -> None:
    code, told, said = failing(error, "--json")
    found = json.loads(told)
    assert code == 1 and found["error"] == "MachineError" and len(found["problems"]) == 1
    assert all(word in found["message"] for word in words), found["message"]
    assert "Traceback" not in said and "not foreseen" not in said


def test_other_errors_are_not_taken_for_the_machine() -> None:
    for error in (ValueError("os error"), FileNotFoundError(errno.ENOENT, "no", "x"), RuntimeError("shapes differ")):
        assert foreseen(error) is None
    assert isinstance(foreseen(MemoryError()), MachineError) and not issubclass(MachineError, ConfigError)


@pytest.mark.parametrize(
    "arguments", [["migrate", "--no-such-flag"], ["report"], ["no-such-command"], ["up", "--port", "x"]]
)
def test_a_command_line_that_cannot_be_read(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorasuite", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert ended.value.code == 2 and found["problems"][0]["where"].startswith("lorasuite") and "Usage" in told.err


def test_output_that_nobody_reads_or_that_has_no_room(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['lorasuite', 'artifacts', 'ls', '--json']; from flows.command_line import main; main()"
    )
    environment = {**os.environ, "LORASUITE_HOME": str(tmp_path)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 1 and "disk is full" in done.stderr and "Traceback" not in done.stderr
