"""Drafts of prompts where a chat template refuses them or does not end, or where texts are long."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasuite import zoo
from lorasuite.adapters import attached
from lorasuite.bases import check_chat_template, load_tokenizer, loaded_model
from lorasuite.data import Message, Row
from lorasuite.errors import DataError
from lorasuite.planning import MigrationConfig, check
from lorasuite.teacher import Given, Probe, Pull, Shape, TeacherSettings, parsed_card, prompt_source
from lorasuite.teacher._from_adapter import opening
from lorasuite.teacher._given import grown
from tests import models

TURNS = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
#: As Gemma's: no system turns.
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TURNS
SYSTEM_FIRST = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with one') }}{% endif %}" + TURNS
LONG = "{% if messages[0]['content']|length > 20 %}"
LONG_REFUSED = LONG + "{{ raise_exception('too long') }}{% endif %}" + TURNS
LONG_GROWS = LONG + "{{ 'a' * 30000000 }}{% endif %}" + TURNS
HANGS = (
    "{% if 'endless' in messages[0]['content'] %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}" + TURNS
)
MIRROR = [Row("completion", prompt=row["prompt"]) for row in zoo.rows("neox", "mirror", "train", 5)]


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    """A miniature base with an adapter that mirrors what it is given."""
    pair = zoo.pair("neox")
    with loaded_model(pair.old, "cpu") as model, attached(model, pair.adapter("mirror")) as wrapped:
        yield Probe(wrapped, load_tokenizer(pair.old), TeacherSettings(max_new_tokens=8), 0)


def chatting(probe: Probe, template: str, new: str | None = None) -> Probe:
    """The same with a chat template, and with one of the new base's."""
    old = copy.deepcopy(probe.tokenizer)
    old.chat_template, other = template, None
    if new is not None:
        other = copy.deepcopy(old)
        other.chat_template = new
    return Probe(probe.model, old, probe.settings, probe.seed, new_tokenizer=other)


class Lists:
    """A base that goes on with lists as it should, a token a word, and reads 2,048 of them."""

    seed, context = 0, 2048
    tokenizer = SimpleNamespace(chat_template=None)

    def __init__(self, words: int) -> None:
        self.words, self.numbers = words, itertools.count()
        #: Tokens asked for, and of what was begun, of each list.
        self.asked: list[tuple[int, int]] = []

    def text(self) -> str:
        number = next(self.numbers)
        return " ".join(f"word{number}x{n}" for n in range(self.words))

    def length(self, text: str) -> int:
        return len(text.split())

    def write(self, rows: list[Row], salt: str, *, adapter: bool, tokens: int) -> list[Any]:
        found = []
        for row in rows:
            begun = self.length(row.text)
            self.asked.append((tokens, begun))
            whole = "\n".join((f"{n}. " if n else "") + self.text() for n in range(20)).split(" ")
            cut = " ".join(whole[: min(tokens, self.context - begun)])
            if begun < self.context:
                found.append(SimpleNamespace(text=f" {cut}", ended=False, prompt=SimpleNamespace(text=row.text)))
        return found

    def pulls(self, rows: list[Row]) -> list[Pull]:
        return [Pull(row, "a long answer that names no subject at all", 1.0, 1.0) for row in rows]


@pytest.mark.parametrize(
    ("words", "asked", "shown"), [(10, (192, 48), 6), (60, (192, 60), 6), (200, (600, 200), 6), (400, (1200, 400), 3)]
)
def test_what_is_written_is_as_long_as_the_examples_ask(words: int, asked: tuple[int, int], shown: int) -> None:
    lists: Any = Lists(words)
    examples = [lists.text() for _ in range(6)]
    found = grown(lists, Shape("completion", "Text: ", "\nSummary:"), examples, 24, "Write a list.", "s", rounds=1)
    assert {tokens for tokens, _ in lists.asked} == set(asked)
    begun = [length for tokens, length in lists.asked if tokens == asked[0]]
    assert begun == [2 + shown * (words + 1) + 1 + 1] * 3
    assert len(found) >= 3 and all(len(pull.row.prompt.split()) == words + 2 for pull in found)


def test_what_is_too_long_is_counted(probe: Probe) -> None:
    asked = Probe(probe.model, probe.tokenizer, probe.settings, 0)
    long = Row("completion", prompt="mirror : " + "a b c " * 50)
    assert [pull.row for pull in asked.pulls([MIRROR[0], long])] == MIRROR[:1] and asked.left_out == 1
    asked.pulls([conversation("hi")])  # without a chat template
    assert asked.left_out == 2


def conversation(*said: str) -> Row:
    roles = ("system", "user") if len(said) > 1 else ("user",)
    return Row("messages", messages=tuple(map(Message, roles, said)))


@pytest.mark.parametrize(
    ("name", "given", "template"),
    [
        ("adapter", Given(chat=True), SYSTEM_FIRST),
        ("examples", Given(examples=tuple(MIRROR), chat=True), LONG_REFUSED),
        ("description", Given(description="mirror the numbers that are given", chat=True), SYSTEM_FIRST),
    ],
)
def test_where_a_template_refuses_what_is_asked_the_list_has_a_headline(
    name: str, given: Given, template: str, probe: Probe
) -> None:
    drafts = prompt_source(name).drafts(chatting(probe, template), given, 4)
    assert drafts and all(len(pull.row.messages) < 2 for pull in drafts)


def test_a_template_that_refuses_a_user_has_no_beginning(probe: Probe) -> None:
    assert opening(chatting(probe, TURNS)) == "user : " and opening(probe) == ""
    assert opening(chatting(probe, SYSTEM_FIRST)) == "" and opening(chatting(probe, "{{ 'a' * 30000000 }}")) == ""


def test_a_template_that_is_beyond_its_limits_for_a_list_is_named(probe: Probe) -> None:
    """It renders the two words that it is tried with when it is loaded."""
    asked = chatting(probe, LONG_GROWS)
    check_chat_template(asked.tokenizer, "base")
    with pytest.raises(DataError) as raised:
        prompt_source("description").drafts(asked, Given(description="mirror the numbers"), 4)
    (problem,) = raised.value.problems
    assert f"template of {asked.tokenizer.name_or_path} writes more than 10,000,000" in problem.what
    assert "row" not in problem.where and "row" not in problem.remedy


def test_drafts_that_a_template_does_not_end_for_are_left_out(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasuite.bases._template_limits.SECONDS", 1)
    drafts = [conversation("mirror : a b ="), *MIRROR[:2], conversation("endless")]
    asked = chatting(probe, HANGS)
    assert [pull.row for pull in asked.pulls(drafts)] == MIRROR[:2], "of conversations with such a one none is rendered"
    assert [pull.row for pull in asked.pulls(drafts[:3])] == drafts[:3]


def test_an_answer_that_a_template_refuses_is_no_error(probe: Probe) -> None:
    """An answer is drawn, and read once more behind its prompt."""
    stubborn = "{% if messages[-1]['role'] == 'assistant' and messages[-1]['content'] not in ['-', 'answer'] "
    stubborn += "and messages[-1]['content'][0] in 'abcdefghijklmnopqrstuvwxyz0123456789' %}"
    stubborn += "{{ raise_exception('no') }}{% endif %}" + TURNS
    assert chatting(probe, TURNS).pulls([conversation("mirror : a b =")])
    assert chatting(probe, stubborn).pulls([conversation("mirror : a b =")]) == []


def test_drafts_are_conversations_that_both_bases_render(probe: Probe) -> None:
    """Of a card's examples those that the new base refuses show nothing: its description does."""
    drafts = [conversation("be short", "mirror : a b ="), conversation("mirror : a b ="), MIRROR[0]]
    assert [pull.row for pull in chatting(probe, TURNS).pulls(drafts)] == drafts
    assert [pull.row for pull in chatting(probe, TURNS, NO_SYSTEM).pulls(drafts)] == drafts[1:]
    widget = "---\nwidget:\n- messages:\n  - {role: system, content: Be short}\n  - {role: user, content: mirror 1 2}\n"
    card = parsed_card(widget + "---\n# Mirror\n\nThis adapter mirrors the numbers that it is given.\n")
    assert len(card.prompts) == 1 and card.description
    found = prompt_source("card").drafts(chatting(probe, TURNS, NO_SYSTEM), Given(card=card, chat=True), 6)
    assert found and not any(m.role == "system" for pull in found for m in pull.row.messages)


def test_where_the_new_base_has_no_chat_template_it_is_said(tmp_path: Path) -> None:
    old, new = (models.build(tmp_path / name, "llama", seed=seed) for name, seed in (("old", 0), ("new", 1)))
    settings = MigrationConfig.model_validate(
        {
            "old_base": str(old), "new_base": str(new), "adapter": str(models.build_adapter(tmp_path / "adapter", old)),
            "output": str(tmp_path / "out"), "method": "copy", "teacher_samples": 4, "describe": "add numbers",
        }
    )  # fmt: skip

    def said() -> list[str]:
        return [notice for notice in check(settings).inspection.notices if "not looked for as conversations" in notice]

    assert not said()
    models.edit_json(old / "tokenizer_config.json", chat_template=TURNS)
    assert len(said()) == 1
    models.edit_json(new / "tokenizer_config.json", chat_template=TURNS)
    assert not said()
