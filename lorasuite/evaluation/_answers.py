"""The answer in what a model wrote: a number, an option letter, or one of the named choices.

LLM-Adapters (arXiv 2304.01933) takes the last number, the first capital A–E and the first choice found anywhere in the
output. That is kept as the fallback; what its rules get wrong is mended here, and ``docs/evaluation.md`` lists it.
Every function returns None where the output holds no answer, which counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

AnswerKind = Literal["number", "letter", "choice"]

#: Numbers closer than this are the same (LLM-Adapters).
TOLERANCE = 1e-3

#: What announces an answer; "answer:" only right before it, as it also heads a chain of thought.
_STATED = r"(?:\bans(?:wer)?s?\b(?:\s+choice)?\s*(?:(?:is|are|=)\s*:?|(?P<colon>:))|####)"

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+"
_NUMBER = re.compile(
    # a minus counts where it is no operator, hyphen or dash; a digit within a word (H2O, x2) is no number
    rf"(?P<sign>(?<![\d)\]}}]\s)(?<![\w.)\]}}])[-−–])?(?:[$£€¥]\s?(?P<inner>-)?)?"
    rf"(?<![A-Za-z_])(?<!\d\.)(?P<digits>{_DIGITS})(?P<power>[eE][-+]?\d+\b)?"
    rf"(?:\s?/\s?(?P<under>\d+(?![\d.,/]*\d)))?"
)
_STATEMENT = re.compile(_STATED, re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
#: Where a statement ends: at the line's end, or a full stop that is no decimal point.
_END = re.compile(r"\n|\.(?!\d)")


def extract(output: str, kind: AnswerKind, choices: Sequence[str] = ()) -> str | None:
    """The answer in an output, as text: a number as Python writes it, ``"A"`` … ``"E"``, or one of ``choices``."""
    if kind == "number":
        value = extract_number(output)
        return None if value is None else repr(value)
    return extract_letter(output) if kind == "letter" else extract_choice(output, choices)


def matches(answer: str | None, gold: str, kind: AnswerKind) -> bool:
    """Whether an extracted answer is the right one; numbers to within :data:`TOLERANCE`."""
    if answer is None:
        return False
    if kind == "number":
        # the margin is for what float arithmetic adds to a difference of exactly the tolerance
        return abs(float(answer) - float(gold)) <= TOLERANCE * (1 + 1e-9)
    return answer == gold.strip()


def extract_number(output: str) -> float | None:
    """The number of the last statement such as "The answer is 42", ``#### 42`` or ``\\boxed{42}``.

    Without such a statement it is the last number there is.

    Thousands separators, currency signs, percent signs, units and ``**bold**`` are read over; simple fractions
    (``1/2``, ``\\frac{1}{2}``) are divided. In "The answer is 5 + 3 = 8" it is the number after the last equals sign.
    """
    text = _FRACTION.sub(r" \1/\2", output).replace("\\", "").replace("*", "")
    for statement in reversed([*_STATEMENT.finditer(text), *re.finditer(r"boxed\s*\{", text)]):
        rest = text[statement.end() :]
        end = _END.search(rest)
        said = rest[: end.start()] if end else rest
        if "boxed" in statement.group():
            said = said.split("}")[0]
        elif statement["colon"] and not _NUMBER.match(said.lstrip()):
            continue
        found = _numbers(said.rpartition("=")[2]) or _numbers(said)
        if found:
            return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[float]:
    values = []
    for match in _NUMBER.finditer(text):
        value = float(match["digits"].replace(",", "") + (match["power"] or ""))
        if match["under"] is not None and float(match["under"]):
            value /= float(match["under"])
        values.append(-value if match["sign"] or match["inner"] else value)
    return values


def extract_letter(output: str) -> str | None:
    """The option (A-E) of the last statement such as "The answer is (B)".

    Without such a statement it is the last in parentheses, ``(B)`` or ``B)``, unless they are the options repeated;
    without those a letter alone, or at the start as "C. …".
    """
    text = output.replace("*", "").replace("\\", "")
    # a lower-case letter counts only in parentheses: "the answer is a number" names no option
    option = r"(?:\(\s*([A-Ea-e])\s*\)|\b([a-e])\)|([A-E])(?![\w'’]))"
    name = r"(?:(?:option|choice|letter)\s+)?"
    stated = re.search(rf"(?s:.*)(?i:{_STATED})\s*(?i:{name})[\"'“`]?{option}", text)
    boxed = re.search(rf"(?s:.*)boxed\{{\s*(?:text\{{)?{option}", text)
    if said := stated or boxed:
        return next(letter for letter in said.groups()[-3:] if letter).upper()
    marked = ["".join(found) for found in re.findall(r"\(\s*([A-E])\s*\)|(?<![\w(])([A-E])\)", text)]
    if marked and (len(marked) == 1 or "".join(marked) != "ABCDE"[: len(marked)]):  # not the options repeated
        return marked[-1]
    alone = re.fullmatch(r"\s*\(?([A-Ea-e])[).:]?\s*", text) or re.match(r"\s*([A-E])\.\s", text)
    return alone[1].upper() if alone else None


def extract_choice(output: str, choices: Sequence[str]) -> str | None:
    """The choice (such as ``answer2``, ``true``) of the first statement "the correct answer is answer2".

    Without such a statement it is the first one named.

    Case, spaces before the number, quotes and emphasis do not count. A list of all choices (the prompt's "Answer
    format: answer1/answer2", repeated) names none of them, nor does "not answer1". The *first* statement counts, unlike
    for numbers: these answers are one line, and what a model writes after it is about something else.
    """
    text = re.sub(r"[*`\"'“”‘’]", "", output.lower())
    # "answer 2", "Option-2" are meant as one word
    stems = {match[1] for choice in choices if (match := re.fullmatch(r"([a-z]+)\d+", choice))}
    for stem in stems:
        text = re.sub(rf"\b{stem}[\s_-]*#?\s*(?=\d)", stem, text)
    name = r"\b(" + "|".join(map(re.escape, choices)) + r")\b"
    text = re.sub(rf"{name}(?:\s*[/|]\s*{name})+", " ", text)
    stated = re.search(rf"\b(?:answer|solution|option|ending|choice)?\s*(?:is|:|=)\s*:?\s*\(?{name}", text)
    if stated is None:
        stated = re.search(rf"(?<!\bnot )(?<!\bisnt ){name}", text)
    return stated[1] if stated else None
