"""Adapter files as trainers leave them: other classes' names, copies that were never trained, empty tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasuite.adapters import Adapter, attached, is_ready, open_adapters, write_ready
from lorasuite.bases import Checkpoint
from lorasuite.errors import AdapterError
from lorasuite.planning import inspect
from tests import models

Base = Callable[..., Path]
State = dict[str, torch.Tensor]
IDS = torch.tensor([[5, 9, 33, 71, 12]])
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def changed(adapter: Path, to: Path, change: Callable[[State], State], **config: object) -> Path:
    """A copy of an adapter with other tensors, and other fields of its config."""
    shutil.copytree(adapter, to)
    file = to / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)
    if config:
        models.edit_json(to / "adapter_config.json", **config)
    return to


def ready(text: Path | str, model: Path, folder: Path) -> Path:
    """The directory of an adapter as flows use it."""
    adapter, checkpoint = open_adapters(str(text)), Checkpoint(model)
    if is_ready(adapter, checkpoint):
        return adapter.path
    return write_ready(adapter, checkpoint, folder / adapter.fingerprint(), "base")


def logits(model: Path, adapter: Path) -> torch.Tensor:
    """What the base writes with the adapter attached as every flow attaches it."""
    with torch.no_grad(), attached(models.load(model), adapter) as tuned:
        return tuned(IDS).logits


def same_effect(found: Path, original: Path, model: Path, folder: Path) -> None:
    """One adapter read as another, and attached as it."""
    checkpoint = Checkpoint(model)
    ours, theirs = Adapter.open(found), Adapter.open(original)
    assert ours.check(checkpoint) == []
    own = checkpoint.architecture.own_name
    updates = {own(path): ours.update(path).dense() for path in ours.modules if checkpoint.architecture.locate(path)}
    assert set(updates) == set(theirs.modules)
    for path, update in updates.items():
        assert torch.equal(update, theirs.update(path).dense())
    tidy = ready(found, model, folder)
    assert tidy != found and ready(tidy, model, folder) == tidy and ready(original, model, folder) == original
    assert torch.equal(logits(model, tidy), logits(model, original))


RENAMED: dict[str, Callable[[str], str]] = {
    "in memory": lambda n: n.replace(".weight", ".default.weight"),
    "a named adapter in memory": lambda n: n.replace(".weight", ".sql_v2.weight"),
    "no prefix": lambda n: n.removeprefix("base_model.model."),
    "the inner model": lambda n: n.removeprefix("base_model.model.model."),
    "compiled": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda n: n.replace(".self_attn.", ".self_attn._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("how", RENAMED)
def test_tensors_named_otherwise_are_the_same_adapter(
    how: str, base: Base, lora: Callable[..., Path], tmp_path: Path
) -> None:
    model, rename = base("llama"), RENAMED[how]
    adapter = lora(model, targets=["q_proj", "down_proj"])
    other = changed(adapter, tmp_path / "other", lambda s: {rename(n): t for n, t in s.items()})
    same_effect(other, adapter, model, tmp_path / "work")


@pytest.mark.parametrize("start", ["model.", "language_model.model.", "language_model."])
def test_the_language_model_goes_by_either_class_s_names(
    start: str, base: Base, lora: Callable[..., Path], tmp_path: Path
) -> None:
    model = base("gemma3")
    adapter = lora(model, targets=LANGUAGE)
    other = changed(
        adapter,
        tmp_path / "other",
        lambda s: {n.replace("model.language_model.", start): t for n, t in s.items()},
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    same_effect(other, adapter, model, tmp_path / "work")


def test_vision_modules_that_were_never_trained_are_left_out(
    base: Base, lora: Callable[..., Path], tmp_path: Path
) -> None:
    model, new = base("gemma3"), base("llama")
    adapter = lora(model, targets="all-linear")
    text_only = lora(model, targets=LANGUAGE.replace("q_proj|v_proj|down_proj", r"\w+_proj"))

    def untrained(state: State, but: str = "") -> State:
        trained = {n: ("language_model" in n or (but and but in n)) for n in state}
        return {n: t if trained[n] or "lora_B" not in n else torch.zeros_like(t) for n, t in state.items()}

    zero = changed(adapter, tmp_path / "zero", untrained)
    opened = Adapter.open(zero)
    idle = {path for path, _ in opened.left_out(Checkpoint(model))}
    assert idle and all("vision" in path or "projector" in path for path in idle)
    found = inspect(str(model), str(new), str(zero))
    (notice,) = [notice for notice in found.notices if "never trained" in notice]
    assert not found.problems and f"{len(idle)} of its modules" in notice and notice.count("vision") == 3
    tidy = Adapter.open(ready(zero, model, tmp_path / "work"))
    assert set(tidy.modules) == set(Adapter.open(text_only).modules) == set(opened.modules) - idle
    assert logits(model, tidy.path).shape == (1, 5, 96)

    trained = changed(adapter, tmp_path / "trained", lambda s: untrained(s, "vision"))
    problems = inspect(str(model), str(new), str(trained)).problems
    assert problems and all("vision" in problem.what for problem in problems)


def with_embeddings(model: Path, rows: int, dtype: torch.dtype = torch.float32) -> Callable[[State], State]:
    def change(state: State) -> State:
        weights = load_file(model / "model.safetensors")
        for name in ("model.embed_tokens", "lm_head"):
            whole = torch.cat([weights[f"{name}.weight"], torch.zeros(max(0, rows - 96), 32)])
            state[f"base_model.model.{name}.weight"] = whole[:rows].to(dtype)
        return state

    return change


@pytest.mark.parametrize(("rows", "dtype"), [(96, torch.float32), (90, torch.bfloat16), (112, torch.float16)])
def test_copies_of_the_base_s_embeddings_are_left_out(
    rows: int, dtype: torch.dtype, base: Base, lora: Callable[..., Path], tmp_path: Path
) -> None:
    model, new = base("llama"), base("qwen3")
    adapter = lora(model)
    copied = changed(adapter, tmp_path / "copied", with_embeddings(model, rows, dtype))
    found = inspect(str(model), str(new), str(copied))
    said = [notice for notice in found.notices if notice.startswith("left out")]
    assert not found.problems and f"all of its {min(rows, 96)} rows are the base's" in said[0]
    assert len(said) == 1 + (rows > 96) and (rows <= 96 or "16 rows for tokens that the adapter added" in said[1])
    same_effect(copied, adapter, model, tmp_path / "work")


def test_an_embedding_that_was_trained_is_no_copy(base: Base, lora: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")

    def change(state: State) -> State:
        state = with_embeddings(model, 96)(state)
        state["base_model.model.lm_head.weight"][[3, 40]] += 1e-3
        return state

    (problem,) = Adapter.open(changed(lora(model), tmp_path / "a", change)).check(Checkpoint(model))
    assert "lm_head differs from the old base's in 2 of 96 rows" in problem.what
    assert "modules_to_save" in problem.remedy


def test_what_a_trained_module_was_before_is_left_out(base: Base, lora: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT writes it beside the trained one where the vocabulary was resized."""
    model = base("llama")
    adapter = lora(model, targets=["q_proj"], modules_to_save=["lm_head"])

    def change(state: State) -> State:
        whole = state["base_model.model.lm_head.weight"]
        more = {"modules_to_save": whole.clone(), "original_module": torch.zeros_like(whole)}
        return state | {f"base_model.model.lm_head.{name}.weight": value for name, value in more.items()}

    other = changed(adapter, tmp_path / "other", change)
    opened, checkpoint = Adapter.open(other), Checkpoint(model)
    assert opened.check(checkpoint) == [] and list(opened.contents.saved) == ["lm_head"]
    assert [path for path, _ in opened.left_out(checkpoint)] == ["lm_head"]
    tidy = ready(other, model, tmp_path / "work")
    assert torch.equal(logits(model, tidy), logits(model, adapter))


def test_a_tensor_that_is_no_factor_is_named(base: Base, lora: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")
    name = "base_model.model.model.layers.0.input_layernorm.weight"
    other = changed(lora(model), tmp_path / "other", lambda s: s | {name: torch.ones(32)})
    (problem,) = inspect(str(model), str(model), str(other)).problems
    assert "model.layers.0.input_layernorm.weight" in problem.what


def test_empty_tensors_of_a_sharded_training_are_one_problem(
    base: Base, lora: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = lora(base("llama"))
    empty = changed(adapter, tmp_path / "empty", lambda s: {n: torch.empty(0) for n in s})
    with pytest.raises(AdapterError, match=r"holds 42 empty tensors of 42.*ZeRO-3.*zero_to_fp32") as caught:
        Adapter.open(empty)
    assert len(caught.value.problems) == 1


def test_two_adapters_in_one_file_keep_their_names(base: Base, lora: Callable[..., Path], tmp_path: Path) -> None:
    adapter = lora(base("llama"), targets=["q_proj"])
    both = changed(
        adapter,
        tmp_path / "both",
        lambda s: {n.replace(".weight", f".{name}.weight"): t.clone() for n, t in s.items() for name in ("a", "b")},
    )
    with pytest.raises(AdapterError, match="not LoRA factors"):
        Adapter.open(both)


def test_an_adapter_in_a_folder_of_its_name_is_pointed_to(
    base: Base, lora: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(lora(base("llama")), tmp_path / "run" / "checkpoint-10" / "sql_v2")
    with pytest.raises(AdapterError, match=r"There is one in checkpoint-10/sql_v2/: give that directory, .*sql_v2\."):
        Adapter.open(tmp_path / "run")


def test_sums_of_adapters_leave_out_what_each_holds_beside_its_updates(
    base: Base, lora: Callable[..., Path], tmp_path: Path
) -> None:
    model = base("llama")
    adapter = lora(model, targets=["q_proj"])
    copied = changed(adapter, tmp_path / "copied", with_embeddings(model, 96))
    both = open_adapters(f"{copied}:0.5,{adapter}:0.5")
    assert both.check(Checkpoint(model)) == []
    written = Adapter.open(ready(f"{copied}:0.5,{adapter}:0.5", model, tmp_path / "work"))
    path = written.modules[0]
    torch.testing.assert_close(written.update(path).dense(), Adapter.open(adapter).update(path).dense())
    config = json.loads((written.path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
