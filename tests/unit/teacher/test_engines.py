"""How the teacher's tokens come about: batches that rows leave, losses that come with them, and vLLM's wiring."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lorasuite.adapters import attached
from lorasuite.errors import ConfigError, EngineError
from lorasuite.teacher import TeacherSettings, VLLMTeacher, _vllm, chosen, text_losses, write_rows
from lorasuite.teacher._sampling import SeededSampler
from tests.integration.tiny import digit_rows, tiny_model, tiny_tokenizer
from tests.unit.teacher.test_teacher import SECRET, adapter_of, every_shape, settings


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_losses_of_unchanged_rows_come_with_the_generation(temperature: float) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(chat=True)
    rows = [*digit_rows(12), *every_shape(SECRET)]
    found = write_rows(model, tokenizer, rows, 16, settings(temperature=temperature, filter=False, text_prefix=2))
    read = text_losses(model, tokenizer, found.rows)
    known = [(own, other) for own, other in zip(found.losses, read, strict=True) if own is not None]
    assert len(known) >= len(found.rows) // 2
    for own, other in known:
        assert other is not None and own.bytes == other.bytes
        assert own.nats == pytest.approx(other.nats, rel=1e-4, abs=1e-4)
    texts = [loss for loss, row in zip(found.losses, found.rows, strict=True) if row.kind == "text"]
    assert texts == [None]  # its beginning is scored too, and was given
    assert found.info()["engine"] == "transformers" and found.info()["seconds"] > 0


def test_rows_that_are_done_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs fewer rows after half of them came to their end, and every row is what it is alone."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3  # ends come early and late
    told = settings(temperature=1.0, filter=False, max_new_tokens=24, batch_size=16)
    alone = write_rows(model, tokenizer, digit_rows(16), 16, told.model_copy(update={"batch_size": 1}))
    sizes: list[int] = []
    model.register_forward_hook(lambda *given: sizes.append(given[2].logits.shape[0]))
    together = write_rows(model, tokenizer, digit_rows(16), 16, told)
    assert together.rows == alone.rows
    assert sizes[0] == 16 and min(sizes) < 8 and sizes == sorted(sizes, reverse=True)
    lengths = [len(row.output.split()) for row in together.rows]
    assert sum(sizes) < 16 * (max(lengths) + 1)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_follow_the_probabilities_of_a_large_vocabulary(top_p: float) -> None:
    """Counts over many rows against the softmax, cut to the likeliest tokens, of one vector of scores."""
    count, size, never = 4000, 5000, [7]
    scores = torch.randn(size + 3, generator=torch.Generator().manual_seed(0)) * 3
    scores[:3], scores[7] = 9.0, 12.0
    sampler = SeededSampler([str(n) for n in range(count)], 1, temperature=0.8, top_p=top_p, size=size, never=never)
    given = scores.expand(count, -1).clone()
    picked = sampler(torch.empty(0), given).argmax(-1)
    log_probs = torch.tensor(sampler.take())[:, 0]
    torch.testing.assert_close(log_probs, scores.log_softmax(-1)[picked])
    allowed = scores.double().clone()
    allowed[never], allowed[size:] = -torch.inf, -torch.inf
    expected = (allowed / 0.8).softmax(-1)
    values, order = expected.sort(descending=True)
    expected[order[values.cumsum(0) - values >= top_p]] = 0
    expected /= expected.sum()
    shares = torch.bincount(picked, minlength=size + 3).double() / count
    assert not shares[expected == 0].any()
    likely = expected > 0.01
    error = (expected * (1 - expected) / count).sqrt()
    assert likely.sum() >= 3 and ((shares - expected)[likely].abs() < 4 * error[likely]).all()


class FakeLLM:
    """vLLM's ``LLM`` as far as it is used, on a model of transformers; greedy."""

    made: dict[str, Any]
    requests: list[Any]
    ended: list[float]
    model: Any
    adapter: Path

    def __init__(self, **given: Any) -> None:
        FakeLLM.made = given
        FakeLLM.requests = []
        FakeLLM.ended = []
        core = SimpleNamespace(shutdown=lambda timeout: FakeLLM.ended.append(timeout))
        self.llm_engine = SimpleNamespace(engine_core=core)

    def generate(self, prompts: Any, params: Any, lora_request: Any = None, use_tqdm: bool = True) -> list[Any]:
        FakeLLM.requests.append((params, lora_request))
        if lora_request is None:
            return [self._one(self.model, *both) for both in zip(prompts, params, strict=True)]
        with attached(self.model, Path(lora_request.path)) as wrapped:
            return [self._one(wrapped, *both) for both in zip(prompts, params, strict=True)]

    def _one(self, model: Any, prompt: Any, params: Any) -> Any:
        ids = list(prompt["prompt_token_ids"])
        tokens, steps = [], []
        while len(tokens) < params.max_tokens and (not tokens or tokens[-1] not in params.stop_token_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + tokens])).logits[0, -1]
            biased = logits.clone()
            for token, bias in (params.logit_bias or {}).items():
                biased[token] += bias
            token = int(biased.argmax())
            steps.append({token: SimpleNamespace(logprob=float(logits.log_softmax(-1)[token]))})
            tokens.append(token)
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=steps)])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = FakeLLM, SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: SimpleNamespace(path=path, number=number)  # type: ignore[attr-defined]
    for name, made in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(_vllm, "installed", lambda cpu: True)
    FakeLLM.model = tiny_model()
    yield


def test_vllm_is_asked_for_the_same_rows(fake: None, tmp_path: Path) -> None:
    adapter, base, tokenizer = adapter_of(tmp_path / "adapter"), tmp_path / "base", tiny_tokenizer(chat=True)
    FakeLLM.model.save_pretrained(base)
    rows = [*digit_rows(6), *every_shape(SECRET)]
    told = settings(temperature=0.0, filter=False, text_prefix=2)
    with attached(tiny_model(), adapter) as teacher:
        here = write_rows(teacher, tokenizer, rows, 10, told)
    with VLLMTeacher.started(base, adapter) as engine:
        there = write_rows(engine, tokenizer, rows, 10, told)
        with engine.disable_adapter():
            bare = write_rows(engine, tokenizer, rows, 10, told)
        assert not FakeLLM.ended
    assert FakeLLM.ended == [_vllm.GRACE]  # though `engine` is still held here
    assert there.rows == here.rows != bare.rows
    assert there.log_probs == pytest.approx(here.log_probs, abs=1e-4)
    assert there.info()["engine"] == "vllm"
    assert FakeLLM.made["enable_lora"] and FakeLLM.made["max_lora_rank"] == 8
    assert [lora is None for _, lora in FakeLLM.requests] == [False, True]


def test_vllm_draws_from_a_seed_for_each_row(fake: None, tmp_path: Path) -> None:
    adapter, base = adapter_of(tmp_path / "adapter"), tmp_path / "base"
    FakeLLM.model.save_pretrained(base)
    told = settings(temperature=0.5, top_p=0.9, filter=False)

    def seeds(seed: int) -> list[int]:
        with VLLMTeacher.started(base, adapter) as engine:
            write_rows(engine, tiny_tokenizer(), digit_rows(4), 4, told, seed=seed)
        (params, _), *_ = FakeLLM.requests
        assert {(one.temperature, one.top_p) for one in params} == {(0.5, 0.9)}
        return [one.seed for one in params]

    assert seeds(0) == seeds(0) != seeds(1) and len(set(seeds(0))) == 4


@pytest.mark.parametrize(
    "error",
    [
        ValueError("GPTNeoXForCausalLM does not support LoRA yet."),
        RuntimeError("Engine core initialization failed. See root cause above."),
    ],
    ids=str,
)
def test_an_engine_that_does_not_start_says_why(
    fake: None, error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    adapter, base = adapter_of(tmp_path / "adapter"), tmp_path / "base"
    FakeLLM.model.save_pretrained(base)
    with pytest.raises(EngineError) as raised, VLLMTeacher.started(base, adapter):
        pass
    (problem,) = raised.value.problems
    assert problem.where == str(base) and str(error) in problem.what and "transformers" in problem.remedy


def test_who_writes(fake: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter")
    assert chosen("auto", adapter, False) and chosen("vllm", adapter, False)
    assert not chosen("transformers", adapter, False) and not chosen("auto", adapter, True)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    assert not chosen("auto", adapter, False)
    with pytest.raises(ConfigError, match="plain LoRA adapters alone"):
        chosen("vllm", adapter, False)
    monkeypatch.setattr(_vllm, "installed", lambda cpu: False)
    with pytest.raises(ConfigError, match=r"lorasuite\[vllm\]"):
        chosen("vllm", adapter, False)
    assert TeacherSettings().engine == "auto" and not chosen("auto", adapter, False)


def test_a_build_for_cpus_writes_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for cpu in (True, False):  # a build for GPUs finds no platform here
        platforms.current_platform = SimpleNamespace(is_cpu=lambda found=cpu: found)  # type: ignore[attr-defined]
        assert not chosen("auto", adapter, False)
        assert bool(_vllm.unusable(False)) != cpu
    assert not chosen("transformers", adapter, False)
