"""The teacher's answers: sampled by a seed of each row's own, so that a row does not depend on its batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasuite.data import UNFINISHED, Message, Row, prompt_ids
from lorasuite.errors import DataError, Problem
from lorasuite.teacher._settings import TeacherSettings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
#: Tokens that a model without a stated context length is given.
CONTEXT = 2048


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
