"""lm-eval (EleutherAI's lm-evaluation-harness) as this package calls it: one model, any adapter, no output.

What is common to held-out rows and tasks by name: loading the base once for all its adapters, left padding with a token
the model knows, a fixed batch size, seeds, and progress.

Importing this module loads neither torch, transformers nor lm-eval.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.data import encode_pair, prompt_ids
from lorasuite.errors import ConfigError, DataError, Problem
from lorasuite.progress import EvaluationProgress

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluation_tokenizer(tokenizer: PreTrainedTokenizerBase, *, generate: bool) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with an EOS and a pad token that is one of its own, padding on the left.

    lm-eval sets the padding of the tokenizer it is given, and where there is neither pad, unknown nor EOS token adds
    a new one, beyond the model's embeddings.

    Args:
        tokenizer: is not changed.
        generate: whether answers are generated, which needs an EOS token to end them.

    Raises:
        DataError: if it has no EOS token and one is needed.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.eos_token_id is None and (generate or tokenizer.bos_token_id is None):
        raise DataError(
            [Problem("tokenizer", "has no EOS token", "Set tokenizer.eos_token to the one the base ends texts with")]
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    tokenizer.padding_side = "left"
    return tokenizer


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that lm-eval gives the model at once, by its own rule, which asks the tokenizer too."""
    from lm_eval.models.huggingface import HFLM

    probe = HFLM.__new__(HFLM)  # its rule is a property of model and tokenizer only
    probe._model, probe.tokenizer, probe._max_length = model, tokenizer, None
    return int(probe.max_length)


@contextlib.contextmanager
def base_model(
    base: str | PreTrainedModel,
    adapters: Mapping[str, Path | None],
    device: str | torch.device,
    trust_remote_code: bool,
) -> Iterator[PreTrainedModel]:
    """The base model on the device, kept in the process's cache; a caller's model is given back as it came.

    Raises:
        ConfigError: without adapters, or where there is no such device.
    """
    import torch

    from lorasuite.adapters import restored
    from lorasuite.bases import loaded_model, placed

    if not adapters:
        raise ConfigError([Problem("adapters", "there are none", "Name at least one, or None for the bare base")])
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Problem(f"device {device}", "is not available", "Use device cpu")])
    if isinstance(base, str):
        with loaded_model(base, device, trust_remote_code=trust_remote_code) as model:
            yield model
        return
    with restored(base):
        yield placed(base, device).eval()


@contextlib.contextmanager
def adapted(
    model: PreTrainedModel, adapter: Path | None, device: str | torch.device
) -> Iterator[PreTrainedModel | PeftModel]:
    """The model with an adapter while the context lasts, or the bare model."""
    from lorasuite.adapters import attached

    if adapter is None:
        yield model
        return
    with attached(model, Path(adapter), device) as wrapped:
        yield wrapped


def run_lm_eval(
    lm: Any,
    tasks: Mapping[str, Any],
    *,
    seed: int,
    limit: int | None,
    bootstrap_iters: int,
    progress: RequestCounter,
    apply_chat_template: bool = False,
) -> Any:
    """``lm_eval.evaluator.evaluate``, seeded.

    Not ``simple_evaluate``: that one describes the environment as well, which runs pip, git and the GPU's tools.

    Args:
        lm: of :func:`lm_class`.
        tasks: as lm-eval's task manager loads them.
        seed: of lm-eval's own draws.
        limit: documents of each task at most.
        bootstrap_iters: draws for the standard errors that lm-eval resamples; 0 leaves them out.
        progress: told of each answered request.
        apply_chat_template: whether prompts are put into the tokenizer's chat template.

    Returns:
        lm-eval's results, with every sample.
    """
    import numpy as np
    import torch
    from lm_eval import evaluator

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    lm.set_cache_hook(progress)
    return evaluator.evaluate(
        lm=lm,
        task_dict=dict(tasks),
        limit=limit,
        bootstrap_iters=bootstrap_iters,
        log_samples=True,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
    )


class RequestCounter:
    """Reports progress from the hook lm-eval calls for each answered request (meant for its response cache).

    Args:
        label: name of the adapter.
        progress: what is called, if anything.
        total: requests there are; None where that is not known.
    """

    def __init__(self, label: str, progress: EvaluationProgress | None, total: int | None) -> None:
        self._label, self._progress, self._total, self._done = label, progress, total, 0

    def add_partial(self, attr: str, request: Any, result: Any) -> None:
        """Count one answered request; lm-eval calls this."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._label, self._done, max(self._done, self._total or 0))

    def finish(self) -> None:
        """Report the end where lm-eval answered fewer requests than there were, equal ones being asked once."""
        if self._progress is not None and self._total is not None and self._done < self._total:
            self._progress(self._label, self._total, self._total)


@cache
def lm_class() -> type[Any]:
    """lm-eval's HFLM with this package's tokenisation, the head at answers only, and without progress bars.

    A function, and not a class of the module: lm-eval takes seconds to import.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    from lorasuite.evaluation._likelihoods import Asked, answer_likelihoods

    class Model(HFLM):  # type: ignore[misc]
        """An HFLM that tokenises as :mod:`lorasuite.data` does.

        Args:
            special: whether prompts get the tokenizer's special tokens; None leaves tokenisation to lm-eval.
        """

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, *, special: bool | None) -> None:
            self._special = special
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **kwargs: Any,
        ) -> list[int]:
            if self._special is None:
                encoded: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
                return encoded
            special = self._special if add_special_tokens is None else add_special_tokens
            ids = prompt_ids(self.tokenizer, string, special=special)
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self._special is None:
                batch: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(
                    strings, padding_side, left_truncate_len, truncation
                )
                return batch
            rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            width = max(len(row) for row in rows)
            pad = self.tokenizer.pad_token_id
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            return ids, mask

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if self._special is None:
                pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
                return pair
            return encode_pair(self.tokenizer, context, continuation, special=self._special)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            asked = [Asked(context, answer) for _, context, answer in requests]
            found: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
            sizes = {"longest": self.max_length, "batch_size": self.batch_size}
            for number, nats, greedy in answer_likelihoods(self.model, asked, **sizes):
                found[number] = (nats, greedy)
                if (said := requests[number][0]) is not None:  # None: a window of a text, counted with its others
                    self.cache_hook.add_partial("loglikelihood", said, found[number])
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return Model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, lm-eval logs nothing below an error, and its one progress bar that has no switch is off.

    What its warnings are about has been checked before (lengths, stops, pad tokens) or is meant (a loaded model).
    """
    import lm_eval.api.task

    log = logging.getLogger("lm_eval")
    level, bar = log.level, getattr(lm_eval.api.task, "tqdm", None)
    log.setLevel(logging.ERROR)
    if bar is not None:
        lm_eval.api.task.tqdm = lambda *args, **kwargs: bar(*args, **{**kwargs, "disable": True})
    try:
        yield
    finally:
        log.setLevel(level)
        if bar is not None:
            lm_eval.api.task.tqdm = bar


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("lm_eval", "peft", "torch", "transformers")}
