"""Starts of a fresh LoRA by name, through PEFT's ``init_lora_weights``.

PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775) and LoftQ (arXiv 2310.08659) begin with factors that are taken out of
the base's weights, and train on what is left of them. What is written is a plain LoRA for the base as it is: the
factors of the start, negated, beside the trained ones, which doubles the rank. EVA (arXiv 2410.07170) leaves the base
alone and begins with the directions in which the modules' inputs vary most.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorasuite.adapters import unwrap, without_old_names
from lorasuite.errors import AdapterError, ConfigError, DataError, NumericalError, Problem
from lorasuite.training._loss import collate
from lorasuite.training._settings import TAKEN_OUT

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

#: Rows that EVA reads at once: together they must have as many tokens as the rank.
EVA_BATCH = 16
#: Passes over the rows after which EVA's directions must have settled; a few are usual.
EVA_PASSES = 100
#: Bits that LoftQ quantizes the base to: NF4's.
LOFTQ_BITS = 4


def takes_out(init: str) -> bool:
    """Whether a start changes the base's weights while its adapter is trained."""
    return init.startswith(TAKEN_OUT)


def wrap_fresh(
    model: PreTrainedModel, lora: LoraConfig, init: str, examples: Sequence[dict[str, list[int]]]
) -> PeftModel:
    """The model with a fresh LoRA that starts as named.

    Args:
        examples: rows to train on, of which EVA reads what the modules are given.

    Raises:
        ConfigError: the start is not for this adapter, this base or this machine.
        AdapterError: the adapter does not fit the base.
        DataError: the rows are too short for EVA.
        NumericalError: EVA's directions do not settle.
    """
    if init == "default":
        return _wrapped(model, lora)
    from peft import EvaConfig, LoftQConfig

    problems = start_problems(
        init,
        dora=bool(getattr(lora, "use_dora", False)),
        quantized=bool(getattr(model, "is_quantized", False)),
        transposed=bool(lora.fan_in_fan_out),
    )
    if lora.peft_type.value != "LORA":
        what = f"{init} is a start of LoRA, and the adapter is another"
        problems.append(Problem("finetune.init", what, "Use --finetune-init default"))
    if problems:
        raise ConfigError(problems)
    lora = copy.deepcopy(lora)
    lora.init_lora_weights = init
    if init == "loftq":
        lora.loftq_config = vars(LoftQConfig(loftq_bits=LOFTQ_BITS))
    elif init == "eva":
        # rho=1: every module keeps its rank, as most that serve adapters expect
        lora.eva_config = EvaConfig(rho=1.0, use_label_mask=False)
    wrapped = _wrapped(model, lora)
    if init == "eva":
        _find_directions(wrapped, lora.r, examples)
    _check_ranks(wrapped, lora.r, init)
    return wrapped


def _wrapped(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    from peft import get_peft_model

    try:
        with without_old_names():
            return get_peft_model(model, lora)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        unwrap(model)
        remedy = "Check its target modules against the base model's"
        raise AdapterError([Problem("lora", f"does not fit the base model ({error})", remedy)]) from error


def start_problems(init: str, *, dora: bool, quantized: bool, transposed: bool) -> list[Problem]:
    """Why a fresh LoRA cannot start as named.

    Args:
        dora: whether it is a DoRA.
        quantized: whether the base is, as it is loaded.
        transposed: whether the base's weights are stored ``(in, out)``.
    """
    found = []
    if takes_out(init) and dora:
        found.append("takes factors out of the base, against which a DoRA's magnitudes cannot be written")
    if takes_out(init) and quantized:
        found.append("changes the base's weights, which are quantized")
    if init in ("olora", "loftq") and transposed:
        found.append("reads weights the other way round than this base stores them")
    if init == "loftq" and (missing := _loftq_lacks()):
        found.append(f"needs {missing}")
    return [Problem("finetune.init", f"{init} {what}", "Use --finetune-init default, or another") for what in found]


def _loftq_lacks() -> str:
    """What PEFT's LoftQ needs that is not here."""
    from peft.import_utils import is_bnb_4bit_available

    if not torch.cuda.is_available():
        return "a CUDA GPU"
    return "" if is_bnb_4bit_available() else "bitsandbytes: pip install 'lorasuite[bnb]'"


def _check_ranks(wrapped: PeftModel, rank: int, init: str) -> None:
    """A weight has no more directions than its smaller side, of which PEFT would make smaller factors than it says."""
    for name, value in wrapped.named_parameters():
        if ".lora_A." in name and value.shape[0] != rank:
            path = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
            what = f"{init} found {value.shape[0]} directions for rank {rank}"
            unwrap(wrapped.get_base_model())
            raise AdapterError([Problem(path, what, "Use a smaller rank, or --finetune-init default")])


def _find_directions(wrapped: PeftModel, rank: int, examples: Sequence[dict[str, list[int]]]) -> None:
    """EVA's ``A``: the first right singular vectors of what each module reads, over the rows."""
    from peft import initialize_lora_eva_weights

    remedy = "Give more or longer rows, a smaller rank, or --finetune-init default"
    batches = [collate(examples[first : first + EVA_BATCH]) for first in range(0, len(examples), EVA_BATCH)]
    enough = [batch for batch in batches if int(batch["attention_mask"].sum()) >= rank]
    if not enough:
        unwrap(wrapped.get_base_model())
        raise DataError([Problem("training rows", f"no batch has {rank} tokens, which EVA needs", remedy)])
    left = EVA_PASSES * len(enough)

    def forward(model: Any, inputs: Mapping[str, Tensor]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise NumericalError([Problem("eva", f"did not settle in {EVA_PASSES} passes over the rows", remedy)])
        model(**{name: value for name, value in inputs.items() if name != "labels"})

    try:
        initialize_lora_eva_weights(wrapped, enough, forward_fn=forward, show_progress_bar=False)
    except BaseException:
        unwrap(wrapped.get_base_model())
        raise


@contextlib.contextmanager
def starting(model: PreTrainedModel, lora: LoraConfig | None, init: str) -> Iterator[Path | None]:
    """Give the weights back that a start takes factors out of; a copy in main memory is kept meanwhile.

    Yields:
        where the adapter is to be saved before training, to be subtracted when it is written; None: nowhere.
    """
    if lora is None or not takes_out(init):
        yield None
        return
    probe = _wrapped(model, copy.deepcopy(lora))
    names = [f"{path}.weight" for path in probe.base_model.targeted_module_names]
    unwrap(model)
    kept = {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in names}
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "initial_adapter"
    finally:
        unwrap(model)
        model.load_state_dict(kept, strict=False)
