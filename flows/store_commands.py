"""The commands ``lorasuite artifacts``: list, check, repair and clean up the artifact store."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from artifacts import ArtifactError, Store, directory_size
from flows.cli_output import Json, errors, print_json
from lorasuite import reporting

store_app = typer.Typer(help="List, check, repair and clean up the artifact store.", no_args_is_help=True)


@store_app.command("ls")
def artifacts_ls(as_json: Json = False) -> None:
    """Every artifact: stage, key, size, when it was made."""
    with errors(as_json):
        rows = [
            {
                "stage": entry.manifest.stage if entry.manifest else None,
                "key": entry.key,
                "size": entry.size,
                "last_used": entry.last_used.isoformat(timespec="seconds"),
                "problem": entry.problem,
            }
            for entry in Store().ls()
        ]
        if as_json:
            print_json({"artifacts": rows})
        else:
            reporting.show_artifacts(rows)


@store_app.command("show")
def artifacts_show(key: Annotated[str, typer.Argument(help="key, or its beginning")], as_json: Json = False) -> None:
    """One artifact's manifest."""
    with errors(as_json):
        manifest = json.loads(Store().manifest(_full_key(key)).to_json())
        print_json(manifest) if as_json else Console().print_json(data=manifest)


@store_app.command("verify")
def artifacts_verify(
    key: Annotated[str | None, typer.Argument(help="key, or its beginning; all if left out")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="fetch what is damaged from LORASUITE_STORE, or compute it again")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with the manifest; end with 1 where something is, or stays, damaged."""
    with errors(as_json):
        store = Store()
        keys = [_full_key(key)] if key else [entry.key for entry in store.ls()]
        damaged = {}
        for found in keys:
            try:
                store.verify(found)
            except ArtifactError as error:
                damaged[found] = str(error)
        repaired: dict[str, str] = {}
        if repair and damaged:
            from flows.repair import repair as repair_all

            repaired, damaged = repair_all(damaged)
        if as_json:
            print_json({"checked": len(keys), "damaged": damaged, **({"repaired": repaired} if repair else {})})
        else:
            Console().print(f"{len(keys)} checked, {len(damaged)} damaged" + (f", {len(repaired)} repaired" * repair))
            for name, how in repaired.items():
                Console().print(f"{name[:16]}: {how}", markup=False, highlight=False)
            for what in damaged.values():
                Console().print(what, style="red", markup=False)
    if damaged:
        raise typer.Exit(1)


@store_app.command("check")
def artifacts_check(key: Annotated[str, typer.Argument(help="key, or its beginning")], as_json: Json = False) -> None:
    """Compute one artifact again, beside the store, and compare: end with 1 where it comes out otherwise."""
    with errors(as_json):
        full = _full_key(key)
        from flows.repair import check

        stage, different = check(full)
        if as_json:
            print_json({"key": full, "stage": stage, "same": not different, "different": different})
        else:
            told = f"comes out otherwise: {', '.join(different)}" if different else "comes out the same"
            Console().print(f"{stage} {full[:16]} {told}", markup=False, highlight=False)
    if different:
        raise typer.Exit(1)


@store_app.command("gc")
def artifacts_gc(
    keep_days: Annotated[float, typer.Option(help="days an unused artifact is kept")] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="remove them; without it they are only listed")] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="directory of outputs: what killed runs left there goes, too (repeatable)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """List, and with --delete remove, artifacts not used for long and leftovers of killed runs.

    What a living process has opened stays, and what is younger than the oldest run that goes on.
    """
    with errors(as_json):
        found = Store().gc(keep_days=keep_days, dry_run=not delete)
        left = [path for folder in beside or () for path in reporting.abandoned(folder)]
        total = found.size + sum(directory_size(path) for path in left)
        for path in left if delete else ():
            shutil.rmtree(path)
        items = [(str(removal.path), removal.why) for removal in found.removals]
        items += [(str(path), "left by a publication that was killed") for path in left]
        if as_json:
            named = {"removed" if delete else "would_remove": [name for name, _ in items]}
            print_json({**named, "reasons": dict(items), "bytes": total})
        else:
            for why, count in Counter(why for _, why in items).items():
                Console().print(f"{count:6} {why}", markup=False, highlight=False)
            Console().print(f"{'removed' if delete else 'would remove'} {len(items)} items, {total / 2**20:.1f} MiB")


def _full_key(beginning: str) -> str:
    keys = [entry.key for entry in Store().ls() if entry.key.startswith(beginning)]
    if len(keys) != 1:
        from lorasuite.errors import ConfigError, Problem

        what = "no artifact's key begins so" if not keys else f"{len(keys)} artifacts' keys begin so"
        raise ConfigError(Problem(beginning, what, "See `lorasuite artifacts ls`."))
    return keys[0]
