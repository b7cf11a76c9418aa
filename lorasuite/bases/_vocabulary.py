"""Which token ids of two tokenizers stand for the same string (METHOD section 2, ``common``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CommonTokens:
    """Paired ids ``old (n,)`` and ``new (n,)``, int64; ``same`` where the two vocabularies are identical."""

    old: Tensor
    new: Tensor
    same: bool
    old_size: int
    new_size: int

    def __len__(self) -> int:
        return self.old.numel()


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
    a: dict[str, int] = old.get_vocab()
    b: dict[str, int] = new.get_vocab()
    if a == b and old_rows == new_rows:
        ids = torch.arange(old_rows)
        return CommonTokens(ids, ids, True, old_rows, new_rows)
    kinds = convention(old), convention(new)
    if kinds[0] == kinds[1]:
        pairs = [(a[token], b[token]) for token in a.keys() & b.keys()]
    else:
        texts_a, texts_b = _by_text(a, kinds[0]), _by_text(b, kinds[1])
        pairs = [(texts_a[text], texts_b[text]) for text in texts_a.keys() & texts_b.keys()]
    pairs = sorted(p for p in pairs if p[0] < old_rows and p[1] < new_rows)
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return CommonTokens(table[:, 0].clone(), table[:, 1].clone(), a == b, old_rows, new_rows)
