"""Model directories and their safetensors files: found locally or on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorasuite.bases import _quantized
from lorasuite.bases._paths import is_directory, is_file
from lorasuite.errors import CheckpointError, Problem

#: Patterns of the files that are fetched from the Hub.
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
#: The remedy where weights cannot be what was published.
DAMAGED = "The file is damaged: download it again."
DOWNLOAD = "Download it again."
#: Bytes of a file of JSON: indexes of the largest models have ten million.
LARGEST_JSON = 64 * 2**20
#: Settings of a config, and values in all of them together: lists of the modules of large models have some 50,000.
MOST_SETTINGS, MOST_VALUES = 5_000, 200_000


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model or adapter: a directory as it is, or ``hub-id[/subfolder][@revision]`` downloaded.

    Raises:
        CheckpointError: if it is neither, or the Hub cannot be reached and has no local copy.
    """
    path = Path(source)
    if is_directory(source):
        return path.expanduser()
    if path.suffix == ".gguf" and is_file(source):
        raise CheckpointError(_quantized.gguf_problem(path))
    if is_file(source):
        raise CheckpointError(
            Problem(str(source), "is a file, not a model directory", f"Give its directory, {path.parent}.")
        )
    hub_id, _, at = str(source).partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", hub_id):
        raise CheckpointError(
            Problem(
                str(source),
                "no such directory, and not a Hub id",
                "Give a local directory or hub-id[/subfolder][@revision].",
            )
        )
    from huggingface_hub import snapshot_download

    parts = hub_id.split("/")
    hub_id, inside = "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])
    patterns = [inside + pattern for pattern in FILES]
    try:
        path = Path(snapshot_download(hub_id, revision=revision or at or None, allow_patterns=patterns)) / inside
    except Exception as error:  # the Hub client raises many kinds; each is one and the same problem here
        raise CheckpointError(
            Problem(
                str(source),
                f"no such directory, and the Hub did not give it ({type(error).__name__}: {error})",
                "Check the path or the id and revision; for private models log in with `hf auth login`.",
            )
        ) from error
    if not path.is_dir():
        raise CheckpointError(Problem(str(source), f"{hub_id} has no folder {inside}", "Check its name."))
    return path


class Weights:
    """The safetensors files of a model directory and the tensors they name, of any architecture."""

    def __init__(self, source: str | Path) -> None:
        """Find the directory and read its config; files of weights are read when asked for.

        Args:
            source: a local directory or ``hub-id[/subfolder][@revision]``.

        Raises:
            CheckpointError: if the directory or its ``config.json`` is missing or cannot be read.
        """
        self.source = str(source)
        self.path = resolve(source)
        gguf = _quantized.gguf_files(self.path)
        if gguf and not (self.path / "config.json").is_file():
            raise CheckpointError(_quantized.gguf_problem(gguf[0]))
        self.config = read_config_json(self.path / "config.json")

    @property
    def _index(self) -> Path | None:
        """The index of a sharded checkpoint; as in transformers, a single file goes before it."""
        index = self.path / "model.safetensors.index.json"
        return index if index.is_file() and not (self.path / "model.safetensors").is_file() else None

    def _indexed(self, index: Path) -> dict[str, Path]:
        """Tensor name → file, as the index says.

        Raises:
            CheckpointError: if it says so in another form.
        """
        found = read_json(index).get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
            what = "has no weight_map from names of tensors to names of files"
            raise CheckpointError(Problem(str(index), what, DOWNLOAD))
        if outside := [file for file in found.values() if Path(file).is_absolute() or ".." in Path(file).parts]:
            raise CheckpointError(Problem(str(index), f"names {outside[0]}, which is not beside it", DOWNLOAD))
        return {name: self.path / file for name, file in found.items()}

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Tensor name → file that holds it.

        Raises:
            CheckpointError: if index, shards or safetensors weights are missing or cannot be read.
        """
        index = self._index
        if index is not None:
            files = self._indexed(index)
            missing = sorted({str(file) for file in files.values() if not is_file(file)})
            if missing:
                raise CheckpointError(
                    [Problem(file, "shard named by the index is missing", "Download it again.") for file in missing]
                )
            return files
        found: dict[str, Path] = {}
        for file in self.weight_files:
            with open_safetensors(file) as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        return found

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in name order.

        Raises:
            CheckpointError: if there are none.
        """
        index = self._index
        single = self.path / "model.safetensors"
        if index is not None:
            files = sorted(set(self._indexed(index).values()))
        else:
            files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if wrong := [str(file) for file in files if not is_file(file)]:  # a pipe or a device may never end
            raise CheckpointError([Problem(file, "is missing, or no regular file", DOWNLOAD) for file in wrong])
        if files:
            return files
        gguf = _quantized.gguf_files(self.path)
        if gguf:
            raise CheckpointError(_quantized.gguf_problem(gguf[0]))
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

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name → shape and dtype as safetensors names it, from the headers alone."""
        tables = {file: dict(_entries(file)) for file in sorted(set(self.shards.values()))}
        # a name counts where the index says it is, as it does when it is read
        return {name: tables[file][name] for name, file in self.shards.items() if name in tables[file]}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape, from the headers alone; without what only says how quantized ones are to be read.

        Raises:
            CheckpointError: if index, shards or safetensors weights are missing or cannot be read.
        """
        quantized = self.quantization is not None
        return {
            name: shape for name, (shape, _) in self._headers.items() if not (quantized and _quantized.is_beside(name))
        }

    @cached_property
    def quantization(self) -> _quantized.Quantization | None:
        """How the checkpoint is quantized, by its config and headers; None for a plain one.

        Raises:
            CheckpointError: if index, shards or safetensors weights are missing or cannot be read.
        """
        return _quantized.found(self.config, {name: dtype for name, (_, dtype) in self._headers.items()})

    def check_readable(self) -> None:
        """Refuse a checkpoint in a quantized format that is not dequantized here.

        Raises:
            CheckpointError: for one, and if headers cannot be read.
        """
        if self.quantization is not None and self.quantization.why:
            raise CheckpointError(self.quantization.problem(str(self.path)))

    def read(self, stored: str) -> Tensor:
        """One tensor by its name in the files: in its own dtype, or in float32 what a quantized one stands for.

        Raises:
            CheckpointError: if it is missing, or of a quantized format that is not dequantized here.
        """
        with open_safetensors(self.shards[stored]) as handle:
            if stored not in handle.keys():  # noqa: SIM118 - not a dict
                raise CheckpointError(missing(self.path, stored))
            tensor: Tensor = handle.get_tensor(stored)
        said = _quantized.declared(self.config)
        return _quantized.dequantized(stored, tensor, self.shards, self._raw, said.blocks if said else ())

    def _raw(self, stored: str) -> Tensor:
        with open_safetensors(self.shards[stored]) as handle:
            tensor: Tensor = handle.get_tensor(stored)
        return tensor


def missing(path: Path, name: str) -> Problem:
    """What a user is told of a tensor that is not there."""
    return Problem(str(path), f"tensor {name} is missing", "The checkpoint is incomplete: download it again.")


def open_safetensors(file: Path) -> Any:
    """A safetensors file, open for reading one tensor at a time (a context manager).

    Raises:
        CheckpointError: if it cannot be read as one.
    """
    if not is_file(file):
        raise CheckpointError(Problem(str(file), "is missing, or no regular file", DOWNLOAD))
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise CheckpointError(
            Problem(str(file), f"is not a readable safetensors file ({error})", "Download it again.")
        ) from error


def _entries(file: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Names of a file's tensors with their shapes and dtypes, from its header."""
    with open_safetensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a dict
            entry = handle.get_slice(name)
            yield name, (tuple(entry.get_shape()), str(entry.get_dtype()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if the file is missing, larger than :data:`LARGEST_JSON` or holds no JSON object.
    """
    if path.exists() and not path.is_file():  # a directory, or a pipe or device, which may never end
        raise CheckpointError(Problem(str(path), "is no regular file", "Give a directory saved with save_pretrained."))
    try:
        if path.stat().st_size > LARGEST_JSON:
            what = f"has more than {LARGEST_JSON // 2**20} MiB, which no config or index has"
            raise CheckpointError(Problem(str(path), what, DOWNLOAD))
        value = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            Problem(str(path), "is missing", "Give a directory saved with save_pretrained.")
        ) from None
    except (ValueError, RecursionError) as error:  # also of integers of thousands of digits, and nesting as deep
        raise CheckpointError(
            Problem(str(path), f"is not valid JSON ({error})", "Download or save it again.")
        ) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise CheckpointError(Problem(str(path), f"cannot be read ({why})", "Check it and its permissions.")) from None
    if not isinstance(value, dict):
        raise CheckpointError(Problem(str(path), "holds no JSON object", "Download or save it again."))
    return value


def read_config_json(path: Path) -> dict[str, Any]:
    """A model's or an adapter's settings from a file: what reads them takes a time that grows with their number.

    Raises:
        CheckpointError: as :func:`read_json`, or if they are more than any model has.
    """
    config = read_json(path)
    held, values = 0, list[Any]([config])
    while values and held <= MOST_VALUES:
        value = values.pop()
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        held += len(inner)
        values += inner
    for count, most, what in ((len(config), MOST_SETTINGS, "settings"), (held, MOST_VALUES, "values")):
        if count > most:
            raise CheckpointError(Problem(str(path), f"has more than {most:,} {what}, as no model has", DOWNLOAD))
    return config


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf in float32, in one pass: ``aminmax`` gives NaN where there is one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = tensor if tensor.itemsize == 2 else tensor.float()
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
