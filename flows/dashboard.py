"""What a run leaves in Prefect's dashboard: figures, tables and the verdict, as Prefect artifacts."""

from __future__ import annotations

import re
from pathlib import Path

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.context import Context
from lorasuite.reporting import (
    REPORT,
    MigrationRecord,
    PairRecord,
    code_span,
    comparison,
    heat_map_png,
    markdown,
    task_comparison,
)
from tasks.stage import Ref


def slug(*names: str) -> str:
    """An artifact key: lowercase letters, numbers and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower()).strip("-")


def show_pair(context: Context, pair: PairRecord, similarity: Ref | None) -> None:
    """The similarity heat map with the chosen path, and the layer map, as one page.

    Args:
        similarity: the artifact with the table ``(L_o, L_n)``; None where it was not measured.
    """
    layers = pair.layers
    parts = [f"# {markdown(context.pair)}\n"]
    if similarity is not None:
        png = heat_map_png(context.open(similarity).tensor("similarity"), layers)
        parts.append(f"![Layer similarity and the chosen path](data:image/png;base64,{png})\n")
    fitted = pair.transfer_matrix
    parts.append(
        "Transfer matrix: identity.\n"
        if fitted.identity
        else f"Transfer matrix: {fitted.tokens} common tokens, residual {fitted.residual:.3f}.\n"
    )
    parts.append("| old layer | new layer | similarity |\n|---|---|---|")
    parts += [f"| {o} | {n} | {_number(pair.layer_similarity.get(str(o)))} |" for o, n in layers.items()]
    create_markdown_artifact(
        "\n".join(parts), key=slug("pair", context.pair), description="Layer similarity and layer map"
    )


def show_migration(record: MigrationRecord, output: Path) -> None:
    """The before/after tables, and the verdict with the place of the report."""
    name = (record.adapter.name, record.new_base.name)
    for title, (columns, rows) in {
        "before-after": comparison(record.evaluation, record.label),
        "tasks": task_comparison(record.tasks, record.label),
    }.items():
        if rows:
            table = [{"arm": row["name"], **dict(zip(columns, row["cells"], strict=True))} for row in rows]
            create_table_artifact(table, key=slug(title, *name), description="Before and after the migration")
    verdict, bases = record.verdict.verdict, [markdown(base.name) for base in (record.old_base, record.new_base)]
    create_markdown_artifact(
        f"# {verdict}\n\n{markdown(record.reason())}\n\n"
        f"- adapter {code_span(record.adapter.id)}, {bases[0]} → {bases[1]}\n"
        f"- published: {markdown(record.published.headline)}\n"
        f"- written to {code_span(str(output.absolute()))}\n"
        f"- report [`{REPORT}`]({(output.absolute() / REPORT).as_uri()})\n",
        key=slug("verdict", *name),
        description=f"Verdict on {markdown(name[0])}: {verdict}",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
