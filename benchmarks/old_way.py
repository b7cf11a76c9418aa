"""Transforms of this code against those of another state of it: how far the moved updates are from each other.

    git worktree add /tmp/old 7e88e49                       # moments of whole spaces, before there were maps
    PYTHONPATH=/tmp/old python benchmarks/old_way.py move old
    PYTHONPATH=. python benchmarks/old_way.py move new
    PYTHONPATH=. python benchmarks/old_way.py move float32 --maps float32
    PYTHONPATH=. python benchmarks/old_way.py move factored --maps float32 --factored
    python benchmarks/old_way.py compare old new float32 factored

Between the miniature bases, in both directions and across the two pairs, the trained adapters of ``orbit`` (attention
and MLP, rank 8) are moved by every transform; both states of the code read the same 256 texts, whose 3,627 positions
are more than the widest space has columns (384), and the same 100 rows. ``compare`` prints by transform and pair the
relative difference of the moved updates, ``‖ΔW − ΔW_first‖_F / ‖ΔW_first‖_F`` of each module: median and maximum. Each
state takes about a minute of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

#: Old and new base by (pair, side), and the pair whose texts and rows are read.
PAIRS = {
    "llama: wider, deeper, GQA, another vocabulary": (("llama", "old"), ("llama", "new"), "llama"),
    "llama, back": (("llama", "new"), ("llama", "old"), "llama"),
    "neox: wider, deeper, more heads, fused QKV": (("neox", "old"), ("neox", "new"), "neox"),
    "neox, back": (("neox", "new"), ("neox", "old"), "neox"),
    "llama to neox: equal widths and depths": (("llama", "old"), ("neox", "old"), "llama"),
    "neox to llama: all of it": (("neox", "old"), ("llama", "new"), "neox"),
}
TASK, TEXTS, ROWS, CUTOFF = "orbit", 256, 100, 64
METHODS = ("lorasuite", "procrustes", "functional", "sequential")


class Kept:
    """What a stage made, in memory, as other stages read it."""

    def __init__(self, output: Any, folder: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = dict(output.tensors)
        self.info = json.loads(json.dumps(output.info))
        self._folder = folder
        folder.mkdir()
        for name, content in output.files.items():
            (folder / name).write_bytes(content)

    def keys(self) -> list[str]:
        """Names of tensors."""
        return list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """One of them."""
        return self._tensors[name]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them."""
        return self._tensors

    def file(self, name: str) -> Path:
        """One of the files."""
        return self._folder / name


class Pair:
    """The stages of one pair, run without Prefect and without a store."""

    def __init__(self, old: tuple[str, str], new: tuple[str, str], data: str, folder: Path) -> None:
        from lorasuite import zoo
        from tasks.data import texts_files
        from tasks.stage import StageOutput, Where

        sides = [getattr(zoo.pair(name), side) for name, side in (old, new)]
        trained = zoo.pair(old[0])
        adapter = (trained.adapter if old[1] == "old" else trained.retrained)(TASK)
        self._paths = {"old_base": sides[0], "new_base": sides[1], "adapter": adapter}
        self._folder, self._where = folder, Where
        self._known = {"old_model": "", "new_model": "", "old_tokenizer": "", "new_tokenizer": "", "adapter": ""}
        self._texts = Kept(StageOutput(files=texts_files(zoo.texts(data, TEXTS))), folder / "texts")
        self._rows = zoo.rows(data, TASK, "train", ROWS)

    def run(self, stage: Any, settings: Mapping[str, Any], base: str = "", **given: Any) -> Kept:
        """One stage; ``base``: which one it looks at, where that is one."""
        inputs, parsed = stage.models.inputs, stage.models.settings
        known = {**self._known, "model": "", "tokenizer": ""}
        fields = {name: known[name] for name in inputs.__dataclass_fields__ if name in known}
        paths = {**self._paths, "base": self._paths[base]} if base else self._paths
        where = self._where(home=self._folder, remote=None, paths=paths)
        settings = {name: value for name, value in settings.items() if name in parsed.model_fields}
        output = stage.fn(inputs(**{**fields, **given}), parsed.model_validate(settings), where)
        return Kept(output, Path(tempfile.mkdtemp(dir=self._folder)) / "files")

    def moved(self, methods: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        """By transform and module the moved update, ``(out, in)``."""
        import tasks.pair_stages as stages
        import tasks.transform_stages as transforms
        from lorasuite.adapters import Adapter
        from lorasuite.bases import Checkpoint
        from lorasuite.data import read_rows, split_rows
        from tasks.stage import StageOutput

        old, new = Checkpoint(self._paths["old_base"]), Checkpoint(self._paths["new_base"])
        roles = list(Adapter.open(self._paths["adapter"]).roles(old.architecture))
        rows = {"old_rows": old.dims.vocab_size, "new_rows": new.dims.vocab_size}
        vocabulary = self.run(stages.vocabulary, rows)
        transfer = self.run(stages.transfer_matrices, {"when": "auto"}, vocabulary=vocabulary)
        reading = {"cutoff": CUTOFF, "pooling": "mean"}
        pooled = {
            side: self.run(stages.activations, reading, f"{side}_base", texts=self._texts) for side in ("old", "new")
        }
        similar = self.run(stages.similarity, {"metric": "cka", "batch_size": 64}, **pooled)
        mapping = {"strategy": "dp", "max_offset": None, "old": old.dims.layers, "new": new.dims.layers}
        layers = self.run(stages.layer_mapping, mapping, similarity=similar)
        known: dict[str, Any] = {"layer_mapping": layers, "transfer_matrices": transfer}
        known["head_mapping"] = self.run(stages.head_mapping, {"matching": True}, **known)
        mlp = [role for role in ("gate", "up", "down") if role in roles]
        known["mlp_factors"] = {role: self.run(stages.mlp_factors, {"role": role}) for role in mlp}
        read = {"roles": roles, "cutoff": CUTOFF, "positions": 2**40, "written": ["orthogonal"]}
        read["read"] = ["orthogonal", "functional"]
        if methods != ["sequential"]:
            known["alignment"] = {"maps": self.run(stages.alignment, read, texts=self._texts, layer_mapping=layers)}
        states = self.run(stages.state_map, read, texts=self._texts) if "sequential" in methods else None
        (self._folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        split = split_rows(read_rows(self._folder / "rows.jsonl"), seed=0)
        kept = Kept(StageOutput(files=split.files()), self._folder / "split")
        common = {
            "rank": 8,
            "alpha": 16,
            "use_rslora": False,
            "output_type": "lora",
            "unmapped": "freeze",
            "seed": 0,
            "cutoff": CUTOFF,
        }
        found = {}
        for method in methods:
            if method == "sequential":
                made = self.run(transforms.model_fit, {**common, "method": method}, rows=kept, state_map=states)
            else:
                made = self.run(transforms.transform, {**common, "method": method}, **known)
            found[method] = updates(made.file("adapter_model.safetensors"), made.file("adapter_config.json"))
        return found


def updates(weights: Path, config: Path) -> dict[str, torch.Tensor]:
    """Module → ``ΔW`` of a stored LoRA, without those of fresh modules, which are zero."""
    tensors, settings = load(weights.read_bytes()), json.loads(config.read_text())
    scale = settings["lora_alpha"] / settings["r"]
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            change = scale * tensors[f"{module}.lora_B.weight"].double() @ a.double()
            if bool(change.any()):
                found[module] = change
    return found


def move(name: str, methods: list[str], maps: str, factored: bool, whole: bool, rounding: float | None) -> None:
    """Move every adapter and keep the updates below ``name``; what is put in the code's place is in the help."""
    if rounding is not None:
        kept = partial(nearest, rounding=rounding)
        for module in ("correspondence._moments", "transforms.procrustes", "transforms.functional"):
            with contextlib.suppress(ImportError):  # where the function is depends on the state of the code
                found = importlib.import_module(f"lorasuite.{module}")
                if hasattr(found, "polar"):
                    found.polar = kept
    if whole:
        state_map = importlib.import_module("lorasuite.correspondence._state_map")
        state_map.FEATURES = state_map.DIRECTIONS = 2**20  # type: ignore[attr-defined]
    if maps == "float32":
        torch.Tensor.half = torch.Tensor.float
    if factored:
        alignment = importlib.import_module("lorasuite.correspondence._alignment")

        def add(self: Any, x: torch.Tensor, y: torch.Tensor, sample: torch.Tensor) -> None:
            self.sampled.append((x[sample].double(), y[sample].double()))

        alignment.Space.add = add
    found = {}
    for pair, sides in PAIRS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[pair] = Pair(*sides, Path(folder)).moved(methods)
            print(pair, {method: len(moved) for method, moved in found[pair].items()}, flush=True)
    torch.save(found, f"{name}.pt")


def nearest(cross: torch.Tensor, rounding: float) -> torch.Tensor:
    """The orthogonal factor without the directions whose singular value is below a share of the first."""
    u, s, vh = torch.linalg.svd(cross, full_matrices=False)
    keep = s > s[0] * rounding
    found: torch.Tensor = u[:, keep] @ vh[keep]
    return found


def compare(first: str, others: list[str]) -> None:
    """Print the differences from the first."""
    runs = {name: torch.load(f"{name}.pt") for name in (first, *others)}
    print("| transform | pair | modules |", " | ".join(f"{name}: median, maximum" for name in others), "|")
    print("|---|---|---|" + "---|" * len(others))
    for method in runs[first][next(iter(PAIRS))]:
        for pair, expected in ((pair, runs[first][pair][method]) for pair in PAIRS):
            cells = []
            for name in others:
                got = runs[name][pair][method]
                assert got.keys() == expected.keys(), f"{method}, {pair}: other modules are moved"
                apart = [float((got[m] - expected[m]).norm() / expected[m].norm()) for m in expected]
                cells.append(f"{statistics.median(apart):.1e}, {max(apart):.1e}")
            print(f"| {method} | {pair} | {len(expected)} |", " | ".join(cells), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    mover, comparer = commands.add_parser("move"), commands.add_parser("compare")
    mover.add_argument("name", help="of the file that the updates are kept in, without .pt")
    mover.add_argument("--maps", choices=["half", "float32"], default="half", help="precision that maps are kept in")
    mover.add_argument("--factored", action="store_true", help="map every space by its factors, of all positions")
    mover.add_argument("--whole", action="store_true", help="features of states neither projected at random nor cut")
    mover.add_argument("--rounding", type=float, help="leave out directions below this share of the first")
    mover.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    comparer.add_argument("names", nargs="+", help="the first is what the others are compared with")
    given = parser.parse_args()
    if given.command == "move":
        move(given.name, given.methods, given.maps, given.factored, given.whole, given.rounding)
    else:
        compare(given.names[0], given.names[1:])
