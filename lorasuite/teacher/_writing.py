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

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasuite.data import Row
from lorasuite.errors import DataError, Problem
from lorasuite.progress import Progress
from lorasuite.teacher._filters import _Sieve
from lorasuite.teacher._generation import _answered, _Writer, _Written
from lorasuite.teacher._prompts import _distinct, imitated
from lorasuite.teacher._settings import ATTEMPTS, SAMPLED, TeacherSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
