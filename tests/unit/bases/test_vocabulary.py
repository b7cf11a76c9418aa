"""Pairing of token ids by what the tokens stand for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from lorasuite.bases import CommonTokens, common_tokens, convention, surface
from tests import models


class Words:
    """The only thing the pairing needs of a tokenizer."""

    def __init__(self, tokens: Iterable[str], reverse: bool = False) -> None:
        pairs = list(enumerate(tokens))
        self.vocabulary = {token: n for n, token in (reversed(pairs) if reverse else pairs)}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocabulary)


def pairs(common: CommonTokens) -> set[tuple[int, int]]:
    return set(zip(common.old.tolist(), common.new.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=3), unique=True, min_size=1, max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), unique=True, min_size=1, max_size=12),
)
def test_common_strings_pair_up(old: list[str], new: list[str]) -> None:
    common = common_tokens(Words(old), Words(new), len(old), len(new))
    assert pairs(common) == {(old.index(s), new.index(s)) for s in set(old) & set(new)}
    assert common.same == (old == new)
    assert common.old.dtype == common.new.dtype == torch.int64 and len(common) == len(pairs(common))
    assert common.old.tolist() == sorted(common.old.tolist())


def test_permuted_and_extended(tmp_path: Path) -> None:
    tokens = models.words(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()
    old = models.build_tokenizer(tmp_path / "old", tokens)
    new = models.build_tokenizer(tmp_path / "new", [tokens[n] for n in order] + ["more", "still"])
    common = common_tokens(old, new, 20, 22)
    assert pairs(common) == {(n, order.index(n)) for n in range(20)}
    assert not common.same and (common.old_size, common.new_size) == (20, 22)


def test_identical_vocabularies_pair_every_row_padding_included() -> None:
    same = common_tokens(Words(["a", "b", "c"]), Words(["a", "b", "c"]), 8, 8)
    assert same.same and pairs(same) == {(n, n) for n in range(8)}
    padded = common_tokens(Words(["a", "b", "c"]), Words(["a", "b", "c"]), 8, 16)
    assert pairs(padded) == {(n, n) for n in range(3)}


def test_ids_beyond_the_embedding_rows_are_left_out() -> None:
    common = common_tokens(Words(["a", "b", "c", "d"]), Words(["d", "c", "b", "a"]), 3, 3)
    assert pairs(common) == {(1, 2), (2, 1)}


def test_nothing_in_common() -> None:
    common = common_tokens(Words(["a"]), Words(["b"]), 1, 1)
    assert len(common) == 0 and common.old.shape == common.new.shape == (0,)


SENTENCEPIECE = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "▁the", "the", "▁", "é", "▁été", "ab"]
BYTE_LEVEL = ["Ġthe", "the", "Ġ", "Ã©", "ĠÃ©tÃ©", "Ċ", "Ã", "xy", "</s>", "<|end|>"]


def test_sentencepiece_and_byte_level_meet_in_their_bytes() -> None:
    found = {
        (SENTENCEPIECE[a], BYTE_LEVEL[b])
        for a, b in pairs(common_tokens(Words(SENTENCEPIECE), Words(BYTE_LEVEL), 99, 99))
    }
    assert found == {
        ("▁the", "Ġthe"), ("the", "the"), ("▁", "Ġ"), ("é", "Ã©"), ("▁été", "ĠÃ©tÃ©"),
        ("<0x0A>", "Ċ"), ("<0xC3>", "Ã"), ("</s>", "</s>"),
    }  # fmt: skip
    back = pairs(common_tokens(Words(BYTE_LEVEL), Words(SENTENCEPIECE), 99, 99))
    assert {(SENTENCEPIECE[b], BYTE_LEVEL[a]) for a, b in back} == found


@pytest.mark.parametrize("reverse", [False, True])
def test_a_byte_token_gives_way_to_the_literal_one_whatever_the_order(reverse: bool) -> None:
    """``<0x41>`` and ``A`` stand for one string: the literal token is the one in use, and pairs are one to one."""
    old = ["<0x41>", "<0x42>", "▁x", "A"]
    new = ["A", "B", "Ġx"]
    forth = common_tokens(Words(old, reverse), Words(new, reverse), 9, 9)
    assert pairs(forth) == {(1, 1), (2, 2), (3, 0)}
    back = common_tokens(Words(new, reverse), Words(old, reverse), 9, 9)
    assert pairs(back) == {(0, 3), (1, 1), (2, 2)}


def test_conventions() -> None:
    assert convention(Words(SENTENCEPIECE)) == "sentencepiece"
    assert convention(Words(BYTE_LEVEL)) == "byte-level"
    assert convention(Words(["a", "b"])) == "plain"
    # U+0120 is also a letter: a multilingual sentencepiece vocabulary may hold it as a token
    assert convention(Words([*SENTENCEPIECE, "Ġ"])) == "sentencepiece"


def test_every_byte_has_a_stand_in_and_it_is_the_one_of_tokenizers() -> None:
    alphabet = sorted(ByteLevel.alphabet())
    assert {surface(c, "byte-level") for c in alphabet} == {bytes([b]) for b in range(256)}
    pre = ByteLevel(add_prefix_space=False, use_regex=False)
    text = "naïve – 漢字\n\t'x'"
    assert surface(pre.pre_tokenize_str(text)[0][0], "byte-level") == text.encode()


def test_strings_that_are_not_text_stay_strings() -> None:
    assert surface("<s>", "sentencepiece") == "<s>" and surface("<|end|>", "byte-level") == "<|end|>"
    assert surface("<0x0A>", "sentencepiece") == b"\n"
    assert surface("<0x0A>", "byte-level") == "<0x0A>"
    assert surface("<0xZZ>", "sentencepiece") == "<0xZZ>"
    assert surface("漢", "byte-level") == "漢"


def test_a_real_byte_level_tokenizer() -> None:
    tokens = ["<unk>", *sorted(ByteLevel.alphabet()), "Ġa", "ab"]
    raw = Tokenizer(BPE({t: n for n, t in enumerate(tokens)}, [("Ġ", "a"), ("a", "b")], unk_token="<unk>"))
    new = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    old = Words(["<unk>", "▁a", "ab", "a", "漢"])
    common = pairs(common_tokens(old, new, 5, len(tokens)))
    assert common == {(0, 0), (1, tokens.index("Ġa")), (2, tokens.index("ab")), (3, tokens.index("a"))}
