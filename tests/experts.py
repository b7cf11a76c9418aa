"""Adapters of experts as trainers for transformers 4 save them: tensors for each projection of each expert."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorasuite.bases import Checkpoint


def experts_one_by_one(base: Path, target: Path, rank: int = 2, router: bool = False) -> Path:
    """A random adapter of every expert's projections in a directory.

    Args:
        router: also of the routers, as ``all-linear`` has them.
    """
    checkpoint, generator = Checkpoint(base), torch.Generator().manual_seed(3)
    known, state = checkpoint.architecture.experts, {}
    assert known is not None
    place = (*known.others, known.path)[0]
    for layer in range(checkpoint.dims.layers):
        dims = checkpoint.experts(layer)
        if dims is None:
            continue
        inside = f"base_model.model.{checkpoint.architecture.layers}.{layer}.{place}"
        sizes = {
            f"{inside}.{number}.{name}": (dims.rows(role), dims.columns(role))
            for number in range(checkpoint.expert_count)
            for role, name in known.names.items()
        }
        if router:
            sizes[f"{inside.removesuffix('experts')}gate"] = checkpoint.expert_count, dims.hidden_size
        for stem, (rows, columns) in sizes.items():
            state[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.3
            state[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
    target.mkdir()
    save_file(state, target / "adapter_model.safetensors")
    names = [*known.names.values(), *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "lora_dropout": 0.05, "target_modules": names}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target
