"""Every kind of adapter PEFT writes, on tiny models: how to make one of any architecture, and what becomes of it.

The table is what ``docs/adapters.md`` shows: :func:`table` renders it, and a test keeps the two in step. What becomes
of each kind on each architecture is in :mod:`tests.cross`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model

from lorasuite.adapters import REFUSED, OutputType, config_problems
from lorasuite.bases import Checkpoint
from tests import models

TARGETS = ("q", "v", "o", "down")
ATTENTION = ("q", "v")


class Names:
    """What a base calls the modules of some roles (``"embedding"`` and ``"unembedding"`` among them)."""

    def __init__(self, model: Path) -> None:
        self.checkpoint = Checkpoint(model)

    def __call__(self, *roles: str) -> list[str]:
        """Their names as PEFT's ``target_modules`` take them: whole paths where a vision tower has the same ones."""
        a = self.checkpoint.architecture
        modules = [m for m in a.modules if set(m.roles) & set(roles)]
        names = dict.fromkeys(m.name.rpartition(".")[2] for m in modules)
        if a.text_config:
            depth = range(self.checkpoint.dims.layers)
            names = {a.path(n, m): None for n in depth for m in self.checkpoint.modules(n) if m in modules}
        ends = {"embedding": a.embedding, "unembedding": a.unembedding}
        return [*names, *(path.rpartition(".")[2] for name, path in ends.items() if name in roles)]

    def pattern(self, layers: str, *roles: str) -> str:
        """A regular expression of the modules of some layers."""
        ends = "|".join(name.rpartition(".")[2] for name in self(*roles))
        return rf"{self.checkpoint.architecture.layers}\.({layers})\..*({ends})"


Config = Callable[[Names], Any]


@dataclass(frozen=True)
class Kind:
    """How an adapter of one kind is made, what its output is, and how it is treated (for the docs)."""

    config: Config
    treated: str
    family: str = "llama"
    numbers: dict[str, Any] = field(default_factory=dict)
    out: str = "LoRA"
    output_type: OutputType = "lora"
    #: done with the path and the model before it is trained, and after it is saved
    before: Callable[[Path, Any], None] | None = None
    after: Callable[[Path, Any], None] | None = None


def lora(**settings: Any) -> Config:
    """A ``LoraConfig``; a setting that is a function is given the base's names."""
    return other("LoraConfig", **{"r": 3, "lora_alpha": 6, **settings})


def other(name: str, targets: tuple[str, ...] = TARGETS, **settings: Any) -> Config:
    """A config of that PEFT class for the modules of some roles."""

    def config(names: Names) -> Any:
        values = {key: value(names) if callable(value) else value for key, value in settings.items()}
        return getattr(peft, name)(**{"target_modules": names(*targets), **values})

    return config


def keep_initial(path: Path, tuned: Any) -> None:
    """The adapter before training, where PEFT's examples put it."""
    tuned.save_pretrained(path / "pissa_init", save_embedding_layers=False)


def keep_logits(path: Path, tuned: Any) -> None:
    """What the model computes as it is: PEFT draws the start anew when it loads such an adapter."""
    with torch.no_grad():
        torch.save(tuned.double().eval()(torch.tensor([[5, 9, 33, 71, 8, 40]])).logits, path / "logits.pt")


def prune(_path: Path, tuned: Any) -> None:
    """A rank for each module, as AdaLoRA's schedule leaves it: every second one loses one direction more."""
    modules = [name.partition("base_model.model.")[2] for name, m in tuned.named_modules() if hasattr(m, "ranknum")]
    pattern = {f"{name}.lora_E": [True, n % 2 == 0, True, False] for n, name in enumerate(modules)}
    tuned.peft_config["default"].rank_pattern = pattern


def as_pickle(path: Path, tuned: Any) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


OWN_WEIGHT = "as LoHa, with the old base's weight"
#: Migrated kinds.
MIGRATED: dict[str, Kind] = {
    "LoRA": Kind(lora(), "factors as stored"),
    "rsLoRA (use_rslora)": Kind(lora(use_rslora=True), "scaling α/√r, kept in the output"),
    "rank_pattern, alpha_pattern": Kind(
        lora(
            rank_pattern=lambda names: {names("q")[0]: 2, names.pattern("1", "o"): 5},
            alpha_pattern=lambda names: {names("v")[-1]: 1},
        ),
        "each module with its own rank and α; written with the largest rank",
    ),
    "layers_to_transform": Kind(lora(layers_to_transform=[1]), "the modules in the file count"),
    "regex target_modules": Kind(
        lora(target_modules=lambda names: names.pattern("1|2", "q", "v")), "the modules in the file count"
    ),
    "all-linear": Kind(lora(target_modules="all-linear"), "the modules in the file count"),
    "exclude_modules": Kind(lora(exclude_modules=r".*\.0\..*"), "the modules in the file count"),
    "fan_in_fan_out (GPT-2)": Kind(
        lora(targets=("q", "up"), fan_in_fan_out=True), "weights turned to (out, in) and back", "gpt2"
    ),
    "bias='lora_only'": Kind(
        lora(bias="lora_only"),
        "what was added to each bias is added to the new module's bias, row by row; dropped with the reason where it "
        "has none or the sizes differ",
        "qwen2",
        out="LoRA with biases",
    ),
    "modules_to_save (embeddings)": Kind(
        lora(modules_to_save=lambda names: names("embedding", "unembedding")),
        "the change of each shared token's row, through W_h, added to the new base's row",
        out="LoRA with whole embeddings",
    ),
    "LoRA on embeddings": Kind(
        lora(targets=("q", "embedding", "unembedding")),
        "rows of shared tokens re-indexed, the hidden side through W_h",
        out="LoRA on embeddings",
    ),
    "trainable_token_indices": Kind(
        lora(trainable_token_indices=lambda names: {names("embedding")[0]: [5, 9, 33]}),
        "the change of each token's row, through W_h, for tokens the new vocabulary has",
        out="LoRA with trained tokens",
    ),
    "DoRA": Kind(
        lora(use_dora=True),
        "direction as LoRA; magnitude ‖W_n‖·(m/‖W_o‖), row by row, averaged where rows have no counterpart",
        numbers={"kv_heads": 2},
        out="DoRA",
    ),
    "PiSSA": Kind(
        lora(init_lora_weights="pissa"),
        "the part PiSSA took out of the old base is computed again and subtracted: rank 2r",
    ),
    "OLoRA": Kind(lora(init_lora_weights="olora"), "as PiSSA"),
    "PiSSA (niter), CorDA, LoftQ, LoRA-GA with the initial adapter": Kind(
        lora(init_lora_weights="pissa_niter_4"),
        "the adapter before training, in a folder `*_init` inside it, is subtracted: rank 2r",
        before=keep_initial,
        after=keep_logits,
    ),
    "EVA, gaussian, orthogonal, LoRA-FA, MiCA": Kind(
        lora(init_lora_weights="gaussian"), "start from another point; ΔW is an ordinary one"
    ),
    "adapter_model.bin": Kind(lora(), "with `--allow-pickle`, read with `weights_only=True`", after=as_pickle),
    "AdaLoRA": Kind(
        other("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
        "ΔW = α/(init_r + 1e-5)·B(E∘A); written as LoRA",
        before=prune,
    ),
    "AdaLoRA, `--output-type adalora`": Kind(
        other("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
        "the SVD of each new ΔW, with the rank it has in the rank pattern",
        out="AdaLoRA",
        before=prune,
        output_type="adalora",
    ),
    "LoHa": Kind(
        other("LoHaConfig", r=2, alpha=4, init_weights=False), "ΔW by PEFT, one module at a time, then an SVD"
    ),
    "LoKr": Kind(other("LoKrConfig", r=2, alpha=4, init_weights=False), "as LoHa"),
    "VeRA": Kind(other("VeraConfig", r=4, targets=ATTENTION), "as LoHa"),
    "RandLoRA": Kind(other("RandLoraConfig", r=4, targets=ATTENTION), "as LoHa"),
    "VB-LoRA": Kind(other("VBLoRAConfig", r=2, num_vectors=8, vector_length=8, topk=2, targets=ATTENTION), "as LoHa"),
    "TinyLoRA": Kind(other("TinyLoraConfig", r=2, u=4, targets=("q", "k", "v")), "as LoHa"),
    "FourierFT": Kind(other("FourierFTConfig", n_frequency=50, scaling=30.0), "as LoHa; no rank of its own"),
    "WaveFT": Kind(other("WaveFTConfig", n_frequency=64), "as LoHa; no rank of its own"),
    "C3A": Kind(other("C3AConfig", block_size=8), "as LoHa; no rank of its own"),
    "GraLoRA": Kind(other("GraloraConfig", r=4, gralora_k=2), "as LoHa"),
    "DeLoRA": Kind(other("DeloraConfig", r=2), "as LoHa"),
    "MiSS": Kind(other("MissConfig", r=2), "as LoHa"),
    "MiSS (mini)": Kind(other("MissConfig", r=2, init_weights="mini", mini_r=4, targets=ATTENTION), "as LoHa"),
    "MiSS (bat)": Kind(other("MissConfig", r=4, init_weights="bat", targets=ATTENTION), OWN_WEIGHT),
    "PSOFT": Kind(other("PsoftConfig", r=4), OWN_WEIGHT),
    "OFT": Kind(other("OFTConfig", oft_block_size=8), OWN_WEIGHT + "; no rank of its own"),
    "OFT (coft, block_share)": Kind(
        other("OFTConfig", oft_block_size=8, block_share=True, coft=True, eps=0.1, use_cayley_neumann=False),
        OWN_WEIGHT + "; no rank of its own",
    ),
    "BOFT": Kind(
        other("BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=2), OWN_WEIGHT + "; no rank of its own"
    ),
    "HRA": Kind(other("HRAConfig", r=4, apply_GS=True), OWN_WEIGHT),
    "IA3": Kind(
        other("IA3Config", feedforward_modules=lambda names: names("down")),
        OWN_WEIGHT + "; no rank of its own; scales biases, too",
    ),
    "HiRA": Kind(other("HiraConfig", r=4), OWN_WEIGHT),
    "RoAd": Kind(
        other("RoadConfig", group_size=8, variant="road_4"),
        OWN_WEIGHT + "; no rank of its own; turns biases, too",
    ),
    "DEFT": Kind(other("DeftConfig", r=4), OWN_WEIGHT),
    "GLoRA": Kind(other("GloraConfig", r=4), OWN_WEIGHT + "; changes biases, too"),
    "PEANuT": Kind(other("PeanutConfig", r=4, depth=1), OWN_WEIGHT),
    "OSF": Kind(other("OSFConfig", effective_rank=12), OWN_WEIGHT + "; no rank of its own"),
    "SHiRA": Kind(other("ShiraConfig", r=4), "as LoHa; single entries, no rank of its own"),
    "Super, Supra": Kind(
        other("SupertuningConfig", sparsity=0.9, r=2, lora_alpha=4), OWN_WEIGHT + "; single entries, no rank of its own"
    ),
    "Uni-LoRA": Kind(
        other("UniLoraConfig", r=4, theta_d_length=64, save_indices=True), "as LoHa; with `save_indices` only"
    ),
}

#: Settings of a LoRA that are refused, by field.
REFUSED_SETTINGS: dict[str, Any] = {
    "bias": "all",
    "init_lora_weights": "corda",
    "lora_bias": True,
    "use_qalora": True,
    "alora_invocation_tokens": [4],
    "layer_replication": [[0, 2], [1, 3]],
    "use_bdlora": {"nblocks": 2},
    "megatron_config": {"a": 1},
    "kasa_config": {"beta": 1e-4},
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 4},
    "a_field_of_a_later_version": 0.5,
}


def build(kind: Kind, path: Path, model: Path, seed: int = 1) -> Path:
    """An adapter of this kind, every trainable parameter moved from where it began, saved by PEFT itself."""
    config = kind.config(Names(model))
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        tuned = get_peft_model(models.load(model), config)
        tuned.create_or_update_model_card = lambda *_: None  # a third of the time of saving
        if kind.before is not None:
            kind.before(path, tuned)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.2
                    parameter.mul_(1 + noise) if "magnitude" in name else parameter.add_(noise)
        tuned.save_pretrained(path)
        if kind.after is not None:
            kind.after(path, tuned)
    return path


def _plain(what: str) -> str:
    return what.replace("0.5 is not", "is not").replace("'all' ", "").replace("'corda' ", "")


def table() -> str:
    """The table of ``docs/adapters.md``, from the kinds above and the reasons in the code."""
    lines = ["| adapter | result | how |", "|---|---|---|"]
    lines += [f"| {name} | {kind.out} | {kind.treated} |" for name, kind in MIGRATED.items()]
    for name, value in REFUSED_SETTINGS.items():
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, name: value}
        problem = next(p for p in config_problems(config, "config") if p.where == f"config: {name}")
        shown = f"{name}={value!r}" if isinstance(value, str) else name
        lines.append(f"| LoRA with `{shown}` | refused | {_plain(problem.what)} |")
    lines += [f"| {name} | refused | {why} |" for name, why in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    docs = Path(__file__).parents[1] / "docs" / "adapters.md"
    head, _, rest = docs.read_text().partition("<!-- kinds -->\n")
    docs.write_text(f"{head}<!-- kinds -->\n{table()}<!-- /kinds -->{rest.partition('<!-- /kinds -->')[2]}")
