"""Prompts of an adapter's task where none are given: shapes, lists, the signal, distances, and what is chosen."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.plugins.general_prompts import GeneralPrompts
from lorasuite import zoo
from lorasuite.adapters import attached
from lorasuite.bases import load_tokenizer, loaded_model
from lorasuite.data import Message, Row
from lorasuite.errors import ConfigError, DataError
from lorasuite.teacher import (
    Card,
    Given,
    Probe,
    Pull,
    TeacherSettings,
    choose_prompts,
    farthest,
    general_level,
    prompt_source,
    register_source,
    resembling,
    shape_of,
    source_names,
)
from lorasuite.teacher._given import _subjects
from lorasuite.teacher._lists import _items, _read
from lorasuite.teacher._probe import ranked
from lorasuite.teacher._shapes import cut_like, known_shapes, names, separators, split_pairs
from tests.integration.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    """A miniature base with an adapter that mirrors what it is given."""
    pair = zoo.pair("neox")
    with loaded_model(pair.old, "cpu") as model, attached(model, pair.adapter("mirror")) as wrapped:
        yield Probe(wrapped, load_tokenizer(pair.old), TeacherSettings(max_new_tokens=12), 0)


def completions(*prompts: str) -> list[Row]:
    return [Row("completion", prompt=prompt) for prompt in prompts]


MIRROR = completions(*(row["prompt"] for row in zoo.rows("neox", "mirror", "train", 5)))


@pytest.mark.parametrize(
    ("rows", "before", "after", "body"),
    [
        (completions("User: I lost it\nIntent:", "User: I see a fee\nIntent:"), "User: ", "\nIntent:", "I lost it"),
        (completions("say one", "say two", "tell three"), "", "", "say one"),
        (completions("name the sum of 1 =", "name the sum of 2 ="), "", " =", "name the sum of 1"),
        (completions("only one?"), "", "", "only one?"),
        ([Row("text", text="once upon a time")], "", "", "once upon a time"),
        ([Row("instruction", instruction="add", input="1 2")], "", "", "add\nInput: 1 2"),
        (
            [Row("messages", messages=(Message("system", "s"), Message("user", "hello there")))],
            "", "", "hello there",
        ),
    ],
)  # fmt: skip
def test_the_shape_of_prompts_and_back(rows: list[Row], before: str, after: str, body: str) -> None:
    shape = shape_of(rows)
    assert (shape.before, shape.after, shape.body(rows[0])) == (before, after, body)
    assert shape.row(body) == rows[0]


def test_shapes_are_tried_by_names_in_the_description_and_known_templates() -> None:
    assert names("Intent of the bank customer's message, kind of") == ["intent", "bank", "customer", "message"]
    shapes = [(shape.before, shape.after) for shape in known_shapes("intent of a customer", chat=False)]
    assert ("Customer: ", "\nIntent:") in shapes and ("Intent: ", "\nCustomer:") in shapes
    assert any(after.endswith("### Response:\n") for _, after in shapes)
    assert [str(shape) for shape in known_shapes("x", True, "q :", " =")] == ["completion 'q :' … ' ='"]
    assert known_shapes("", chat=True)[0].kind == "messages"
    # names that would be code in a template stay text
    assert all("{{" not in shape.before for shape in known_shapes("{{ cycler.__init__ }} of {% raw %}", False))


def test_texts_of_prompt_and_answer_show_where_prompts_end() -> None:
    texts = [f"Customer: number {n}\nIntent: kind_{n}\n" for n in range(6)]
    shape = split_pairs([*texts, "nothing"])
    assert shape is not None and (shape.before, shape.after) == ("Customer: ", "\nIntent:")
    assert cut_like(shape, texts[0]) == Row("completion", prompt="Customer: number 0\nIntent:")
    assert cut_like(shape, "nothing") is None and split_pairs(["a", "b"]) is None
    assert separators(["a : b = c", "d : e = f", "g h"]) in ([" :", " ="], [" =", " :"])


def test_prompts_of_one_answer_share_its_rank_and_its_turn_as_a_subject() -> None:
    row = Row("text", text="x")

    def pulls(*found: tuple[str, float]) -> list[Pull]:
        return [Pull(row, answer, nats, 1.0) for answer, nats in found]

    sure = pulls(("lost_card", 9), ("lost_card", 8), ("lost_card", 7), ("a_fee", 5), ("made_up", 1))
    assert ranked(sure) == [0, 3, 1, 2, 4], "the second of a label after the first of another, what is in doubt last"
    assert ranked(pulls(("a", 1), ("b", 3), ("c", 2))) == [1, 2, 0] and ranked([]) == []
    assert _subjects(sure) == ["a fee", "lost card", "made up"]
    assert _subjects(pulls(("an answer of more than six words is none", 9))) == []


def test_an_answer_in_json_names_what_it_says() -> None:
    row = Row("text", text="x")
    songs = ' {"intent": "PlayMusic", "slots": {"music_item": "song", "sorts": ["new", 1, null]}}'
    found = _subjects([Pull(row, songs, 9, 1.0), Pull(row, '{"a": {}}', 9, 1.0), Pull(row, '{"cut": "of', 5, 1.0)])
    assert found == ["intent play music, music item song, sorts new, sorts 1", "cut of"]
    assert len(_subjects([Pull(row, '["' + "w " * 50 + '"]', 9, 1.0)])[0].split()) == 16
    assert _subjects([Pull(row, "[" * 100_000, 9, 1.0)]) == []


def test_lists_are_begun_and_read() -> None:
    assert _items(["a", "b"], block=False) == "1. a\n2. b\n3."
    assert list(_read(' first\n4. "second" \n5. third 6.Fourth\n\n7.', block=False)) == [
        "first", "second", "third", "Fourth", "",
    ]  # fmt: skip
    assert _items(["a\nb"], block=True) == "### 1\na\nb\n\n### 2\n"
    assert list(_read("c\nd\n\n### 3\ne\nf\n", block=True)) == ["c\nd", "e\nf"]


def test_the_farthest_are_kept() -> None:
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [0.0, 3.0], [5.0, 0.1]])
    assert farthest(points, 3) == [0, 4, 3]
    assert sorted(farthest(points, 9)) == [0, 1, 2, 3, 4] and farthest(points[:0], 2) == []


def test_prompts_of_the_task_move_the_adapter_more_than_others(probe: Probe) -> None:
    own = probe.pulls(MIRROR)
    level = general_level(probe, ())
    assert statistics.fmean(pull.nats for pull in own) > statistics.fmean(level) + 2 and len(level) > 8
    alone = [pull for row in MIRROR for pull in probe.pulls([row])]  # batches change nothing but rounding
    assert [pull.answer for pull in alone] == [pull.answer for pull in own]
    assert [pull.nats for pull in alone] == pytest.approx([pull.nats for pull in own], abs=1e-3)
    vectors = probe.vectors([row.prompt for row in MIRROR])
    assert vectors.norm(dim=1) == pytest.approx(torch.ones(5), abs=1e-5)


def test_what_is_written_is_counted(probe: Probe) -> None:
    told: list[tuple[int, int]] = []
    counted = Probe(
        probe.model,
        probe.tokenizer,
        TeacherSettings(max_new_tokens=2, batch_size=2),
        0,
        lambda done, total: told.append((done, total)),
    )
    counted.write(MIRROR[:3], "counted", adapter=True, tokens=2)
    assert told == [(2, 3), (3, 3)]


def test_the_share_that_resembles_real_prompts(probe: Probe) -> None:
    real = completions(*(row["prompt"] for row in zoo.rows("neox", "mirror", "train", 30)))
    other = completions(*(row["prompt"] for row in zoo.rows("neox", "mirror", "test", 12)))
    assert resembling(probe, other, real) > resembling(probe, completions("so", "mirror", "a : b c d"), real)


def test_from_examples(probe: Probe) -> None:
    given = Given(examples=tuple(MIRROR))
    drafts = prompt_source("examples").drafts(probe, given, 16)
    rows, found = choose_prompts(probe, {"examples": drafts}, MIRROR, general_level(probe, ()), 12)
    assert rows[:5] == MIRROR and len(rows) == len(set(rows)) == 12 and found.clear and found.signal is not None
    assert found.signal > found.general and found.sources["examples"].share == 7 / 12
    assert all(row.prompt.startswith("mirror :") and row.prompt.endswith(" =") for row in rows)
    assert "7 from examples, 5 given" in found.said
    again = prompt_source("examples").drafts(probe, given, 16)
    assert again == drafts


def test_from_the_card_and_the_adapter_alone(probe: Probe) -> None:
    card = Card(prompts=tuple(MIRROR[:3]))
    drafts = {"card": prompt_source("card").drafts(probe, Given(card=card), 4)}
    assert {row.prompt for row in MIRROR[:3]} <= {pull.row.prompt for pull in drafts["card"]}
    framed = prompt_source("card").drafts(probe, Given(card=Card(frames=(("mirror :", " ="),), description="a b c")), 4)
    assert all(pull.row.prompt.startswith("mirror :") for pull in framed)
    drafts["adapter"] = prompt_source("adapter").drafts(probe, Given(), 4)
    rows, found = choose_prompts(probe, drafts, [], general_level(probe, ("some general text",) * 4), 6)
    assert len(rows) == 6 and sum(one.share for one in found.sources.values()) == pytest.approx(1)


def test_a_control_draws_at_random(probe: Probe) -> None:
    register_source(GeneralPrompts())
    assert "general" not in source_names() and "general" in source_names(controls=True)
    drafts = prompt_source("general").drafts(probe, Given(), 6)
    assert drafts and all(pull.row.prompt.startswith("Question: ") for pull in drafts)
    rows, found = choose_prompts(probe, {"general": drafts}, [], [99.0, 99.0], 4, ["general"])
    assert rows and not found.clear and "may not be of its task" in found.said
    with pytest.raises(ConfigError, match="is called 'general'"):
        register_source(type("Other", (GeneralPrompts,), {})())


def test_no_usable_prompt_says_what_was_tried(probe: Probe) -> None:
    dull = [Pull(row, "x", 0.1) for row in MIRROR]
    with pytest.raises(DataError) as raised:
        choose_prompts(probe, {"description": dull, "adapter": []}, [], [1.0, 2.0], 4)
    said = str(raised.value)
    assert "description (5 drafts), adapter (0 drafts)" in said and "none moves the adapter more" in said
    assert "--prompts" in said and "--describe" not in said, "a description is given"
    with pytest.raises(DataError, match=r"none was written: texts may be longer.*\(7 were left out.*--describe"):
        choose_prompts(probe, {"adapter": []}, [], [1.0, 2.0], 4, left_out={"adapter": 7})
    unwritten = choose_prompts(probe, {"examples": []}, MIRROR[:2], [1.0, 2.0], 4)[1]
    assert "no other was written: texts may be longer" in unwritten.said and "left out" not in unwritten.said
    kept, found = choose_prompts(probe, {"examples": dull}, MIRROR[:2], [1.0, 2.0], 4)
    assert kept == MIRROR[:2] and found.signal is None and "no other" in found.said


def test_drafts_like_general_text_are_not_clear_however_good_the_best_are() -> None:
    class Drawn:
        """Texts at random places."""

        seed = 0

        def text(self, row: Row) -> str:
            return row.prompt

        def vectors(self, texts: list[str]) -> torch.Tensor:
            return torch.randn(len(texts), 8, generator=torch.Generator().manual_seed(1))

    def found(seed: int, more: float) -> Any:
        drawn = random.Random(seed)
        rows = completions(*(f"p{n}" for n in range(900)))
        drafts = [Pull(row, row.prompt, drawn.gauss(3 + more), abs(drawn.gauss(1, 0.3))) for row in rows]
        asked: Any = Drawn()
        return choose_prompts(asked, {"adapter": drafts}, [], [drawn.gauss(3) for _ in range(32)], 300)[1]

    alike = [found(seed, 0) for seed in range(20)]
    assert sum(one.clear for one in alike) <= 1 and all(one.signal > one.general for one in alike)
    assert all(one.clear and one.drafted < one.signal for one in (found(seed, 1) for seed in range(20)))


def test_text_of_others_is_only_text(probe: Probe, tmp_path: Any) -> None:
    """Descriptions and examples that look like templates, paths or markup come out as they are, or not at all."""
    nasty = "{{ 7*7 }} {% for x in range(10**9) %} [bold] ../../etc/passwd $(touch x) <|endoftext|>"
    shape = shape_of(completions(f"{nasty}: a =", f"{nasty}: b ="))
    assert shape.row(shape.body(Row("completion", prompt=f"{nasty}: a ="))).prompt == f"{nasty}: a ="
    for given in (Given(description=nasty), Given(examples=tuple(completions(nasty, nasty + " b")))):
        for name in ("description", "examples"):
            if prompt_source(name).can(given):
                for pull in prompt_source(name).drafts(probe, given, 2):
                    assert "49" not in pull.row.prompt.replace(nasty, "")


def test_chat_rows_and_rows_that_are_too_long(probe: Probe) -> None:
    long = Row("completion", prompt="a " * 9000)
    chat = Row("messages", messages=(Message("user", "hi"),))
    assert [pull.row for pull in probe.pulls([long, MIRROR[0], chat])] == [MIRROR[0]]
    held = probe.tokenizer
    probe.tokenizer = tiny_tokenizer(chat=True)
    try:
        assert probe.text(replace(chat)).startswith("user") or "hi" in probe.text(chat)
    finally:
        probe.tokenizer = held
