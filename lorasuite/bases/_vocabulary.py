"""Which token ids of two tokenizers stand for the same string: the shared tokens that ``W_h`` is fitted on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorasuite.stored import Stored


@dataclass(frozen=True, eq=False)
class CommonTokens:
    """The ids of the tokens that two vocabularies share.

    Attributes:
        old, new: paired ids ``(n,)``, int64.
        same: whether the two vocabularies are identical.
        old_size, new_size: rows of the two embeddings.
    """

    old: Tensor
    new: Tensor
    same: bool
    old_size: int
    new_size: int

    def __len__(self) -> int:
        """How many tokens are shared."""
        return self.old.numel()

    def tensors(self) -> dict[str, Tensor]:
        """The ids, to be stored."""
        return {"old": self.old, "new": self.new}

    def info(self) -> dict[str, Any]:
        """What :meth:`read` needs beside the ids, and how many pairs there are."""
        return {"common": len(self), "same": self.same, "old": self.old_size, "new": self.new_size}

    @classmethod
    def read(cls, stored: Stored) -> CommonTokens:
        """What :meth:`tensors` and :meth:`info` gave."""
        info = stored.info
        return cls(stored.tensor("old"), stored.tensor("new"), info["same"], info["old"], info["new"])


@cache
def _byte_of() -> dict[str, int]:
    """The printable stand-ins byte-level BPE uses for bytes (printable Latin-1 as it is, the rest from U+0100)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in kept}
    table.update({chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in kept)})
    return table


def convention(tokenizer: Any) -> str:
    """How a tokenizer writes spaces inside its token strings: ``byte-level``, ``sentencepiece`` or ``plain``."""
    vocabulary = tokenizer.get_vocab()
    # Counted, because Ġ is also a letter that a multilingual sentencepiece vocabulary may hold.
    byte_level = sum(token.startswith("Ġ") for token in vocabulary)
    sentencepiece = sum(token.startswith("▁") for token in vocabulary)
    if not byte_level and not sentencepiece:
        return "plain"
    return "byte-level" if byte_level > sentencepiece else "sentencepiece"


def _is_byte(token: str, kind: str) -> bool:
    """Whether a token string stands for one byte, as sentencepiece writes those it falls back to."""
    return kind == "sentencepiece" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) is not None


def surface(token: str, kind: str) -> str | bytes:
    """The bytes of text a token string stands for, or the string itself where it is not text (special tokens)."""
    if token.startswith("<") and token.endswith(">"):
        return bytes([int(token[3:5], 16)]) if _is_byte(token, kind) else token
    if kind == "byte-level":
        table = _byte_of()
        return bytes(table[c] for c in token) if all(c in table for c in token) else token
    if kind == "sentencepiece":
        return token.replace("▁", " ").encode()
    return token.encode()


class TokenBytes:
    """The bytes of text that the tokens of one tokenizer stand for; special tokens stand for none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._kind = tokenizer, convention(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        self._special |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(self, ids: Sequence[int]) -> list[bytes]:
        """Of each token, as it is cut: a character may lie in several."""
        return [b"" if id_ in self._special else self._text(id_) for id_ in ids]

    def _text(self, id_: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(id_)
        found = surface(token, self._kind)
        # one that looks like markup, or was added as it is
        return found if isinstance(found, bytes) else token.replace("▁", " ").encode()


def _by_text(vocabulary: Mapping[str, int], kind: str) -> dict[str | bytes, int]:
    """Text → id. Of a literal token and a byte token (``A``, ``<0x41>``) the literal one, which is the one in use."""
    found: dict[str | bytes, int] = {}
    for token, id_ in sorted(vocabulary.items(), key=lambda item: (_is_byte(item[0], kind), item[1])):
        found.setdefault(surface(token, kind), id_)
    return found


def common_tokens(old: Any, new: Any, old_rows: int, new_rows: int) -> CommonTokens:
    """Pair the ids whose token strings are in both vocabularies.

    Two tokenizers of one convention are compared by their literal strings, as in the paper. Where the conventions
    differ (``▁the`` against ``Ġthe``) literal strings would miss every word that starts with a space, so the text the
    strings stand for is compared instead.

    Args:
        old, new: the two tokenizers.
        old_rows, new_rows: rows of the two embeddings; ids beyond them are left out. With identical vocabularies and
            as many rows, every row pairs with itself, unused padding rows included.
    """
    old_ids: dict[str, int] = old.get_vocab()
    new_ids: dict[str, int] = new.get_vocab()
    if old_ids == new_ids and old_rows == new_rows:
        ids = torch.arange(old_rows)
        return CommonTokens(ids, ids, True, old_rows, new_rows)
    kinds = convention(old), convention(new)
    if kinds[0] == kinds[1]:
        pairs = [(old_ids[token], new_ids[token]) for token in old_ids.keys() & new_ids.keys()]
    else:
        old_texts, new_texts = _by_text(old_ids, kinds[0]), _by_text(new_ids, kinds[1])
        pairs = [(old_texts[text], new_texts[text]) for text in old_texts.keys() & new_texts.keys()]
    pairs = sorted(p for p in pairs if p[0] < old_rows and p[1] < new_rows)
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return CommonTokens(table[:, 0].clone(), table[:, 1].clone(), old_ids == new_ids, old_rows, new_rows)
