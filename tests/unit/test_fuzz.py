"""Rows, configs, headers of weights and YAML of any shape: read, or refused with an error of lorasuite's own.

Never a traceback, and within twelve seconds. ``make soak`` tries each many more times (``LORASUITE_FUZZ``), with the
same values at every run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasuite.adapters import Adapter
from lorasuite.bases import Checkpoint, load, read_json
from lorasuite.data import (
    calibration_texts,
    fingerprint_rows,
    read_prompts,
    read_rows,
    rows_to_jsonl,
    unanswered,
    unread_keys,
)
from lorasuite.errors import LoRASuiteError
from lorasuite.planning import MigrationConfig, build, read_config
from lorasuite.planning._base_config import unusable_config
from tests.integration.tiny import tiny_tokenizer

FUZZ = settings(
    derandomize=True,
    deadline=timedelta(seconds=12),
    max_examples=int(os.environ.get("LORASUITE_FUZZ", "60")),
    database=None,
    suppress_health_check=list(HealthCheck),
)

text = st.text(max_size=8)
scalar = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | text
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
role = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", ""])
part = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image"]) | value, "text": text | value})
content = text | st.lists(part, max_size=2) | value
turn = (
    st.fixed_dictionaries(
        {}, optional={"role": role | value, "content": content, "tool_calls": value, "reasoning_content": value}
    )
    | st.fixed_dictionaries({}, optional={"from": role | value, "value": content, "weight": value})
    | value
)
turns = st.lists(turn, max_size=4) | value
KEYS = {
    **dict.fromkeys(("instruction", "input", "output", "prompt", "completion", "text", "label"), text | value),
    **dict.fromkeys(("messages", "conversations"), turns),
    **dict.fromkeys(("system", "history", "tools", "documents", "chat_template_kwargs", "unfinished"), value),
    "prompt_list": turns,
}
record = st.fixed_dictionaries({}, optional=KEYS) | value
columns = st.sampled_from(
    [{}, {"prompt": "text", "completion": "label"}, {"messages": "conversations"}, {"text": "output"}]
)


def written(record: Any) -> str:
    return json.dumps(record, ensure_ascii=True)


@FUZZ
@given(records=st.lists(record, max_size=3), columns=columns, array=st.booleans())
def test_rows_of_any_shape(
    records: list[Any], columns: dict[str, str], array: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    file.write_text(written(records) if array else "\n".join(map(written, records)))
    for read in (read_rows, read_prompts):
        try:
            rows = read(file, columns)
        except LoRASuiteError as error:
            assert error.problems and all(p.where and p.what and p.remedy for p in error.problems)
            continue
        unread_keys(rows), fingerprint_rows([unanswered(row) for row in rows])
        kept = file.with_name("kept.jsonl")
        kept.write_bytes(rows_to_jsonl(rows))
        again = read_prompts(kept) if read is read_prompts else read_rows(kept)
        assert fingerprint_rows(again) == fingerprint_rows(rows), "what a stage stores is what was read"
        for tokenizer in (None, TOKENIZER):
            for row in rows:
                try:
                    row.target(tokenizer)
                except LoRASuiteError as error:
                    assert error.problems
    try:
        assert all(isinstance(text, str) for text in calibration_texts(file, TOKENIZER, columns))
    except LoRASuiteError as error:
        assert error.problems


TOKENIZER = tiny_tokenizer(chat=True)
MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\x00", ".parquet": b"PAR1"}
SUFFIXES = [".json", ".jsonl", ".csv", ".tsv", ".txt", *MAGIC]
broken = st.text(alphabet='"{}[],:\\\n\t a1PAR\x00é', max_size=40).map(str.encode)


@FUZZ
@given(content=st.binary(max_size=40) | broken, suffix=st.sampled_from(SUFFIXES))
def test_files_of_any_content(content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    magic = MAGIC.get(suffix, b"")
    file.write_bytes(magic + content)
    try:
        read_rows(file)
    except LoRASuiteError as error:
        assert error.problems


FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights",
    "target_modules", "modules_to_save", "layers_to_transform", "trainable_token_indices", "fan_in_fan_out",
    "peft_type", "init_r", "task_type", "base_model_name_or_path", "revision", "target_parameters", "lora_bias",
    "a_new_field", "exclude_modules", "lora_dropout", "loftq_config", "megatron_config", "eva_config", "inference_mode",
)  # fmt: skip
LIKELY = st.sampled_from(
    [
        *("LORA", "ADALORA", "LOHA", "IA3", "OFT", "pissa", "olora", "loftq", "lora_only", "all", "q_proj"),
        *({"q_proj": 2}, 0, -1, 4, 1e400),
    ]
)  # fmt: skip
changes = st.dictionaries(st.sampled_from(FIELDS), LIKELY | value, min_size=1, max_size=3)


@FUZZ
@given(changes=changes | value)
def test_adapter_configs_of_any_shape(
    changes: Any, base: Callable[..., Path], lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = base("llama")
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(lora(model), folder)
    config = read_json(lora(model) / "adapter_config.json")
    fuzzed = {**config, **changes} if isinstance(changes, dict) else changes
    (folder / "adapter_config.json").write_text(json.dumps(fuzzed))
    try:
        adapter = Adapter.open(folder)
        checkpoint = Checkpoint(model)
        problems = adapter.check(checkpoint)
        assert all(p.where and p.what and p.remedy for p in problems)
        if not problems:
            adapter.roles(checkpoint.architecture)
            adapter.lora_settings(adapter.rank)
    except LoRASuiteError as error:
        assert error.problems


NUMBERS = st.sampled_from([0, 1, -1, 3, 2.5, 2**31, 10**30, 1e30, float("nan"), float("inf"), "8", [], [4, 4], None])
CONFIG_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "intermediate_size", "rms_norm_eps", "rope_parameters", "rope_theta", "hidden_act", "attention_dropout",
    "model_type", "architectures", "quantization_config", "text_config", "tie_word_embeddings", "torch_dtype",
    "pad_token_id", "eos_token_id", "layer_types", "sliding_window", "auto_map", "a_new_field",
)  # fmt: skip
config_changes = st.dictionaries(st.sampled_from(CONFIG_FIELDS), NUMBERS | value, min_size=1, max_size=2)


@FUZZ
@given(changes=config_changes)
def test_base_configs_of_any_shape(
    changes: dict[str, Any], base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-base"
    if not folder.exists():
        shutil.copytree(base("llama"), folder)
    (folder / "config.json").write_text(json.dumps(read_json(base("llama") / "config.json") | changes))
    try:
        checkpoint = Checkpoint(folder)
        problems = checkpoint.check()
        problems += unusable_config(checkpoint, not problems)
        assert all(p.where and p.what and p.remedy for p in problems)
    except LoRASuiteError as error:
        assert error.problems


entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "C64", "F4", "F8_E4M3", ""]) | value,
        "shape": st.lists(st.sampled_from([0, 1, 4, 32, -1, 2**40, 2**63]), max_size=3) | value,
        "data_offsets": st.lists(st.sampled_from([0, 16, 4096, -8, 2**63, 2**64]), max_size=3) | value,
    },
)
TENSORS = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "__metadata__", "", "x" * 300)
headers = st.dictionaries(st.sampled_from(TENSORS) | text, entry | value, max_size=3)


@FUZZ
@given(
    header=headers | value,
    keep=st.booleans(),
    claimed=st.sampled_from([0, 1, -1, 2**40, 2**63]),
    tail=st.sampled_from([b"", b"\0" * 64, None]),
)
def test_headers_of_weights_of_any_shape(
    header: Any,
    keep: bool,
    claimed: int,
    tail: bytes | None,
    base: Callable[..., Path],
    lora: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = base("llama")
    for source, name in ((model, "model.safetensors"), (lora(model), "adapter_model.safetensors")):
        folder = tmp_path_factory.getbasetemp() / f"fuzzed-{name}"
        if not folder.exists():
            shutil.copytree(source, folder)
        whole = (source / name).read_bytes()
        size = int.from_bytes(whole[:8], "little")
        told = json.loads(whole[8 : 8 + size])
        fuzzed = json.dumps({**told, **header} if keep and isinstance(header, dict) else header).encode()
        length = max(0, len(fuzzed) + claimed) if abs(claimed) < 2 else claimed
        content = length.to_bytes(8, "little") + fuzzed + (whole[8 + size :] if tail is None else tail)
        (folder / name).write_bytes(content)
        try:
            if name.startswith("model"):
                checkpoint = Checkpoint(folder)
                problems = checkpoint.check()
                if not problems:
                    checkpoint.embedding()
            else:
                problems = Adapter.open(folder).check(Checkpoint(model))
            assert all(p.where and p.what and p.remedy for p in problems)
        except LoRASuiteError as error:
            assert error.problems


yaml_text = st.text(alphabet="ab1: -[]{}&*!|>\n\t'\"#%@?,~<=.\x00\u2028é", max_size=60)
YAML_KEYS = ("method", "rank", "finetune", "gate", "candidates", "template", "columns", "family", "config", "layers")
YAML_VALUES = ("1", "[]", "{a: 1}", "&x [*x]", "*x", "!!python/object:os.system {}", "!!timestamp 2", "2001-99-99")
yaml_line = st.tuples(st.sampled_from(YAML_KEYS), st.sampled_from(YAML_VALUES) | yaml_text).map(": ".join)


@FUZZ
@given(content=yaml_text | st.lists(yaml_line, max_size=5).map("\n".join) | value.map(json.dumps))
def test_yaml_of_any_shape(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    for read in (lambda: build(MigrationConfig, read_config(file)), lambda: load(file)):
        try:
            read()
        except LoRASuiteError as error:
            assert error.problems and all(p.where and p.what and p.remedy for p in error.problems)
