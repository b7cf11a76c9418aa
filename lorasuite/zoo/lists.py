"""The language that the zoo's models speak: operations on short lists of symbols, written as text.

An example is a prompt such as ``rev inc : c d a f =`` and its completion `` g b e d``: operations apply left
to right, ``inc`` moves each symbol one up in its alphabet (the last becomes the first).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

Symbols = list[int]
"""A list's symbols as positions in its alphabet."""

SIZE: Final = 16
"""Symbols in every alphabet."""

LENGTHS: Final = (4, 5, 6)
"""Lengths of the lists in prompts."""


def _alphabets(table: str) -> tuple[list[str], ...]:
    return tuple(line.split() for line in table.strip().splitlines())


# The last alphabet's words name the new tasks too. The bases meet them as symbols of lists, so their
# embeddings are trained, but never in the place of an operation.
SHARED_ALPHABETS: Final = _alphabets("""
a b c d e f g h i j k l m n o p
A B C D E F G H I J K L M N O P
0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi
red orange yellow green cyan blue violet pink brown black grey white gold silver bronze copper
amber blend cross drift ember fable glide haste ivory jolly knack latch mirror noble orbit prism
""")
"""Alphabets of every model, one a line, each in its order."""

EXTRA_ALPHABETS: Final = _alphabets("""
1st 2nd 3rd 4th 5th 6th 7th 8th 9th 10th 11th 12th 13th 14th 15th 16th
#0 #1 #2 #3 #4 #5 #6 #7 #8 #9 #10 #11 #12 #13 #14 #15
""")
"""Alphabets that only a model with an extended vocabulary has."""


def _shift(symbols: Symbols, by: int) -> Symbols:
    return [(symbol + by) % SIZE for symbol in symbols]


def _swap(symbols: Symbols) -> Symbols:
    return [symbols[-1], *symbols[1:-1], symbols[0]] if len(symbols) > 1 else symbols


def _pairs(symbols: Symbols) -> Symbols:
    swapped = list(symbols)
    for left in range(0, len(symbols) - 1, 2):
        swapped[left], swapped[left + 1] = symbols[left + 1], symbols[left]
    return swapped


OPERATIONS: Final[dict[str, Callable[[Symbols], Symbols]]] = {
    "rev": lambda symbols: symbols[::-1],
    "rotl": lambda symbols: symbols[1:] + symbols[:1],
    "rotr": lambda symbols: symbols[-1:] + symbols[:-1],
    "sort": sorted,
    "inc": lambda symbols: _shift(symbols, 1),
    "dec": lambda symbols: _shift(symbols, -1),
    "swap": _swap,
    "pairs": _pairs,
    "tail": lambda symbols: symbols[1:],
    "init": lambda symbols: symbols[:-1],
    "dup": lambda symbols: [symbol for symbol in symbols for _ in range(2)],
    "odds": lambda symbols: symbols[::2],
}
"""What the bases are taught, alone and in pairs."""


def _composed(*names: str) -> Callable[[Symbols], Symbols]:
    def operation(symbols: Symbols) -> Symbols:
        for name in names:
            symbols = OPERATIONS[name](symbols)
        return symbols

    return operation


TASKS: Final[dict[str, Callable[[Symbols], Symbols]]] = {
    # A new name for a composition of two taught operations.
    "mirror": _composed("rev", "inc"),
    # Compositions of three, which the bases never saw.
    "drift": _composed("rotl", "pairs", "dec"),
    "orbit": _composed("sort", "rev", "tail"),
    # A new rule: only every second symbol moves up, which no composition of taught operations does.
    "blend": lambda symbols: [(symbol + place % 2) % SIZE for place, symbol in enumerate(symbols)],
}
"""What the adapters learn: operations that no base was taught."""

PROGRAMS: Final = tuple(
    [(name,) for name in OPERATIONS]
    + [(one, two) for one in OPERATIONS for two in OPERATIONS if (one, two) != ("dup", "dup")]
)
"""Every sequence of operations that the bases are taught; two ``dup`` would only make long lists."""

SPLITS: Final = ("train", "validation", "test")


def split_of(items: Sequence[str]) -> str:
    """The split that a list belongs to, by its content alone: 80 % train, 10 % validation, 10 % test."""
    bucket = zlib.crc32(" ".join(items).encode()) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def vocabulary(extended: bool) -> list[str]:
    """Every word of the language without the special tokens; ``extended`` adds the extra alphabets."""
    alphabets = SHARED_ALPHABETS + (EXTRA_ALPHABETS if extended else ())
    return [*OPERATIONS, ":", "=", *(symbol for alphabet in alphabets for symbol in alphabet)]


def example(program: Sequence[str], symbols: Symbols, alphabet: Sequence[str]) -> dict[str, str]:
    """One prompt and completion, for taught operations and task names alike."""
    result = symbols
    for name in program:
        result = (TASKS[name] if name in TASKS else OPERATIONS[name])(result)
    prompt = " ".join([*program, ":", *(alphabet[symbol] for symbol in symbols), "="])
    return {"prompt": prompt, "completion": "".join(f" {alphabet[symbol]}" for symbol in result)}


def examples(
    programs: Sequence[Sequence[str]], split: str, seed: int, extended: bool = False
) -> Iterator[dict[str, str]]:
    """Endless examples of ``programs``, chosen evenly, on random lists of distinct symbols from one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    alphabets = SHARED_ALPHABETS + (EXTRA_ALPHABETS if extended else ())
    generator = random.Random(f"{split} {seed}")
    while True:
        alphabet = generator.choice(alphabets)
        symbols = generator.sample(range(SIZE), generator.choice(LENGTHS))
        if split_of([alphabet[symbol] for symbol in symbols]) == split:
            yield example(generator.choice(programs), symbols, alphabet)
