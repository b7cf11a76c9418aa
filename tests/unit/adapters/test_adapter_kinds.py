"""Every kind of adapter: read as PEFT computes it, migrated as reported, loaded without a missing or unexpected key."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasuite.adapters import (
    CONFIG,
    Adapter,
    Combined,
    LowRank,
    attach_adapter,
    config_problems,
    detach_adapter,
    open_adapters,
    split_sources,
    write_ready,
)
from lorasuite.bases import Checkpoint, CommonTokens
from lorasuite.correspondence import fit_transfer_matrix
from lorasuite.errors import AdapterError, CheckpointError, ConfigError
from lorasuite.planning import MigrationConfig, build, inspect
from lorasuite.transforms import Migrated, migrate
from tests import cross, kinds, models
from tests.cross import check_tensors, close, logits, merged, move, opened, trained, write

KINDS = kinds.MIGRATED


@pytest.fixture(scope="module")
def made(base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``made(kind)``: the old base and an adapter of that kind, built once."""
    root = tmp_path_factory.mktemp("kinds")
    built: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in built:
            kind = KINDS[name]
            model = base(kind.family, **kind.numbers)
            built[name] = model, kinds.build(kind, root / str(len(built)), model)
        return built[name]

    return make


@pytest.mark.parametrize("name", KINDS)
def test_old_base_is_new_base(name: str, made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """``copy`` to the same base gives an adapter that computes the same."""
    model, path = made(name)
    adapter = opened(path)
    moved = move(adapter, model, model, "copy", energy=1.0)
    out = write(tmp_path / "out", moved, adapter, model)
    close(logits(check_tensors(out, model)), trained(path, model), 1e-4)
    assert not moved.dropped


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """Read as PEFT computes it, and moved as reported; the checks are in :func:`tests.cross.cell`."""
    kind = KINDS[name]
    old, new = cross.bases(kind.family, base)
    held = {"LoRA on embeddings": "LoRA", "whole embeddings": "embeddings", "trained tokens": "tokens"}
    words = [held.get(part, part) for part in kind.out.split(" with ")]
    assert cross.cell(kind, old, new, tmp_path) == " + ".join(words) == cross.stored()[name][kind.family]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), cross.some())
def test_kinds_on_other_architectures(family: str, name: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """A part of the table in docs/adapters.md; ``python -m tests.cross`` runs all of it."""
    found, shown = cross.cell(KINDS[name], *cross.bases(family, base), tmp_path), cross.stored()[name][family]
    assert found == shown, "run python -m tests.cross"


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_attaches_it_and_leaves_the_base_as_it_was(
    name: str, made: Callable[[str], tuple[Path, Path]]
) -> None:
    """The ``old+adapter`` arm reads every kind, biases and changed bases included."""
    model, path = made(name)
    plain = models.load(model)
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = attach_adapter(plain, path)
    if not (path / "logits.pt").is_file():
        close(logits(wrapped.double().eval()), trained(path, model))
    after = detach_adapter(wrapped).float().state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


# ------------------------------------------------------------------------------------------------- what goes beside ΔW


def reversed_vocabulary(base: Callable[..., Path], **numbers: Any) -> Path:
    return base("llama", seed=7, vocab=120, tokens=tuple(reversed(models.words(120))), **numbers)


def test_embedding_changes_go_with_their_tokens(made: Callable[..., Any], base: Callable[..., Path]) -> None:
    """Same hidden size, other ids: every shared token's row changes by just what it changed in the old base."""
    new = reversed_vocabulary(base)
    for name in ("LoRA on embeddings", "modules_to_save (embeddings)"):
        model, path = made(name)
        adapter, old = opened(path), Checkpoint(model)
        moved = move(adapter, model, new, rank=8)
        for side in ("model.embed_tokens", "lm_head"):
            before = old.tensor(f"{side}.weight").double()
            if side in adapter.contents.updates:
                change, there = adapter.update(side).dense(), moved.updates[side].dense()
            else:
                change = adapter.extra(adapter.contents.saved[side]) - before
                there = moved.extras.saved[side].double() - Checkpoint(new).tensor(f"{side}.weight").double()
            expected = torch.zeros(120, 32, dtype=torch.float64)
            for id_, token in enumerate(models.words(96)):
                expected[119 - models.words(120).index(token)] = change[id_]
            torch.testing.assert_close(there, expected, rtol=1e-4, atol=1e-5)
        assert [row["rows"] for row in moved.carried] == [96, 96]


@pytest.mark.parametrize("kind", ["LoRA", "modules_to_save"])
@pytest.mark.parametrize("trained", [(90, 93), (5, 93), ()])
def test_tokens_trained_in_spare_rows_are_dropped_and_named(
    kind: str, trained: tuple[int, ...], base: Callable[..., Path], tmp_path: Path
) -> None:
    """An old base of 96 rows and 90 tokens: what was trained in the rows behind has no token to go to, and what is
    written is no copy of the new base's embedding."""
    old = base("llama", tokens=tuple(models.words(90)))
    new = base("llama", seed=7, vocab=120, tokens=tuple(models.words(110)))
    parts = {"target_modules": ["q_proj", "embed_tokens"]} if kind == "LoRA" else {"modules_to_save": ["embed_tokens"]}
    path = kinds.build(kinds.Kind(kinds.lora(**parts), ""), tmp_path / "adapter", old)
    file = path / "adapter_model.safetensors"
    state = load_file(file)
    keep = torch.zeros(96, dtype=torch.bool)
    keep[list(trained)] = True
    for name, tensor in state.items():
        if name.endswith("embed_tokens.lora_embedding_A"):
            state[name] = torch.where(keep, tensor, 0.0)
        elif name.endswith("embed_tokens.weight"):
            state[name] = torch.where(keep[:, None], tensor, Checkpoint(old).embedding())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, {"format": "pt"})
    moved = move(opened(path), old, new)
    found = [d["why"] for d in moved.dropped if d["module"] == "model.embed_tokens"]
    counted = [(row["module"], row["rows"], row["of"]) for row in moved.carried]
    written = "model.embed_tokens" in {*moved.updates, *moved.extras.saved}
    if not trained:
        assert found == [f"{kind}: every row is the old base's own"] and counted == [] and not written
    elif 5 in trained:
        assert found == ["1 of its 2 trained tokens are not in the new vocabulary, such as id 93"]
        assert counted == [("model.embed_tokens", 1, 2)] and written
    else:
        assert found == ["2 of its 2 trained tokens are not in the new vocabulary, such as id 90"]
        assert counted == [] and not written


def test_trained_tokens_without_a_counterpart_are_dropped_and_named(
    made: Callable[..., Any], base: Callable[..., Path]
) -> None:
    model, path = made("trainable_token_indices")
    tokens = ["w1" if t == "w29" else "other" if t == "w1" else t for t in models.words(96)]
    new = base("llama", seed=7, tokens=tuple(tokens))
    moved = move(opened(path), model, new)
    ids, _ = moved.extras.tokens["model.embed_tokens"]
    assert ids == [9, 33]  # ids 5 (w1 → 33), 9 and 33 (w29, gone)
    assert [d["why"] for d in moved.dropped] == [
        "1 of its 3 trained tokens are not in the new vocabulary, such as id 33"
    ]


EMBEDDING_KINDS = {
    "LoRA on embeddings": "LoRA",
    "modules_to_save (embeddings)": "LoRA + embeddings",
    "trainable_token_indices": "LoRA + tokens",
}


@pytest.mark.parametrize("name", EMBEDDING_KINDS)
@pytest.mark.parametrize(("old_tied", "new_tied"), [(True, True), (True, False), (False, True)])
def test_tied_embeddings(name: str, old_tied: bool, new_tied: bool, base: Callable[..., Path], tmp_path: Path) -> None:
    old = base("llama", tie_word_embeddings=old_tied, layers=2)
    tokens = tuple(reversed(models.words(120)))
    new = base("llama", seed=7, vocab=120, tokens=tokens, tie_word_embeddings=new_tied, layers=2)
    assert cross.cell(KINDS[name], old, new, tmp_path) == EMBEDDING_KINDS[name]


def test_tokens_trained_in_tied_embeddings_count_at_both_ends(base: Callable[..., Path], tmp_path: Path) -> None:
    """Moved to an untied base, the output rows change as well; the other way, two changes of a row cannot be told."""
    tokens = tuple(reversed(models.words(120)))
    tied, untied = base("llama", tie_word_embeddings=True), base("llama")
    adapter = opened(kinds.build(KINDS["trainable_token_indices"], tmp_path / "tied", tied))
    new = base("llama", seed=7, vocab=120, tokens=tokens)
    moved = move(adapter, tied, new)
    name, ids = adapter.contents.tokens["model.embed_tokens"]
    change = adapter.extra(name) - Checkpoint(tied).embedding()[list(ids)]
    assert set(moved.extras.tokens) == {"model.embed_tokens", "lm_head"}
    for path, (found, rows) in moved.extras.tokens.items():
        assert found == sorted(119 - id_ for id_ in ids)
        torch.testing.assert_close(
            rows.double().flip(0), Checkpoint(new).tensor(f"{path}.weight")[found].flip(0) + change
        )
    both = kinds.lora(trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [5, 9]})
    adapter = opened(kinds.build(kinds.Kind(both, ""), tmp_path / "both", untied))
    moved = move(adapter, untied, base("llama", seed=7, tie_word_embeddings=True))
    assert list(moved.extras.tokens) == ["model.embed_tokens"] and "the new base ties them" in str(moved.carried)
    assert [d["module"] for d in moved.dropped] == ["lm_head"] and "ties its embeddings" in moved.dropped[0]["why"]


def test_embeddings_need_shared_tokens(made: Callable[..., Any]) -> None:
    model, path = made("LoRA on embeddings")
    adapter, checkpoint = opened(path), Checkpoint(model)
    none = CommonTokens(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), False, 96, 96)
    for common in (None, none):
        with pytest.raises(AdapterError, match="share no token"):
            migrate(
                adapter, checkpoint, checkpoint, method="copy", layers={0: 0, 1: 1, 2: 2},
                heads={n: {a: a for a in range(4)} for n in range(3)}, rank=3, common=common,
                transfer=fit_transfer_matrix(checkpoint, checkpoint, none), mlp_factor=lambda *_: torch.empty(0),
            )  # fmt: skip


def test_magnitudes_follow_their_heads(made: Callable[..., Any], base: Callable[..., Path]) -> None:
    """Where nothing but the heads' order changes, every row keeps its relative magnitude, in its new place."""
    from lorasuite.transforms import move_rows

    model, _ = made("DoRA")
    dims = Checkpoint(model).dims  # 4 heads, 2 key/value heads, head size 8
    ratio = torch.arange(32, dtype=torch.float64)
    moved = move_rows(ratio, "q", dims, dims, {0: 2, 1: 0, 2: 3, 3: 1}, "ratio")
    assert moved is not None
    assert moved.reshape(4, 8)[:, 0].tolist() == [8, 24, 0, 16]
    grouped = move_rows(ratio[:16], "k", dims, dims, {0: 2, 1: 3, 2: 0}, "ratio")
    assert grouped is not None
    # new heads 0, 1 are one group: old head 2 (k-head 1), and none, which counts as unchanged
    torch.testing.assert_close(grouped.reshape(2, 8)[0], (ratio[8:16] + 1) / 2)
    torch.testing.assert_close(grouped.reshape(2, 8)[1], ratio[:8])
    smaller = Checkpoint(base("llama", hidden=16, heads=4, intermediate=24)).dims
    assert move_rows(ratio[:32], "o", dims, smaller, {}, "shift") is None
    averaged = move_rows(ratio[:32], "o", dims, smaller, {}, "ratio")
    assert averaged is not None and averaged.tolist() == [15.5] * 16


def test_biases_that_do_not_correspond_are_dropped_and_named(
    made: Callable[..., Any], base: Callable[..., Path], tmp_path: Path
) -> None:
    model, path = made("bias='lora_only'")
    new = base("llama", seed=7)
    adapter = opened(path)
    moved = move(adapter, model, new)
    assert not moved.extras.biases and {d["why"] for d in moved.dropped} == {"the new module has no bias"}
    assert json.loads((write(tmp_path / "a", moved, adapter, new) / CONFIG).read_text())["bias"] == "none"
    wider = move(adapter, model, base("qwen2", seed=7, hidden=48, heads=4))
    assert "the old and new outputs have other sizes" in {d["why"] for d in wider.dropped}


@pytest.mark.parametrize("name", ["DoRA", "bias='lora_only'", "LoRA on embeddings"])
def test_fresh_layers_beside_extras(
    name: str, made: Callable[..., Any], base: Callable[..., Path], tmp_path: Path
) -> None:
    model, path = made(name)
    new = base(KINDS[name].family, seed=7, layers=4, **KINDS[name].numbers)
    adapter = opened(path)
    moved = move(adapter, model, new, unmapped="train")
    assert moved.fresh
    live = check_tensors(write(tmp_path / "a", moved, adapter, new), new)
    close(logits(live), logits(merged(new, moved.updates, moved.extras)))


# --------------------------------------------------------------------------------------------------- rank and energy


@pytest.mark.parametrize("name", ["LoRA", "LoHa"])
def test_rank_by_kept_energy(name: str, made: Callable[..., Any]) -> None:
    model, path = made(name)
    adapter = opened(path)
    for energy in (0.5, 0.9, 1.0):
        moved = move(adapter, model, model, "copy", energy=energy)
        assert min(moved.retained.values()) >= energy - 1e-9
        assert moved.rank == max(update.rank for update in moved.updates.values())
        for update in moved.updates.values():
            assert update.rank == 1 or adapter_energy(adapter, model, update, moved) < energy
    smallest = move(adapter, model, model, "copy", rank=1)
    assert smallest.rank == 1 and 0 < min(smallest.retained.values()) < 1


def adapter_energy(adapter: Adapter, model: Path, update: LowRank, moved: Migrated) -> float:
    """The energy one rank less would keep."""
    path = next(path for path, other in moved.updates.items() if other is update)
    return adapter.update(path, Checkpoint(model)).compress(update.rank - 1)[1]


# ------------------------------------------------------------------------------------------------------ AdaLoRA written


def test_a_rank_for_each_module(made: Callable[..., Any], base: Callable[..., Path], tmp_path: Path) -> None:
    """As the energy asks for, in the rank pattern; the scaling stays; fresh layers can be trained."""
    model, path = made("AdaLoRA")
    adapter, new = opened(path), base("llama", seed=7, layers=4)
    moved = move(adapter, model, new, energy=0.9, unmapped="train")
    out = write(tmp_path / "a", moved, adapter, new, "adalora")
    check_tensors(out, new)
    config = json.loads((out / CONFIG).read_text())
    ranks = {name.removesuffix(".lora_E"): sum(mask) for name, mask in config["rank_pattern"].items()}
    assert {module: ranks[module] for module in moved.updates} == {m: u.rank for m, u in moved.updates.items()}
    assert len(set(ranks.values())) > 1 and set(map(len, config["rank_pattern"].values())) == {moved.rank}
    scaling = next(iter(adapter.scaling.values()))
    assert list(opened(out).scaling.values()) == pytest.approx([scaling] * len(ranks), rel=1e-4)
    for module in moved.fresh:
        B, A = opened(out).factors(module)
        assert float(B.norm()) > 0 and float(A.norm()) == 0  # A carries E, which is zero


@pytest.mark.parametrize(
    ("name", "what"),
    [("DoRA", "magnitudes"), ("bias='lora_only'", "biases"), *((name, "embeddings") for name in EMBEDDING_KINDS)],
)
def test_what_an_adalora_cannot_hold_is_refused(name: str, what: str, made: Callable[..., Any], tmp_path: Path) -> None:
    model, path = made(name)
    found = inspect(str(model), str(model), str(path), output_type="adalora")
    assert [p.where for p in found.problems] == ["output_type"] and what in found.problems[0].what
    adapter = opened(path)
    with pytest.raises(AdapterError, match=what):
        write(tmp_path / "a", move(adapter, model, model, "copy"), adapter, model, "adalora")


# ---------------------------------------------------------------------------------------------------- several adapters


def test_sources_and_weights(tmp_path: Path) -> None:
    assert split_sources("a") == [("a", 1.0)]
    assert split_sources("a:0.7, b@main:-0.3,org/c") == [("a", 0.7), ("b@main", -0.3), ("org/c", 1.0)]
    (tmp_path / "x,y:2").mkdir()
    assert split_sources(str(tmp_path / "x,y:2")) == [(str(tmp_path / "x,y:2"), 1.0)]


def test_several_adapters_are_summed(made: Callable[..., Any], tmp_path: Path) -> None:
    members = {"LoRA": 0.7, "rank_pattern, alpha_pattern": -0.5, "LoHa": 1.0}
    for number, name in enumerate(members):  # names of kinds hold commas
        shutil.copytree(made(name)[1], tmp_path / str(number))
    model, checkpoint = made("LoRA")[0], Checkpoint(made("LoRA")[0])
    text = ",".join(f"{tmp_path / str(n)}:{weight}" for n, weight in enumerate(members.values()))
    both = open_adapters(text)
    assert (
        both.check(checkpoint) == []
        and both.rank == 3 + 5 + 2
        and both.fingerprint() != open_adapters(text.replace("0.7", "0.6")).fingerprint()
    )
    assert isinstance(both, Combined)
    path = write_ready(both, checkpoint, tmp_path / "work", "base")
    check_tensors(path, model)
    written = Adapter.open(path)
    for module in written.modules:
        parts = [(opened(tmp_path / str(n)), weight) for n, weight in enumerate(members.values())]
        expected = sum(a.update(module, checkpoint).dense() * w for a, w in parts if module in a.modules)
        torch.testing.assert_close(written.update(module).dense(), expected, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_no_sum_of_updates_are_not_combined(made: Callable[..., Any], tmp_path: Path) -> None:
    text = ",".join(str(made(name)[1]) for name in ("LoRA", "DoRA", "trainable_token_indices"))
    with pytest.raises(AdapterError) as caught:
        open_adapters(text)
    assert [p.where.rpartition(": ")[2] for p in caught.value.problems] == ["use_dora", "trainable_token_indices"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", kinds.REFUSED_SETTINGS)
def test_refused_fields_are_named(name: str, made: Callable[..., Any], tmp_path: Path) -> None:
    _, path = made("LoRA")
    shutil.copytree(path, tmp_path / "a")
    models.edit_json(tmp_path / "a" / CONFIG, **{name: kinds.REFUSED_SETTINGS[name]})
    with pytest.raises(AdapterError) as caught:
        Adapter.open(tmp_path / "a")
    assert [p.where for p in caught.value.problems] == [f"{tmp_path / 'a' / CONFIG}: {name}"]
    assert all(p.remedy for p in caught.value.problems)


def test_modules_to_save_other_than_embeddings_are_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")
    kinds.build(kinds.Kind(kinds.lora(modules_to_save=["norm"]), ""), tmp_path / "a", model)
    problems = Adapter.open(tmp_path / "a").check(Checkpoint(model))
    assert {p.where for p in problems} == {f"{tmp_path / 'a' / CONFIG}: modules_to_save"}
    assert any("model.norm is trained as a whole" in p.what for p in problems)


def test_dora_on_an_embedding_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens", "lm_head"]
    kinds.build(kinds.Kind(kinds.lora(use_dora=True, target_modules=targets), ""), tmp_path / "a", base("llama"))
    with pytest.raises(AdapterError, match="use_dora: lm_head is an embedding"):
        Adapter.open(tmp_path / "a")


def test_pickles_only_on_request(made: Callable[..., Any]) -> None:
    _, path = made("adapter_model.bin")
    with pytest.raises(AdapterError, match="--allow-pickle"):
        Adapter.open(path)
    assert Adapter.open(path, allow_pickle=True).rank == 3


def test_a_pickle_that_would_run_code_is_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    _, path = made("adapter_model.bin")
    shutil.copytree(path, tmp_path / "a")
    torch.save({"x": Path("/")}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="something other than tensors"):
        Adapter.open(tmp_path / "a", allow_pickle=True)


def test_delta_methods_of_another_base_are_refused(made: Callable[..., Any], base: Callable[..., Path]) -> None:
    _, path = made("LoHa")
    adapter = opened(path)
    with pytest.raises(AdapterError, match="Give the old base"):
        adapter.update(adapter.modules[0])
    other = Checkpoint(base("llama", hidden=40))
    with pytest.raises(AdapterError, match="fits the old base"):
        adapter.update(adapter.modules[0], other)


def test_fingerprints_tell_what_an_adapter_computes(made: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("LoHa", "PiSSA", "AdaLoRA"):
        _, path = made(name)
        shutil.copytree(path, tmp_path / name)
        first = opened(path).fingerprint()
        models.edit_json(tmp_path / name / CONFIG, base_model_name_or_path="elsewhere")
        assert opened(tmp_path / name).fingerprint() == first
        field = {"LoHa": "alpha", "PiSSA": "init_lora_weights", "AdaLoRA": "init_r"}[name]
        models.edit_json(tmp_path / name / CONFIG, **{field: {"PiSSA": "olora"}.get(name, 9)})
        assert opened(tmp_path / name).fingerprint() != first


def test_inspect_says_what_a_kind_takes(made: Callable[..., Any]) -> None:
    model, path = made("LoHa")
    found = inspect(str(model), str(model), str(path))
    assert not found.problems and found.adapter["kind"] == "LOHA"
    assert any("LOHA: ΔW is computed and decomposed for each of 12 modules" in notice for notice in found.notices)
    model, path = made("LoRA on embeddings")
    found = inspect(str(model), str(model), f"{path},{path}:0.5")
    assert not found.problems and found.adapter["rank"] == 6
    assert "lm_head, model.embed_tokens: changes are carried over for 96 of 96 tokens" in found.notices
    model, path = made("adapter_model.bin")
    assert [p.where for p in inspect(str(model), str(model), str(path)).problems] == [str(path)]
    assert not inspect(str(model), str(model), str(path), allow_pickle=True).problems


def test_rank_and_energy_exclude_each_other() -> None:
    values = {"adapter": "a", "old_base": "o", "new_base": "n", "output": "x"}
    build(MigrationConfig, {**values, "energy": 0.9})
    for wrong in ({"rank": 4, "energy": 0.9}, {"energy": 0}, {"energy": 1.1}):
        with pytest.raises(ConfigError):
            build(MigrationConfig, {**values, **wrong})


# ---------------------------------------------------------------------------------------------- configurations in use

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "peft_configs.json").read_text()
)["configs"]
UNREAD = ("kasa_config", "use_bdlora", "peft_type", "save_indices")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_or_refused_by_field(name: str) -> None:
    config = PUBLISHED[name]
    problems = config_problems(config, name)
    for problem in problems:
        field = problem.where.removeprefix(f"{name}: ")
        # PEFT leaves Uni-LoRA's indices out of the file unless it is told not to
        assert field in {*config, "save_indices"} and field in UNREAD and problem.what and problem.remedy, problem
    kind = str(config["peft_type"])
    lost = kind == "UNILORA" and not config.get("save_indices")
    unread = config.get("kasa_config") or config.get("use_bdlora") or lost
    assert bool(problems) == (kind in kinds.REFUSED or bool(unread))


def test_there_are_a_hundred_of_them() -> None:
    assert len(PUBLISHED) >= 100


PATTERNS = json.loads((Path(__file__).parents[2] / "data" / "peft_configs.json").read_text())["target_modules_patterns"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_published_target_patterns(pattern: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """What PEFT matched with them is in the file, and that is what moves."""
    model = base("llama")
    path = kinds.build(kinds.Kind(kinds.lora(target_modules=pattern), ""), tmp_path / "a", model)
    adapter = Adapter.open(path)
    assert adapter.check(Checkpoint(model)) == []
    assert {"q", "v", "o"} <= set(adapter.roles(Checkpoint(model).architecture))
    moved = move(adapter, model, model, "copy")
    assert set(moved.updates) == set(adapter.modules)


def test_the_tables_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text()
    results = cross.stored()
    for mark, expected in (("kinds", kinds.table()), ("architectures", cross.table(results))):
        shown = text.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]
        assert shown == expected, f"rewrite it with: python -m tests.{'kinds' if mark == 'kinds' else 'cross'}"
    assert list(results) == list(KINDS) and {tuple(row) for row in results.values()} == {models.CROSSED}
    assert {family for family, _ in cross.some()} == set(models.CROSSED) and {n for _, n in cross.some()} == set(KINDS)
