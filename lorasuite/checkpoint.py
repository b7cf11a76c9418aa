"""Base models read one tensor at a time: safetensors, sharded or not, from a directory or the Hub.

Nothing here builds a model; :func:`load_model` and :func:`load_tokenizer` do, for the stages that need a forward pass.
"""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Iterator, MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorasuite.architectures import ROLES, Architecture, Dimensions, Module, Role, architecture_for
from lorasuite.errors import CheckpointError, Problem

#: What a base model needs on disk; nothing else is fetched from the Hub.
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
DAMAGED = "The file is damaged: download it again."
#: Config fields that say nothing about what the model computes.
INERT_CONFIG = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache")


class Meter:
    """Bytes of checkpoint tensors alive now and at most, so that the memory promise can be tested and reported."""

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0

    def reset(self) -> None:
        """Forget the peak, keep what is alive."""
        self.peak = self.current

    def watch(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage until the last view of it is gone."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, size)
        return tensor

    def _release(self, size: int) -> None:
        self.current -= size


#: Counts every tensor any checkpoint of this process has loaded.
METER = Meter()


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model or adapter: a directory as it is, or ``hub-id[@revision]`` downloaded.

    Raises:
        CheckpointError: if it is neither, or the Hub cannot be reached and has no local copy.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(
            Problem(str(source), "is a file, not a model directory", f"Give its directory, {path.parent}.")
        )
    hub_id, _, at = str(source).partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) or hub_id.startswith("."):
        raise CheckpointError(
            Problem(
                str(source),
                "no such directory, and not a Hub id",
                "Give a local directory or hub-id[@revision].",
            )
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision or at or None, allow_patterns=FILES))
    except Exception as error:  # the Hub client raises many kinds; each is one and the same problem here
        raise CheckpointError(
            Problem(
                str(source),
                f"no such directory, and the Hub did not give it ({type(error).__name__}: {error})",
                "Check the path or the id and revision; for private models log in with `hf auth login`.",
            )
        ) from error


class Weights:
    """The safetensors files of a model directory and the tensors they name, of any architecture.

    Raises:
        CheckpointError: if config, index, shards or safetensors weights are missing.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.path = resolve(source)
        self.config = read_json(self.path / "config.json")

    @property
    def _index(self) -> Path | None:
        """The index of a sharded checkpoint; as in transformers, a single file goes before it."""
        index = self.path / "model.safetensors.index.json"
        return index if index.is_file() and not (self.path / "model.safetensors").is_file() else None

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Tensor name → file that holds it."""
        index = self._index
        if index is not None:
            weight_map: dict[str, str] = read_json(index).get("weight_map", {})
            files = {name: self.path / file for name, file in weight_map.items()}
            missing = sorted({str(file) for file in files.values() if not file.is_file()})
            if missing:
                raise CheckpointError(
                    [Problem(file, "shard named by the index is missing", "Download it again.") for file in missing]
                )
            return files
        found: dict[str, Path] = {}
        for file in self.weight_files:
            with _open(file) as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        return found

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in name order."""
        index = self._index
        if index is not None:
            return sorted({self.path / file for file in read_json(index).get("weight_map", {}).values()})
        single = self.path / "model.safetensors"
        files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if files:
            return files
        pickles = sorted(p.name for p in self.path.glob("*.bin"))
        if pickles:
            raise CheckpointError(
                Problem(
                    str(self.path),
                    f"has pickle weights only ({', '.join(pickles[:3])})",
                    "Pickle files can run code when read: convert them with `save_pretrained` first.",
                )
            )
        raise CheckpointError(
            Problem(str(self.path), "has no safetensors weights", "Give a directory with model.safetensors.")
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape, from the headers alone."""
        tables = {file: dict(_shapes(file)) for file in sorted(set(self.shards.values()))}
        # a name counts where the index says it is, as it does when it is read
        return {name: tables[file][name] for name, file in self.shards.items() if name in tables[file]}


class Checkpoint(Weights):
    """A base model's weights on disk, opened lazily.

    Tensors come one at a time, in float32, and are freed when the caller drops them; only the headers of the shards
    are kept.

    Raises:
        CheckpointError: if config, index, shards or safetensors weights are missing.
        ArchitectureError: if no architecture file describes the model.
    """

    def __init__(self, source: str | Path) -> None:
        super().__init__(source)
        where = str(self.path / "config.json")
        self.architecture: Architecture = architecture_for(self.config, where)
        self.dims: Dimensions = self.architecture.dimensions(self.config, where)

    def find(self, name: str) -> str | None:
        """The name a tensor has in this checkpoint (a family's checkpoints may differ in prefixes), or None."""
        names = [*self.architecture.names(name)]
        if name == self.architecture.embedding + ".weight" and self.architecture.tied(self.config):
            # a tied pair may be stored under either name
            names += self.architecture.names(self.architecture.unembedding + ".weight")
        return next((candidate for candidate in names if candidate in self.shards), None)

    def modules(self, layer: int) -> tuple[Module, ...]:
        """The modules one layer has: optional ones where the checkpoint holds them, each role once."""
        present: list[Module] = []
        for module in self.architecture.modules:
            held = {role for other in present for role in other.roles}
            if not module.optional or (
                not held & set(module.roles) and self.find(self.architecture.path(layer, module) + ".weight")
            ):
                present.append(module)
        return tuple(present)

    def roles(self, layer: int) -> tuple[Role, ...]:
        """The roles one layer has."""
        held = {role for module in self.modules(layer) for role in module.roles}
        return tuple(role for role in ROLES if role in held)

    def layer_dims(self, layer: int) -> Dimensions:
        """The dimensions of one layer, whose MLP width may be its own."""
        return self.architecture.widths(self.dims, self.modules(layer), self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        stored = self._stored(name)
        with _open(self.shards[stored]) as handle:
            if stored not in handle.keys():  # noqa: SIM118 - not a dict
                raise CheckpointError(self._missing(stored))
            return tuple(handle.get_slice(stored).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32.

        Raises:
            CheckpointError: if it is missing, or holds NaN or Inf.
        """
        stored = self._stored(name)
        with _open(self.shards[stored]) as handle:
            if stored not in handle.keys():  # noqa: SIM118 - not a dict
                raise CheckpointError(self._missing(stored))
            tensor: Tensor = handle.get_tensor(stored).float()
        if not _finite(tensor):
            raise CheckpointError(
                Problem(
                    str(self.shards[stored]),
                    f"{stored} holds NaN or Inf",
                    DAMAGED,
                )
            )
        return METER.watch(tensor)

    def weight(self, layer: int, module: Module) -> Tensor:
        """A block's weight ``(out, in)`` in float32, however it is stored."""
        stored = self.tensor(self.architecture.path(layer, module) + ".weight")
        return stored.T if module.transposed else stored

    def layer(self, layer: int, roles: tuple[Role, ...]) -> dict[Role, Tensor]:
        """The weights of some roles of one block, fused ones split; each ``(out, in)``, float32."""
        found: dict[Role, Tensor] = {}
        dims = self.layer_dims(layer)
        for module in self.modules(layer):
            if set(module.roles) & set(roles):
                whole = self.weight(layer, module)
                for role, part in module.split(whole, dims).items():
                    if role in roles:
                        shared = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                        found[role] = part if shared else METER.watch(part)
        return found

    def embedding(self) -> Tensor:
        """The input embedding ``(V, d)`` as the first block reads it, with the family's scale; float32."""
        rows = self.tensor(self.architecture.embedding + ".weight")
        scale = self.architecture.scale(self.config)
        return rows if scale == 1 else rows.mul_(scale)

    def check(self) -> list[Problem]:
        """Everything the architecture file expects that the checkpoint does not have, from headers only."""
        problems: list[Problem] = []
        expected: list[tuple[str, tuple[int, int]]] = []
        try:
            shapes = self.shapes()
            for layer in range(self.dims.layers):
                dims, modules = self.layer_dims(layer), self.modules(layer)
                for module in (*modules, *self._siblings(modules)):
                    shape = sum(dims.rows(role) for role in module.roles), dims.columns(module.roles[0])
                    name = self.architecture.path(layer, module) + ".weight"
                    expected.append((name, shape[::-1] if module.transposed else shape))
        except CheckpointError as error:
            return error.problems
        embedding = self.find(self.architecture.embedding + ".weight")
        if embedding is None or embedding not in shapes:
            problems.append(self._missing(self.architecture.embedding + ".weight"))
        elif shapes[embedding][1] != self.dims.hidden_size:
            problems.append(
                Problem(
                    embedding,
                    f"is {shapes[embedding]}, config says hidden size {self.dims.hidden_size}",
                    "The config does not belong to these weights, or the embedding is projected to the hidden size, "
                    "which is not supported.",
                )
            )
        for name, shape in expected:
            stored = self.find(name)
            if stored is None or stored not in shapes:
                problems.append(self._missing(name))
            elif shapes[stored] != shape:
                problems.append(
                    Problem(
                        stored,
                        f"is {shapes[stored]}, the config implies {shape}",
                        f"The config does not belong to these weights, or {self.architecture.family}.yaml is wrong.",
                    )
                )
        return problems

    def _siblings(self, modules: tuple[Module, ...]) -> list[Module]:
        """Optional modules a layer lacks although it has others of the same parent: they are missing, not absent."""
        parents = {module.name.rpartition(".")[0] for module in modules if module.optional}
        return [
            module
            for module in self.architecture.modules
            if module.optional and module not in modules and module.name.rpartition(".")[0] in parents
        ]

    def _missing(self, name: str) -> Problem:
        return Problem(str(self.path), f"tensor {name} is missing", "The checkpoint is incomplete: download it again.")

    def _stored(self, name: str) -> str:
        stored = self.find(name)
        if stored is None:
            raise CheckpointError(self._missing(name))
        return stored


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise CheckpointError(
            Problem(str(file), f"is not a readable safetensors file ({error})", "Download it again.")
        ) from error


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with _open(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a dict
            yield name, tuple(handle.get_slice(name).get_shape())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            Problem(str(path), "is missing", "Give a directory saved with save_pretrained.")
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            Problem(str(path), f"is not valid JSON ({error})", "Download or save it again.")
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(Problem(str(path), "holds no JSON object", "Download or save it again."))
    return value


def file_digest(path: Path, cache: MutableMapping[str, str] | None = None) -> str:
    """sha256 of a file's bytes, remembered in ``cache`` under its path, size and modification time.

    Files of the Hub cache are links to blobs named by their sha256, which is then taken as it is.
    """
    real = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    key = f"{real}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    if cache is not None and key in cache:
        return cache[key]
    with real.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if cache is not None:
        cache[key] = digest
    return digest


def digest_json(value: object) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_model(source: str | Path, cache: MutableMapping[str, str] | None = None) -> str:
    """What a base model computes, as a digest: its weight files and the parts of its config that matter."""
    checkpoint = Checkpoint(source)
    config = {key: value for key, value in checkpoint.config.items() if key not in INERT_CONFIG}
    return digest_json([config, [file_digest(file, cache) for file in checkpoint.weight_files]])


def check_finite(source: str | Path, cache: MutableMapping[str, str] | None = None) -> None:
    """Read every weight once and refuse a damaged base before any work is built on it.

    Files already found whole are remembered in ``cache`` by their digest and not read again.

    Raises:
        CheckpointError: naming each tensor that holds NaN or Inf.
    """
    problems: list[Problem] = []
    for file in Checkpoint(source).weight_files:
        known = f"finite:{file_digest(file, cache)}"
        if cache is not None and known in cache:
            continue
        with _open(file) as handle:
            wrong = [name for name in handle.keys() if not _finite(handle.get_tensor(name))]  # noqa: SIM118
        problems += [Problem(str(file), f"{name} holds NaN or Inf", DAMAGED) for name in wrong]
        if cache is not None and not wrong:
            cache[known] = "yes"
    if problems:
        raise CheckpointError(problems)


def _finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN, which is its own extreme, nor Inf: in one pass that allocates nothing."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor.float()))


def fingerprint_tokenizer(source: str | Path, cache: MutableMapping[str, str] | None = None) -> str:
    """A tokenizer as a digest of its files.

    Raises:
        CheckpointError: if the directory has no tokenizer.
    """
    path = resolve(source)
    files = {name: file_digest(path / name, cache) for name in TOKENIZER_FILES if (path / name).is_file()}
    if not files:
        raise CheckpointError(Problem(str(path), "has no tokenizer files", "Save the tokenizer beside the model."))
    return digest_json(files)


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    path = resolve(source)
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(
            Problem(
                str(path),
                f"its tokenizer cannot be loaded ({type(error).__name__}: {error})",
                "Save the tokenizer beside the model.",
            )
        ) from error


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


def load_model(
    source: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The whole model for a forward pass, in evaluation mode, with frozen weights.

    Args:
        dtype: None means float32 on the CPU and the checkpoint's own elsewhere.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    from transformers import AutoConfig

    path = resolve(source)
    wanted = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        loader = auto_class(config)
        model = loader.from_pretrained(str(path), dtype=wanted, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            Problem(
                str(path),
                f"cannot be loaded ({type(error).__name__}: {error})",
                "Check that the directory was saved with save_pretrained; a model with its own code needs "
                "trust_remote_code.",
            )
        ) from error
    return model.to(device).eval().requires_grad_(False)
