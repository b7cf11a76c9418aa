"""Which drafts of prompts are used: those that move the adapter more than general text does, far from each other."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import Row, unanswered
from lorasuite.errors import DataError, Problem
from lorasuite.teacher._from_adapter import texts
from lorasuite.teacher._given import VARIED, VARIED_TOKENS
from lorasuite.teacher._lists import SHOWN, USED, list_tokens
from lorasuite.teacher._probe import PROBE_TOKENS, Probe, Pull, farthest, ranked

#: Drafts made for each prompt wanted, and of those that move the adapter, how many are chosen among by distance.
DRAFTS, POOL = 3, 1.5
#: Words of a general text that are given as a prompt.
GENERAL_WORDS = 12
#: General texts that the signal is compared with.
GENERAL = 32
#: Share of real prompts whose distance to another real one says how near is near.
NEAR = 0.95


class Asked(NamedTuple):
    """What a search for prompts asks of the old base, as counts: each source's drafts, and the choice among them."""

    #: Lists that are gone on with, texts that each shows, and tokens that are written of it.
    lists: float
    shown: int
    list_tokens: int
    #: Prompts that are begun like others, and tokens that are written of each.
    varied: float
    varied_tokens: int
    #: Prompts whose signal is taken, and tokens of the answer, at most.
    probed: float
    answer_tokens: int
    #: In the choice: general texts whose signal is taken, and prompts that are compared.
    general: int
    pool: float


def asked_for(count: int, longest: float = 0) -> Asked:
    """What it takes to find so many prompts, of which a search in lists gives as many drafts as it may.

    Args:
        longest: tokens of the longest example, where there are any.
    """
    drafts, pool = DRAFTS * count, POOL * count
    varied, varied_tokens = VARIED * drafts, max(VARIED_TOKENS, math.ceil(longest))
    return Asked(
        lists=drafts / USED,
        shown=SHOWN,
        list_tokens=list_tokens(longest),
        varied=varied,
        varied_tokens=varied_tokens,
        probed=drafts + varied,
        answer_tokens=PROBE_TOKENS,
        general=GENERAL,
        pool=pool,
    )


class SourceShare(BaseModel):
    """What one source gave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    drafts: int
    kept: int
    share: float = Field(description="of the prompts that are used, those given by the user among them")
    signal: float | None = Field(None, description="mean over its kept drafts, in nats a token")
    left_out: int = Field(
        0, description="texts that were too long for the old base to read, or that a chat template refused"
    )


class Discovered(BaseModel):
    """Where prompts came from, and how sure it is that they are of the adapter's task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int = Field(description="that are used, given ones among them")
    given: int = Field(description="of the user's")
    sources: dict[str, SourceShare]
    signal: float | None = Field(
        None,
        description="mean over the written prompts: the old base's loss on the answer less its loss with the adapter, "
        "in nats a token",
    )
    drafted: float | None = Field(
        None, description="the same over all drafts of the sources they are from, before any was chosen by it"
    )
    general: float = Field(description="the same on general texts")
    error: float | None = Field(None, description="standard error of drafted − general")
    clear: bool = Field(description="whether the difference is above two standard errors")
    said: str = Field(description="all this in a line")


def general_level(probe: Probe, general: Sequence[str]) -> list[float]:
    """The signal on general texts, each of its own: on those given, or on what the bare old base writes from nothing.

    Args:
        general: beginnings of texts.
    """
    found = list(general[:GENERAL]) or texts(probe, "", GENERAL, adapter=False, salt="level")
    rows = [unanswered(Row("text", text=text), GENERAL_WORDS) for text in found if text.strip()]
    return [pull.nats for pull in probe.pulls(rows)]


def choose_prompts(
    probe: Probe,
    drafts: Mapping[str, Sequence[Pull]],
    given: Sequence[Row],
    general: Sequence[float],
    count: int,
    drawn: Sequence[str] = (),
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[Row], Discovered]:
    """The prompts that are used: given ones, and the drafts that the adapter's signal and their distances choose.

    Of all sources together the drafts that move the adapter more than general text does on average are :func:`ranked`;
    of :data:`POOL` times those wanted the ones farthest from each other are kept, by the bare old base's embeddings.

    Args:
        drafts: by source.
        given: prompts of the user's, kept whatever their signal.
        general: the signal on general texts.
        count: how many in all.
        drawn: sources that are controls: theirs are drawn at random.
        left_out: texts by source that :attr:`Probe.left_out` counted.

    Returns:
        the prompts, and where they came from.

    Raises:
        DataError: if there is none, saying what was tried.
    """
    level = statistics.fmean(general) if general else 0.0
    known = {probe.text(row) for row in given}
    every: list[tuple[str, Pull]] = []
    for source, pulls in drafts.items():
        for pull in pulls:
            text = probe.text(pull.row)
            if text not in known:
                known.add(text)
                every.append((source, pull))
    pool = [(source, pull) for source, pull in every if source in drawn or pull.nats > level]
    wanted = max(count - len(given), 0)
    if drawn:
        random.Random(f"{probe.seed} drawn").shuffle(pool)
        kept = pool[:wanted]
    else:
        pool = [pool[n] for n in ranked([pull for _, pull in pool])[: max(wanted, round(POOL * wanted))]]
        far = farthest(probe.vectors([probe.text(pull.row) for _, pull in pool]), wanted) if pool and wanted else []
        kept = [pool[n] for n in far]
    if not kept and not given:
        raise DataError([_none(drafts, level, sum(left_out.values()))])
    mean = statistics.fmean(pull.nats for _, pull in kept) if kept else None
    # those kept are the best of theirs, and would be above general texts by chance alone
    used = {source for source, _ in kept}
    before = [pull.nats for source, pull in every if source in used]
    drafted, error = statistics.fmean(before) if before else None, _error(before, general)
    clear = drafted is not None and error is not None and drafted - level > 2 * error
    total = len(kept) + len(given)
    shares = {name: _share(name, pulls, kept, total, left_out.get(name, 0)) for name, pulls in drafts.items()}
    found = Discovered(
        prompts=total,
        given=len(given),
        sources=shares,
        signal=mean,
        drafted=drafted,
        general=level,
        error=error,
        clear=clear,
        said="",
    )
    return [*given, *(pull.row for _, pull in kept)], found.model_copy(update={"said": _said(found)})


def resembling(probe: Probe, prompts: Sequence[Row], real: Sequence[Row]) -> float:
    """The share of prompts that are as near to a real one, by the old base's embeddings, as :data:`NEAR` of the real
    ones are to another real one.

    Args:
        real: two or more, none of them among the prompts.
    """
    vectors = probe.vectors([probe.text(row) for row in (*prompts, *real)])
    found, known = vectors[: len(prompts)], vectors[len(prompts) :]
    between = torch.cdist(known, known)
    between.fill_diagonal_(torch.inf)
    near = between.min(dim=1).values.quantile(NEAR)
    return float((torch.cdist(found, known).min(dim=1).values <= near).float().mean())


def _share(
    name: str, pulls: Sequence[Pull], kept: Sequence[tuple[str, Pull]], total: int, left_out: int
) -> SourceShare:
    own = [pull.nats for source, pull in kept if source == name]
    signal = statistics.fmean(own) if own else None
    return SourceShare(
        drafts=len(pulls), kept=len(own), share=len(own) / max(total, 1), signal=signal, left_out=left_out
    )


def _error(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Standard error of the difference of two means."""
    if len(one) < 2 or len(other) < 2:
        return None
    return math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))


def _said(found: Discovered) -> str:
    parts = [f"{share.kept} from {name}" for name, share in found.sources.items() if share.kept]
    parts += [f"{found.given} given"] if found.given else []
    text = f"{found.prompts} prompts ({', '.join(parts)})"
    if found.signal is None or found.drafted is None:
        if any(share.drafts for share in found.sources.values()):
            return f"{text}: no other moves the adapter more than general text"
        return f"{text}: no other {_unwritten(sum(share.left_out for share in found.sources.values()))}"
    sure = "clearly more" if found.clear else "not clearly more: they may not be of its task"
    level = f"{found.signal:.2f} nats a token, to all drafts by {found.drafted:.2f}"
    return f"{text}; the adapter changes its answers to them by {level}, to general text by {found.general:.2f}, {sure}"


def _none(drafts: Mapping[str, Sequence[Any]], level: float, left_out: int) -> Problem:
    tried = ", ".join(f"{name} ({len(pulls)} drafts)" for name, pulls in drafts.items())
    why = f"moves the adapter more than general text ({level:.2f} nats)"
    if not any(drafts.values()):
        why = _unwritten(left_out)
    described = "" if "description" in drafts else ", or say what it does (--describe)"
    remedy = (
        f"Give a few prompts of the adapter's task (--prompts){described}, or go on without written rows: "
        "--teacher-samples 0"
    )
    return Problem("prompts", f"no usable one was found: tried {tried}, and none {why}", remedy)


def _unwritten(left_out: int) -> str:
    """What is said of prompts where there is no draft."""
    said = "was written: texts may be longer than the old base reads or writes at once"
    more = f" ({left_out} were left out: longer than that, or refused by a chat template)"
    return said + (more if left_out else "")
