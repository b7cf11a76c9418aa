"""How much an adapter changes what the old base says to a prompt, and how alike prompts are to the old base.

The signal is that of TuneShift-KD (arXiv 2603.24518): prompts whose answer the adapted model is sure of and the bare
base is not are those that the adapter was trained for. It costs one greedy answer of at most
:data:`PROBE_TOKENS` tokens and two forward passes a prompt; nothing is trained.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasuite.data import Row, accepted, prompt_ids
from lorasuite.errors import DataError
from lorasuite.progress import Progress
from lorasuite.teacher._generation import Answer, Generator, Prompt, context_length, generator
from lorasuite.teacher._settings import TeacherSettings
from lorasuite.teacher._worth import text_losses
from lorasuite.training import LabelHead, collate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

#: Tokens of the answer by which a prompt is judged, at most.
PROBE_TOKENS = 32
#: Nats a token below which an adapter's loss on its own answer makes no difference: it is sure.
SURE = 0.05
#: Temperature and nucleus of what the old base drafts: of a small base, hotter texts fall apart.
DRAFT_TEMPERATURE, DRAFT_TOP_P = 0.8, 0.95


@dataclass(frozen=True)
class Pull:
    """How much the adapter changes the answer to a prompt."""

    row: Row
    #: What the old base with the adapter answers, greedily.
    answer: str
    #: Nats a token, the end token included: the old base's loss on that answer, less its loss with the adapter.
    nats: float
    #: The loss with the adapter on that answer of its own, in nats a token: how sure of it it is.
    loss: float = 0.0

    @property
    def score(self) -> float:
        """By which prompts are ranked: how often the signal holds the adapter's own loss.

        The answer must be one that the bare base does not expect and the adapter is sure of, as TuneShift-KD asks.
        To a prompt that is none of its task an adapter for labels answers with one that it makes up, in doubt.
        """
        return self.nats / max(self.loss, SURE)


def ranked(pulls: Sequence[Pull]) -> list[int]:
    """Places of prompts, best first by :attr:`Pull.score`, which prompts of one answer share.

    The k-th best of those that get the same answer counts for a k-th of its score: of an adapter for labels the best
    are then prompts of many labels. Where all answers differ, scores alone decide.
    """
    places = sorted(range(len(pulls)), key=lambda n: -pulls[n].score)
    alike: Counter[str] = Counter()
    worth = {}
    for n in places:
        alike[pulls[n].answer] += 1
        worth[n] = pulls[n].score / alike[pulls[n].answer]
    return sorted(places, key=lambda n: -worth[n])


class Probe:
    """The old base with the adapter put on, as sources of prompts ask it.

    Args:
        model: the old base in PEFT, its adapter unmerged, on its device.
        tokenizer: that which the adapter is used with.
        settings: of the teacher.
        seed: of everything that is drawn.
        progress: told of the texts written, anew each time that some are.
        new_tokenizer: that of the base that reads them later; conversations are rendered by both chat templates, or
            left out. None: the first alone.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TeacherSettings,
        seed: int,
        progress: Progress | None = None,
        new_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.seed = model, tokenizer, settings, seed
        self.progress, self.new_tokenizer = progress, new_tokenizer
        #: Rows that nothing was written to: too long, or conversations that are not rendered.
        self.left_out = 0

    def write(
        self,
        rows: Sequence[Row],
        salt: str,
        *,
        adapter: bool,
        temperature: float = DRAFT_TEMPERATURE,
        tokens: int = 256,
    ) -> list[Answer]:
        """What the old base writes to rows, in their order.

        Left out, and counted, are rows that leave no room for an answer, conversations that a chat template refuses,
        and all of these conversations where it takes too long for one or writes too much.

        Args:
            salt: with the seed, what is drawn.
            adapter: whether the adapter is on.
            tokens: of an answer, at most.
        """
        settings = self.settings.model_copy(update={"max_new_tokens": tokens, "top_p": DRAFT_TOP_P})
        writer = generator(self.model, self.tokenizer, settings, temperature, f"{self.seed} {salt}")
        asked = list(_fitting(writer, self._rendered(rows)))
        self.left_out += len(rows) - len(asked)
        with contextlib.nullcontext() if adapter else self.model.disable_adapter():
            found: list[Answer] = []
            for batch in writer.generate(asked):
                found += batch
                if self.progress is not None:
                    self.progress(len(found), len(asked))
        return sorted(found, key=lambda answer: answer.prompt.number)

    def pulls(self, rows: Sequence[Row]) -> list[Pull]:
        """The signal of each prompt that gets an answer, in their order.

        Args:
            rows: without their answers; of a text row all of it is the prompt.
        """
        tokens = min(self.settings.max_new_tokens, PROBE_TOKENS)
        written = [a for a in self.write(rows, "pull", adapter=True, temperature=0, tokens=tokens) if a.text.strip()]
        kept = self._rendered([_answered(answer) for answer in written])
        answers, answered = [written[n] for n, _ in kept], [row for _, row in kept]
        size = self.settings.batch_size
        tuned = text_losses(self.model, self.tokenizer, answered, batch_size=size)
        with self.model.disable_adapter():
            bare = text_losses(self.model, self.tokenizer, answered, batch_size=size)
        return [
            Pull(
                answer.prompt.row,
                answer.text.strip(),
                (before.nats - after.nats) / len(answer.ids),
                after.nats / len(answer.ids),
            )
            for answer, before, after in zip(answers, bare, tuned, strict=True)
            if before is not None and after is not None
        ]

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Mean hidden states of the bare old base over each text, centred and of length 1: ``(texts, D)`` float32."""
        device = next(self.model.parameters()).device
        ids = [self._ids(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]), reverse=True)
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        with self.model.disable_adapter(), torch.no_grad():
            head = LabelHead(self.model)
            for start in range(0, len(order), self.settings.batch_size):
                members = order[start : start + self.settings.batch_size]
                batch = collate([{"input_ids": ids[n], "attention_mask": [1] * len(ids[n])} for n in members])
                states = head.states({key: value.to(device) for key, value in batch.items()}).float()
                weights = batch["attention_mask"].to(states.device)[..., None]
                for n, mean in zip(members, (states * weights).sum(1) / weights.sum(1), strict=True):
                    found[n] = mean
        vectors = torch.stack(found)
        return torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)

    @property
    def context(self) -> int:
        """Tokens that the old base reads at once."""
        return context_length(self.model)

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(prompt_ids(self.tokenizer, text))

    def text(self, row: Row) -> str:
        """A prompt as the model reads it."""
        return Generator(self.model, self.tokenizer, self.settings, 0.0, 0).prompt(0, row).text

    def _rendered(self, rows: Sequence[Row]) -> list[tuple[int, Row]]:
        """Rows with their places, without conversations that are not :func:`lorasuite.data.accepted`."""
        readers = [self.tokenizer] if self.new_tokenizer is None else [self.tokenizer, self.new_tokenizer]
        kept = {id(row) for row in accepted([row for row in rows if row.kind == "messages"], readers)[0]}
        return [(n, row) for n, row in enumerate(rows) if row.kind != "messages" or id(row) in kept]

    def _ids(self, text: str) -> list[int]:
        return prompt_ids(self.tokenizer, text or " ")[: self.context]


def farthest(vectors: Tensor, count: int) -> list[int]:
    """Which vectors to keep for the kept ones to lie far apart: greedily, always the one farthest from those kept.

    The two-fold approximation of k-centre (Gonzalez 1985). The first vector is kept first.

    Args:
        vectors: ``(n, D)``.
        count: how many; all where there are fewer.

    Returns:
        places in ``vectors``, in the order they were taken.
    """
    if not len(vectors):
        return []
    kept = [0]
    nearest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    while len(kept) < min(count, len(vectors)):
        nearest = torch.minimum(nearest, (vectors - vectors[kept[-1]]).square().sum(1))
        nearest[kept] = -1
        kept.append(int(nearest.argmax()))
    return kept


def _fitting(writer: Generator, rows: Sequence[tuple[int, Row]]) -> Iterator[Prompt]:
    for number, row in rows:
        with contextlib.suppress(DataError):  # too long
            yield writer.prompt(number, row)


def _answered(answer: Answer) -> Row:
    """The answer as a row whose answer alone is scored, of running text too."""
    if answer.prompt.row.kind != "text":
        return answer.row()
    asked = Row(kind="completion", prompt=answer.prompt.text)
    return replace(answer, prompt=replace(answer.prompt, row=asked)).row()
