"""Label-free refresh: the old base with its adapter writes the rows that the new base is fine-tuned on.

After Trans-LoRA (arXiv 2405.17258) and TiTok (arXiv 2510.04682): prompts are given or sampled by the teacher
itself, answers are the teacher's, and what is empty, cut off, repeated or degenerate is left out and counted. Of rows
given as prompts the answer is removed before anything else looks at them (:func:`lorasuite.data.unanswered`), so no
label can reach the result.

Every attempt draws its random numbers from its own seed, one number a token (inverse transform sampling), so a row
does not depend on the batch it is written in beyond the rounding of its logits, and on a CPU the same call gives the
same rows. The loss of what was written is known from its generation; only the bare base's takes a pass of its own.

Importing this module does not load transformers.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasuite.data import Kind, Row
from lorasuite.errors import DataError, Problem
from lorasuite.progress import Progress
from lorasuite.teacher._filters import SyntheticRowFilter
from lorasuite.teacher._generation import Answer, Prompt, generator
from lorasuite.teacher._prompts import distinct_prompts, imitate
from lorasuite.teacher._settings import ATTEMPTS_PER_ROW, SAMPLING_TEMPERATURE, TeacherSettings
from lorasuite.teacher._worth import TextLoss, written_losses

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorasuite.teacher._vllm import VLLMTeacher


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
    #: Of the sampling; of prompts of several kinds, that of those which are not running text.
    temperature: float = 0.0
    #: Distinct prompts there were; 0: the teacher wrote from nothing.
    prompts: int = 0
    #: Prompts that the old base wrote itself.
    imitated: int = 0
    #: Each row's loss where the row is what was generated, token for token; else None.
    losses: list[TextLoss | None] = field(default_factory=list)
    #: Seconds of generation, without loading.
    seconds: float = 0.0
    engine: str = "transformers"

    def info(self) -> dict[str, Any]:
        """Counts, as JSON."""
        mean = sum(self.log_probs) / len(self.log_probs) if self.log_probs else None
        return {
            "rows": len(self.rows),
            "written": self.written,
            "dropped": self.dropped,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "engine": self.engine,
            "temperature": self.temperature,
            "prompts": self.prompts,
            "imitated": self.imitated,
            "mean_log_prob": mean,
        }


def write_rows(
    model: PreTrainedModel | PeftModel | VLLMTeacher,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Row] | None,
    samples: int,
    settings: TeacherSettings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> TeacherRows:
    """Let the teacher write ``samples`` rows in the shape of the prompts, or text rows where there are none.

    The adapter stays unmerged: attach it to a loaded base (:func:`lorasuite.adapters.attached`), call this, and detach
    it, for one adapter after the other.

    Args:
        model: the old base with its adapter, on its device, or in vLLM.
        tokenizer: the old base's.
        prompts: rows whose prompts are answered; their own answers are never looked at. Of a text row the first
            ``settings.text_prefix`` words are the prompt. With fewer prompts than rows, several answers of each are
            sampled; greedy, one answer of each is all there is. None: the teacher writes from ``settings.prefix`` on.
        samples: rows asked for.
        settings: of the teacher. Where they name no temperature, running text is sampled, and other prompts are
            answered greedily if there is one for each row.
        seed: of the order of prompts and of the sampling.
        progress: called after each batch.

    Returns:
        at most ``samples`` rows, in the order they were tried.

    Raises:
        DataError: without an EOS token, for a prompt that leaves no room for an answer, for a conversation without a
            chat template, or if fewer than ``settings.min_kept`` of the written rows can be used.
    """
    begun = time.perf_counter()
    if samples < 1:
        raise DataError([Problem("teacher_samples", f"is {samples}", "Ask for at least one row")])
    given = distinct_prompts(prompts, settings.text_prefix) if prompts else []
    own = len(given)
    if settings.suffix or settings.imitate:
        given += imitate(model, tokenizer, given, samples - own, settings, seed=seed)
    texts = {row.text for row in prompts or () if row.kind == "text"}
    alike = len(texts) - sum(row.kind == "text" for row in given)  # several texts may begin with one prompt
    enough = len(given) + alike >= samples
    order = list(given)
    random.Random(seed).shuffle(order)
    sources = order or [Row(kind="text", text=settings.prefix)]
    temperatures = {row.kind: _temperature(settings, row, enough) for row in sources}
    writers = {t: generator(model, tokenizer, settings, t, seed) for t in sorted(set(temperatures.values()))}
    writer = next(iter(writers.values()))
    wanted = samples if not settings.filter else math.ceil(samples / (1 - settings.drop_unsure))
    limit = ATTEMPTS_PER_ROW * wanted
    places = [n % len(sources) for n in range(limit)]
    # greedily, a prompt's second answer would be its first
    attempts = [n for n, at in enumerate(places) if n < len(sources) or temperatures[sources[at].kind]]
    filters = SyntheticRowFilter(settings)
    kept: list[Answer] = []
    dropped: Counter[str] = Counter()
    tried = tokens = 0
    while tried < len(attempts) and len(kept) < wanted:
        # As many as should give what is missing, by the share kept so far.
        share = max(len(kept), 1) / tried if tried else 1.0
        count = min(len(attempts) - tried, math.ceil((wanted - len(kept)) / share))
        asked = [writer.prompt(n, sources[places[n]]) for n in attempts[tried : tried + count]]
        answers: dict[int, Answer] = {}
        for temperature, members in _by(asked, temperatures).items():
            for batch in writers[temperature].generate(members):
                answers |= {answer.prompt.number: answer for answer in batch}
                if progress is not None:
                    progress(min(len(kept) + len(answers), samples), samples)
        for number in sorted(answers):
            answer = answers[number]
            tokens += answer.tokens
            if len(kept) >= wanted:
                continue
            reason = filters.reason(answer)
            if reason is None:
                kept.append(answer)
            else:
                dropped[reason] += 1
        tried += count
    if settings.filter and settings.drop_unsure and kept:
        sure = _without_unsure(kept, settings.drop_unsure)
        dropped["unsure"] = len(kept) - len(sure)
        kept = sure
    if len(kept) < max(1, math.ceil(settings.min_kept * min(tried, samples))):
        counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.most_common())
        what = f"of {tried} rows it wrote only {len(kept)} can be used ({counts})"
        remedy = "Give other prompts or more of them, raise the temperature or max_new_tokens, or loosen the filters"
        raise DataError([Problem("teacher", what, remedy)])
    kept = kept[:samples]
    rows = [answer.row() for answer in kept]
    return TeacherRows(
        rows=rows,
        losses=written_losses(kept, rows, tokenizer),
        seconds=time.perf_counter() - begun,
        engine=writer.engine,
        log_probs=[answer.log_prob for answer in kept],
        written=tried,
        dropped=dict(dropped),
        tokens=tokens,
        temperature=writer.temperature,
        prompts=own,
        imitated=len(given) - own,
    )


def _temperature(settings: TeacherSettings, row: Row, enough: bool) -> float:
    """What a prompt is answered at, where there are prompts enough for one answer of each, or not."""
    if settings.temperature is not None:
        return settings.temperature
    return 0.0 if enough and row.kind != "text" else SAMPLING_TEMPERATURE


def _by(prompts: Sequence[Prompt], temperatures: Mapping[Kind, float]) -> dict[float, list[Prompt]]:
    """Prompts by the temperature of their kind."""
    found: dict[float, list[Prompt]] = {}
    for prompt in prompts:
        found.setdefault(temperatures[prompt.row.kind], []).append(prompt)
    return found


def _without_unsure(answers: Sequence[Answer], share: float) -> list[Answer]:
    """The answers but for this share with the least mean log-probability; at least one."""
    surplus = min(len(answers) - 1, round(share * len(answers)))
    unsure = {answer.prompt.number for answer in sorted(answers, key=lambda answer: answer.log_prob)[:surplus]}
    return [answer for answer in answers if answer.prompt.number not in unsure]
