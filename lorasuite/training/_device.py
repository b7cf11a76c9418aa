"""What fine-tuning settings mean on a device, and the memory a run took there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from lorasuite.errors import ConfigError, Problem
from lorasuite.training._settings import FinetuneSettings


@dataclass(frozen=True)
class DevicePlan:
    """How a run uses its device."""

    device: torch.device
    bf16: bool
    """Whether the forward pass is computed in bfloat16."""


def plan_device(settings: FinetuneSettings, device: str | torch.device) -> DevicePlan:
    """Check the device, and fix the precision.

    Raises:
        ConfigError: a device, precision or optional package that is not there.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError([Problem(f"device {device}", "is not supported for training", "Use cpu or cuda")])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Problem(f"device {device}", "is not available", "Use device cpu")])
    if device.index not in (None, 0):
        # The Trainer always takes the first visible GPU; moving the model elsewhere would fail half-way.
        remedy = f"Set CUDA_VISIBLE_DEVICES={device.index} and use device cuda"
        raise ConfigError([Problem(f"device {device}", "cannot be chosen by its index", remedy)])
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision == "bf16" and device.type == "cuda" and not gpu:
        raise ConfigError([Problem("precision bf16", f"is not available on {device}", "Use precision auto or fp32")])
    _check_packages(settings, device)
    return DevicePlan(device=device, bf16=settings.precision == "bf16" or (gpu and settings.precision == "auto"))


def _check_packages(settings: FinetuneSettings, device: torch.device) -> None:
    """ConfigError for optional packages that the settings name and that are not there."""
    problems = []
    if settings.liger and device.type != "cuda":
        problems.append(Problem("finetune.liger", f"needs a GPU, and the device is {device}", "Leave it out"))
    if settings.liger and find_spec("liger_kernel") is None:
        problems.append(Problem("finetune.liger", "needs liger-kernel", 'pip install "lorasuite[liger]"'))
    if settings.report_to != "none" and find_spec(settings.report_to) is None:
        name = settings.report_to
        problems.append(Problem(f"finetune.report_to {name}", "is not installed", f"pip install {name}, or use none"))
    if problems:
        raise ConfigError(problems)


def base_dtype(settings: FinetuneSettings, device: str | torch.device) -> torch.dtype | None:
    """The dtype of a base that is fine-tuned on a device, where nothing else is asked for; None: that in which a base
    is loaded there.

    Raises:
        ConfigError: a device or precision that is not there.
    """
    plan = plan_device(settings, device)
    if settings.precision == "auto" and plan.device.type == "cpu":
        return None
    return torch.bfloat16 if plan.bf16 else torch.float32


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU since the run began, or resident in this process since it started."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
