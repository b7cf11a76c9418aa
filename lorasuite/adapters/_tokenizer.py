"""The tokenizer and chat template that trainers save beside an adapter, where they are not the base's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasuite.adapters._sources import split_sources
from lorasuite.bases import check_chat_template, digest_json, file_digest, load_tokenizer, read_json, resolve
from lorasuite.errors import AdapterError, CheckpointError, Problem

#: Files of which any makes a tokenizer; the others below only say how one is used.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
FILES = (*VOCABULARY_FILES, SETTINGS, TEMPLATE, "merges.txt", "added_tokens.json", "special_tokens_map.json")
#: A text on which two tokenizers of one vocabulary show that they split or begin texts otherwise.
PROBE = "Hello, wörld! 12345  a\n\tb <x> 日本  x."
#: Rendered to see which tokens a chat template writes.
CONVERSATION = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True, eq=False)
class OwnTokenizer:
    """An adapter's own tokenizer; :func:`own_tokenizer` makes one.

    Attributes:
        folder: the adapter's directory.
        tokenizer: loaded; the base's with another chat template where the directory holds no more than that.
        whole: whether the directory holds a tokenizer, and not a chat template alone.
        fingerprint: a digest of its files. What the base's lends is not in it.
        differences: from the base's, in words.
    """

    folder: Path
    tokenizer: Any
    whole: bool
    fingerprint: str
    differences: tuple[str, ...]

    @property
    def has_template(self) -> bool:
        """Whether the chat template is the adapter's, too."""
        return _own_template(self.folder) is not None

    def notice(self, used: str) -> str:
        """What the user is told: that it is used, and how it differs.

        Args:
            used: what it is used for.
        """
        what = "tokenizer" if self.whole else "chat template"
        return f"{self.folder}: its own {what} is used for {used}, and not the base's: {'; '.join(self.differences)}"

    def beyond(self, rows: int) -> list[str]:
        """The tokens that a base of so many embedding rows has none for, by id."""
        found = [(id_, token) for token, id_ in self.tokenizer.get_vocab().items() if id_ >= rows]
        return [token for _, token in sorted(found)]

    def problems(self, rows: int) -> list[Problem]:
        """Why a base of so many embedding rows cannot read what it writes: tokens beyond them, in every text.

        Tokens beyond them that nothing writes, such as one for padding, do no harm.
        """
        beyond = self.beyond(rows)
        written = [token for token in beyond if token in self._always()]
        if not written:
            return []
        what = (
            f"its own tokenizer has {len(beyond)} tokens beyond the old base's {rows} embedding rows, and writes "
            f"{', '.join(repr(token) for token in written[:3])} into every text"
        )
        fix = f"Resize the base's embeddings to {rows + len(beyond)} rows as the trainer did, save it, and give that."
        return [Problem(str(self.folder), what, fix)]

    def _always(self) -> str:
        """The text that it puts around every text, and around a conversation's turns."""
        ends = f"{self.tokenizer.bos_token or ''} {self.tokenizer.eos_token or ''}"
        if self.tokenizer.chat_template is None:
            return ends
        try:
            found = self.tokenizer.apply_chat_template(list(CONVERSATION), tokenize=False)
        except Exception:  # a template is code of its author; one that refuses this conversation is looked at as it is
            found = self.tokenizer.chat_template
        return f"{ends} {found}"


def tokenizer_folder(sources: str) -> tuple[Path | None, str]:
    """Where an adapter, named as for :func:`lorasuite.adapters.open_adapters`, has a tokenizer or template of its own.

    Returns:
        its directory, or None; and a notice where several adapters have different ones, of which none is taken.
    """
    folders = [path for source, _ in split_sources(sources) if _files(path := resolve(source))]
    if not folders:
        return None, ""
    together = len(split_sources(sources))
    if len(folders) == together and len({_fingerprint(folder) for folder in folders}) == 1:
        return folders[0], ""
    names = ", ".join(folder.name for folder in folders)
    return None, f"of {together} adapters not all have the same tokenizer ({names} have their own): the base's is used"


def tokenizer_digest(folder: Path) -> str | None:
    """A digest of the files of a tokenizer or chat template in an adapter's directory; None where there are none."""
    return _fingerprint(folder) if _files(folder) else None


def own_tokenizer(folder: Path, base: Any, trust_remote_code: bool = False) -> OwnTokenizer | None:
    """The tokenizer that lies in an adapter's directory; None where there is none, or the base's does the same.

    Unsloth, Axolotl, LLaMA-Factory and TRL save it there, and lm-eval, vLLM and PEFT's ``AutoPeftModel`` take it. Of a
    directory with a chat template alone, that is put on the base's tokenizer; without one, the base's template stays.

    Args:
        base: the base's tokenizer.

    Raises:
        AdapterError: if there is one that cannot be loaded.
    """
    if not _files(folder):
        return None
    template, whole = _own_template(folder), any((folder / name).is_file() for name in VOCABULARY_FILES)
    if whole:
        try:
            tokenizer = load_tokenizer(folder, trust_remote_code)
        except CheckpointError as error:
            what = f"holds a tokenizer that cannot be loaded ({error.__cause__ or error})"
            fix = "Save it there again, or take its files out of the directory: the base's is used then."
            raise AdapterError(Problem(str(folder), what, fix)) from error
        if tokenizer.chat_template is None:
            tokenizer.chat_template = base.chat_template
    elif template is not None:
        tokenizer = copy.deepcopy(base)
        tokenizer.chat_template = template
        try:
            check_chat_template(tokenizer, str(folder))
        except CheckpointError as error:
            raise AdapterError(error.problems) from error
    else:
        return None
    differences = tuple(_differences(tokenizer, base))
    return OwnTokenizer(folder, tokenizer, whole, _fingerprint(folder), differences) if differences else None


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in FILES if (folder / name).is_file()]


def _fingerprint(folder: Path) -> str:
    return digest_json({file.name: file_digest(file) for file in _files(folder)})


def _own_template(folder: Path) -> Any:
    """The chat template in a directory: a text, or several by name; None where there is none."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    try:
        found = read_json(folder / SETTINGS).get("chat_template") if (folder / SETTINGS).is_file() else None
    except CheckpointError as error:
        raise AdapterError(error.problems) from error
    if isinstance(found, list):
        return {one["name"]: one["template"] for one in found}
    return found


def _differences(own: Any, base: Any) -> Iterator[str]:
    """What two tokenizers do otherwise; how they pad is no such thing."""
    ours, theirs = own.get_vocab(), base.get_vocab()
    added = sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)
    if added:
        yield f"{len(added)} tokens more, such as {added[0]!r}"
    if lacking := sorted(theirs.keys() - ours.keys()):
        yield f"{len(lacking)} tokens fewer, such as {lacking[0]!r}"
    if moved := sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]):
        yield f"{len(moved)} tokens under other ids, such as {moved[0]!r}"
    for name in ("bos_token", "eos_token"):
        if getattr(own, name) != getattr(base, name):
            yield f"{name} is {getattr(own, name)!r}, and not {getattr(base, name)!r}"
    if not moved and not lacking and own(PROBE)["input_ids"] != base(PROBE)["input_ids"]:
        yield "it begins or splits texts otherwise"
    if own.chat_template != base.chat_template:
        yield "another chat template" if base.chat_template is not None else "a chat template, and the base has none"
