"""The types of an adapter config's fields, as PEFT writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from lorasuite.errors import Problem

#: Beyond these nobody trains, and half precision holds no product of them.
LARGEST_RANK, LARGEST_ALPHA = 2**16, 1e6
#: How PEFT can begin a LoRA, in any case; it refuses other names when it loads one.
_INITIALISATIONS = r"(?i)^(gaussian|eva|olora|mica|pissa|pissa_niter_\d+|corda|loftq|orthogonal|lora_ga|default)$"

_Positive = Annotated[FiniteFloat, Field(gt=0, le=LARGEST_ALPHA)]
_Names = str | list[str] | None


class _Fields(BaseModel):
    """Fields that are read here and may be of another type only in a file that PEFT did not write."""

    model_config = ConfigDict(strict=True, extra="ignore")

    alpha_pattern: dict[str, _Positive] | None = None
    base_model_name_or_path: str | None = None
    bias: str | None = None
    exclude_modules: _Names = None
    fan_in_fan_out: bool | None = None
    init_lora_weights: bool | Annotated[str, Field(pattern=_INITIALISATIONS)] | None = None
    layers_pattern: _Names = None
    layers_to_transform: int | list[int] | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0
    modules_to_save: list[str] | None = None
    peft_type: str | None = None
    rank_pattern: dict[str, PositiveInt | list[bool]] | None = None
    revision: str | None = None
    target_modules: _Names = None
    target_parameters: list[str] | None = None
    task_type: str | None = None
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None


def type_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Fields of another type than PEFT's, one problem a field."""
    try:
        _Fields.model_validate(config)
    except ValidationError as error:
        wrong = dict.fromkeys(str(item["loc"][0]) for item in error.errors())
        return [
            Problem(f"{where}: {name}", f"is {_short(config[name])}", "PEFT writes no such value: save it again.")
            for name in wrong
        ]
    return []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
