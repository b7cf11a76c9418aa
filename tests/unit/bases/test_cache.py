"""Loaded models kept between callers: once a process, within a budget, given back as they came."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from lorasuite.adapters import attached, restored
from lorasuite.bases import (
    Checkpoint,
    ModelCache,
    _cache,
    _memory,
    free_ram,
    load_model,
    loaded_model,
    model_cache,
    release_models,
)
from lorasuite.errors import CheckpointError, ConfigError, NumericalError
from lorasuite.evaluation import EvaluationSettings, compare_merged, evaluate
from lorasuite.planning import Machine
from lorasuite.training import FinetuneSettings, finetune
from lorasuite.training._passes import free_memory
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

Base = Callable[..., Path]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the directories that were loaded from, by a process's cache that begins and ends empty."""
    found: list[str] = []

    def counted(path: Path, *rest: Any) -> Any:
        found.append(path.name)
        return load_model(path, *rest)

    release_models()
    monkeypatch.setattr(_cache, "load_model", counted)
    yield found
    release_models()


@pytest.fixture
def copies(base: Base, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three directories of models of the same size."""
    names = ("a", "b", "c")
    return tuple(Path(shutil.copytree(base("llama"), tmp_path / name)) for name in names)  # type: ignore[return-value]


def size_of(path: Path) -> int:
    model = load_model(path)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def test_a_model_is_loaded_once(base: Base, loads: list[str]) -> None:
    with loaded_model(base("llama")) as first:
        assert not first.training and not any(p.requires_grad for p in first.parameters())
    with loaded_model(str(base("llama")), torch.device("cpu"), dtype=torch.float32) as second:
        assert second is first
    with loaded_model(base("llama"), dtype=torch.bfloat16) as other:
        assert other is not first and other.dtype == torch.bfloat16
    assert len(loads) == 2
    release_models()
    with loaded_model(base("llama")) as third:
        assert third is not first and len(loads) == 3


def test_a_lent_model_is_nobody_elses(base: Base, loads: list[str]) -> None:
    with loaded_model(base("llama")) as first, loaded_model(base("llama")) as second:
        assert first is not second
        release_models()  # what is lent stays
        assert model_cache._models and all(kept.model is not None for kept in model_cache._models)
    assert len(loads) == 2
    with loaded_model(base("llama")), loaded_model(base("llama")):
        assert len(loads) == 2


def test_threads_get_models_of_their_own(base: Base, loads: list[str]) -> None:
    seen: list[int] = []
    both_inside = threading.Barrier(2, timeout=60)

    def use() -> None:
        with loaded_model(base("llama")) as model:
            both_inside.wait()
            seen.append(id(model))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 2 == len(loads)


def test_the_least_recently_used_goes_first(copies: tuple[Path, Path, Path], loads: list[str]) -> None:
    a, b, c = copies
    cache = ModelCache(budget=size_of(a) * 2)
    for path in (a, b, a, c, a, b):  # c takes the place of b, b that of c
        with cache.loaded(path):
            pass
    assert loads == ["a", "b", "c", "b"]


def test_a_lent_model_is_never_dropped(copies: tuple[Path, Path, Path], loads: list[str]) -> None:
    a, b, _ = copies
    cache = ModelCache(budget=size_of(a))
    with cache.loaded(a) as model:
        with cache.loaded(b):
            pass  # more than the budget together: not kept
        with cache.loaded(b):
            assert model.lm_head.weight.numel()
    with cache.loaded(a) as again:
        assert again is model
    assert loads == ["a", "b", "b"]


def test_the_budget(base: Base, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(cache: ModelCache) -> int:
        loads.clear()
        for _ in range(2):
            with cache.loaded(base("llama")):
                pass
        return len(loads)

    assert twice(ModelCache(budget=0)) == 2
    monkeypatch.setattr(_cache, "_memory", lambda device: 0)
    assert twice(ModelCache()) == 1  # one alone is kept, unless a budget was set
    monkeypatch.setenv("LORASUITE_MODEL_CACHE_BYTES", "0")
    assert twice(ModelCache()) == 2
    monkeypatch.setenv("LORASUITE_MODEL_CACHE_BYTES", str(2**30))
    assert twice(ModelCache()) == 1
    monkeypatch.setenv("LORASUITE_MODEL_CACHE_BYTES", "1GB")
    with pytest.raises(ConfigError, match="no number of bytes"):
        twice(ModelCache())


def test_the_default_budget_is_within_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, no_limit = tmp_path / "limit", tmp_path / "max"
    limit.write_text("4096\n")
    no_limit.write_text("max\n")
    absent = str(tmp_path / "absent")
    unlimited, unknown, limited = ((str(file), absent, absent) for file in (no_limit, absent, limit))
    monkeypatch.setattr(_memory, "CGROUPS", (unlimited, unknown))
    assert _cache._memory(torch.device("cpu")) > 2**28
    monkeypatch.setattr(_memory, "CGROUPS", (unlimited, limited))
    assert _cache._memory(torch.device("cpu")) == 4096


def test_what_the_control_group_holds_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of files are given back, and count as free; the fine-tune and ``inspect`` go by the same numbers."""
    files = [tmp_path / name for name in ("limit", "current", "stat")]
    for file, text in zip(files, (2**24, 2**23, "anon 5\ninactive_file 4096"), strict=True):
        file.write_text(f"{text}\n")
    monkeypatch.setattr(_memory, "CGROUPS", (tuple(map(str, files)),))
    free = 2**24 - 2**23 + 4096
    machine = Machine.here("cpu", None)
    assert (machine.ram, machine.ram_free) == (2**24, free) and free_memory(torch.device("cpu")) == free
    files[1].write_text(str(2**25))  # a limit that was lowered
    assert free_ram() == 0
    files[2].unlink()  # what it holds is not known
    assert free_ram() == 2**24


def test_changed_files_are_loaded_anew(copies: tuple[Path, Path, Path], base: Base, loads: list[str]) -> None:
    path = copies[0]
    with loaded_model(path) as before:
        old = before.lm_head.weight.clone()
    changed = load_model(path)
    with torch.no_grad():
        changed.lm_head.weight.add_(1.0)
    changed.save_pretrained(path)
    with loaded_model(path) as after:
        assert after is not before and torch.equal(after.lm_head.weight, old + 1.0)
    assert loads == ["a", "a"]


def test_a_model_that_cannot_be_loaded_leaves_nothing(tmp_path: Path, loads: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"), loaded_model(tmp_path):
        pass
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="cannot be loaded"), loaded_model(tmp_path):
        pass
    assert not model_cache._models


def _train(model: Any) -> None:
    model.train()


def _thaw(model: Any) -> None:
    model.lm_head.weight.requires_grad_(True)


def _hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def _wrap(model: Any) -> None:
    get_peft_model(model, tiny_lora())


def _change(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)


def _configure(model: Any) -> None:
    model.generation_config.max_new_tokens = 3


@pytest.mark.parametrize("leave", [_train, _thaw, _hook, _wrap, _change, _configure])
def test_what_is_not_given_back_as_it_came_is_not_kept(
    base: Base, loads: list[str], leave: Callable[[Any], None]
) -> None:
    with loaded_model(base("llama")) as model:
        leave(model)
    with loaded_model(base("llama")) as again:
        assert again is not model
    assert len(loads) == 2


def test_adapters_come_and_go(base: Base, lora: Base, loads: list[str]) -> None:
    path = base("llama")
    ids = torch.tensor([[4, 5, 6]])
    with loaded_model(path) as model:
        bare = model(ids).logits
        with attached(model, lora(path)) as wrapped:
            assert not torch.equal(wrapped(ids).logits, bare)
    with loaded_model(path) as again:
        assert again is model and torch.equal(again(ids).logits, bare)
        with restored(again):
            get_peft_model(again, tiny_lora()).train()
    with pytest.raises(RuntimeError), loaded_model(path), attached(model, lora(path)):
        raise RuntimeError
    with loaded_model(path) as last:
        assert last is model and torch.equal(last(ids).logits, bare)


def test_fine_tunes_and_evaluations_share_a_base_and_leave_it_unchanged(tmp_path: Path, loads: list[str]) -> None:
    path = tmp_path / "base"
    tiny_model().save_pretrained(path)
    tokenizer, rows = tiny_tokenizer(), digit_rows(6)
    settings = FinetuneSettings(epochs=1, batch_size=4, micro_batch_size=2, gradient_checkpointing=True)

    def tune(name: str, **changes: Any) -> Path:
        arguments: Any = {"adapter": None, "lora": tiny_lora(), "work_dir": tmp_path / "work"}
        finetune(str(path), tokenizer, rows, settings.model_copy(update=changes), output=tmp_path / name, **arguments)
        return tmp_path / name

    with loaded_model(path) as model:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, two = tune("one"), tune("two")
    assert (one / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()
    with pytest.raises(NumericalError):
        tune("diverged", learning_rate=1e30)
    evaluate(str(path), tokenizer, rows, EvaluationSettings(generate=False), adapters={"base": None, "tuned": one})
    evaluate(str(path), tokenizer, rows, EvaluationSettings(generate=True), adapters={"tuned": one})
    with loaded_model(path) as after:
        assert after is model and not after.training and not any(p.requires_grad for p in after.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())
        assert set(after.state_dict()) == set(before)
    assert len(loads) == 1


def test_merging_takes_the_kept_model_and_does_not_give_it_back(base: Base, lora: Base, loads: list[str]) -> None:
    path = base("llama")
    with loaded_model(path):
        pass
    assert compare_merged(path, lora(path))["transformers"].ok and len(loads) == 1
    with loaded_model(path) as model:
        weight = Checkpoint(path).layer(0, ("q",))["q"]
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight) and len(loads) == 2
