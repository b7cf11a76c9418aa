"""Configs, weights and settings that no program writes: told as problems, in bounded time, before anything runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from flows.evaluate_adapters import check
from lorasuite import planning
from lorasuite.bases import Checkpoint, LoadSettings, add_architectures, fingerprint_model
from lorasuite.data import read_rows
from lorasuite.errors import CheckpointError, ConfigError, DataError, LoRASuiteError, PreflightError, Problem
from lorasuite.evaluation import check_tasks
from lorasuite.planning import MigrationConfig, build, inspect, merged, read_config, torch_device
from lorasuite.planning._base_config import unusable_config
from tests import models

#: A document of a few lines that stands for 10^9 values.
ALIASES = [f"{name}: &{name} [{', '.join(['*' + inner] * 9)}]" for inner, name in pairwise("abcdefghi")]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("hostile")
    models.build(root / "base", "llama", layers=1)
    return root / "base", models.build_adapter(root / "adapter", root / "base", targets=["q_proj"])


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regular expressions are given up after one second."""
    monkeypatch.setattr("lorasuite.adapters._config_patterns.TIME_LIMIT", 1)


def found(base: Path, adapter: Path | str) -> list[str]:
    begun = time.monotonic()
    problems = [str(problem) for problem in inspect(str(base), str(base), str(adapter)).problems]
    assert time.monotonic() - begun < 12 and all(len(line) < 3000 for line in problems)
    return problems


def changed(folder: Path, name: str, target: Path, **fields: Any) -> Path:
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text()) | fields
    (target / name).write_text(json.dumps(content))
    return target


ADAPTER: list[tuple[str, Any]] = [
    *(("r", value) for value in (NAN, 0.5, 1e30, 10**30, INF, 8.0, 0, -1, "8")),
    *(("lora_alpha", value) for value in (1e30, NAN, INF, 0, "16", [1])),
    *(("alpha_pattern", value) for value in ([], [1], "x", 5, {"(": 1}, {"q_proj": "x"}, {"q_proj": None}, {"a": NAN})),
    *(("rank_pattern", value) for value in ([1], {"(": 1}, {"q_proj": 0.5}, {"q_proj": [1]}, {"q_proj": 1e30})),
    *(("target_modules", value) for value in ("(", 5, [1], {"a": 1}, "k_proj", ["k_proj"], "(a|a|.)*!")),
    *((name, "(.*.*)*$x") for name in ("exclude_modules", "layers_pattern")),
    *(("alpha_pattern", {text: 2}) for text in (r"([a-z_.0-9]+)+!", r"(x{1,5000}){1,5000}{1,5000}")),
    ("modules_to_save", ["([a-z_.0-9]+)+!"]),
    ("target_modules", r".*q_proj|model\.language_model\.([a-z_.0-9]+)+!"),  # a name in a larger model
    ("target_modules", r".*q_proj|model\.layers\.0\.post_([a-z_.0-9]+)+!"),  # a module the adapter has not
    ("lora_dropout", 5), ("use_rslora", "yes"), ("init_lora_weights", "banana"), ("modules_to_save", "lm_head"),
    ("layers_to_transform", "all"), ("base_model_name_or_path", {"a": 1}), ("trainable_token_indices", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), ADAPTER, ids=str)
def test_fields_of_an_adapter(field: str, value: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    problems = found(pair[0], changed(pair[1], "adapter_config.json", tmp_path / "a", **{field: value}))
    assert problems and field in problems[0]


def test_evaluate_does_not_give_peft_what_does_not_end(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapters = [
        str(changed(pair[1], "adapter_config.json", tmp_path / name, **fields)) for name, fields in WRONG.items()
    ]
    with pytest.raises(PreflightError) as refused:
        check(str(pair[0]), tuple(adapters), None, (), None, None, None, "cpu", LoadSettings())
    where = [problem.where for problem in refused.value.problems]
    assert [name for name in WRONG if any(f"/{name}/adapter_config.json" in place for place in where)] == list(WRONG)


WRONG: dict[str, dict[str, Any]] = {"slow": {"target_modules": "([a-z_.0-9]+)+!"}, "odd": {"modules_to_save": 5}}
BASE: list[tuple[str, Any]] = [
    *(("model_type", value) for value in (5, [], {"a": 1})),
    *(("num_hidden_layers", value) for value in (10**7, 1e30, 10**30, INF, 2.5)),
    *((name, value) for name in ("vocab_size", "hidden_size", "num_attention_heads") for value in (10**30, 3.5, INF)),
    ("head_dim", -1), ("hidden_act", "banana"), ("auto_map", ["x"]), ("rope_parameters", "x"),
    ("vocab_size", 5), ("vocab_size", 10**9),
    *(("rms_norm_eps", value) for value in (NAN, INF, -1e-6)), *(("num_key_value_heads", value) for value in (0, -1)),
    *(("rope_parameters", {"rope_type": "default", "rope_theta": value}) for value in (NAN, 0, -1.0)),
    ("attention_dropout", 2.5), ("initializer_range", -0.02), ("a_new_field", [1.0, NAN]),
    ("text_config", {}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BASE, ids=str)
def test_fields_of_a_base(field: str, value: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert found(changed(pair[0], "config.json", tmp_path / "b", **{field: value}), pair[1]) or field == "auto_map"


#: Numbers that some families alone have, each a kind of its own.
OF_FAMILIES: list[tuple[str, str, Any]] = [
    ("gpt2", "attn_pdrop", 2.5),
    ("gemma3_text", "query_pre_attn_scalar", -1),
    ("gemma3_text", "sliding_window", 0),
    ("qwen3_next", "linear_key_head_dim", 0),
    ("qwen3_next", "shared_expert_intermediate_size", INF),
    ("falcon_h1", "attention_in_multiplier", 1e30),
    ("falcon_h1", "ssm_multipliers", [1.0, 1.0, 1e30, 1.0, 1.0]),
    ("falcon_h1", "time_step_limit", [INF, INF]),
]


@pytest.mark.parametrize(("family", "field", "value"), OF_FAMILIES, ids=str)
def test_numbers_that_no_model_computes_with(
    family: str, field: str, value: Any, base: Callable[..., Path], tmp_path: Path
) -> None:
    def problems(folder: Path) -> list[Problem]:
        checkpoint = Checkpoint(folder)
        return checkpoint.check() or unusable_config(checkpoint)

    assert not problems(base(family))
    assert problems(changed(base(family), "config.json", tmp_path / "b", **{field: value}))


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize(
    "fields",
    [{f"field_{n}": n for n in range(10**5)}, {"field": [[n] for n in range(10**6)]}],
    ids=["fields", "values"],
)
def test_more_settings_than_any_model_has(
    name: str, fields: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    if name == "config.json":
        base = changed(base, name, tmp_path / "b", **fields)
    else:
        adapter = changed(adapter, name, tmp_path / "a", **fields)
    begun = time.monotonic()
    assert "as no model has" in found(base, adapter)[0] and time.monotonic() - begun < 6


@pytest.mark.parametrize(
    "fields",
    [{f"f{n}": n for n in range(10**5)}, {"extra_special_tokens": {f"t{n}": f"<{n}>" for n in range(10**5)}}],
    ids=["settings", "tokens"],
)  # fmt: skip
def test_more_of_a_tokenizer_than_any_has(fields: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = changed(pair[0], "tokenizer_config.json", tmp_path / "b", **fields)
    assert any("as no model has" in line for line in found(base, pair[1]))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.int8, "int8"), (torch.complex64, "complex64"), (torch.float8_e4m3fn, ""), (torch.bfloat16, "")],
)
def test_kinds_of_factors(dtype: torch.dtype, words: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    save_file({name: (10 * tensor).to(dtype) for name, tensor in load_file(file).items()}, file)
    problems = found(pair[0], adapter)
    assert bool(problems) == bool(words) and all(words in line for line in problems)


def test_factors_of_rank_zero_and_of_one_dimension(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for number, shape in enumerate(((0, 32), (32,))):
        adapter = shutil.copytree(pair[1], tmp_path / str(number))
        file = adapter / "adapter_model.safetensors"
        tensors = {n: torch.zeros(shape if "lora_A" in n else shape[::-1]) for n in load_file(file)}
        save_file(tensors, file)
        assert "factors of sizes" in found(pair[0], adapter)[0]


def files(name: str) -> dict[str, Callable[[Path], object]]:
    return {
        "deep": lambda path: path.write_text("[" * 100_000),
        "long integer": lambda path: path.write_text('{"a": ' + "1" * 5_000 + "}"),
        "a directory": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a loop": lambda path: path.symlink_to(path),
        "not text": lambda path: path.write_bytes(b"\xff\xfe"),
    }


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", files(""))
def test_files_that_are_no_json(name: str, kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = (shutil.copytree(folder, tmp_path / folder.name) for folder in pair)
    target = (adapter if name.startswith("adapter") else base) / name
    target.unlink(missing_ok=True)
    files(name)[kind](target)
    if "index" in name:
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    ignored = "index" in name and kind in ("a directory", "a pipe", "a device", "a loop")  # then it is no index
    assert ignored or found(base, adapter)


@pytest.mark.parametrize(
    "weight_map",
    [5, [], ["x"], {}, {"a": 1}, {"a": "x" * 300}, {"a": "../../x\0"}, "x", {"a": "../base/model.safetensors"}],
)
def test_an_index_of_another_form(weight_map: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(pair[0], tmp_path / "b")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert found(base, pair[1])


@pytest.mark.parametrize(
    "source", ["x" * 300, "/" + "x" * 5000, "~nobody-here/x", "a\0b", "/dev/zero", ":0.5", ",", "a:1e999"]
)
def test_names_that_are_no_directories(source: str, pair: tuple[Path, Path]) -> None:
    assert found(pair[0], source)


@pytest.mark.parametrize(
    "text",
    [
        "rank: 4\nrank: 8\n",
        "finetune: {epochs: 1, epochs: 2}\n",
        "\n".join(["a: &a [x, x, x, x, x, x, x, x, x, x]", *ALIASES]),
        "a: &a [*a]\n",
        "[" * 2_000,
        "\0",
    ],
)
def test_settings_files_that_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read_config(tmp_path / "c.yaml")


def test_messages_on_yaml_quote_nothing_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "private.yaml"
    for text in (
        *("password: [hunter2\n", "hunter2: 1\nhunter2: 2\n", "*hunter2\n", "!hunter2 x\n", "a: hunter2: x\n"),
        *("@hunter2", "'hunter2", "%hunter2\n---\n", '"\\hunter2"', "&hunter2 &hunter2 x", "- hunter2\nx", "hunter2"),
        *("!!int hunter2", "!!timestamp hunter2", "a: 2020-13-45"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as refused:
            read_config(file)
        assert "hunter2" not in str(refused.value), text
        assert any(words in str(refused.value) for words in ("line ", "is not a mapping", "it has a value")), text


def irregular(kind: str, path: Path) -> Path:
    files("")[kind](path)
    return path


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_files_that_never_end(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(pair[0], tmp_path / "b")
    (base / "model.safetensors").unlink()
    irregular(kind, base / "x.safetensors")
    assert "no regular file" in found(base, pair[1])[0]
    with pytest.raises(CheckpointError, match="no regular file"):
        fingerprint_model(base)
    for name in ("x.jsonl", "x.csv", "x.txt", "x.parquet", "x.json.gz"):
        with pytest.raises(DataError, match="is no regular file"):
            read_rows(irregular(kind, tmp_path / name))
    saved = tmp_path / "saved"
    Dataset.from_dict({"text": ["a"]}).save_to_disk(saved)
    irregular(kind, saved / "data")
    with pytest.raises(DataError, match="is no regular file"):
        read_rows(saved)
    for folder, read in {
        "architectures": add_architectures,
        "tasks": lambda path: check_tasks(["x"], None, path),
    }.items():
        (tmp_path / folder).mkdir()
        file = irregular(kind, tmp_path / folder / "x.yaml")
        with pytest.raises(LoRASuiteError, match="is no regular file"):
            read(tmp_path / folder)
    with pytest.raises(LoRASuiteError, match="is no regular file"):
        check_tasks([str(file)])


def test_architecture_and_task_files_of_others(tmp_path: Path) -> None:
    many = "\n".join(["a: &a [x, x, x, x, x, x, x, x, x, x]", *ALIASES])
    for folder, text, words in (
        ("a", many, "aliases stand for more"),
        ("b", "like: ../../../../../../tmp/x\n", "like: is no file here"),
        ("c", "like: {a: 1}\n", "like: is no file here"),
        ("d", "hunter2: [", "line 1, column"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text(text)
        with pytest.raises(LoRASuiteError, match=words) as refused:
            add_architectures(tmp_path / folder)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match="aliases stand for more"):
        check_tasks(["x"], None, tmp_path / "a", trust_remote_code=True)


def test_settings_files_that_never_end_or_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError):
            read_config(path)
    (tmp_path / "c.yaml").write_text("defaults: &d {rank: 4}\npairs:\n" + "  - {<<: *d, method: auto}\n" * 50)
    assert read_config(tmp_path / "c.yaml")["pairs"][0] == {"rank": 4, "method": "auto"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"finetune": {"epochs": INF}}, {"finetune": {"learning_rate": NAN}}, {"learning_rates": [INF]}, {"energy": NAN},
        {"gate": {"ship": NAN}}, {"gate": {"ship": 0.1, "finetune": 0.5}}, {"teacher": {"temperature": INF}},
        {"finetune": "fast"}, {"evaluation": {"batch_size": 0.5}},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_run(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(MigrationConfig, {"adapter": "a", "old_base": "b", "new_base": "c", "output": "d", **wrong})


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop/x"])
def test_outputs_that_no_directory_can_have(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    given = {"adapter": str(pair[1]), "old_base": str(pair[0]), "new_base": str(pair[0]), "method": "lorasuite"}
    with pytest.raises(LoRASuiteError) as told:
        planning.check(build(MigrationConfig, {**given, "output": str(tmp_path / name)}), tmp_path / "home")
    assert any("output" in problem.remedy for problem in told.value.problems)


def test_flags_over_text_and_devices() -> None:
    with pytest.raises(ConfigError, match="finetune: is 'fast'"):
        merged({"finetune": "fast"}, {"finetune": {"epochs": 1}})
    for device in ("cuda:²", "cuda:-1", "cuda:", "tpu", "cuda:99999999999999999999"):
        with pytest.raises(LoRASuiteError):
            torch_device(device)


def test_an_evaluation_tells_of_an_endless_template_with_all_else(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    shutil.copytree(base, tmp_path / "chat")
    large = (
        "{% for m in messages %}{{ m.content }}{% if m.content == 'w3' %}{{ 'a' * 10 ** 10 }}{% endif %}{% endfor %}"
    )
    models.edit_json(tmp_path / "chat" / "tokenizer_config.json", chat_template=large)
    turns = [[{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w1"}] for n in (2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    given = (str(tmp_path / "chat"), (str(adapter), str(tmp_path / "none")), str(tmp_path / "rows.jsonl"))
    with pytest.raises(PreflightError) as caught:
        check(*given, (), None, None, tmp_path, "cpu", LoadSettings())
    said = {problem.where: problem.what for problem in caught.value.problems}
    assert set(said) == {str(tmp_path / "none"), f"{tmp_path / 'rows.jsonl'}, line 2", str(tmp_path)}
    assert "takes more than 1 GiB of memory for it" in said[f"{tmp_path / 'rows.jsonl'}, line 2"]
