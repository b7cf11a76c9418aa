"""Fingerprints (sha256) of models, tokenizers and files, which do not depend on paths or dates."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import MutableMapping
from pathlib import Path

from lorasuite.bases._checkpoint import Checkpoint
from lorasuite.bases._files import DAMAGED, is_finite, open_safetensors, resolve
from lorasuite.errors import CheckpointError, Problem

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
#: Config fields that do not change what the model computes.
INERT_CONFIG = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache")

#: A file changed this shortly before it was read may change again without a new time.
_RACY_SECONDS = 0.1


def file_digest(path: Path, cache: MutableMapping[str, str] | None = None) -> str:
    """sha256 of a file's bytes, remembered in ``cache`` under its path and :func:`stamp`.

    Files of the Hub's cache are links to blobs named by their sha256, which is then taken as it is.
    """
    real = path.resolve()
    if _is_blob(real):
        return real.name
    begun, before = time.time(), stamp(real)
    key = f"{real}:{before}"
    if cache is not None and key in cache:
        return cache[key]
    with real.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    # a file that changed this shortly before may change again without another time
    settled = real.stat().st_ctime < begun - _RACY_SECONDS
    if cache is not None and settled and stamp(real) == before:
        cache[key] = digest
    return digest


def stamp(path: Path) -> str:
    """What a file looks like from outside; another after every change of its content.

    The time of the last change of its entry (``ctime``) is among it, which no program sets: copies, archives and
    editors set the modification time back.
    """
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _is_blob(real: Path) -> bool:
    """Whether a file is one of the Hub's cache that is named by its sha256."""
    from huggingface_hub.constants import HF_HUB_CACHE

    named = re.fullmatch(r"[0-9a-f]{64}", real.name) and real.parent.name == "blobs"
    return bool(named) and real.parent.parent.parent == Path(HF_HUB_CACHE).resolve()


def digest_json(value: object) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_model(source: str | Path, cache: MutableMapping[str, str] | None = None) -> str:
    """The digest of what a base model computes: its weight files, and its config but for :data:`INERT_CONFIG`.

    Args:
        cache: digests of files, by :func:`file_digest`.

    Raises:
        CheckpointError: if files are missing or cannot be read.
        ArchitectureError: if no architecture file describes the model.
    """
    checkpoint = Checkpoint(source)
    config = {key: value for key, value in checkpoint.config.items() if key not in INERT_CONFIG}
    return digest_json([config, [file_digest(file, cache) for file in checkpoint.weight_files]])


def check_finite(source: str | Path, cache: MutableMapping[str, str] | None = None) -> None:
    """Read every weight once, and refuse a base that is damaged.

    Files found whole are remembered in ``cache`` by their digest, and not read again.

    Raises:
        CheckpointError: naming each tensor that holds NaN or Inf.
    """
    problems: list[Problem] = []
    for file in Checkpoint(source).weight_files:
        known = f"finite:{file_digest(file, cache)}"
        if cache is not None and known in cache:
            continue
        with open_safetensors(file) as handle:
            wrong = [name for name in handle.keys() if not is_finite(handle.get_tensor(name))]  # noqa: SIM118
        problems += [Problem(str(file), f"{name} holds NaN or Inf", DAMAGED) for name in wrong]
        if cache is not None and not wrong:
            cache[known] = "yes"
    if problems:
        raise CheckpointError(problems)


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
