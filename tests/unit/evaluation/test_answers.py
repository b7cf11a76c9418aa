"""Answer extraction on outputs as models write them: what is found, what is not, and what LLM-Adapters got wrong."""

from __future__ import annotations

import pytest

from lorasuite.evaluation import extract, extract_choice, extract_letter, extract_number, matches

NUMBERS: list[tuple[str, float | None]] = [
    ("The answer is 42.", 42),
    (" A: There were 7 crayons. Mary took 3 out, so there are 7 - 3 = 4 crayons. The answer is 4.", 4),
    ("so now there are 7 - 3 = 4 crayons.", 4),
    ("42", 42),
    (" 1,234 ", 1234),
    ("The answer is 1,234,567.", 1234567),
    ("The answer is $1,234.50.", 1234.5),
    ("She pays $18", 18),
    ("He owes -$5", -5),
    ("He owes $-5", -5),
    ("The answer is -15.", -15),
    ("x = -3", -3),
    ("The answer is −4", -4),
    ("(-3)", -3),
    ("5, -3", -3),
    ("so it is 10 -7", 7),
    ("10-3", 3),
    ("from 3–5", 5),
    ("20-13=7", 7),
    ("The answer is 9.8.", 9.8),
    ("0.6 of a loaf", 0.6),
    ("it is .5", 0.5),
    ("3.", 3),
    ("The answer is 25%.", 25),
    ("The answer is 15cm", 15),
    ("The answer is 120 km/h.", 120),
    ("The answer is 18 apples. There are 7 days in a week.", 18),
    ("The answer is 18.\n\nNext: 2 + 2 = 4", 18),
    ("The answer is 5. No, the answer is 6.", 6),
    ("The answer is 5 + 3 = 8.", 8),
    ("Answer: 8", 8),
    ("Answer: There were 7 crayons, so 4 are left", 4),
    ("Final answer: **18**", 18),
    ("#### 72", 72),
    ("#### 1,000", 1000),
    ("The answer is $\\boxed{12}$.", 12),
    ("so \\boxed{3} and not 4", 3),
    ("The answer is 1/2.", 0.5),
    ("The answer is $\\frac{3}{4}$", 0.75),
    ("The answer is 1.8333333333333333.", 1.8333333333333333),
    ("about 1e3 people", 1000),
    ("The answer is unknown, but she had 3", 3),
    ("H2O", None),
    ("The answer is four.", None),
    ("I do not know.", None),
    ("", None),
    ("\n", None),
]
LETTERS: list[tuple[str, str | None]] = [
    ("The answer is (D).", "D"),
    (" Rationale: The greatest even integer is 1000. The answer is (A).", "A"),
    ("answer: B", "B"),
    ("Answer: (C)", "C"),
    ("**Answer:** C", "C"),
    ("The correct answer is option D", "D"),
    ("The answer choice is E.", "E"),
    ("The answer is B) 20%", "B"),
    ("Answer is (c)", "C"),
    ("The answer is \\boxed{B}", "B"),
    ("$\\boxed{\\text{E}}$", "E"),
    ("The answer is A. No, the answer is C.", "C"),
    ("(A) is too small, so it must be (C)", "C"),
    ("Each Box costs 3, hence C) 12", "C"),
    ("B", "B"),
    ("(D)", "D"),
    ("e)", "E"),
    ("E.", "E"),
    ("C. because 3 x 4 = 12", "C"),
    ("Because Dan Ate Bread", None),
    ("(A) 21% (B) 20% (C) 25% (D) 33% (E) 18%", None),
    ("The answer is a number", None),
    ("The answer is F", None),
    ("A: There were 7 crayons", None),
    ("23.65", None),
    ("", None),
]
FOUR = ("answer1", "answer2", "answer3", "answer4")
CHOICES: list[tuple[str, tuple[str, ...], str | None]] = [
    ("the correct answer is answer3", FOUR, "answer3"),
    ("The correct answer is: Answer3.", FOUR, "answer3"),
    ("the correct answer is **answer1**", FOUR, "answer1"),
    ("Answer 2", FOUR, "answer2"),
    ("answer2\nanswer3", FOUR, "answer2"),
    ("answer1 is wrong, the correct answer is answer4", FOUR, "answer4"),
    ("the correct answer is answer4, not answer1", FOUR, "answer4"),
    ("not answer1 but answer4", FOUR, "answer4"),
    ("Answer format: answer1/answer2/answer3/answer4\nthe correct answer is answer2", FOUR, "answer2"),
    ("answer1/answer2/answer3/answer4", FOUR, None),
    ("answer10", FOUR, None),
    ("answer5", FOUR, None),
    ("the answer is oxygen", FOUR, None),
    ("", FOUR, None),
    ("the correct answer is solution2", ("solution1", "solution2"), "solution2"),
    ("Solution 1 works because it is dry", ("solution1", "solution2"), "solution1"),
    ("the correct answer is ending3", ("ending1", "ending2", "ending3", "ending4"), "ending3"),
    ("the correct answer is option1", ("option1", "option2"), "option1"),
    ("Option-2", ("option1", "option2"), "option2"),
    ("the correct answer is true", ("true", "false"), "true"),
    ("True.", ("true", "false"), "true"),
    ("FALSE", ("true", "false"), "false"),
    ("the correct answer is 'false'", ("true", "false"), "false"),
    ("true/false", ("true", "false"), None),
    ("untrue", ("true", "false"), None),
    ("yes", ("true", "false"), None),
]


@pytest.mark.parametrize(("output", "expected"), NUMBERS)
def test_numbers(output: str, expected: float | None) -> None:
    assert extract_number(output) == expected
    answer = extract(output, "number")
    assert answer is None if expected is None else answer is not None and float(answer) == expected


@pytest.mark.parametrize(("output", "expected"), LETTERS)
def test_letters(output: str, expected: str | None) -> None:
    assert extract_letter(output) == extract(output, "letter") == expected


@pytest.mark.parametrize(("output", "choices", "expected"), CHOICES)
def test_choices(output: str, choices: tuple[str, ...], expected: str | None) -> None:
    assert extract_choice(output, choices) == extract(output, "choice", choices) == expected


def test_right_and_wrong() -> None:
    gold = "1.8333333333333335"
    assert matches(extract("The answer is 1.833.", "number"), gold, "number")
    assert not matches(extract("The answer is 1.83.", "number"), gold, "number")
    assert matches(extract("12 apples", "number"), "12.0", "number")
    assert matches("0.501", "0.5", "number")
    assert not matches("0.5011", "0.5", "number")
    assert not matches(extract("12 apples", "number"), "-12.0", "number")
    assert not matches(extract("9" * 400, "number"), "12.0", "number")
    assert not matches(None, "12.0", "number")
    assert not matches(None, "", "choice")
    assert matches("B", "B", "letter")
    assert not matches("B", "A", "letter")
