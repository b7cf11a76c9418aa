"""Answers to prompts, generated in batches that do not change them.

Cost: of each batch one pass over the prompts and one a token over the rows that are not done. At 8B in bfloat16 on one
GPU a step of 32 rows reads the weights once, 16 GB, whatever its rows; on a CPU it costs 2 × 8·10⁹ operations a row.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lorasuite.data import UNFINISHED, Message, Row, end_tokens, prompt_ids
from lorasuite.errors import DataError, Problem
from lorasuite.teacher._settings import TeacherSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens that a model without a stated context length is taken to read.
DEFAULT_CONTEXT = 2048
#: In the place of an answer, where a conversation is rendered without one.
_STAND_IN = Message(role="assistant", content="answer")


@dataclass(frozen=True)
class Prompt:
    """A row without its answer, as text and as token ids; ``number`` decides what is drawn for its answer."""

    number: int
    row: Row
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a prompt."""

    prompt: Prompt
    text: str
    log_prob: float
    """Mean log-probability of its tokens, at temperature 1, in nats."""
    tokens: int
    """Its length, without the end token."""
    ended: bool
    """Whether it came to an end token."""
    ids: tuple[int, ...] = ()
    """Its tokens, the end token included where it came to one."""
    log_probs: tuple[float, ...] = ()
    """The log-probability of each, at temperature 1 over the whole vocabulary, in nats."""

    def row(self) -> Row:
        """The prompt's row with this answer; one that did not end is marked :data:`UNFINISHED`."""
        row, extra = self.prompt.row, {} if self.ended else {UNFINISHED: True}
        match row.kind:
            case "instruction":
                return replace(row, output=self.text.strip(), extra=extra)
            case "completion":
                return replace(row, prompt=self.prompt.text, completion=self.text, extra=extra)
            case "messages":
                turn = Message(role="assistant", content=self.text.strip())
                return replace(row, messages=(*row.messages, turn), extra=extra)
            case "text":
                return replace(row, text=self.prompt.text + self.text, extra=extra)


class Generator:
    """What every engine does alike: prompts made of rows, and answers of tokens.

    Args:
        model: or what tells of it, with its ``config`` and ``generation_config``.
        tokenizer: the model's.
        settings: of the teacher.
        temperature: of the sampling; 0 is greedy.
        seed: with a prompt's number, the seed of its answer.

    Raises:
        DataError: if the tokenizer has no EOS token.
    """

    #: What generates, as the record names it.
    engine = ""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: TeacherSettings,
        temperature: float,
        seed: int | str,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.temperature, self.seed = temperature, seed
        if tokenizer.eos_token_id is None:
            remedy = "Set tokenizer.eos_token to the one the base ends texts with"
            raise DataError([Problem("tokenizer", "has no EOS token", remedy)])
        self.context = context_length(model)

    def prompt(self, number: int, row: Row) -> Prompt:
        """An unanswered row as the model reads it.

        Raises:
            DataError: if it leaves no room for an answer, or is a conversation and there is no chat template.
        """
        text = self._text(row)
        if text:
            ids = prompt_ids(self.tokenizer, text, special=row.kind != "messages")
        else:
            start = self.tokenizer.bos_token_id
            ids = [int(self.tokenizer.eos_token_id if start is None else start)]
        if len(ids) >= self.context:
            what = f"has {len(ids)} tokens, and the model reads {self.context}"
            raise DataError([Problem(f"prompt {text[:40]!r}", what, "Shorten it, or leave it out")])
        return Prompt(number, row, text, tuple(ids))

    def room(self, prompt: Prompt) -> int:
        """Tokens that an answer to it may have."""
        return min(self.settings.max_new_tokens, self.context - len(prompt.ids))

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[list[Answer]]:
        """The answers, some at a time."""
        raise NotImplementedError

    def _text(self, row: Row) -> str:
        if row.kind == "text":
            return row.text
        if row.kind != "messages":
            return row.prompt_and_completion()[0]
        # Rendered with a stand-in for the answer: the same checks, and the same generation prompt as elsewhere.
        return replace(row, messages=(*row.messages, _STAND_IN)).prompt_and_completion(self.tokenizer)[0]

    def answer(self, prompt: Prompt, ids: Sequence[int], log_probs: Sequence[float], ends: Sequence[int]) -> Answer:
        """Tokens as text: what the whole says beyond its prompt, so that a leading space is kept."""
        stop = next((at for at, token in enumerate(ids) if token in ends), None)
        ended = stop is not None
        body = ids[:stop]
        used = log_probs[: len(body) + ended]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = str(self.tokenizer.decode(list(prompt.ids), **options))
        whole = str(self.tokenizer.decode([*prompt.ids, *body], **options))
        answer = whole.removeprefix(before) if whole.startswith(before) else str(self.tokenizer.decode(body, **options))
        # Where no one token stands for it, a text ends the answer: what was written beyond it is not the answer's.
        if (end := prompt.row.end_of_answer) and end in answer:
            answer, ended = answer.partition(end)[0], True
        mean = sum(used) / max(len(used), 1)
        return Answer(prompt, answer, mean, len(body), ended, tuple(ids[: len(body) + ended]), tuple(used))

    def ends(self, prompt: Prompt, chat: bool) -> list[int]:
        """The tokens that end an answer to a prompt like this one."""
        row = prompt.row
        if not chat:
            return end_tokens(self.model, self.tokenizer, [row.end_of_answer])
        suffix = replace(row, messages=(*row.messages, _STAND_IN)).target(self.tokenizer)[2]
        return end_tokens(self.model, self.tokenizer, [suffix])

    def drawn(self, number: int) -> int:
        """The seed of a prompt's answer, for an engine that takes one of 31 bits for each request."""
        return random.Random(f"{self.seed} {number}").getrandbits(31)

    def never(self, ends: Sequence[int], chat: bool) -> list[int]:
        """The tokens that are not to be written: special ones that do not end an answer, but for conversations."""
        return [] if chat else sorted(set(self.tokenizer.all_special_ids) - set(ends))


class AnswerGenerator(Generator):
    """Generates answers with transformers, in batches of prompts of like lengths, padded on the left."""

    engine = "transformers"

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[list[Answer]]:
        """The answers, a batch at a time, short prompts first.

        All of a batch may be answered at the same length: where the context ends before ``max_new_tokens``, prompts of
        one length make a batch, for a longer one would shorten the others' answers.
        """
        alike: dict[tuple[bool, str], list[Prompt]] = {}
        for prompt in prompts:
            alike.setdefault((prompt.row.kind == "messages", prompt.row.end_of_answer), []).append(prompt)
        for (chat, _), found in sorted(alike.items()):
            members = sorted(found, key=lambda p: len(p.ids))
            for _, together in itertools.groupby(members, self.room):
                for batch in _batched(together, self.settings.batch_size):
                    yield self._batch(batch, chat)

    def _batch(self, prompts: Sequence[Prompt], chat: bool) -> list[Answer]:
        width = max(len(prompt.ids) for prompt in prompts)
        steps = self.room(prompts[0])
        ends = self.ends(prompts[0], chat)
        written, log_probs = self._run(prompts, width, steps, ends, self.never(ends, chat))
        return [self.answer(*found, ends) for found in zip(prompts, written, log_probs, strict=True)]

    def _run(
        self, prompts: Sequence[Prompt], width: int, steps: int, ends: list[int], never: list[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The tokens written to each prompt, and their log-probabilities; rows leave the batch when half are done."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        from lorasuite.teacher._sampling import HalfDone, SeededSampler

        device = next(self.model.parameters()).device
        pad = int(self.tokenizer.eos_token_id)
        ids = torch.tensor([[pad] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
        sampler = SeededSampler(
            [f"{self.seed} {prompt.number}" for prompt in prompts],
            steps,
            temperature=self.temperature,
            top_p=self.settings.top_p,
            size=len(self.tokenizer),
            never=never,
        )
        written: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        cache: Any = None
        with self._plain_generation():
            while live and (left := steps - ids.shape[1] + width):
                plan = GenerationConfig(
                    max_new_tokens=left,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=ends,
                    pad_token_id=pad,
                    use_cache=True,
                    return_dict_in_generate=True,
                )
                before = ids.shape[1]
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=plan,
                    logits_processor=LogitsProcessorList([sampler]),
                    stopping_criteria=StoppingCriteriaList([HalfDone(ends)]),
                    **({} if cache is None else {"past_key_values": cache}),
                )
                new = out.sequences[:, before:]
                for row, tokens, likely in zip(live, new.tolist(), sampler.take(), strict=True):
                    written[row] += tokens
                    log_probs[row] += likely
                going = ~torch.isin(new, torch.tensor(ends, device=device)).any(dim=1)
                stay = going.nonzero()[:, 0]
                live = [live[n] for n in stay.tolist()]
                ids, cache = out.sequences[stay], getattr(out, "past_key_values", None)
                mask = torch.cat([mask[stay], mask.new_ones(len(stay), new.shape[1])], dim=1)
                sampler.keep(stay)
                if live and hasattr(cache, "batch_select_indices"):
                    cache.batch_select_indices(stay)
                else:  # none that can be cut: what it held is computed again
                    cache = None
        return written, log_probs

    @contextlib.contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """The model in evaluation mode and without the checkpoint's own penalties and limits, which generate would take
        wherever a plan leaves something open."""
        from transformers import GenerationConfig

        holder = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        configured, holder.generation_config = holder.generation_config, GenerationConfig()
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            holder.generation_config = configured
            self.model.train(training)


def generator(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: TeacherSettings, temperature: float, seed: int | str
) -> Generator:
    """The generator of a teacher: a model of transformers or PEFT, or :class:`lorasuite.teacher.VLLMTeacher`.

    Raises:
        DataError: if the tokenizer has no EOS token.
    """
    from lorasuite.teacher._vllm import VLLMGenerator, VLLMTeacher

    kind = VLLMGenerator if isinstance(model, VLLMTeacher) else AnswerGenerator
    return kind(model, tokenizer, settings, temperature, seed)


def _batched(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    left = iter(prompts)
    while batch := list(itertools.islice(left, size)):
        yield batch


def context_length(model: Any) -> int:
    """Tokens the model can read at once, as its config says; :data:`DEFAULT_CONTEXT` where it does not."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return DEFAULT_CONTEXT
