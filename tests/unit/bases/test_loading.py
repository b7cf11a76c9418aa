"""How a base is put into memory: precision, quantization while loading, devices; and what of it makes another key."""

from __future__ import annotations

import base64
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError

from flows.context import Context
from lorasuite.bases import (
    Checkpoint,
    LoadSettings,
    ModelCache,
    known_dtype,
    load_model,
    load_tokenizer,
    streamed_base,
)
from lorasuite.bases._loading import cpu_has_bfloat16
from lorasuite.errors import CheckpointError, ConfigError
from lorasuite.planning import MigrationConfig
from lorasuite.planning._estimate import weight_items
from lorasuite.training import FinetuneSettings, base_dtype
from tasks.bases import running
from tasks.stage import Where


@pytest.mark.parametrize(
    ("dtype", "found"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_the_dtype_is_the_one_asked_for(dtype: str, found: torch.dtype, base: Callable[..., Path]) -> None:
    model = load_model(base("llama"), loading=LoadSettings.model_validate({"dtype": dtype, "device_map": "auto"}))
    assert {parameter.dtype for parameter in model.parameters()} == {found}
    assert model(input_ids=torch.arange(4)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("stored", "able", "found"),
    [
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float16", True, torch.float32),
        ("float32", True, torch.float32),
    ],
)
def test_a_cpu_with_instructions_for_it_runs_bfloat16_files_as_they_are(
    stored: str,
    able: bool,
    found: torch.dtype,
    base: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the process, layer by layer, fine-tuned, and as ``inspect`` counts."""
    monkeypatch.setattr("lorasuite.bases._loading.cpu_has_bfloat16", lambda: able)
    path = tmp_path / "stored"
    load_model(base("llama"), dtype=getattr(torch, stored)).save_pretrained(path)
    load_tokenizer(base("llama")).save_pretrained(path)
    assert known_dtype(path, torch.device("cpu")) == load_model(path).dtype == found
    with streamed_base(path) as streamed:
        assert {parameter.dtype for parameter in streamed.fetch(0).parameters()} == {found}
    tuning, config = FinetuneSettings(), MigrationConfig(adapter="a", old_base="o", new_base="n", output="out")
    dtype = base_dtype(tuning, "cpu")
    assert dtype is None
    where = Where(paths={"base": path})
    with running(where, "base", dtype) as tuned:
        assert tuned.model.dtype == found
    with running(where, "base", base_dtype(tuning.model_copy(update={"precision": "fp32"}), "cpu")) as tuned:
        assert tuned.model.dtype == torch.float32
    assert weight_items(config, "cpu", True, [Checkpoint(path)]) == 3 * (found.itemsize,)
    assert weight_items(config, "cpu", True, [Checkpoint(path), Checkpoint(base("llama"))]) == 3 * (4,)


def test_this_cpu_is_asked() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if platform.machine() != "x86_64" or not flags or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("needs Linux on x86-64, and torch 2.10")
    assert cpu_has_bfloat16() == ("avx512_bf16" in flags or "amx_bf16" in flags)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_head_reads_a_prompts_last_states_in_one_piece(adapter: bool, base: Callable[..., Path]) -> None:
    """Else torch copies the head's weight for each row of a batch: minutes and gigabytes in 16 bits on a CPU."""
    model = load_model(base("llama"), dtype=torch.bfloat16)
    seen: list[tuple[torch.Size, bool]] = []
    model.lm_head.register_forward_pre_hook(lambda _, read: seen.append((read[0].shape, read[0].is_contiguous())))
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    model.generate(input_ids=torch.arange(12).view(3, 4), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert len(seen) == 2 and all(shape[:2] == (3, 1) and whole for shape, whole in seen)


@pytest.mark.parametrize("width", ["load_in_4bit", "load_in_8bit"])
def test_quantization_without_a_gpu_is_refused_with_the_remedy(width: str, base: Callable[..., Path]) -> None:
    loading = LoadSettings.model_validate({width: True})
    with pytest.raises(ConfigError, match=f"{width}: needs a CUDA GPU, and the device is cpu.*--dtype bfloat16"):
        load_model(base("llama"), loading=loading)
    with pytest.raises(ValidationError, match="not both"):
        LoadSettings(load_in_4bit=True, load_in_8bit=True)


def test_the_cache_keeps_loads_apart(base: Callable[..., Path]) -> None:
    cache, path = ModelCache(), base("llama")
    half = LoadSettings(dtype="bfloat16")
    with cache.loaded(path) as first, cache.loaded(path, loading=half) as second:
        assert first is not second and second.dtype == torch.bfloat16
    with cache.loaded(path, loading=half) as again, cache.loaded(path, dtype=torch.float32) as plain:
        assert again is second and plain is first


def test_precision_makes_another_key_and_devices_do_not(base: Callable[..., Path], tmp_path: Path) -> None:
    def context(**loading: object) -> Context:
        where = Where(home=tmp_path, paths={"base": base("llama")}, options={"loading": loading})  # type: ignore[dict-item]
        return Context(where, {"new_model": "m", "new_tokenizer": "t"})

    plain = context().base("new")
    assert plain == {"model": "m", "tokenizer": "t"} == context(device_map="auto").base("new")
    others = [context(dtype="bfloat16"), context(load_in_4bit=True), context(load_in_8bit=True)]
    assert len({one.base("new")["model"] for one in others} | {"m"}) == 4
    with running(others[0].where, "base", torch.float32) as found:  # what is asked for goes before what a stage wants
        assert found.model.dtype == torch.bfloat16
    with running(context().where, "base", torch.bfloat16) as found:
        assert found.model.dtype == torch.bfloat16


def test_an_adapter_left_in_a_base_folder_is_not_attached(base: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(base("llama"), tmp_path / "base"))
    bare = load_model(path)
    adapted = get_peft_model(load_model(path), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(path))
    assert (path / "adapter_config.json").is_file()
    names = [name for name, _ in bare.named_parameters()]
    assert [name for name, _ in load_model(path).named_parameters()] == names


def test_a_tokenizer_that_is_a_tekken_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Mistral's own repositories have it: read by transformers, or what reads it is named."""
    special = [{"rank": n, "token_str": token, "is_control": True} for n, token in enumerate(["<unk>", "<s>", "</s>"])]
    words = [*(bytes([n]) for n in range(256)), b"he", b"ll", b"hell", b"hello"]
    vocabulary = [{"rank": n, "token_bytes": base64.b64encode(word).decode()} for n, word in enumerate(words)]
    config = {"pattern": r"\p{L}+|[^\p{L}]+", "num_vocab_tokens": 260, "default_vocab_size": 263, "version": "v3"}
    tekken = {"config": {**config, "default_num_special_tokens": 3}, "vocab": vocabulary, "special_tokens": special}
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 263}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [262]  # special tokens come first
    assert tokenizer.get_vocab()["<s>"] == 1

    def unable(*_args: object, **_named: object) -> None:
        raise ValueError("no such tokenizer")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unable)
    with pytest.raises(CheckpointError, match=r"only tekken\.json.*mistral-common"):
        load_tokenizer(tmp_path)
