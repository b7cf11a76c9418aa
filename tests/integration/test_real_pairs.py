"""The paper's nine pairs at their published shapes (``tests/real_pairs.yaml``), with random weights.

Each model is a truncated checkpoint: the real config but for its depth, real widths, head layouts and vocabulary sizes,
float16 on disk. Pairs whose old hidden size is below 1536 have two layers, others one; those below 4096 move all their
linear modules. What two cores do not do in seconds is cut: the three pairs of hidden size 4096 move attention only, and
`down` where it is the intermediate size that changes (Llama 2 to 3). From 2048 the MLP's factor is a plain inverse in
float32 (the library's is an eigenvalue problem, 7 s at that size; the three narrower pairs have it). From 4096 to 5120
(Llama 2) heads are matched as they come: comparing them takes 25 s. Where the new hidden size is above 2304 the
hidden map is given, not fitted (its pseudo-inverse is an SVD of that size). Embeddings are random in the rows of a
synthetic vocabulary of common tokens, where a map is fitted on them; they are zero elsewhere, as are the MLP's weights
where no update of them moves, and zeros are holes in the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING

from lorasuite.adapters import Adapter, LowRank, check_loads, write_adapter
from lorasuite.bases import ATTENTION, Checkpoint, Role, architecture_for, common_tokens
from lorasuite.correspondence import TransferMatrix, fit_transfer_matrix, map_heads, map_layers, mlp_factor
from lorasuite.planning import inspect
from lorasuite.transforms import migrate
from tests import models

TABLE = yaml.safe_load((Path(__file__).parent.parent / "real_pairs.yaml").read_text())
PAIRS = {f"{pair['old']} to {pair['new']}": pair for pair in TABLE["pairs"]}
#: METHOD's table: old → new of layers, heads, hidden and intermediate size, and the attention type.
PAPER = {
    "yi-6b to yi-1.5-9b": ((32, 48), (32, 32), (4096, 4096), (11008, 11008), ("GQA", "GQA")),
    "pythia-1b to pythia-1.4b": ((16, 24), (8, 16), (2048, 2048), (8192, 8192), ("MHA", "MHA")),
    "bloom-560m to bloomz-1b1": ((24, 24), (16, 16), (1024, 1536), (4096, 6144), ("MHA", "MHA")),
    "llama-2-7b to llama-3-8b": ((32, 32), (32, 32), (4096, 4096), (11008, 14336), ("MHA", "GQA")),
    "qwen-1.5-1.8b to qwen-2.5-3b": ((24, 36), (16, 16), (2048, 2048), (5504, 11008), ("MHA", "GQA")),
    "minicpm-s-1b to minicpm-2b": ((52, 40), (24, 36), (1536, 2304), (3840, 5760), ("GQA", "MHA")),
}
RANK = 4
COMMON = 3000  # tokens of the synthetic vocabularies
WIDE = 1536
LARGE = 4096


def dims_of(model: str) -> Any:
    config = TABLE["models"][model]["config"]
    return architecture_for(config).dimensions(config)


def test_every_model_has_a_source() -> None:
    assert len(PAIRS) == 9
    assert {name for pair in PAIRS.values() for name in (pair["old"], pair["new"])} == set(TABLE["models"])
    for model in TABLE["models"].values():
        assert model["hub"].count("/") == 1 and model["source"]


@pytest.mark.parametrize("pair", PAPER)
def test_the_numbers_are_those_of_the_papers_table(pair: str) -> None:
    old, new = dims_of(PAIRS[pair]["old"]), dims_of(PAIRS[pair]["new"])
    sides = [(d.layers, d.heads, d.hidden_size, d.intermediate_size, d.attention) for d in (old, new)]
    assert tuple(zip(*sides, strict=True)) == PAPER[pair]


@pytest.mark.parametrize("pair", PAIRS)
def test_layers_are_mapped_at_full_depth(pair: str) -> None:
    old, new = dims_of(PAIRS[pair]["old"]), dims_of(PAIRS[pair]["new"])
    S = torch.rand(old.layers, new.layers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layers = map_layers(S, "dp", None)
    assert len(layers) == min(old.layers, new.layers)
    assert list(layers) == sorted(layers) and list(layers.values()) == sorted(set(layers.values()))
    offset = abs(old.layers - new.layers)
    steps = (n - o if old.layers <= new.layers else o - n for o, n in layers.items())
    assert all(0 <= step <= offset for step in steps)


def roles_of(pair: str) -> tuple[Role, ...]:
    """What the pair's adapter updates."""
    config = TABLE["models"][PAIRS[pair]["old"]]["config"]
    if config["hidden_size"] < LARGE:
        return architecture_for(config).roles
    return (*ATTENTION, "down") if "llama-3" in pair else ATTENTION


def write_weights(file: Path, tensors: dict[str, tuple[tuple[int, int], torch.Tensor]]) -> None:
    """Float16 tensors by name, each as its shape and its first rows; the others are zero, and holes in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + 2 * shape[0] * shape[1]]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        start = out.tell()
        for name, (_, rows) in tensors.items():
            out.seek(start + header[name]["data_offsets"][0])
            out.write(rows.numpy().data)
        out.truncate(start + end)


def truncated(path: Path, model: str, depth: int, seed: int, embedded: bool, roles: tuple[Role, ...]) -> Path:
    """The model at its real widths, so many layers deep: the weights of ``roles`` and ``COMMON`` embeddings."""
    config = dict(TABLE["models"][model]["config"])
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = depth
    architecture, dims = architecture_for(config), architecture_for(config).dimensions(config)
    g = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=g) * 0.02).half()

    vectors = random(COMMON + 4 if embedded else 0, dims.hidden_size)
    state = {architecture.embedding + ".weight": ((dims.vocab_size, dims.hidden_size), vectors)}
    for layer in range(depth):
        for module in architecture.modules:
            shape = sum(dims.rows(r) for r in module.roles), dims.columns(module.roles[0])
            rows = shape[0] if set(module.roles) & set(roles) else 0
            state[architecture.path(layer, module) + ".weight"] = shape, random(rows, shape[1])
    path.mkdir()
    write_weights(path / "model.safetensors", state)
    CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"}).save_pretrained(path)
    words = [f"t{n}" for n in range(COMMON)]
    # another order in each model: its tokenizers never have the same ids, so only COMMON rows are fitted on
    models.build_tokenizer(path, [*models.SPECIAL, *(words if seed == 0 else reversed(words))])
    return path


def adapter_of(path: Path, base: Path, roles: tuple[Role, ...]) -> Path:
    """A random adapter: attention in every layer, the MLP's modules in layer 0 only."""
    checkpoint = Checkpoint(base)
    g = torch.Generator().manual_seed(5)
    updates = {}
    for layer in range(checkpoint.dims.layers):
        for module in checkpoint.modules(layer):
            if not set(module.roles) & set(roles if layer == 0 else ATTENTION):
                continue
            rows = sum(checkpoint.dims.rows(r) for r in module.roles)
            updates[checkpoint.architecture.path(layer, module)] = LowRank(
                torch.randn(rows, RANK, generator=g, dtype=torch.float64) * 0.02,
                torch.randn(RANK, checkpoint.dims.columns(module.roles[0]), generator=g, dtype=torch.float64) * 0.02,
            )
    return write_adapter(
        path, updates, architecture=checkpoint.architecture, dims=checkpoint.dims, base=str(base), rank=RANK, alpha=RANK
    )


def given_map(d_o: int, d_n: int) -> TransferMatrix:
    """``W_h`` that puts old coordinate ``i`` at a random new one, up to sign: its transpose is its inverse."""
    g = torch.Generator().manual_seed(9)
    W = torch.zeros(d_o, d_n, dtype=torch.float64)
    W[torch.arange(d_o), torch.randperm(d_n, generator=g)[:d_o]] = (
        torch.randint(2, (d_o,), generator=g).double() * 2 - 1
    )
    return TransferMatrix(W, W.T.contiguous())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory that is gone after the test: pytest keeps its own, and a pair has gigabytes of weights."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_at_its_real_shapes(name: str, folder: Path) -> None:
    pair = PAIRS[name]
    changes_width = "hidden size" in pair["changed"]
    d_n = dims_of(pair["new"]).hidden_size
    fits = changes_width and d_n <= 2304
    roles = roles_of(name)
    depth = 2 if dims_of(pair["old"]).hidden_size < WIDE else 1
    old_path = truncated(folder / "old", pair["old"], depth, 0, fits, roles)
    new_path = truncated(folder / "new", pair["new"], depth, 1, fits, roles)
    old, new = Checkpoint(old_path), Checkpoint(new_path)
    adapter = Adapter.open(adapter_of(folder / "adapter", old_path, roles))

    found = inspect(str(old_path), str(new_path), str(adapter.path))
    assert found.problems == []
    changed = {row["name"] for row in found.factors if row["changed"]}
    if old.dims.attention == new.dims.attention:
        changed -= {"attention type"}  # its row has the number of key/value heads, too
    assert changed == set(pair["changed"]) - {"layers"}  # the depth is cut
    assert [row["role"] for row in found.modules if row["moves"]] == [r for r in old.architecture.roles if r in roles]

    tokens = common_tokens(
        models.tokenizer_of(old_path), models.tokenizer_of(new_path), old.dims.vocab_size, new.dims.vocab_size
    )
    assert len(tokens) == COMMON + 4
    if changes_width and not fits:
        W = given_map(old.dims.hidden_size, d_n)
    else:
        W = fit_transfer_matrix(old, new, tokens)
        assert W.identity != changes_width
    layers = {n: n for n in range(min(old.dims.layers, new.dims.layers))}
    every = min(old.dims.heads, new.dims.heads)
    compared = map_heads(old, new, layers, W) if d_n <= LARGE else {}
    heads = {n: compared[n].heads if compared else {a: a for a in range(every)} for n in layers}
    match = heads[0]
    assert len(match) == len(set(match.values())) == every
    result = migrate(
        adapter, old, new, method="lorasuite", layers=layers, heads=heads, transfer=W,
        mlp_factor=lambda layer, role: mlp_factor(old, layer, role), rank=RANK,
    )  # fmt: skip
    similarity = compared[0].similarity if compared else None
    check_one_head(adapter, old, new, W, similarity, match, result.updates)
    check_mlp(adapter, old, new, W, result.updates, roles)

    out = write_adapter(
        folder / "migrated", result.updates, architecture=new.architecture, dims=new.dims, base=str(new_path),
        rank=RANK, alpha=RANK,
    )  # fmt: skip
    check_loads(out, new_path)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == RANK


def parts(checkpoint: Checkpoint, updates: Any, layer: int) -> dict[Role, LowRank]:
    """One layer's updates by role."""
    found: dict[Role, LowRank] = {}
    for module in checkpoint.modules(layer):
        update = updates(checkpoint.architecture.path(layer, module))
        if update is not None:
            split = module.split(update.B, checkpoint.dims)
            found.update({role: LowRank(B, update.A) for role, B in split.items()})
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


def check_one_head(
    adapter: Adapter,
    old: Checkpoint,
    new: Checkpoint,
    W: TransferMatrix,
    similarity: torch.Tensor | None,
    match: dict[int, int],
    updates: dict[str, LowRank],
) -> None:
    """Similarity and equation 3 of one head pair of layer 0, from the formulas."""
    a = min(3, old.dims.heads - 1)
    a, b = next((x, y) for x, y in match.items() if x >= a)
    before = parts(old, lambda p: adapter.update(p) if p in adapter.modules else None, 0)
    after = parts(new, updates.get, 0)
    P, N = old.layer(0, ATTENTION), new.layer(0, ATTENTION)

    def head(x: torch.Tensor, dims: Any, at: int, role: Role) -> torch.Tensor:
        rows = x.T if role == "o" else x
        at = at if role in ("q", "o") else at // dims.group
        return rows[at * dims.head_dim : (at + 1) * dims.head_dim].double()

    o = {r: head(P[r], old.dims, a, r) for r in ATTENTION}
    n = {r: head(N[r], new.dims, b, r) for r in ATTENTION}
    if similarity is not None:
        x, y = ({r: W.forward(o[r]) for r in ATTENTION}, n)
        pairs = (("q", "k"), ("v", "o"))
        # ⟨XᵀY, X'ᵀY'⟩ = ⟨XX'ᵀ, YY'ᵀ⟩: of the head's size, not of the hidden one (dense in test_head_mapping)
        inner = [
            [sum(float(((p[r] @ q[r].T) * (p[s] @ q[s].T)).sum()) for r, s in pairs) for q in (x, y)] for p in (x, y)
        ]
        dot, norms = inner[0][1], (inner[0][0] ** 0.5, inner[1][1] ** 0.5)
        assert float(similarity[a, b]) == pytest.approx(dot / (norms[0] * norms[1]), rel=1e-3, abs=1e-6)

    for role in ATTENTION:
        if role in ("k", "v") and (new.dims.group > 1 or old.dims.group > 1):
            continue  # averaged over the group: what one head gives is not seen alone
        delta = head(before[role].dense(), old.dims, a, role)
        moved = head(after[role].dense(), new.dims, b, role)
        close(moved, n[role] @ W.adjoint(o[role].T) @ W.forward(delta), 1e-3)


def pinv_times(weight: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``pinv(weight)·right`` of a tall weight of full rank: the normal equations, in float32 (its Gram is benign)."""
    factor = torch.linalg.cholesky(weight.T @ weight)
    return torch.cholesky_solve(weight.T @ right.float(), factor).double()


def check_mlp(
    adapter: Adapter,
    old: Checkpoint,
    new: Checkpoint,
    W: TransferMatrix,
    updates: dict[str, LowRank],
    roles: tuple[Role, ...],
) -> None:
    """The MLP rules of layer 0, with the pseudo-inverses by the normal equations instead of eigenvalues."""
    before = parts(old, lambda p: adapter.update(p) if p in adapter.modules else None, 0)
    after = parts(new, updates.get, 0)
    for role in [role for role in ("gate", "up", "down") if role in roles]:
        update, moved = before[role], after[role]
        weight, target = (c.layer(0, (role,))[role] for c in (old, new))
        target = target.double()
        if role == "down":
            through = pinv_times(weight.T, update.A.T).T  # A·pinv(D_o)
            expected = LowRank(W.backward(update.B), W.forward(through) @ target)
        else:
            through = pinv_times(weight, update.B)  # pinv(U_o)·B
            expected = LowRank(target @ W.backward(through), W.forward(update.A))
        difference = LowRank.sum([moved, expected.scaled(-1.0)])
        assert difference.norm() < 1e-4 * expected.norm()
