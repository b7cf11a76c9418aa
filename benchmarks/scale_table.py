"""The table and the figure of ``benchmarks/scale.py``, from its cells."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.shapes import PAIRS, cut, published
from lorasuite.bases import ATTENTION, architecture_for
from lorasuite.planning import Machine, Ops, Shape, Throughput, Work, estimate, measure, pair_costs
from lorasuite.transforms import names, transform

CELLS = Path(__file__).parent / "scale"
#: What ``scale_published.py --keep`` measured.
PUBLISHED = CELLS / "published"
#: Bytes of a float32.
FLOAT = 4
#: What the table is of: so many calibration texts and training rows of 64 tokens, an all-linear LoRA of rank 16.
FULL = Work(texts=256, text_tokens=64, rows=100, row_tokens=64, label_tokens=8, chosen_by=20)
#: Bytes without end: what fits is for ``inspect`` to say.
ENDLESS = Machine(2**60, 2**60, 2**60, 2**60, 2**60)
#: Stages of the pair, as the cost model names them; the others run for each adapter.
PAIR_STAGES = (
    "fingerprint", "vocabulary", "transfer_matrices", "mlp_factors", "activations", "similarity", "head_mapping",
    "alignment", "state_map",
)  # fmt: skip


def shape(config: dict[str, Any]) -> Shape:
    """A base's counts, from its configuration."""
    return Shape.configured(architecture_for(config), config)


def work(old: Shape, new: Shape, **changes: Any) -> Work:
    """:data:`FULL` with every transform that can move between two bases."""
    usable = [name for name in names() if not transform(name).problems(old.dims, new.dims, new.roles)]
    roles = tuple(role for role in old.roles if role in new.roles)
    return replace(FULL, methods=tuple(usable), roles=roles, **changes)


@cache
def speed_here(hidden: int, inner: int) -> Throughput:
    """This machine, measured on a block of such widths and a file of its own."""
    config = {**published("llama-2-7b"), "hidden_size": hidden, "intermediate_size": inner}
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(2**25))
        file.flush()
        return measure(shape(config).dims, Path(file.name))


def counted(old: str, new: str, *, layers: int, words: int, texts: int, rows: int) -> dict[str, Any]:
    """The cost model's own say of a pair cut to so many layers and words, at this machine's speed."""
    first, second = (shape(cut(published(name), layers, words)) for name in (old, new))
    speed = speed_here(second.dims.hidden_size, second.dims.intermediate_size)
    return estimate(first, second, work(first, second, texts=texts, rows=rows, epochs=1), ENDLESS, speed)


def factors(cell: dict[str, Any]) -> dict[str, float]:
    """How much longer each stage of a cell took than was counted."""
    took = spent(cell["timings"])[0]
    return {
        row["stage"]: took[row["stage"]] / row["seconds"]
        for row in cell["cost"]["stages"]
        if row["stage"] in took and row["seconds"] > 1e-3
    }


def spent(timings: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and peak bytes by stage."""
    took: dict[str, float] = {}
    peak: dict[str, int] = {}
    for row in timings:
        stage = row["stage"]
        took[stage] = took.get(stage, 0.0) + row["computed_seconds"]
        peak[stage] = max(peak.get(stage, 0), row["peak_memory_bytes"])
    return took, peak


def published_ops(old: Shape, new: Shape) -> tuple[Ops, Ops]:
    """The published way by count, as ``scale_published.py`` runs it, in float32: what a pair needs once, and the
    transform of each adapter.

    Once: for every head of every layer pair the ``d × d`` products ``QᵀK`` and ``VᵀOᵀ``, those of the old base brought
    to the new hidden size where that is another, and their cosines for every pair of heads, which read both; ``pinv``
    of every old MLP weight in full. For each adapter: dense ``ΔW`` carried from head to head or through those, and an
    SVD of each.
    """
    pairs, (o, n) = min(old.dims.layers, new.dims.layers), (old.dims, new.dims)
    d_o, d_n = o.hidden_size, n.hidden_size
    carried = 0 if d_o == d_n else 2 * (d_o**2 * d_n + d_o * d_n**2)
    heads = sum(4 * s.heads * s.head_dim * s.hidden_size**2 for s in (o, n)) + 2 * o.heads * carried
    compared = o.heads * n.heads * 2 * FLOAT * 2 * d_n**2
    once, each = Ops(single=heads, streamed=compared), Ops()
    for role in (role for role in old.roles if role in new.roles):
        a, b, c, e = o.rows(role), o.columns(role), n.rows(role), n.columns(role)
        each += decomposed(c, e)
        if role in ATTENTION:
            moved = min(o.heads, n.heads) * (2 * o.head_dim * d_o**2 + carried + 2 * n.head_dim * d_n**2)
        else:
            once += decomposed(a, b) + Ops(single=2 * a * b * min(a, b))
            moved = 2 * a * b * d_o + carried + 2 * c * e * d_n
        each += Ops(single=moved)
    return once * pairs, each * pairs


def decomposed(rows: int, columns: int) -> Ops:
    """The SVD of a dense matrix: LAPACK brings a tall one to its triangle first, and decomposes that."""
    small, large = sorted((rows, columns))
    return Ops(svd=small**3, single=6 * large * small**2 if large > small else 0)


def ways(old: Shape, new: Shape, full: Work, speed: Throughput, by: dict[str, float]) -> tuple[float, float]:
    """How many times as long the published way takes by count as equation 3 here, for a pair's first adapter (head
    mapping, MLP factors and transform) and for each one after (the transform alone)."""
    stages = estimate(old, new, replace(full, methods=("lorasuite",)), ENDLESS, speed)["stages"]
    took = {row["stage"]: row["seconds"] * by.get(row["stage"], 1.0) for row in stages}
    once, each = (speed.seconds(ops) for ops in published_ops(old, new))
    first = took["head_mapping"] + took["mlp_factors"] + took["transform"]
    return (once + each) / first, each / took["transform"]


def ratio_measured(old: str, new: str) -> str:
    """The same two ratios where ``scale_published.py`` has measured both ways; a dash where not."""
    file = PUBLISHED / f"{old}--{new}.json"
    if not file.is_file():
        return "–"
    ratio = json.loads(file.read_text())["ratio"]
    return f"{ratio['first adapter']:,.0f} ×, {ratio['each after']:,.0f} ×"


def floor(old: Shape, new: Shape, full: Work, speed: Throughput, by: dict[str, float]) -> float:
    """Seconds of one pass of each base over the texts without a head, and of the factored products: the head maps'."""
    costs = pair_costs(old, new, full)
    reading = sum(speed.seconds(Ops(forward=c.ops.forward)) for c in costs if c.stage == "activations")
    heads = sum(speed.seconds(Ops(single=c.ops.single)) for c in costs if c.stage == "head_mapping")
    return reading * by.get("activations", 1.0) + heads * by.get("head_mapping", 1.0)


def full_pair(old: str, new: str, cell: dict[str, Any]) -> dict[str, Any]:
    """A pair at its full size: what the cost model counts, times the factors of a cell."""
    first, second = shape(published(old)), shape(published(new))
    speed, by, full = Throughput(**cell["cost"]["measured"]), factors(cell), work(first, second)
    found = estimate(first, second, full, ENDLESS, speed)
    gpu = estimate(first, second, replace(full, gpu=True, item=2, run_item=2, training_item=2), ENDLESS, speed)
    seconds = {row["stage"]: row["seconds"] * by.get(row["stage"], 1.0) for row in found["stages"]}
    return {
        "seconds": seconds,
        "ram": {row["stage"]: row["ram_bytes"] for row in found["stages"]},
        "gpu": {row["stage"]: row["gpu_bytes"] for row in gpu["stages"]},
        "disk": {row["stage"]: row["disk_bytes"] for row in found["stages"]},
        "pair": sum(value for stage, value in seconds.items() if stage in PAIR_STAGES),
        "floor": floor(first, second, full, speed, by),
        "ways": ways(first, second, full, speed, by),
        "files": second.files,
    }


def write_table() -> None:
    """Write ``table.md`` and ``growth.png`` from the cells there are."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))}
    layers = {name: cell for name, cell in cells.items() if not name.startswith("real-")}
    widest = max(layers, key=lambda name: shape(published(name.split("--")[1])).block)
    rows, stages, by_stage = [], {}, {}
    for old, new in PAIRS:
        name = f"{old}--{new}"
        found = full_pair(old, new, layers.get(name, layers[widest]))
        title = f"{old} → {new}" + ("" if name in layers else " *")
        by_stage[title] = found
        stages |= dict.fromkeys(found["seconds"])
        own = {stage: s for stage, s in found["seconds"].items() if stage not in PAIR_STAGES}
        pair_disk = sum(size for stage, size in found["disk"].items() if stage in PAIR_STAGES)
        rows.append(
            f"| {title} | {found['pair']:,.0f} | {found['floor']:,.0f} | {found['pair'] / found['floor']:.1f} "
            f"| {own['transform']:.1f} | {own['finetune']:,.0f} "
            f"| {found['ways'][0]:,.0f} ×, {found['ways'][1]:,.0f} × | {ratio_measured(old, new)} "
            f"| {gib(found['ram'], PAIR_STAGES)} | {gib(found['ram'])} | {gib(found['gpu'])} "
            f"| {pair_disk / 2**30:.2f} | {found['files'] / 2**30:.2f} |"
        )
    head = (
        "| pair | pair stages, s | floor, s | ratio | all transforms, s | a fine-tune, s | published ÷ ours, counted "
        "| published ÷ ours, measured | RAM of the pair | RAM | GPU | artifacts | new base |\n|---|" + "---|" * 12
    )
    lines = [
        "Written by `python benchmarks/scale.py table`. Sizes in GiB; * counted with the factors of "
        f"`{widest}`, its own layer not measured. Seconds are counted, times how much longer the measured layer took "
        "than counted; published ÷ ours is of a pair's first adapter (head mapping, MLP factors, transform by equation "
        "3) and of each after (the transform), by count, and as measured where `scale_published.py` ran.\n",
        head,
        *rows,
        "\nSeconds by stage:\n",
        "| stage | " + " | ".join(by_stage) + " |",
        "|---|" + "---|" * len(by_stage),
    ]
    for stage in stages:
        values = (found["seconds"].get(stage, 0.0) for found in by_stage.values())
        lines.append(f"| {stage} | " + " | ".join(f"{value:,.1f}" for value in values) + " |")
    for name, cell in cells.items():
        if name.startswith("real-"):
            lines += ["\n" + name.removeprefix("real-") + ", measured whole:\n", *real_rows(cell)]
    (CELLS / "table.md").write_text("\n".join(lines) + "\n")
    draw(Throughput(**layers[widest]["cost"]["measured"]), factors(layers[widest]))


def gib(sizes: dict[str, int], stages: tuple[str, ...] = ()) -> str:
    """The largest of some stages' bytes, in GiB."""
    return f"{max(size for stage, size in sizes.items() if not stages or stage in stages) / 2**30:.1f}"


def real_rows(cell: dict[str, Any]) -> list[str]:
    """A real pair's stages, as measured and as counted."""
    took, peak = spent(cell["timings"])
    lines = ["| stage | seconds | counted | GiB | counted |", "|---|---|---|---|---|"]
    for row in cell["cost"]["stages"]:
        if row["stage"] in took:
            held = max(row["ram_bytes"], row["gpu_bytes"]) / 2**30
            size = f"{peak[row['stage']] / 2**30:.2f} | {held:.2f}"
            lines.append(f"| {row['stage']} | {took[row['stage']]:.1f} | {row['seconds']:.1f} | {size} |")
    return lines


def draw(speed: Throughput, by: dict[str, float]) -> None:
    """How the seconds of a pair grow with width, inner width, depth, adapters and texts, around 8B."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    def seconds(hidden: int = 4096, inner: int = 14336, layers: int = 32, texts: int = 256, adapters: int = 1) -> Any:
        config = {
            **published("llama-3-8b"), "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128,
        }  # fmt: skip
        one = shape(config)
        full = replace(work(one, one), texts=texts)
        stages = estimate(one, one, full, ENDLESS, speed)["stages"]
        took = {row["stage"]: row["seconds"] * by.get(row["stage"], 1.0) for row in stages}
        pair = sum(value for stage, value in took.items() if stage in PAIR_STAGES)
        once, each = (speed.seconds(ops) for ops in published_ops(one, one))
        old_way = once + adapters * each
        return pair + adapters * took["transform"], old_way

    panels: dict[str, tuple[str, list[int]]] = {
        "hidden": ("hidden size d", [1024, 2048, 4096, 8192]),
        "inner": ("MLP size i", [3584, 7168, 14336, 28672]),
        "layers": ("layers L", [8, 16, 32, 64, 128]),
        "adapters": ("adapters", [1, 4, 16, 64, 256]),
        "texts": ("calibration texts of 64 tokens", [32, 64, 128, 256, 512]),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(18, 3.4), sharey=True, layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    for axis, (key, (label, values)) in zip(axes, panels.items(), strict=True):
        found = [seconds(**{key: value}) for value in values]
        axis.loglog(values, [ours for ours, _ in found], marker="o", label="pair stages and transforms")
        axis.loglog(values, [old for _, old in found], marker="s", label="the published way: heads and transforms")
        axis.set_xlabel(label)
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("seconds, two CPU cores, counted")
    axes[0].legend(fontsize=7)
    figure.savefig(CELLS / "growth.png", dpi=110)
