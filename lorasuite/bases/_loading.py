"""Whole models and tokenizers, as transformers loads them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorasuite.bases._checkpoint import Checkpoint
from lorasuite.bases._files import Weights, read_config_json, read_json, resolve
from lorasuite.bases._quantized import FIELDS
from lorasuite.bases._settings import LoadSettings
from lorasuite.bases._template_limits import check_chat_template
from lorasuite.errors import CheckpointError, LoRASuiteError, Problem

#: How a base is loaded where nobody says.
DEFAULT = LoadSettings()

#: transformers and accelerate set global state while they build a model: one at a time in a process.
BUILDING = threading.Lock()


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer.

    Raises:
        CheckpointError: if it cannot be loaded, or its chat template does not end.
    """
    from transformers import AutoTokenizer

    path = resolve(source)
    _check_size(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        remedy = "Save the tokenizer beside the model."
        if (path / "tekken.json").is_file() and not (path / "tokenizer.json").is_file():
            remedy = (
                "It has only tekken.json: a newer transformers reads that, as does mistral-common (pip install "
                "mistral-common); or put the tokenizer.json of a converted repository beside it."
            )
        what = f"its tokenizer cannot be loaded ({type(error).__name__}: {error})"
        raise CheckpointError(Problem(str(path), what, remedy)) from error
    check_chat_template(tokenizer, str(path))
    return tokenizer


#: Special tokens of a tokenizer's settings: what adds them takes half a millisecond for each.
MOST_TOKENS = 10_000


def _check_size(path: Path) -> None:
    """
    Raises:
        CheckpointError: if a tokenizer's settings are more than any has.
    """
    for file in (path / "tokenizer_config.json", path / "special_tokens_map.json"):
        settings = read_config_json(file) if file.is_file() else {}
        for name in ("extra_special_tokens", "additional_special_tokens"):
            if len(found if isinstance(found := settings.get(name), list | dict) else ()) > MOST_TOKENS:
                what = f"has more than {MOST_TOKENS:,} tokens, as no model has"
                raise CheckpointError(Problem(f"{file}: {name}", what, "Download it again."))


def auto_class(config: Any) -> Any:
    """The transformers Auto class for a config: the causal one, or the multimodal one where there is no causal one."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (
        AutoModelForImageTextToText
        if multimodal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForCausalLM
    )


def module_order(base: Checkpoint) -> dict[str, int]:
    """Module path → its place in the model that transformers builds (on the meta device: no weight is read).

    Raises:
        CheckpointError: for a model with code of its own, which is not run for this.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(base.path), trust_remote_code=False)  # nor asked about
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (OSError, ValueError) as error:
        what = f"the order of its modules is not known without running its code ({type(error).__name__})"
        raise CheckpointError(Problem(base.source, what, "Train a LoRA adapter.")) from error
    return {name: place for place, (name, _) in enumerate(model.named_modules())}


def empty_model(path: Path, dtype: torch.dtype | None, trust_remote_code: bool = False) -> Any:
    """The model that transformers builds, in evaluation mode: parameters without values (on the meta device), and real
    buffers on the CPU. No weight is read.

    Args:
        dtype: of the parameters; None means the config's own.

    Raises:
        CheckpointError: if it cannot be built.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        code = {"trust_remote_code": True} if trust_remote_code else {}
        named = {} if dtype is None else {"dtype": dtype}
        with BUILDING, init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, **named, **code)
    except (OSError, ValueError) as error:
        remedy = "Give a directory saved with save_pretrained; a model with its own code needs trust_remote_code."
        raise CheckpointError(
            Problem(str(path), f"cannot be built ({type(error).__name__}: {error})", remedy)
        ) from error
    return model.eval().requires_grad_(False)


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16: products take half of the time there, and a hundred times
    elsewhere. False where torch cannot tell (before 2.10)."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def known_dtype(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype a load gives, so that asking for it by name or by default is one; None where only the load tells.

    By default it is that of the files. On a CPU only where that is bfloat16 and the CPU has instructions for it, and
    float32 otherwise.
    """
    if dtype is not None:
        return dtype
    config = read_json(path / "config.json")
    found: Any = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if device.type == "cpu":
        return found if found == torch.bfloat16 and cpu_has_bfloat16() else torch.float32
    return found if isinstance(found, torch.dtype) else None


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    loading: LoadSettings = DEFAULT,
) -> Any:
    """The whole model on its devices, in evaluation mode, with frozen weights.

    It is loaded anew: :func:`lorasuite.bases.loaded_model` keeps what it has loaded. Each tensor is read, made the
    dtype that is wanted and put on its device before the next: beside the model itself memory holds the tensors that
    are in work. A quantized checkpoint is dequantized in the same way (:mod:`lorasuite.bases._quantized`).

    Args:
        source: a local directory or ``hub-id[/subfolder][@revision]``.
        device: of the whole model, unless ``loading`` spreads it.
        dtype: goes before that of ``loading``; None in both means :func:`known_dtype`.
        loading: precision, quantization while loading, and devices.

    Raises:
        CheckpointError: if it cannot be loaded.
        ConfigError: for quantization while loading that this machine cannot do.
    """
    from transformers import AutoConfig

    loading.check(device)
    path = resolve(source)
    place, asked = torch.device(device), dtype or loading.torch_dtype
    wanted: Any = known_dtype(path, place, asked) if place.type == "cpu" else asked or "auto"
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if place.type != "cpu":  # else there is one place, and PEFT takes a map to it for offloading
        options["device_map"] = "auto" if loading.device_map == "auto" else {"": str(device)}
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        loader = auto_class(config)
        read = _dequantized(path, config)
        if loading.quantized:
            options["quantization_config"] = _bitsandbytes(loading, wanted)
        if read is None:
            # transformers attaches an adapter whose files lie beside a base's, unless it is to look for one elsewhere.
            nowhere = {"subfolder": "no adapter of its own"}
            model = loader.from_pretrained(str(path), dtype=wanted, adapter_kwargs=nowhere, **options)
        else:
            own = torch.bfloat16 if wanted == "auto" else wanted
            with torch.device("meta"):
                empty = loader.from_config(config, trust_remote_code=options.pop("trust_remote_code"))
            model = type(empty).from_pretrained(None, config=empty.config, state_dict=read, dtype=own, **options)
            _generation(model, path)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, LoRASuiteError):
            raise
        raise CheckpointError(
            Problem(
                str(path),
                f"cannot be loaded ({type(error).__name__}: {error})",
                "Check that the directory was saved with save_pretrained; a model with its own code needs "
                "trust_remote_code.",
            )
        ) from error
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_in_one_piece)
    return model.eval().requires_grad_(False)


def _in_one_piece(_head: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an output head reads, contiguous.

    ``generate`` gives it a prompt's last positions as a view of all states, with whose strides torch makes a batched
    product of it and copies the head's weight for every row.
    """
    states, *rest = arguments
    return (states.contiguous(), *rest)


def placed(model: Any, device: str | torch.device) -> Any:
    """A loaded model on a device; one that is spread over several, or quantized, stays where it was loaded."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return model if len(places) > 1 or getattr(model, "is_quantized", False) else model.to(device)


class _Later:
    """A tensor that transformers' loader reads when it comes to it, as it does slices of safetensors files."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.weights, self.name = weights, name

    def __getitem__(self, _whole: Any) -> torch.Tensor:
        return self.weights.read(self.name)


def _dequantized(path: Path, config: Any) -> dict[str, _Later] | None:
    """The tensors of a quantized checkpoint, to be read one at a time; None for a plain one, which transformers reads.

    Args:
        config: is changed: it says afterwards that the model is plain.

    Raises:
        CheckpointError: for a quantized format that is not dequantized here.
    """
    weights = Weights(path)
    if not [*path.glob("*.safetensors"), *path.glob("*.gguf")]:
        return None  # transformers says what is wrong, or reads it
    weights.check_readable()
    said = [part for part in (config, config.get_text_config()) if any(hasattr(part, field) for field in FIELDS)]
    if not said and weights.quantization is None:
        return None
    for part in said:
        for field in FIELDS:
            if hasattr(part, field):
                delattr(part, field)
    return {name: _Later(weights, name) for name in weights.shapes()}


def _generation(model: Any, path: Path) -> None:
    """The checkpoint's generation settings, which transformers reads itself where it reads the weights."""
    from transformers import GenerationConfig

    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    model.config._name_or_path = str(path)  # PEFT writes it into an adapter's config


def _bitsandbytes(loading: LoadSettings, dtype: torch.dtype | str) -> Any:
    """Quantization while loading: NF4 with double quantization as in QLoRA (arXiv 2305.14314), or LLM.int8()."""
    from transformers import BitsAndBytesConfig

    if loading.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    computed = torch.bfloat16 if isinstance(dtype, str) else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
