"""The teacher's rows: determinism, no labels, filters, and a base left as it was."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from lorasuite.adapters import attached, save_adapter
from lorasuite.data import Message, Row, encode, read_prompts, read_rows, rows_to_jsonl, unanswered
from lorasuite.errors import DataError
from lorasuite.teacher import (
    TeacherSettings,
    TextLoss,
    _prompts,
    _writing,
    frame,
    judge_teacher,
    judged,
    losses_of_some,
    text_losses,
    total,
    write_rows,
)
from lorasuite.teacher import _generation as module
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

SECRET = "nine"
LOOSE = {"min_kept": 0.0, "truncated": "keep", "max_new_tokens": 6}


def settings(**changes: Any) -> TeacherSettings:
    return TeacherSettings.model_validate({**LOOSE, **changes})


def adapter_of(path: Path) -> Path:
    """A LoRA that changes what the tiny model says."""
    torch.manual_seed(3)
    wrapped = get_peft_model(tiny_model(), tiny_lora())
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(wrapped, path)
    return path


def every_shape(answer: str) -> list[Row]:
    """One row of each shape, with the answer in every place where one can be."""
    return [
        Row(kind="instruction", instruction="add one", input="twice", output=answer, extra={"label": answer}),
        Row(kind="completion", prompt="say two: ", completion=f" {answer}", extra={"answer": answer}),
        Row(kind="messages", messages=(Message("user", "say three"), Message("assistant", answer))),
        Row(kind="text", text=f"add two {answer} {answer}"),
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_do_not_depend_on_the_batch(temperature: float) -> None:
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(chat=True), [*digit_rows(8), *every_shape(SECRET)]
    once = write_rows(model, tokenizer, rows, 12, settings(temperature=temperature, batch_size=12, text_prefix=2))
    for size in (1, 5):
        again = write_rows(
            model, tokenizer, rows, 12, settings(temperature=temperature, batch_size=size, text_prefix=2)
        )
        assert again.rows == once.rows
    if temperature:
        other = write_rows(model, tokenizer, rows, 12, settings(temperature=temperature, text_prefix=2), seed=1)
        assert other.rows != once.rows


def test_text_among_the_prompts_leaves_the_others_greedy() -> None:
    """Texts that begin alike are one prompt, of which several are written."""
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), digit_rows(5)
    texts = [Row("text", text=f"say two {end}") for end in ("one", "three", "four")]
    asked = settings(filter=False, text_prefix=2)
    greedy = write_rows(model, tokenizer, rows, 5, asked)
    mixed = write_rows(model, tokenizer, [*rows, *texts], 8, asked)
    assert greedy.temperature == mixed.temperature == 0 and len(mixed.rows) == 8
    assert {row for row in mixed.rows if row.kind != "text"} == set(greedy.rows)
    assert len({row.text for row in mixed.rows if row.kind == "text"}) == 3
    assert write_rows(model, tokenizer, texts, 3, asked).temperature == 0.9
    assert write_rows(model, tokenizer, rows, 8, asked).temperature == 0.9


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_prompt_that_fills_the_context_shortens_no_answer_beside_it(temperature: float) -> None:
    """Of 64 tokens that the model reads, a prompt of 62 leaves two: to itself, and not to a short one in its batch."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = [Row(kind="completion", prompt=" ".join(["say two"] * n)) for n in (1, 2, 20, 30, 31)]
    told = {"temperature": temperature, "filter": False, "max_new_tokens": 12}
    once = write_rows(model, tokenizer, rows, 5, settings(**told, batch_size=5))
    again = write_rows(model, tokenizer, rows, 5, settings(**told, batch_size=1))
    assert again.rows == once.rows and once.tokens > 10
    full = next(row for row in once.rows if row.prompt == rows[-1].prompt)
    assert len(tokenizer(full.prompt + full.completion)["input_ids"]) <= 64


def test_sampling_follows_the_model() -> None:
    """First tokens of many answers to one prompt come as often as the model says."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        for head in model.lm_head.parameters():
            head.mul_(4)  # away from uniform
    pick = settings(temperature=0.7, max_new_tokens=1, filter=False, batch_size=512)
    prompt = Row(kind="completion", prompt="say two")
    written = write_rows(model, tokenizer, [prompt], 2000, pick)
    ids = torch.tensor([tokenizer("say two")["input_ids"]])
    scores = model(ids).logits[0, -1, : len(tokenizer)].clone()
    never = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    scores[list(never)] = -torch.inf
    expected = (scores / 0.7).softmax(-1)
    words = [row.completion.strip() for row in written.rows]
    likely = int(expected.argmax())
    share = words.count(tokenizer.convert_ids_to_tokens(likely)) / written.written
    assert abs(share - expected[likely].item()) < 0.05


def test_no_label_reaches_the_rows() -> None:
    """What the teacher is given, and what it writes, is the same whatever the answers say."""
    model, tokenizer = tiny_model(), tiny_tokenizer(chat=True)
    found = [write_rows(model, tokenizer, every_shape(a), 4, settings(text_prefix=2)).rows for a in (SECRET, "four")]
    assert found[0] == found[1]
    assert [unanswered(row, 2) for row in every_shape(SECRET)] == [unanswered(row, 2) for row in every_shape("four")]
    assert SECRET not in str([unanswered(row, 2) for row in every_shape(SECRET)])
    assert sorted(row.kind for row in found[0]) == ["completion", "instruction", "messages", "text"]
    assert all("label" not in row.extra and "answer" not in row.extra for row in found[0])


def test_prompts_may_lack_their_answers(tmp_path: Path) -> None:
    lines = [
        '{"instruction": "add one"}',
        '{"prompt": "say two"}',
        '{"messages": [{"role": "user", "content": "say"}]}',
        '{"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "nine"}]}',
        '{"text": "add two three"}',
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    rows = read_prompts(file)
    assert [row.kind for row in rows] == ["instruction", "completion", "messages", "messages", "text"]
    assert rows[2] == rows[3] == Row(kind="messages", messages=(Message("user", "say"),))
    file.write_text('{"prompt": ""}\n{"instruction": 3}')
    with pytest.raises(DataError) as caught:
        read_prompts(file)
    assert len(caught.value.problems) == 2


def test_the_adapter_stays_unmerged_and_leaves(tmp_path: Path) -> None:
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), digit_rows(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configured = model.generation_config
    bare = write_rows(model, tokenizer, rows, 6, settings())
    with attached(model, adapter_of(tmp_path / "adapter")) as wrapped:
        taught = write_rows(wrapped, tokenizer, rows, 6, settings())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert model.generation_config is configured
    assert taught.rows != bare.rows
    assert write_rows(model, tokenizer, rows, 6, settings()).rows == bare.rows


class Script:
    """Answers in order, in the place of a model's."""

    def __init__(self, *answers: tuple[str, float, bool]) -> None:
        self.answers = answers

    def __call__(self, prompts: Any) -> Any:
        yield [
            module.Answer(p, *self.answers[p.number % len(self.answers)][:2], 5, self.answers[p.number][2])
            for p in prompts
        ]


LONG = " ".join(f"w{n}" for n in range(20))
ALIKE = LONG.replace("w19", "other")
LOOP = " ".join(["a b c d"] * 6)


@pytest.mark.parametrize(
    ("answers", "kind", "reasons"),
    [
        ([("  ", 0, True), ("fine", 0, True)], "completion", {"empty": 1}),
        ([("cut off", 0, False), ("fine", 0, True)], "completion", {"truncated": 1}),
        ([("cut off", 0, False), ("fine", 0, True)], "text", {}),
        ([("same", 0, True), ("same ", 0, True)], "text", {"duplicate": 1}),
        ([(LONG, 0, True), (ALIKE, 0, True)], "text", {"near_duplicate": 1}),
        ([(LOOP, 0, True), ("fine", 0, True)], "completion", {"repetition": 1}),
        ([("yes", 0, True), ("yes", 0, True)], "two prompts", {}),
    ],
)
def test_filters(
    monkeypatch: pytest.MonkeyPatch, answers: list[tuple[str, float, bool]], kind: str, reasons: dict[str, int]
) -> None:
    monkeypatch.setattr(module.AnswerGenerator, "generate", lambda _, prompts: Script(*answers)(prompts))
    monkeypatch.setattr(_writing, "ATTEMPTS_PER_ROW", 1)
    monkeypatch.setattr(_prompts, "ATTEMPTS_PER_ROW", 1)
    prompts = {
        "completion": [Row(kind="completion", prompt="say")],
        "text": [Row(kind="text", text="say")],
        "two prompts": [Row(kind="completion", prompt="say"), Row(kind="completion", prompt="add")],
    }[kind]
    strict = TeacherSettings(temperature=0.9)
    found = write_rows(tiny_model(), tiny_tokenizer(), prompts, 2, strict)
    assert found.dropped == reasons and len(found.rows) == 2 - sum(reasons.values()) and found.written == 2
    for row in found.rows:
        assert bool(row.extra) == (kind == "text" and "cut" in row.text)


def test_the_least_sure_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(f"answer {n}", -float(n % 4), True) for n in range(8)]
    monkeypatch.setattr(module.AnswerGenerator, "generate", lambda _, prompts: Script(*answers)(prompts))
    prompts = [Row(kind="completion", prompt=f"say {n}") for n in range(8)]
    found = write_rows(tiny_model(), tiny_tokenizer(), prompts, 6, TeacherSettings(drop_unsure=0.25))
    assert found.dropped == {"unsure": 2} and min(found.log_probs) == -2 and len(found.rows) == 6


def test_a_template_ends_answers_by_a_token_or_by_its_text() -> None:
    """What a row says ends an answer is not part of it, whether the tokenizer has a token for that or not."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [Row(kind="completion", prompt=f"add {word}") for word in ("one", "two", "three")]
    loose = settings(max_new_tokens=12, filter=False)
    free = write_rows(model, tokenizer, prompts, 3, loose).rows
    for row in free:
        words = row.completion.split()
        end = f" {words[3]}"
        ended = [replace(p, end_of_answer=end) for p in prompts if p.prompt == row.prompt]
        found = write_rows(model, tokenizer, ended, 1, settings(max_new_tokens=12, filter=False, truncated="drop"))
        assert found.rows[0].completion.split() == words[: words.index(words[3])]
        assert found.rows[0].target() == (row.prompt, found.rows[0].completion, end)
        exact = text_losses(model, tokenizer, found.rows)[0]
        assert found.losses[0] is None and exact is not None  # it is read again: more was generated than is kept
    tokenizer.add_special_tokens({"additional_special_tokens": [words[3]]})
    stopped = write_rows(model, tokenizer, ended, 1, loose)
    assert stopped.rows[0].completion.split() == words[: words.index(words[3])]


def test_too_few_rows_is_an_error() -> None:
    with pytest.raises(DataError, match=r"of 8 rows it wrote only 0 can be used \(8 truncated\)"):
        write_rows(tiny_model(), tiny_tokenizer(), digit_rows(8), 8, TeacherSettings(max_new_tokens=1))


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = every_shape(SECRET)
    rows[3] = Row(kind="text", text="add two", extra={"unfinished": True})
    (tmp_path / "rows.jsonl").write_bytes(rows_to_jsonl(rows))
    assert read_rows(tmp_path / "rows.jsonl") == rows
    tokenizer = tiny_tokenizer()
    ended, cut = encode([Row(kind="text", text="add two"), rows[3]], tokenizer)
    assert ended["input_ids"] == [*cut["input_ids"], tokenizer.eos_token_id]


def test_text_losses_are_those_of_each_row_alone() -> None:
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), digit_rows(5)
    together = text_losses(model, tokenizer, rows, batch_size=5)
    for row, loss in zip(rows, together, strict=True):
        prompt, answer = row.prompt_and_completion()
        head = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert loss is not None and loss.bytes == len(answer)
        assert loss.nats == pytest.approx(-log_probs[len(head) - 1 :].sum().item(), rel=1e-4)
    long = Row(kind="text", text="add " * 80)
    assert text_losses(model, tokenizer, [long, rows[0]])[0] is None
    assert total(together).nats == pytest.approx(sum(loss.nats for loss in together if loss))
    some = losses_of_some(model, tokenizer, [*rows, long], range(0, len(rows) + 1, 2), batch_size=2)
    assert [n for n, loss in enumerate(some) if loss] == list(range(0, len(rows), 2)) and len(some) == len(rows) + 1
    assert total([some[2]]).nats == pytest.approx(total([together[2]]).nats, rel=1e-4)


def test_a_teacher_is_judged_by_at_most_a_hundred_rows_spread_over_all() -> None:
    assert [list(judged(count)) for count in (0, 1, 3)] == [[], [0], [0, 1, 2]]
    for count in (100, 101, 299, 300, 1000, 4999):
        places = judged(count)
        assert 50 < len(places) <= 100 and places[-1] > count - 2 * count / len(places)


def losses(*values: float | None) -> list[TextLoss | None]:
    return [None if value is None else TextLoss(nats=value, bytes=10, rows=1) for value in values]


def test_worth() -> None:
    better = judge_teacher(losses(9, 9), losses(3, 4), losses(8, None), labelled=True)
    assert (
        better.worth and better.scored_rows == 1 and better.bits_per_byte["teacher"] == pytest.approx(0.4328, abs=1e-4)
    )
    assert not judge_teacher(losses(9), losses(8), losses(3), labelled=True).worth
    idle = judge_teacher(losses(4.001), losses(4), losses(9), labelled=False)
    assert not idle.worth and "hardly changes" in idle.reason
    assert not judge_teacher(losses(9), losses(4), losses(3), labelled=False).worth
    with pytest.raises(DataError):
        judge_teacher(losses(None), losses(1), losses(1), labelled=True)


FRAMED = [Row(kind="completion", prompt=f"say {word} now :", completion=" nothing") for word in ("one", "two", "six")]


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        (["add : 1 2 =", "add : 3 =", "add : 4 5 6 ="], ("add :", " =")),
        (["one =", "two ="], ("", " =")),
        (["a\n\n### Q:\nx y\n\n### A:\n", "a\n\n### Q:\nz\n\n### A:\n"], ("a\n\n### Q:", "\n\n### A:\n")),
        (["add : 1 =", "add : 1 ="], ("", "")),  # one prompt says nothing of what all begin with
        (["add : 1 =", "add : 1 2"], ("", "")),
        (["b = b", "b ="], ("", "")),  # nothing is left between
    ],
)
def test_the_frame_of_prompts(prompts: list[str], found: tuple[str, str]) -> None:
    assert frame(prompts) == found


def test_the_base_writes_prompts_between_beginning_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New prompts have the given ones' frame, are new, and are the base's own: its adapter is off, then on again."""
    states = []
    generate = module.AnswerGenerator._batch

    def watched(self: Any, prompts: Any, chat: bool) -> Any:
        layers = [m for m in self.model.modules() if hasattr(m, "disable_adapters")]
        states.append((prompts[0].row.kind, all(m.disable_adapters for m in layers)))
        written = generate(self, prompts, chat)
        if prompts[0].row.kind != "text":
            return written
        # the tiny model knows no words: every third prompt comes to its end, every sixth is one that was given
        middle = [" two" if n % 6 == 0 else f" w{n}" for n in (w.prompt.number for w in written)]
        ends = [" now : rest" if w.prompt.number % 3 == 0 else "" for w in written]
        return [replace(w, text=m + e) for w, m, e in zip(written, middle, ends, strict=True)]

    monkeypatch.setattr(module.AnswerGenerator, "_batch", watched)
    with attached(tiny_model(), adapter_of(tmp_path / "adapter")) as wrapped:
        found = write_rows(wrapped, tiny_tokenizer(), FRAMED, 8, settings(imitate=True, temperature=0.0))
    assert found.prompts == 3 and found.imitated == 5 and len(found.rows) == 8
    with attached(tiny_model(), adapter_of(tmp_path / "other")) as wrapped:
        for size in (1, 100):
            told = settings(imitate=True, temperature=0.0, batch_size=size)
            assert len(_prompts.imitate(wrapped, tiny_tokenizer(), FRAMED, 5, told)) == 5
    new = [row.prompt for row in found.rows if row not in FRAMED and row.prompt not in {r.prompt for r in FRAMED}]
    assert len(new) == len(set(new)) == 5
    assert all(re.fullmatch(r"say w\d+ now :", prompt) for prompt in new)
    assert dict(states) == {"text": True, "completion": False}


def test_prompts_from_a_frame_alone_and_none_that_ends() -> None:
    """The stated frame needs no prompt; a base that never comes to its end is an error that says so."""
    with pytest.raises(DataError, match="none came to 'zzz'"):
        write_rows(tiny_model(), tiny_tokenizer(), None, 4, settings(prefix="say", suffix=" zzz"))
    with pytest.raises(DataError, match="no common end"):
        write_rows(tiny_model(), tiny_tokenizer(), [Row(kind="text", text="a b")], 4, settings(imitate=True))
