"""Evaluation through lm-eval against plain recomputation, on tiny models."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from lorasuite.adapters import attach_adapter, detach_adapter
from lorasuite.data import Message, Row, encode_pair, prompt_ids
from lorasuite.errors import AdapterError, ConfigError, DataError, NumericalError
from lorasuite.evaluation import EvaluationSettings, evaluate, evaluate_text
from lorasuite.training import FinetuneSettings, finetune
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

SETTINGS = EvaluationSettings(batch_size=3, max_new_tokens=6)
CHAT = [
    Row(kind="messages", messages=(Message("user", f"say {word}"), Message("assistant", f"{word} {word}")))
    for word in ("one", "two", "three")
]
TEXTS = [Row(kind="text", text="one two three"), Row(kind="text", text=" ".join(["four five six seven"] * 40))]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An adapter that has learnt the eight rows by heart, and the base it was trained on."""
    directory = tmp_path_factory.mktemp("tuned")
    base = tiny_model()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)  # a fresh head's logits are too flat to be sure of anything
    finetune(
        base,
        tiny_tokenizer(),
        digit_rows(),
        FinetuneSettings(learning_rate=2e-2, batch_size=8, epochs=60, checkpoint_steps=100),
        adapter=None,
        lora=tiny_lora(r=16),
        output=directory / "adapter",
        work_dir=directory / "work",
    )
    return base, directory / "adapter"


def greedy(model, tokenizer, prompt: str, *, special: bool = True, ends: tuple[int, ...] = (2,)) -> str:
    """Greedy decoding of one prompt, step by step, no padding and no cache."""
    ids = prompt_ids(tokenizer, prompt, special=special)
    written: list[int] = []
    while len(written) < SETTINGS.max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def teacher_forced(model, tokenizer, row: Row, *, special: bool = True) -> tuple[float, int]:
    """Log-likelihood of a completion given its prompt, and its tokens."""
    prompt, completion, _ = row.target(tokenizer)
    head, tail = encode_pair(tokenizer, prompt, completion, special=special)
    with torch.no_grad():
        logp = model(torch.tensor([head + tail])).logits[0].float().log_softmax(-1)
    return sum(float(logp[len(head) - 1 + at, token]) for at, token in enumerate(tail)), len(tail)


def test_results_equal_a_plain_recomputation_for_base_and_adapter(tuned, capfd):
    base, adapter = tuned
    rows = digit_rows(10)
    tokenizer = tiny_tokenizer()
    seen = []
    results = evaluate(
        base,
        tokenizer,
        rows,
        SETTINGS,
        adapters={"base": None, "tuned": adapter, "base again": None},
        progress=lambda *args: seen.append(args),
    )
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err
    assert list(results) == ["base", "tuned", "base again"]
    assert seen[-1] == ("base again", 20, 20)
    assert results["base"].samples == results["base again"].samples
    assert results["base"].samples != results["tuned"].samples

    for label, path in (("base", None), ("tuned", adapter)):
        model = base if path is None else attach_adapter(base, path)
        result = results[label]
        total, tokens, matches = 0.0, 0, []
        for row, sample in zip(rows, result.samples, strict=True):
            prompt, completion, _ = row.target(tokenizer)
            output = greedy(model, tokenizer, prompt)
            assert sample.output.strip() == output
            matches.append(output == completion.strip())
            loglikelihood, count = teacher_forced(model, tokenizer, row)
            assert sample.loglikelihood == pytest.approx(loglikelihood, abs=1e-4)
            assert (sample.tokens, sample.bytes) == (count, len(completion.encode()))
            total += loglikelihood
            tokens += count
        assert result.exact_match == sum(matches) / len(matches)
        assert result.loss == pytest.approx(-total / tokens, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))
        size = sum(sample.bytes for sample in result.samples)
        assert result.bits_per_byte == pytest.approx(-total / size / math.log(2), rel=1e-5)
        if path is not None:
            detach_adapter(model)
    assert (results["base"].n, results["base"].batch_size) == (10, 3)
    assert results["base"].loss_stderr > 0
    # Nothing of the caller's was touched.
    assert tokenizer.pad_token_id is None
    assert base.get_input_embeddings().weight.shape == (40, 32)
    assert not any("lora" in name for name, _ in base.named_modules())


def test_a_model_that_knows_the_rows_scores_one(tuned, tmp_path):
    base, adapter = tuned
    result = evaluate(base, tiny_tokenizer(), digit_rows(), SETTINGS, adapters={"tuned": adapter})["tuned"]
    assert result.exact_match == 1.0
    assert result.exact_match_stderr == 0.0
    assert result.loss < 0.05
    assert result.task["generation"]["plain"] == {
        "until": ["\n"],
        "max_gen_toks": 6,
        "do_sample": False,
        "temperature": 0.0,
        "eos_token_id": [2],
    }
    json.dumps(result.summary())
    unsaid = evaluate(base, tiny_tokenizer(), digit_rows(), EvaluationSettings(), adapters={"tuned": adapter})["tuned"]
    assert unsaid.exact_match == 1.0
    longest = max(sample.tokens for sample in result.samples)
    assert unsaid.task["generation"]["plain"]["max_gen_toks"] == longest + 16, "no right answer is cut"
    result.write_samples(tmp_path / "samples.jsonl")
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["exact_match"] for line in lines] == [True] * 8
    # Batching and padding change nothing that matters.
    alone = evaluate(
        base,
        tiny_tokenizer(),
        digit_rows(),
        SETTINGS.model_copy(update={"batch_size": 1}),
        adapters={"tuned": adapter},
    )["tuned"]
    assert [sample.output for sample in alone.samples] == [sample.output for sample in result.samples]
    assert alone.loss == pytest.approx(result.loss, rel=1e-4)


def test_mixed_rows_conversations_and_texts(capfd):
    model, tokenizer = tiny_model(3), tiny_tokenizer(chat=True)
    rows = [*CHAT, *TEXTS, *digit_rows(2)]
    result = evaluate(model, tokenizer, rows, SETTINGS, adapters={"base": None})["base"]
    assert capfd.readouterr().out == ""
    assert [sample.index for sample in result.samples] == list(range(len(rows)))
    assert result.task["kinds"] == {"instruction": 2, "messages": 3, "text": 2}
    assert result.n == len(rows)
    for row, sample in zip(CHAT, result.samples, strict=False):
        # The template spells out its own BOS and end of turn; neither is doubled or scored.
        assert sample.prompt == f"<s>user {row.messages[0].content}</s><s>assistant "
        assert sample.target == row.messages[1].content
        loglikelihood, tokens = teacher_forced(model, tokenizer, row, special=False)
        assert (sample.loglikelihood, sample.tokens) == (pytest.approx(loglikelihood, abs=1e-4), tokens)
        assert tokens == 2
        assert sample.output.strip() == greedy(model, tokenizer, sample.prompt, special=False)
    # Texts: given one BOS, in windows of the context (64), every token scored once.
    for row, sample in zip(TEXTS, result.samples[3:], strict=False):
        assert (sample.output, sample.exact_match) == (None, None)
        ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
        assert sample.tokens == len(ids)
    ids = [1, *tokenizer(TEXTS[0].text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(logp[at - 1, ids[at]]) for at in range(1, len(ids)))
    assert result.samples[3].loglikelihood == pytest.approx(expected, abs=1e-4)
    matches = [sample.exact_match for sample in result.samples if sample.exact_match is not None]
    assert result.exact_match == sum(matches) / 5


def test_text_rows_alone_give_no_exact_match():
    result = evaluate(tiny_model(), tiny_tokenizer(), TEXTS, SETTINGS, adapters={"base": None})["base"]
    assert result.exact_match is None
    assert result.exact_match_stderr is None
    size = sum(len(row.text) for row in TEXTS)
    total = sum(sample.loglikelihood for sample in result.samples)
    assert result.bits_per_byte == pytest.approx(-total / size / math.log(2))


def test_likelihoods_only_limit_and_repeated_rows():
    rows = [digit_rows(1)[0]] * 4 + digit_rows(8)
    settings = EvaluationSettings(generate=False, limit=5)
    seen = []
    result = evaluate(
        tiny_model(),
        tiny_tokenizer(),
        rows,
        settings,
        adapters={"base": None},
        progress=lambda *args: seen.append(args),
    )["base"]
    assert result.n == 5
    assert result.exact_match is None
    assert len({sample.loglikelihood for sample in result.samples}) == 1  # lm-eval asks equal requests once
    assert result.loss_stderr == pytest.approx(0, abs=1e-6)
    assert seen[-1] == ("base", 5, 5)


def test_answers_with_newlines_do_not_stop_at_one():
    rows = [Row(kind="completion", prompt="say one", completion=" one\ntwo")]
    result = evaluate(tiny_model(), tiny_tokenizer(), rows, SETTINGS, adapters={"base": None})["base"]
    assert result.task["generation"]["plain"]["until"] == ["\nQuestion:"]
    assert result.exact_match_stderr is None


def test_refusals(tuned, tmp_path):
    base, _ = tuned
    tokenizer, rows = tiny_tokenizer(), digit_rows(2)
    with pytest.raises(DataError, match="there are none"):
        evaluate(base, tokenizer, [], SETTINGS, adapters={"base": None})
    with pytest.raises(ConfigError, match="there are none"):
        evaluate(base, tokenizer, rows, SETTINGS, adapters={})
    with pytest.raises(AdapterError, match="adapter_config"):
        evaluate(base, tokenizer, rows, SETTINGS, adapters={"lost": tmp_path})
    with pytest.raises(DataError, match=r"evaluation row 1: .*no chat template"):
        evaluate(base, tokenizer, CHAT, SETTINGS, adapters={"base": None})
    long = Row(kind="completion", prompt="say", completion=" one" * 70)
    with pytest.raises(DataError, match="completion of 70 tokens does not fit the model's context of 64"):
        evaluate(base, tokenizer, [long], SETTINGS, adapters={"base": None})
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        evaluate(base, endless, rows, SETTINGS, adapters={"base": None})
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        evaluate(broken, tokenizer, rows, EvaluationSettings(generate=False), adapters={"base": None})


def test_importing_the_module_is_cheap():
    code = "import sys; from lorasuite.evaluation import EvaluationSettings, Gate, evaluate, evaluate_tasks; "
    code += "print(sorted({'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_general_text_equals_lm_eval_and_keeps_no_more_logits_than_it_needs(tuned, monkeypatch):
    """Within the context, as lm-eval's rolling likelihood; beyond it every token still counts once."""
    from lorasuite.training import _head

    base, adapter = tuned
    texts = ["one two three", "four five six", "seven"]
    arms = {"base": None, "tuned": adapter}
    wanted = evaluate(base, tiny_tokenizer(), [Row(kind="text", text=t) for t in texts], SETTINGS, adapters=arms)
    monkeypatch.setattr(_head, "CHUNK", 2 * 40)  # two positions of this vocabulary at once
    widths = []
    head = base.lm_head.register_forward_hook(lambda _, __, output: widths.append(output.shape[-2]))
    found = evaluate_text(base, tiny_tokenizer(), texts, adapters=arms, batch_size=2)
    head.remove()
    assert max(widths) <= 2
    for label, result in found.items():
        assert [s.loglikelihood for s in result.samples] == pytest.approx(
            [s.loglikelihood for s in wanted[label].samples], abs=1e-4
        )
        assert [(s.tokens, s.bytes) for s in result.samples] == [(3, 13), (3, 13), (1, 5)]
        assert result.bits_per_byte == pytest.approx(wanted[label].bits_per_byte, rel=1e-5)
        assert result.exact_match is None
    assert found["base"].bits_per_byte != found["tuned"].bits_per_byte

    long = evaluate_text(base, tiny_tokenizer(), [" ".join(["four five six seven"] * 40)], adapters={"base": None})
    assert long["base"].samples[0].tokens == 160, "the context is 64 tokens"


def test_general_text_that_cannot_be_scored():
    base = tiny_model()
    for texts in ([], ["one", ""]):
        with pytest.raises(DataError, match="general texts"):
            evaluate_text(base, tiny_tokenizer(), texts, adapters={"base": None})
    neither = tiny_tokenizer(bos=False)
    neither.eos_token = neither.bos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        evaluate_text(base, neither, ["one"], adapters={"base": None})
