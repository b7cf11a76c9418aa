"""Label-free refresh: the old base with its adapter writes the rows that the new base is fine-tuned on.

In the spirit of Trans-LoRA (arXiv 2405.17258) and TiTok (arXiv 2510.04682): prompts are given or sampled by the teacher
itself, answers are the teacher's, and what is empty, cut off, repeated or degenerate is left out and counted. Of rows
given as prompts the answer is removed before anything else looks at them (:func:`lorasuite.data.unanswered`), so no
label can reach the result.

Every attempt draws its random numbers from its own seed, one number a token (inverse transform sampling), so a row
does not depend on the batch it is written in beyond the rounding of its logits, and on a CPU the same call gives the
same rows.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import IGNORED, UNFINISHED, Kind, Message, Row, encode_pair, prompt_ids, unanswered
from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: ``progress(done, wanted)``, after each batch: rows kept so far, and rows asked for.
Progress = Callable[[int, int], None]

#: Why a written row is left out, in the order the reasons are looked for.
Reason = Literal["empty", "truncated", "repetition", "duplicate", "near_duplicate", "unsure"]

#: Words an n-gram has, where near-duplicates and repetition are looked for.
NGRAM = 4
#: An answer of fewer words is never called repetitive or a near-duplicate: short answers are alike by nature.
SHORTEST = 12
#: Sampling temperature where one answer a prompt is not enough, or the teacher writes running text.
SAMPLED = 0.9
#: Sampling temperature of prompts that the old base writes.
IMITATED = 1.0
#: Attempts for each row asked for, at most.
ATTEMPTS = 3
#: Tokens that a model without a stated context length is given.
CONTEXT = 2048


class TeacherSettings(BaseModel):
    """How the teacher writes, and what of it is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = Field(
        None,
        ge=0,
        description=f"of the teacher's tokens; 0 is greedy; unset: greedy where there is a prompt for each row, else "
        f"{SAMPLED}",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    batch_size: int = Field(32, ge=1, description="rows written at once; does not change what is written")
    text_prefix: int = Field(3, ge=0, description="words of a text row that are given to the teacher as its beginning")
    prefix: str = Field("", description="beginning of every row where no prompts are given")
    suffix: str = Field(
        "", description="end of every prompt where none are given: the old base writes what stands between"
    )
    imitate: bool = Field(
        False,
        description="where prompts are fewer than rows: let the old base write more of them, between the words with "
        "which all given ones begin and end",
    )
    truncated: Literal["text", "keep", "drop"] = Field(
        "text", description="rows cut off at max_new_tokens: kept where they are running text, always, or never"
    )
    max_repetition: float = Field(
        0.5, ge=0, le=1, description=f"drop answers of which more than this share of {NGRAM}-word sequences is repeated"
    )
    max_overlap: float = Field(
        0.8,
        ge=0,
        le=1,
        description=f"drop answers that share more of their {NGRAM}-word sequences with one kept before",
    )
    drop_unsure: float = Field(
        0.0, ge=0, lt=1, description="share of rows dropped for the teacher's low mean log-probability"
    )
    filter: bool = Field(True, description="leave out repetitive, repeated and unsure rows; empty ones never stay")
    min_kept: float = Field(0.1, ge=0, le=1, description="share of the written rows that must pass the filters")


@dataclass
class TeacherRows:
    """What the teacher wrote."""

    rows: list[Row]
    #: The teacher's mean log-probability of each row's tokens, at temperature 1, in nats.
    log_probs: list[float]
    #: Attempts made.
    written: int
    #: Attempts left out, by reason.
    dropped: dict[str, int] = field(default_factory=dict)
    #: Tokens generated, those of dropped attempts included.
    tokens: int = 0
    temperature: float = 0.0
    #: Distinct prompts there were; 0: the teacher wrote from nothing.
    prompts: int = 0
    #: Prompts that the old base wrote itself.
    imitated: int = 0

    def info(self) -> dict[str, Any]:
        """Counts, as JSON."""
        mean = sum(self.log_probs) / len(self.log_probs) if self.log_probs else None
        return {
            "rows": len(self.rows),
            "written": self.written,
            "dropped": self.dropped,
            "tokens": self.tokens,
            "temperature": self.temperature,
            "prompts": self.prompts,
            "imitated": self.imitated,
            "mean_log_prob": mean,
        }


@dataclass(frozen=True)
class _Attempt:
    """One row to be written: the prompt without its answer, as text and as token ids."""

    number: int
    row: Row
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class _Written:
    """An answer: its text, its mean log-probability, its length in tokens, and whether it came to an end."""

    attempt: _Attempt
    answer: str
    log_prob: float
    tokens: int
    ended: bool


# ---------------------------------------------------------------------------------------------------------- writing


def write_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Row] | None,
    samples: int,
    settings: TeacherSettings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> TeacherRows:
    """Let the teacher write ``samples`` rows in the shape of the prompts, or text rows where there are none.

    The adapter stays unmerged: wrap a loaded base with :func:`lorasuite.finetune.attach_adapter`, call this, and
    detach it, for one adapter after the other.

    Args:
        model: the old base with its adapter, on its device.
        tokenizer: the old base's.
        prompts: rows whose prompts are answered; their own answers are never looked at. Of a text row the first
            ``settings.text_prefix`` words are the prompt. With fewer prompts than rows, several answers of each are
            sampled; greedy, one answer of each is all there is. None: the teacher writes from ``settings.prefix`` on.
        progress: called after each batch.

    Returns:
        at most ``samples`` rows, in the order they were tried.

    Raises:
        DataError: without an EOS token, for a prompt that leaves no room for an answer, for a conversation without a
            chat template, or if fewer than ``settings.min_kept`` of the written rows can be used.
    """
    if samples < 1:
        raise DataError([Problem("teacher_samples", f"is {samples}", "Ask for at least one row")])
    given = _distinct(prompts, settings.text_prefix) if prompts else []
    own = len(given)
    if settings.suffix or settings.imitate:
        given += imitated(model, tokenizer, given, samples - own, settings, seed=seed)
    temperature = settings.temperature
    if temperature is None:
        plain = len(given) >= samples and not any(row.kind == "text" for row in given)
        temperature = 0.0 if plain else SAMPLED
    order = list(given)
    random.Random(seed).shuffle(order)
    sources = order or [Row(kind="text", text=settings.prefix)]
    writer = _Writer(model, tokenizer, settings, temperature, seed)
    wanted = samples if not settings.filter else math.ceil(samples / (1 - settings.drop_unsure))
    limit = ATTEMPTS * wanted if temperature else min(len(sources), ATTEMPTS * wanted)
    sieve = _Sieve(settings)
    kept: list[_Written] = []
    dropped: Counter[str] = Counter()
    tried = tokens = 0
    while tried < limit and len(kept) < wanted:
        # As many as should give what is missing, by the share kept so far.
        share = max(len(kept), 1) / tried if tried else 1.0
        count = min(limit - tried, math.ceil((wanted - len(kept)) / share))
        attempts = [writer.attempt(n, sources[n % len(sources)]) for n in range(tried, tried + count)]
        found: dict[int, _Written] = {}
        for batch in writer.write(attempts):
            found |= {written.attempt.number: written for written in batch}
            if progress is not None:
                progress(min(len(kept) + len(found), samples), samples)
        for number in sorted(found):
            written = found[number]
            tokens += written.tokens
            reason = sieve.reason(written) if len(kept) < wanted else None
            if reason is not None:
                dropped[reason] += 1
            elif len(kept) < wanted:
                kept.append(written)
        tried += count
    if settings.filter and settings.drop_unsure and kept:
        surplus = min(len(kept) - 1, round(settings.drop_unsure * len(kept)))
        unsure = {w.attempt.number for w in sorted(kept, key=lambda w: w.log_prob)[:surplus]}
        dropped["unsure"] = len(unsure)
        kept = [w for w in kept if w.attempt.number not in unsure]
    if len(kept) < max(1, math.ceil(settings.min_kept * min(tried, samples))):
        counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.most_common())
        remedy = "Give other prompts or more of them, raise the temperature or max_new_tokens, or loosen the filters"
        raise DataError(
            [Problem("teacher", f"of {tried} rows it wrote only {len(kept)} can be used ({counts})", remedy)]
        )
    kept = kept[:samples]
    return TeacherRows(
        rows=[_answered(w.attempt, w.answer, w.ended) for w in kept],
        log_probs=[w.log_prob for w in kept],
        written=tried,
        dropped=dict(dropped),
        tokens=tokens,
        temperature=temperature,
        prompts=own,
        imitated=len(given) - own,
    )


def frame(prompts: Sequence[str]) -> tuple[str, str]:
    """The words with which all prompts begin, and those with which all end, with the blanks around what differs.

    Both empty for fewer than two prompts, and where the prompts do not end alike: then nothing says where one is over.
    """
    if len(set(prompts)) < 2:
        return "", ""
    split = [re.findall(r"\s*\S+", prompt.rstrip()) for prompt in prompts]
    shortest = min(len(words) for words in split)
    ahead = _alike(split, shortest - 1)
    behind = _alike([words[::-1] for words in split], shortest - 1 - ahead)
    last = split[0]
    trail = prompts[0][len(prompts[0].rstrip()) :]
    return ("".join(last[:ahead]), "".join(last[len(last) - behind :]) + trail) if behind else ("", "")


def prompt_frame(prompts: Iterable[Row]) -> tuple[str, str]:
    """The :func:`frame` of prompts that can be imitated.

    Raises:
        DataError: if they have none.
    """
    begin, end = frame(_texts(prompts))
    if not end:
        remedy = "Give two or more completion or instruction rows that end alike, or teacher.prefix and teacher.suffix"
        raise DataError([Problem("teacher.imitate", "the prompts have no common end to stop at", remedy)])
    return begin, end


def _texts(prompts: Iterable[Row]) -> list[str]:
    return [row.prompt_and_completion()[0] for row in prompts if row.kind in ("completion", "instruction")]


def _alike(lists: Sequence[Sequence[str]], longest: int) -> int:
    """How many first elements all lists share, at most ``longest``."""
    count = 0
    while count < longest and len({words[count] for words in lists}) == 1:
        count += 1
    return count


def imitated(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[Row],
    count: int,
    settings: TeacherSettings,
    *,
    seed: int = 0,
) -> list[Row]:
    """New prompts: the old base, without its adapter, goes on from the given ones' beginning until their end.

    In the way of Magpie (arXiv 2406.08464), which lets a chat model go on from its template. The adapter is off: it was
    trained to answer prompts, not to write them. Conversations and running text are not imitated.

    Returns:
        at most ``count`` completion rows, each prompt once, none of the given ones among them; fewer where the base
        does not reach the end, or repeats itself.

    Raises:
        DataError: if prompts are not alike, or none of the new ones comes to its end.
    """
    if count <= 0:
        return []
    begin, end = (settings.prefix, settings.suffix) if settings.suffix else prompt_frame(given)
    writer = _Writer(model, tokenizer, settings, IMITATED, f"{seed} prompts")
    known, found = set(_texts(given)), list[Row]()
    off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    with off:
        for start in range(0, ATTEMPTS * count, max(count, settings.batch_size)):
            if len(found) >= count:
                break
            numbers = range(start, start + max(count, settings.batch_size))
            attempts = [writer.attempt(n, Row(kind="text", text=begin)) for n in numbers]
            written = {w.attempt.number: w.answer for batch in writer.write(attempts) for w in batch}
            for number in sorted(written):
                middle, stop, _ = written[number].partition(end)
                text = begin + middle + end
                if stop and middle.strip() and text not in known:
                    known.add(text)
                    found.append(Row(kind="completion", prompt=text))
    if not found:
        what = f"of {ATTEMPTS * count} prompts the old base began, none came to {end.strip()!r}"
        raise DataError([Problem("teacher.imitate", what, "Give more prompts (--prompts) instead")])
    return found[:count]


def _distinct(prompts: Sequence[Row], words: int) -> list[Row]:
    """The prompts without their answers, each once."""
    return list(dict.fromkeys(unanswered(row, words) for row in prompts))


def _answered(attempt: _Attempt, answer: str, ended: bool) -> Row:
    """A row of the prompt's shape with the teacher's answer."""
    row, extra = attempt.row, {} if ended else {UNFINISHED: True}
    match row.kind:
        case "instruction":
            return replace(row, output=answer.strip(), extra=extra)
        case "completion":
            return replace(row, prompt=attempt.text, completion=answer, extra=extra)
        case "messages":
            turn = Message(role="assistant", content=answer.strip())
            return replace(row, messages=(*row.messages, turn), extra=extra)
        case "text":
            return replace(row, text=attempt.text + answer, extra=extra)


class _Writer:
    """Generation in batches, padded on the left."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TeacherSettings,
        temperature: float,
        seed: int | str,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.temperature, self.seed = temperature, seed
        if tokenizer.eos_token_id is None:
            raise DataError(
                [
                    Problem(
                        "tokenizer", "has no EOS token", "Set tokenizer.eos_token to the one the base ends texts with"
                    )
                ]
            )
        self.context = context_length(model)

    def attempt(self, number: int, row: Row) -> _Attempt:
        text = self._prompt(row)
        if text:
            ids = prompt_ids(self.tokenizer, text, special=row.kind != "messages")
        else:
            start = self.tokenizer.bos_token_id
            ids = [int(self.tokenizer.eos_token_id if start is None else start)]
        if len(ids) >= self.context:
            what = f"has {len(ids)} tokens, and the old base reads {self.context}"
            raise DataError([Problem(f"prompt {text[:40]!r}", what, "Shorten it, or leave it out")])
        return _Attempt(number, row, text, tuple(ids))

    def _prompt(self, row: Row) -> str:
        """The text of an unanswered row that the teacher goes on from."""
        if row.kind == "text":
            return row.text
        if row.kind != "messages":
            return row.prompt_and_completion()[0]
        # Rendered with a stand-in for the answer: the same checks, and the same generation prompt as elsewhere.
        return replace(row, messages=(*row.messages, _STAND_IN)).prompt_and_completion(self.tokenizer)[0]

    def write(self, attempts: Sequence[_Attempt]) -> Iterator[list[_Written]]:
        """The answers, a batch at a time, short prompts first."""
        for chat in (False, True):
            members = sorted((a for a in attempts if (a.row.kind == "messages") == chat), key=lambda a: len(a.ids))
            for start in range(0, len(members), self.settings.batch_size):
                yield self._batch(members[start : start + self.settings.batch_size], chat)

    def _batch(self, attempts: Sequence[_Attempt], chat: bool) -> list[_Written]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        device = next(self.model.parameters()).device
        width = max(len(attempt.ids) for attempt in attempts)
        steps = min(self.settings.max_new_tokens, self.context - width)
        ends = self._ends(attempts, chat)
        pad = ends[0]
        ids = torch.tensor([[pad] * (width - len(a.ids)) + list(a.ids) for a in attempts], device=device)
        mask = torch.tensor([[0] * (width - len(a.ids)) + [1] * len(a.ids) for a in attempts], device=device)
        never = set() if chat else set(self.tokenizer.all_special_ids) - set(ends)
        pick = _picker(
            [f"{self.seed} {attempt.number}" for attempt in attempts],
            steps,
            self.temperature,
            self.settings.top_p,
            len(self.tokenizer),
            sorted(never),
        )
        plan = GenerationConfig(
            max_new_tokens=steps, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=pad, use_cache=True
        )
        # Whatever the plan leaves open, generate takes from here: the checkpoint's own penalties and limits.
        holder = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        configured, holder.generation_config = holder.generation_config, GenerationConfig()
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=plan,
                    logits_processor=LogitsProcessorList([pick]),
                )
        finally:
            holder.generation_config = configured
            self.model.train(training)
        rows = out[:, width:].tolist()
        return [self._read(a, row, lp, ends) for a, row, lp in zip(attempts, rows, pick.log_probs(), strict=True)]

    def _read(self, attempt: _Attempt, ids: list[int], log_probs: list[float], ends: list[int]) -> _Written:
        """One attempt's tokens as text: what the whole says beyond its prompt, so that a leading space is kept."""
        stop = next((at for at, token in enumerate(ids) if token in ends), None)
        ended = stop is not None
        body = ids[:stop]
        used = log_probs[: len(body) + ended]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = str(self.tokenizer.decode(list(attempt.ids), **options))
        whole = str(self.tokenizer.decode([*attempt.ids, *body], **options))
        answer = whole.removeprefix(before) if whole.startswith(before) else str(self.tokenizer.decode(body, **options))
        return _Written(attempt, answer, sum(used) / max(len(used), 1), len(body), ended)

    def _ends(self, attempts: Sequence[_Attempt], chat: bool) -> list[int]:
        """Ids that end an answer: the tokenizer's EOS, the model's, and the one a chat template ends turns with."""
        ends = [int(self.tokenizer.eos_token_id)]
        configured = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if configured is not None:
            ends += [int(token) for token in (configured if isinstance(configured, list) else [configured])]
        if chat:
            row = attempts[0].row
            suffix = replace(row, messages=(*row.messages, _STAND_IN)).target(self.tokenizer)[2]
            ids = self.tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix.strip() else []
            if ids and ids[0] in self.tokenizer.all_special_ids:
                ends.append(int(ids[0]))
        return list(dict.fromkeys(ends))


_STAND_IN = Message(role="assistant", content="answer")


def _picker(seeds: Sequence[str], steps: int, temperature: float, top_p: float, size: int, never: Sequence[int]) -> Any:
    """A logits processor that chooses each row's token itself, and leaves it the only one possible.

    ``generate`` would draw from one generator for the whole batch, so that a row would depend on its neighbours.

    Args:
        seeds: one a row.
        size: ids from here on are no tokens of the tokenizer (padded embeddings).
        never: ids that are not chosen.
    """
    import torch
    from transformers import LogitsProcessor

    uniform = torch.tensor([[generator.random() for _ in range(steps)] for generator in map(random.Random, seeds)])

    class Pick(LogitsProcessor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.found: list[torch.Tensor] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.float().clone()
            scores[:, size:] = -torch.inf
            scores[:, list(never)] = -torch.inf
            if temperature:
                chosen = self._sample(scores, uniform[:, len(self.found)].to(scores.device))
            else:
                chosen = scores.argmax(dim=-1)
            self.found.append(scores.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0])
            return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

        def _sample(self, scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
            """The token at which the cumulative probability passes the row's number."""
            # float64: the sum runs over a whole vocabulary
            values, ids = (scores.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
            total = values.cumsum(dim=-1)
            # the token that reaches top_p is still in
            kept = (total - values < top_p).sum(dim=-1, keepdim=True)
            mass = total.gather(1, kept - 1)
            place = torch.searchsorted(total, uniform[:, None].double() * mass, right=True).minimum(kept - 1)
            return ids.gather(1, place)[:, 0]

        def log_probs(self) -> list[list[float]]:
            found: list[list[float]] = torch.stack(self.found, dim=1).tolist()
            return found

    return Pick()


def context_length(model: Any) -> int:
    """Tokens the model can read at once, by its config."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return CONTEXT


# -------------------------------------------------------------------------------------------------------- filtering


class _Sieve:
    """Tells why a written row should be left out, knowing those kept before it."""

    def __init__(self, settings: TeacherSettings) -> None:
        self.settings = settings
        self.seen: set[tuple[str, str]] = set()
        #: group → n-gram → the kept rows that have it
        self.holders: dict[str, dict[tuple[str, ...], list[int]]] = {}
        self.kept = 0

    def reason(self, written: _Written) -> Reason | None:
        """Why the row is left out; None keeps it, for the next ones to be compared with."""
        kind = written.attempt.row.kind
        answer = " ".join(written.answer.split())
        if not answer:
            return "empty"
        if not written.ended and not self._may_be_cut(kind):
            return "truncated"
        if not self.settings.filter:
            return None
        grams = _ngrams(answer)
        if grams and 1 - len(set(grams)) / len(grams) > self.settings.max_repetition:
            return "repetition"
        # Answers of different prompts may be alike (yes or no); texts may not.
        group = "" if kind == "text" else written.attempt.text
        if (group, answer) in self.seen:
            return "duplicate"
        if grams and self._overlap(group, set(grams)) > self.settings.max_overlap:
            return "near_duplicate"
        self.seen.add((group, answer))
        holders = self.holders.setdefault(group, {})
        for gram in set(grams):
            holders.setdefault(gram, []).append(self.kept)
        self.kept += 1
        return None

    def _may_be_cut(self, kind: Kind) -> bool:
        return self.settings.truncated == "keep" or (self.settings.truncated == "text" and kind == "text")

    def _overlap(self, group: str, grams: set[tuple[str, ...]]) -> float:
        """The largest share of the n-grams that one kept row has."""
        holders = self.holders.get(group, {})
        shared = Counter(row for gram in grams for row in holders.get(gram, ()))
        return max(shared.values(), default=0) / len(grams)


def _ngrams(text: str) -> list[tuple[str, ...]]:
    """The word n-grams of a text; none of a short one."""
    words = text.split()
    if len(words) < SHORTEST:
        return []
    return [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]


# --------------------------------------------------------------------------------------------------- is it worth it?


class TextLoss(BaseModel):
    """What a model makes of rows: summed loss of their answers in nats, over their UTF-8 bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nats: float
    bytes: int
    rows: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def text_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
) -> list[TextLoss | None]:
    """The loss of each row's answer (of a text row, all of it), its end included; None where it is too long to read.

    Answers are scored given their prompts, so that models with different tokenizers are asked the same.
    """
    import torch

    from lorasuite.finetune import read_batches

    context = context_length(model)
    found: list[TextLoss | None] = [None] * len(rows)
    examples: list[tuple[int, dict[str, list[int]], int]] = []
    for index, row in enumerate(rows):
        prompt, scored, suffix = row.target(tokenizer)
        special = row.kind != "messages"
        if prompt:
            head, tail = encode_pair(tokenizer, prompt, scored, special=special)
        else:
            head, tail = [], prompt_ids(tokenizer, scored, special=special)
        if not suffix and not row.extra.get(UNFINISHED) and tokenizer.eos_token_id is not None:
            tail = [*tail, int(tokenizer.eos_token_id)]
        ids = head + tail
        if len(ids) > context or len(ids) < 2:
            continue
        labels = [IGNORED] * max(len(head), 1) + ids[max(len(head), 1) :]
        size = len(scored.encode())
        examples.append((index, {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}, size))
    for members, targets, logits in read_batches(model, [example for _, example, _ in examples], batch_size):
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), targets[:, 1:], ignore_index=IGNORED, reduction="none"
        ).sum(dim=1)
        for n, nats in zip(members, loss.tolist(), strict=True):
            index, _, size = examples[n]
            found[index] = TextLoss(nats=nats, bytes=size, rows=1)
    return found


def total(losses: Sequence[TextLoss | None]) -> TextLoss:
    """The sum of rows' losses; those of None are left out."""
    known = [loss for loss in losses if loss is not None]
    return TextLoss(nats=sum(k.nats for k in known), bytes=sum(k.bytes for k in known), rows=len(known))


class Worth(BaseModel):
    """Whether the teacher is worth copying, and what that was decided by."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    worth: bool
    reason: str
    measured_on: Literal["training rows", "written rows"]
    scored_rows: int = Field(description="rows that every model could read whole")
    bits_per_byte: dict[str, float] = Field(
        description="of old (the bare old base), teacher and new (the bare new base)"
    )


#: What an adapter must take away of the old base's loss on the teacher's own text to count as one: this share, and
#: so many bits per byte (a greedy text's loss is near zero with and without it).
LEAST_CHANGE = 0.01


def judge_teacher(
    old: Sequence[TextLoss | None], teacher: Sequence[TextLoss | None], new: Sequence[TextLoss | None], labelled: bool
) -> Worth:
    """Whether the teacher beats the bare new base.

    On the user's rows (``labelled``) that is asked directly. On rows the teacher wrote it cannot lose, as nothing
    predicts a model's text better than the model, so there the question is whether there is anything to copy: the
    adapter must change what the old base says, and the new base must not be saying it already. Whether it is *right*
    nobody knows without labels.

    Args:
        old, teacher, new: losses of the bare old base, of it with its adapter, and of the bare new base, on the same
            rows.

    Raises:
        DataError: if no row can be read whole by every model.
    """
    whole = [n for n, found in enumerate(zip(old, teacher, new, strict=True)) if None not in found]
    if not whole:
        what = "no row is short enough for both bases to read whole"
        raise DataError([Problem("teacher", what, "Use shorter rows, or a smaller teacher.max_new_tokens")])
    bits = {
        name: total([losses[n] for n in whole]).bits_per_byte
        for name, losses in (("old", old), ("teacher", teacher), ("new", new))
    }
    shown = f"{bits['teacher']:.3f} bits per byte against the bare new base's {bits['new']:.3f}"
    if labelled:
        worth = bits["teacher"] < bits["new"]
        reason = f"the teacher {'beats' if worth else 'does not beat'} the bare new base: {shown}"
    elif bits["old"] - bits["teacher"] < LEAST_CHANGE * max(bits["old"], 1.0):
        worth = False
        reason = f"the adapter hardly changes the old base: {bits['old']:.3f} bits per byte without it, {shown}"
    else:
        worth = bits["teacher"] < bits["new"]
        reason = f"{'there is something' if worth else 'nothing'} to learn from the teacher's text: {shown}"
    return Worth(
        worth=worth,
        reason=reason,
        measured_on="training rows" if labelled else "written rows",
        scored_rows=len(whole),
        bits_per_byte=bits,
    )


# ------------------------------------------------------------------------------------------------------------ files


def rows_to_jsonl(rows: Sequence[Row]) -> bytes:
    """Rows in the shape :func:`lorasuite.data.read_rows` reads."""
    return "".join(json.dumps(_record(row), ensure_ascii=False) + "\n" for row in rows).encode()


def _record(row: Row) -> dict[str, Any]:
    match row.kind:
        case "instruction":
            fields: dict[str, Any] = {"instruction": row.instruction, "input": row.input, "output": row.output}
        case "completion":
            fields = {"prompt": row.prompt, "completion": row.completion}
        case "messages":
            fields = {"messages": [{"role": m.role, "content": m.content} for m in row.messages]}
        case "text":
            fields = {"text": row.text}
    return {**fields, **row.extra}
