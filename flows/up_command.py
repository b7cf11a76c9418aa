"""The command ``lorasuite up``: everything a host needs, from one terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from flows.cli_output import Json, errors, print_json


def up(
    host: Annotated[str, typer.Option(help="address the server listens on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of the server and its dashboard")] = 4200,
    fleet: Annotated[
        list[str] | None,
        typer.Option(help="fleet file that events and schedules may start, or a directory of them (repeatable)"),
    ] = None,
    trust_remote_code_of: Annotated[
        list[str] | None,
        typer.Option(help="directory, org/name or org/* whose code runs on the workers may execute (repeatable)"),
    ] = None,
    include_path: Annotated[
        list[str] | None,
        typer.Option(help="directory of lm-eval task files that runs on the workers may name (repeatable)"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="further name or address under which the server is asked for (repeatable)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Start server, work pool, a worker for each GPU (or one for the CPU) and all deployments; Ctrl-C stops them."""
    with errors(as_json):
        from flows.allowed import Allowed
        from flows.host import auth_file, running, stay

        here = Allowed.here()  # of this process's environment, where a flag does not say
        allowed = Allowed(
            tuple(fleet or here.fleets),
            tuple(trust_remote_code_of or here.code),
            tuple(include_path or here.task_files),
        )
        with running(host.strip("[]"), port, allowed=allowed, names=tuple(allow_host or ())) as started:
            workers = [name for name in started.processes if name != "server"]
            kept = auth_file()  # none, where the secret is the environment's
            if as_json:
                told = {"dashboard": started.dashboard, "api": started.api, "auth_file": kept and str(kept)}
                print_json({**told, "workers": workers, "fleets": sorted(allowed.registered())})
            else:
                secret = "$PREFECT_SERVER_API_AUTH_STRING" if kept is None else f"$(cat {kept})"
                for line in (
                    f"dashboard  {started.dashboard}",
                    f"api        {started.api}",
                    f"fleets     {', '.join(sorted(allowed.registered())) or 'none: events start nothing'}",
                    f"in other terminals: export PREFECT_API_URL={started.api}",
                    f'                    export PREFECT_API_AUTH_STRING="{secret}"',
                    "the dashboard asks for the same, once",
                ):
                    Console().print(line, highlight=False, markup=False, soft_wrap=True)
            sys.stdout.flush()
            code = stay(started)
    if code:
        raise typer.Exit(code)
