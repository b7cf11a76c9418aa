"""How base models are put into memory: precision, quantization while loading, and devices."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorasuite.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class LoadSettings(BaseModel):
    """How a base that is run is loaded: for the teacher, fine-tunes and evaluation.

    The stages of a pair and the transforms do not heed it: neither those that read weights alone or stream a base layer
    by layer, nor the fit of a model transform, which loads both bases whole.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dtype: Dtype = Field(
        "auto",
        description="of a base that is run; auto: that of its files; on a CPU float32, unless they are bfloat16 and it "
        "has instructions for that",
    )
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto: spread a base that is run over all GPUs, and where they do not hold it the CPU (accelerate)",
    )
    load_in_4bit: bool = Field(
        False, description="run bases in 4-bit NF4 (QLoRA), with bitsandbytes on a CUDA GPU: lorasuite[bnb]"
    )
    load_in_8bit: bool = Field(
        False, description="run bases in 8-bit integers, with bitsandbytes on a CUDA GPU: lorasuite[bnb]"
    )

    @model_validator(mode="after")
    def _one_width(self) -> LoadSettings:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("give load_in_4bit or load_in_8bit, not both")
        return self

    @property
    def quantized(self) -> bool:
        """Whether weights are quantized while they are loaded."""
        return self.load_in_4bit or self.load_in_8bit

    def key(self) -> dict[str, Any]:
        """What of it changes results, where it is not the default: where weights lie does not."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"device_map"})

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that is named; None: none."""
        import torch

        named = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return named[self.dtype]

    def check(self, device: str | torch.device) -> None:
        """Refuse quantization that this machine cannot do.

        Raises:
            ConfigError: without bitsandbytes, or for a device that is no CUDA GPU.
        """
        import torch

        if not self.quantized:
            return
        flag = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
        problems = []
        if torch.device(device).type != "cuda":
            remedy = f"Leave --{flag.replace('_', '-')} out (--dtype bfloat16 halves the memory), or use a CUDA GPU."
            problems.append(Problem(flag, f"needs a CUDA GPU, and the device is {device}", remedy))
        if importlib.util.find_spec("bitsandbytes") is None:
            remedy = "Install it with `pip install 'lorasuite[bnb]'`."
            problems.append(Problem(flag, "needs bitsandbytes, which is not installed", remedy))
        if problems:
            raise ConfigError(problems)
