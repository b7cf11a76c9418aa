"""The tokenizer that trainers save beside an adapter: how it differs from the base's, and what cannot be used of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasuite.adapters import own_tokenizer, tokenizer_folder
from lorasuite.bases import load_tokenizer
from lorasuite.errors import AdapterError, CheckpointError
from tests import models

TEMPLATE = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
#: Writes the names of roles as tokens of their own, as Phi's and Zephyr's do: no token is in its text.
BY_ROLE = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    """A base's tokenizer of 90 words, without a chat template."""
    models.build_tokenizer(tmp_path / "base", models.words(90))
    return load_tokenizer(tmp_path / "base")


def saved(folder: Path, tokens: list[str], **changes: Any) -> Path:
    """An adapter's directory with a tokenizer."""
    tokenizer = models.build_tokenizer(folder, tokens)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_no_tokenizer_and_the_bases_own_are_none(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert own_tokenizer(tmp_path / "bare", plain) is None
    assert own_tokenizer(saved(tmp_path / "same", models.words(90)), plain) is None
    # how it pads, and to which side, changes nothing of what is read
    padded = saved(tmp_path / "padded", models.words(90), pad_token="</s>", padding_side="left")
    assert own_tokenizer(padded, plain) is None
    # a tokenizer of the time before templates were saved has the base's
    plain.chat_template = TEMPLATE
    assert own_tokenizer(tmp_path / "same", plain) is None


@pytest.mark.parametrize("as_file", [True, False], ids=["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_alone_is_put_on_the_bases_tokenizer(plain: Any, as_file: bool, tmp_path: Path) -> None:
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    own = own_tokenizer(tmp_path, plain)
    assert own is not None and not own.whole and own.has_template
    assert own.differences == ("a chat template, and the base has none",)
    assert own.notice("the teacher") == (
        f"{tmp_path}: its own chat template is used for the teacher, and not the base's: "
        "a chat template, and the base has none"
    )
    turns = [{"role": "user", "content": "w5"}]
    assert own.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "w1 w5 w2 w3 "
    assert plain.chat_template is None  # the base's tokenizer stays as it is


def test_a_tokenizer_config_without_a_template_is_nothing(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padding_side": "left"}))
    assert own_tokenizer(tmp_path, plain) is None


DIFFERENT: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "more": ([*models.words(90), "<|im_end|>"], {}, "1 tokens more, such as '<|im_end|>'"),
    "fewer": (models.words(88), {}, "2 tokens fewer, such as 'w84'"),
    "renumbered": ([*models.words(88), "w85", "w84"], {}, "2 tokens under other ids, such as 'w84'"),
    "eos": (models.words(90), {"eos_token": "w7"}, "eos_token is 'w7', and not '</s>'"),
    "template": (models.words(90), {"chat_template": TEMPLATE}, "another chat template"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_differences(name: str, plain: Any, tmp_path: Path) -> None:
    tokens, changes, said = DIFFERENT[name]
    plain.chat_template = BY_ROLE
    own = own_tokenizer(saved(tmp_path / "own", tokens, **changes), plain)
    assert own is not None and own.whole and said in own.differences
    assert own.has_template == (name == "template") and own.tokenizer.chat_template is not None


def test_texts_begun_otherwise_are_a_difference(plain: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    folder = saved(tmp_path / "own", models.words(90))
    changed = models.tokenizer_of(folder)
    single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    changed.backend_tokenizer.post_processor = single
    changed.save_pretrained(folder)
    own = own_tokenizer(folder, plain)
    assert own is not None and own.differences == ("it begins or splits texts otherwise",)


def test_tokens_beyond_the_base(plain: Any, tmp_path: Path) -> None:
    """Rows that nothing asks for do no harm (a pad token); those that end or frame every text cannot be read."""
    tokens = [*models.words(90), "<|user|>", "[PAD]"]
    for number, (changes, written) in enumerate(
        [
            ({}, []),
            ({"pad_token": "[PAD]"}, []),
            ({"eos_token": "[PAD]"}, ["'[PAD]'"]),
            ({"chat_template": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"}, ["'<|user|>'"]),
            ({"chat_template": BY_ROLE}, ["'<|user|>'"]),
        ]
    ):
        own = own_tokenizer(saved(tmp_path / str(number), tokens, **changes), plain)
        assert own is not None and own.beyond(90) == ["<|user|>", "[PAD]"] and own.problems(92) == []
        found = own.problems(90)
        assert bool(found) == bool(written)
        if found:
            assert f"2 tokens beyond the old base's 90 embedding rows, and writes {', '.join(written)}" in found[0].what
            assert "Resize the base's embeddings to 92 rows" in found[0].remedy


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_one_that_cannot_be_loaded(file: str, plain: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "own", models.words(90))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / file).write_text("{")
    with pytest.raises(AdapterError) as error:
        own_tokenizer(folder, plain)
    assert str(folder) in str(error.value)


def test_its_fingerprint_is_of_its_files(plain: Any, tmp_path: Path) -> None:
    def fingerprint(name: str, template: str) -> str:
        own = own_tokenizer(saved(tmp_path / name, models.words(90), chat_template=template), plain)
        assert own is not None
        return own.fingerprint

    assert fingerprint("a", TEMPLATE) == fingerprint("b", TEMPLATE) != fingerprint("c", BY_ROLE)


def test_several_adapters_must_have_the_same(
    lora: Callable[..., Path], base: Callable[..., Path], tmp_path: Path
) -> None:
    one = saved(tmp_path / "one", models.words(90))
    two = saved(tmp_path / "two", models.words(90))
    other = saved(tmp_path / "other", models.words(80))
    without = lora(base("llama"))
    assert tokenizer_folder(str(one)) == (one, "") and tokenizer_folder(str(without)) == (None, "")
    assert tokenizer_folder(f"{one}:0.5,{two}") == (one, "")
    for pair in (f"{one},{other}", f"{one},{without}"):
        folder, notice = tokenizer_folder(pair)
        assert folder is None and "of 2 adapters not all have the same tokenizer" in notice


def test_a_chat_template_that_does_not_end_is_refused_when_it_is_loaded(plain: Any, tmp_path: Path) -> None:
    endless = "{{ messages[0].content * 10 ** 10 }}"
    plain.chat_template = endless
    plain.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"its chat template takes more than .*for a conversation of two words"):
        load_tokenizer(tmp_path / "base")
    (tmp_path / "chat_template.jinja").write_text(endless)
    with pytest.raises(AdapterError, match=r"its chat template takes more than"):
        own_tokenizer(tmp_path, plain)
