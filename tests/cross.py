"""Every kind of adapter on every architecture: the same checks for each, and the table of what comes out.

``python -m tests.cross`` runs all of them (five minutes of one core; or those of the architectures it is given) and
writes the table of ``docs/adapters.md``; the tests run a part, in which every kind and every architecture appears, and
hold it against that table.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from lorasuite.adapters import Adapter, Extras, LowRank, OutputType, check_loads, write_adapter
from lorasuite.bases import Checkpoint, common_tokens
from lorasuite.correspondence import fit_transfer_matrix, map_heads, mlp_factor
from lorasuite.errors import AdapterError
from lorasuite.transforms import Migrated, migrate
from tests import kinds, models

IDS = torch.tensor([[5, 9, 33, 71, 8, 40]])


def opened(path: Path) -> Adapter:
    return Adapter.open(path, allow_pickle=True)


def merged(model: Path, updates: Mapping[str, LowRank], extras: Extras) -> Any:
    """The plain model with everything merged by definition, float64: what PEFT's forward is held against."""
    plain = models.load(model).double()
    architecture = Checkpoint(model).architecture
    first, last = (plain.get_submodule(path) for path in (architecture.embedding, architecture.unembedding))
    tied = first.weight is last.weight
    if tied:  # a change of the one is none of the other, but for trained tokens
        last.weight = torch.nn.Parameter(first.weight.detach().clone())
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for path, update in updates.items():
            located = architecture.locate_expert(path)
            if located is not None:
                layer, number, module = located
                experts = modules[architecture.expert_path(layer, number, module).rsplit(".", 2)[0]]
                getattr(experts, module.name)[number] += update.dense()
                continue
            weight = modules[path].weight
            whole = models.out_in(modules[path], weight) + update.dense()
            if path in extras.magnitudes:
                whole = whole * (extras.magnitudes[path].double() / whole.norm(dim=1))[:, None]
            weight.copy_(models.out_in(modules[path], whole))
        for path, bias in extras.biases.items():
            modules[path].bias.copy_(bias)
        for path, rows in extras.saved.items():
            modules[path].weight.copy_(rows)
        for path, (ids, rows) in extras.tokens.items():
            modules[path].weight[ids] = rows.double()
            if tied and modules[path] is first:
                last.weight[ids] = rows.double()
    return plain


def read(adapter: Adapter, base: Checkpoint) -> tuple[dict[str, LowRank], Extras]:
    """All that an adapter holds, as lorasuite reads it."""
    c = adapter.contents
    return {path: adapter.update(path, base) for path in adapter.modules}, Extras(
        {path: adapter.extra(name) for path, name in c.magnitudes.items()},
        {p: base.tensor(f"{p}.bias") + change for p, read in c.biases.items() if (change := read(base)) is not None},
        {path: adapter.extra(name) for path, name in c.saved.items()},
        {path: (list(ids), adapter.extra(name)) for path, (name, ids) in c.tokens.items()},
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def tuned(adapter: Path, model: Path) -> Any:
    """PEFT's own model, float64."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        warnings.filterwarnings("ignore", message=".*SVD.*")
        return PeftModel.from_pretrained(models.load(model), str(adapter)).double().eval()


@cache
def pair(old: Path, new: Path) -> dict[str, Any]:
    """What a migration needs of two bases."""
    a, b = Checkpoint(old), Checkpoint(new)
    common = common_tokens(models.tokenizer_of(old), models.tokenizer_of(new), a.dims.vocab_size, b.dims.vocab_size)
    transfer = fit_transfer_matrix(a, b, common)
    layers = {n: n for n in range(min(a.dims.layers, b.dims.layers))}
    heads = {o: match.heads for o, match in map_heads(a, b, layers, transfer).items()}
    return {"layers": layers, "heads": heads, "transfer": transfer, "common": common}


def move(adapter: Adapter, old: Path, new: Path, method: str = "lorasuite", **settings: Any) -> Migrated:
    a, b = Checkpoint(old), Checkpoint(new)
    settings = {"method": method, "rank": adapter.rank, **pair(old, new), **settings}
    return migrate(adapter, a, b, mlp_factor=lambda layer, role: mlp_factor(a, layer, role), **settings)


def write(output: Path, moved: Migrated, adapter: Adapter, new: Path, output_type: OutputType = "lora") -> Path:
    target = Checkpoint(new)
    return write_adapter(
        output, moved.updates, architecture=target.architecture, dims=target.dims, base=str(new), extra=moved.fresh,
        extras=moved.extras, output_type=output_type, **adapter.lora_settings(moved.rank),
    )  # fmt: skip


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to the tolerance, relative to the largest logit where that is above 1."""
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def differ(one: Tensor, other: Tensor) -> float:
    """The largest difference of two models' logits, relative to the largest one."""
    return float((one - other).abs().max() / other.abs().max())


def trained(path: Path, model: Path) -> Tensor:
    """PEFT's logits of an adapter on its base: of the model it was saved from, where loading cannot repeat that."""
    kept = path / "logits.pt"
    return torch.load(kept) if kept.is_file() else logits(tuned(path, model))


def check_tensors(adapter: Path, model: Path) -> Any:
    """PEFT finds every tensor: none missing, none unexpected."""
    check_loads(adapter, model, models.needs_code(model))
    live = tuned(adapter, model)
    expected = get_peft_model_state_dict(live, save_embedding_layers=False)
    stored = Adapter.open(adapter).tensors
    assert set(expected) == set(stored.shapes)
    for name, tensor in expected.items():
        torch.testing.assert_close(stored.tensor(name).double(), tensor.double(), rtol=0, atol=0)
    return live


# ------------------------------------------------------------------------------------------------------------ the table

#: Numbers of the old and the new base of each architecture: all but the depth differ.
OLD: dict[str, Any] = {"layers": 2, "kv_heads": 2}
NEW: dict[str, Any] = {**OLD, "seed": 7, "hidden": 48, "intermediate": 56, "heads": 6, "kv_heads": 3, "vocab": 120}
#: What a fixture needs so that every kind fits its sizes.
ALSO: dict[str, dict[str, Any]] = {"qwen2_moe": {"shared_expert_intermediate_size": 24}}
NONE = "–"
RESULTS = Path(__file__).parent / "data" / "architectures_by_kinds.json"


def bases(family: str, build: Callable[..., Path]) -> tuple[Path, Path]:
    """The old base and a new one of the same architecture, with other sizes, weights and token ids."""
    plain = family in models.NO_KV_HEADS
    sizes = [{k: v for k, v in n.items() if not (plain and k == "kv_heads")} | ALSO.get(family, {}) for n in (OLD, NEW)]
    return build(family, **sizes[0]), build(family, tokens=tuple(reversed(models.words(120))), **sizes[1])


def cell(kind: kinds.Kind, old: Path, new: Path, folder: Path) -> str:
    """What becomes of one kind on one architecture, every check made on the way.

    Raises:
        AssertionError: if anything is not as promised.
    """
    try:  # what PEFT cannot make, or cannot run, there is nothing to say of
        path = kinds.build(kind, folder / "old", old)
        theirs = trained(path, old)
    except Exception as error:
        return f"{NONE} " + re.sub(r"\(.*?\)", "", str(error)).partition(". ")[0].partition(", currently")[0]
    checkpoint = Checkpoint(old)
    try:
        adapter = opened(path)
        problems = adapter.check(checkpoint)
    except AdapterError as error:
        problems = error.problems
    if problems:
        return "refused: " + re.sub(r"\(.*?\)", "", problems[0].what)
    assert differ(theirs, logits(models.load(old).double())) > 1e-3
    close(logits(merged(old, *read(adapter, checkpoint))), theirs)
    moved = move(adapter, old, new)
    out = write(folder / "new", moved, adapter, new, kind.output_type)
    live = logits(check_tensors(out, new))
    assert differ(live, logits(models.load(new).double())) > 1e-3
    close(live, logits(merged(new, moved.updates, moved.extras)))
    again = opened(out)
    assert again.check(Checkpoint(new)) == []
    return result(again)


def result(adapter: Adapter) -> str:
    """What an adapter is, in the words of the table."""
    c = adapter.contents
    kind = {"LORA": "LoRA", "DORA": "DoRA", "ADALORA": "AdaLoRA"}[adapter.kind]
    held = {"biases": c.biases, "embeddings": c.saved, "tokens": c.tokens}
    return " + ".join([kind, *(name for name, value in held.items() if value)])


Results = dict[str, dict[str, str]]


def some() -> list[tuple[str, str]]:
    """``(architecture, kind)`` of the cells the tests run: each architecture and each kind at least once."""
    families, names = models.CROSSED, list(kinds.MIGRATED)
    down = {(families[n * 7 % len(families)], name) for n, name in enumerate(names)}
    across = {(family, names[n * 11 % len(names)]) for n, family in enumerate(families)}
    return sorted(down | across)


def stored() -> Results:
    """The results of the last full run, by kind and architecture."""
    return dict(json.loads(RESULTS.read_text()))


def run(families: Sequence[str]) -> Results:
    """Every kind on some architectures."""
    found: Results = {name: {} for name in kinds.MIGRATED}
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            build = partial(_build, Path(folder))
            old, new = bases(family, build)
            for number, (name, kind) in enumerate(kinds.MIGRATED.items()):
                found[name][family] = cell(kind, old, new, Path(folder) / str(number))
            print(family, flush=True)
    return found


def _build(folder: Path, family: str, **numbers: Any) -> Path:
    return models.build(folder / f"base{len(list(folder.iterdir()))}", family, **numbers)


def table(results: Results) -> str:
    """The table in Markdown: a row a kind, a column for architectures that agree in every row, and the reasons."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for family in models.CROSSED:
        columns.setdefault(tuple(row[family] for row in results.values()), []).append(family)
    reasons: dict[str, int] = {}

    def shown(text: str) -> str:
        name = next((name for name in ("refused", NONE) if text.startswith(name)), None)
        if name is None:
            return text
        return f"{name} ({reasons.setdefault(text, len(reasons) + 1)})"

    heads = [", ".join(f"`{family}`" for family in families) for families in columns.values()]
    lines = ["| adapter | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for number, name in enumerate(results):
        lines.append(f"| {name} | " + " | ".join(shown(column[number]) for column in columns) + " |")
    lines.append("")
    for text, number in reasons.items():
        why = text.removeprefix("refused: ").removeprefix(f"{NONE} ")
        lines.append(f"{number}. {'PEFT does not make it: ' if text.startswith(NONE) else ''}{why}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parts = run(sys.argv[1:] or models.CROSSED)
    before = stored() if RESULTS.is_file() else {}
    merged_rows = {name: {**before.get(name, {}), **row} for name, row in parts.items()}
    RESULTS.write_text(json.dumps(merged_rows, indent=1, ensure_ascii=False) + "\n")
    page, mark = Path(__file__).parents[1] / "docs" / "adapters.md", "architectures"
    head, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    rest = rest.partition(f"<!-- /{mark} -->")[2]
    if all(set(row) >= set(models.CROSSED) for row in merged_rows.values()):
        page.write_text(f"{head}<!-- {mark} -->\n{table(stored())}<!-- /{mark} -->{rest}")
