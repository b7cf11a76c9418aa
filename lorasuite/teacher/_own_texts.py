"""Texts that a bare base writes from nothing, for fine-tunes to rehearse (:mod:`lorasuite.training._rehearsal`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasuite.data import Row
from lorasuite.progress import Progress
from lorasuite.teacher._generation import AnswerGenerator
from lorasuite.teacher._settings import TeacherSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def own_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    *,
    seed: int,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows of text that the model writes after its BOS (or EOS, where there is no BOS), sampled at temperature 1.

    At 8B in bfloat16 on a GPU 64 texts of 32 tokens at once read the weights 32 times, 0.5 TB.

    Args:
        model: without an adapter, on its device.
        tokenizer: the model's.
        count: texts asked for; those without a word are left out.
        tokens: of a text, at most.
        seed: with a text's number, what is drawn; how many are written at once changes nothing.
        batch_size: texts written at once.
        progress: told of the texts written.

    Raises:
        DataError: if the tokenizer has no EOS token.
    """
    settings = TeacherSettings(max_new_tokens=tokens, batch_size=batch_size)
    writer = AnswerGenerator(model, tokenizer, settings, 1.0, f"{seed} own texts")
    asked = [writer.prompt(number, Row("text")) for number in range(count)]
    found = []
    for batch in writer.generate(asked):
        found += batch
        if progress is not None:
            progress(len(found), count)
    found.sort(key=lambda answer: answer.prompt.number)
    return [answer.row() for answer in found if answer.text.strip()]
