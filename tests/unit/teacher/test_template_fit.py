"""Which template fits an adapter, judged by losses with and without it."""

from __future__ import annotations

import math

import pytest

from lorasuite.data import Message, Row, read_template
from lorasuite.teacher import TextLoss, candidates, judge_templates, rendered

Losses = list[TextLoss | None]


def losses(bits: float, noise: float = 0.0, rows: int = 8) -> Losses:
    """Of rows of ten bytes: so many bits per byte, a little more and less by turns."""
    return [TextLoss(nats=10 * (bits + noise * (-1) ** n) * math.log(2), bytes=10, rows=1) for n in range(rows)]


def test_a_template_that_fits_says_nothing() -> None:
    found = judge_templates({"question": (losses(2), losses(0.5)), "alpaca": (losses(2), losses(1.5))}, "question")
    assert found is not None and found.best == "question" and found.warning is None and found.rows == 8
    assert found.fits["question"].gain == pytest.approx(1.5) and list(found.fits) == ["question", "alpaca"]


def test_another_one_fits_better() -> None:
    found = judge_templates({"question": (losses(2), losses(2)), "alpaca": (losses(2), losses(0.5))}, "question")
    assert found is not None and found.best == "alpaca" and found.warning is not None
    assert "not clearly better" in found.warning and "--template alpaca" in found.warning
    some = judge_templates({"question": (losses(2), losses(1.5)), "alpaca": (losses(2), losses(0.5))}, "question")
    assert some is not None and some.warning is not None and "fits alpaca best" in some.warning
    # a base that the other template only confuses says nothing of the adapter
    confused = judge_templates({"question": (losses(2), losses(0.5)), "chatml": (losses(9), losses(0.6))}, "question")
    assert confused is not None and confused.best == "chatml" and confused.warning is None


def test_chance_and_trifles_are_no_gain() -> None:
    chance = judge_templates({"question": (losses(2), losses(1.9, noise=1.5))}, "question")
    trifle = judge_templates({"question": (losses(2), losses(1.999))}, "question")
    for found in (chance, trifle):
        assert found is not None and found.warning is not None and "as a Jinja file" in found.warning


def test_rows_too_long_and_too_few() -> None:
    short: Losses = [None, *losses(1, rows=4)]
    found = judge_templates({"a": (short, losses(1, rows=5)), "b": (losses(1, rows=5), losses(1, rows=5))}, "a")
    assert found is not None and found.rows == 4
    assert judge_templates({"a": (losses(2, rows=3), losses(1, rows=3))}, "a") is None


def test_what_is_tried() -> None:
    row = Row("instruction", instruction="Add.", input="1 2", output="3")
    chat = Row("messages", messages=(Message("user", "a"), Message("assistant", "b")))
    tried = candidates([row], read_template("alpaca"))
    assert {"alpaca", "question", "vicuna", "chatml"} <= set(tried)
    prompts = {rendered([row], name, text)[0].prompt for name, text in tried.items()}
    assert len(prompts) == len(tried)
    (name,) = candidates([chat], read_template("alpaca"))
    assert rendered([chat], name, "") == [chat]
    found = judge_templates({name: (losses(2), losses(2))}, name)
    assert found is not None and found.warning is not None and "by the chat template in use" in found.warning
