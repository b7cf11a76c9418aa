"""Two bases compared, and what of an adapter would move: headers and configs only (``lorasuite inspect``)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lorasuite import bases
from lorasuite.adapters import (
    Adapter,
    OutputType,
    OwnTokenizer,
    not_in_adalora,
    open_adapters,
    own_tokenizer,
    tokenizer_folder,
)
from lorasuite.bases import Checkpoint, Role, Weights, add_architectures, common_tokens, load_tokenizer, propose
from lorasuite.errors import LoRASuiteError, PreflightError, Problem, examples
from lorasuite.planning._base_config import unusable_config
from lorasuite.planning._candidates import usable
from lorasuite.planning._config import AUTO
from lorasuite.planning._experts import expert_rows, not_moved_notices, nothing_moves
from lorasuite.transforms import AnyTransform, LayerTransform, ModelTransform, can_move, names, transform


@dataclass
class Inspection:
    """What ``lorasuite inspect`` shows, and what a check found."""

    old_base: str
    new_base: str
    #: Rows of ``name``, ``old``, ``new`` and ``changed``: what differs between the two architectures.
    factors: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    modules: list[dict[str, Any]] = field(default_factory=list)
    #: Seconds and bytes by stage, and what this machine has: see :func:`lorasuite.planning.survey`.
    cost: dict[str, Any] = field(default_factory=dict)
    #: What every way was measured to do elsewhere: see :func:`lorasuite.planning._outlook.outlook`.
    outlook: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    #: For a base of an unknown architecture: ``{"old_base": {"yaml": a draft of its file, "questions": […]}}``
    proposal: dict[str, Any] = field(default_factory=dict)
    old_tokenizer: Any = field(default=None, repr=False)
    new_tokenizer: Any = field(default=None, repr=False)
    #: What was opened, where it could be.
    old: Checkpoint | None = field(default=None, repr=False)
    new: Checkpoint | None = field(default=None, repr=False)
    opened: Adapter | None = field(default=None, repr=False)
    #: The adapter's own tokenizer, where it has one that is not the old base's.
    own_tokenizer: OwnTokenizer | None = field(default=None, repr=False)
    #: Whether no module of the adapter has a counterpart in the new base.
    nothing_moves: bool = field(default=False, repr=False)

    @property
    def old_reader(self) -> Any:
        """The tokenizer of what runs on the old base with the adapter: the adapter's own, or the base's."""
        return self.old_tokenizer if self.own_tokenizer is None else self.own_tokenizer.tokenizer

    def to_dict(self) -> dict[str, Any]:
        """All but the tokenizers and what was opened, as JSON-able values."""
        shown = [f.name for f in fields(self) if f.repr]
        return {name: getattr(self, name) for name in shown} | {"problems": [p.to_dict() for p in self.problems]}

    def attempt(self, action: Callable[[], Any]) -> Any:
        """The action's result, or None with the problems of its error noted."""
        try:
            return action()
        except LoRASuiteError as error:
            known = set(self.problems)  # a file may be read twice, as rows and as calibration texts
            found = error.problems or [Problem("input", str(error), "")]
            self.problems += [problem for problem in found if problem not in known]
            return None

    def raise_problems(self) -> None:
        """End the check.

        Raises:
            PreflightError: with every problem, if there is one.
        """
        if self.problems:
            raise PreflightError(self.problems)


def inspect(
    old_base: str,
    new_base: str,
    adapter: str | None = None,
    method: str = "lorasuite",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    output_type: OutputType = "lora",
    architectures: str | None = None,
    trains: bool = False,
    texts: bool = True,
    candidates: Sequence[str] | None = None,
    mapped: bool = True,
) -> Inspection:
    """Compare two bases, and say what of an adapter would move. Headers and configs only: no weight is read.

    Args:
        trains: whether there are rows that a fresh LoRA could be trained on, where nothing of the adapter moves.
        texts: whether there are calibration texts, by which experts are matched.
        candidates: the transforms that ``auto`` tries where they fit, by name; None: all.
        mapped: whether layers are mapped where the depths differ.
        architectures: a directory of architecture files, known from here on as by
            :func:`lorasuite.bases.add_architectures`.
    """
    result = Inspection(old_base, new_base)
    if architectures is not None:
        result.attempt(lambda: add_architectures(architectures))
    old = result.old = result.attempt(lambda: Checkpoint(old_base))
    new = result.new = result.attempt(lambda: Checkpoint(new_base))
    for side, source, checkpoint in (("old_base", old_base, old), ("new_base", new_base, new)):
        if checkpoint is None:
            _propose(result, side, source)
    opened = result.opened = result.attempt(lambda: open_adapters(adapter, allow_pickle)) if adapter else None
    sound = True
    for checkpoint in (old, new):
        if checkpoint is not None:
            wrong = checkpoint.check()
            sound = sound and not wrong
            result.problems += wrong + _own_code(checkpoint, trust_remote_code) + unusable_config(checkpoint, not wrong)
            with contextlib.suppress(LoRASuiteError):  # what cannot be read has been noted
                if checkpoint.quantization is not None and not checkpoint.quantization.why:
                    result.notices.append(f"{checkpoint.source}: {checkpoint.quantization.notice()}")
    if old is not None and new is not None:
        _factors(result, old, new)
        _vocabulary(result, old, new, trust_remote_code, sound)
    if old is not None and opened is not None:
        found = result.attempt(lambda: opened.check(old))
        result.problems += found or result.attempt(lambda: _something_to_move(opened)) or []
        if found is not None:
            result.notices += _left_out(opened, old)
        if output_type == "adalora":
            c = opened.contents
            biases = [path for path in c.biases if old.find(f"{path}.bias")]
            result.problems += not_in_adalora(opened.vocabulary_modules(old.architecture), c.magnitudes, biases)
        result.adapter = {
            "path": str(opened.path),
            "kind": opened.kind,
            "rank": opened.rank,
            "alpha": opened.config.get("lora_alpha"),
            "modules": len(opened.modules),
            "trained_on": opened.config.get("base_model_name_or_path"),
        }
        _other_base(result, old, opened)
        _own_tokenizer(result, old, str(adapter), trust_remote_code)
        if new is not None and not result.problems:
            _modules(result, opened, method, trains, texts)
            wanted = names() if candidates is None else candidates
            tried = [] if result.nothing_moves else _tried(old, new, opened, method, wanted, trains, texts, mapped)
            if any(isinstance(one, LayerTransform) for one in tried):
                _layers_apart(result, old, new, opened.roles(old.architecture))
            _outside_factors(result, old, opened, tried)
    return result


def _propose(result: Inspection, side: str, source: str) -> None:
    """A draft of an architecture file, if what stopped the base from being read is that there is none."""
    with contextlib.suppress(LoRASuiteError):  # noted already
        weights = Weights(source)
        if str(weights.config.get("model_type")) not in bases.architectures():
            weights.check_readable()
            draft = propose(weights.config, weights.shapes())
            result.proposal[side] = {"yaml": draft.text, "questions": draft.questions}


def _own_code(checkpoint: Checkpoint, trust_remote_code: bool) -> list[Problem]:
    """Whether a base runs code of its own without leave."""
    from transformers import CONFIG_MAPPING

    if trust_remote_code or not checkpoint.config.get("auto_map"):
        return []
    if checkpoint.config.get("model_type") in CONFIG_MAPPING:
        return []
    what = "is a model with code of its own, which running it takes"
    return [Problem(checkpoint.source, what, "Read that code, and give --trust-remote-code if you trust it.")]


def _other_base(result: Inspection, old: Checkpoint, adapter: Adapter) -> None:
    """A notice where the adapter's config names another base than the old one, or another revision of it.

    Of paths and ids the last parts are compared: a copy of a base is the same base.
    """
    named = str(adapter.config.get("base_model_name_or_path") or "")
    given, _, at = old.source.partition("@")
    known = {given, str(old.path), str(old.config.get("_name_or_path") or "")}
    if named and Path(named).name.lower() not in {Path(name).name.lower() for name in known}:
        result.notices.append(f"{adapter.path}: trained on {named}, as its config says, and the old base is {given}")
    elif (revision := adapter.config.get("revision")) and at and revision != at:
        result.notices.append(f"{adapter.path}: trained on revision {revision}, as its config says, and not on {at}")


def _own_tokenizer(result: Inspection, old: Checkpoint, adapter: str, trust_remote_code: bool) -> None:
    """The tokenizer that the adapter was saved with, and a notice of it."""
    folder, notice = tokenizer_folder(adapter)
    if notice:
        result.notices.append(notice)
    if folder is None or result.old_tokenizer is None:
        return
    own = result.attempt(lambda: own_tokenizer(folder, result.old_tokenizer, trust_remote_code))
    if own is not None:
        result.own_tokenizer = own
        result.problems += own.problems(old.dims.vocab_size)
        result.notices.append(own.notice("the old base, with and without the adapter, and for the teacher"))


def _left_out(adapter: Adapter, old: Checkpoint) -> list[str]:
    """One notice a reason, with a count and three examples."""
    reasons: dict[str, list[str]] = {}
    for module, why in adapter.left_out(old):
        reasons.setdefault(why, []).append(module)
    return [f"left out: {len(mods)} of its modules ({examples(mods)}), {why}" for why, mods in reasons.items()]


def _something_to_move(adapter: Adapter) -> list[Problem]:
    """Whether the adapter does anything: a problem if every update is zero (it was never trained).

    Raises:
        AdapterError: if a factor holds NaN or Inf.
    """
    if not adapter.stored:  # known only after a computation for each module
        return []
    if sum(adapter.update(path).norm() for path in adapter.modules) > 0:
        return []
    return [Problem(str(adapter.path), "every update is zero", "It was never trained: there is nothing to migrate.")]


def _factors(result: Inspection, old: Checkpoint, new: Checkpoint) -> None:
    a, b = old.dims, new.dims
    rows = [
        ("architecture", old.architecture.family, new.architecture.family),
        ("vocabulary size", a.vocab_size, b.vocab_size),
        ("hidden size", a.hidden_size, b.hidden_size),
        ("intermediate size", a.intermediate_size, b.intermediate_size),
        ("layers", a.layers, b.layers),
        ("attention heads", a.heads, b.heads),
        ("attention type", f"{a.attention} ({a.kv_heads} kv)", f"{b.attention} ({b.kv_heads} kv)"),
        ("head size", a.head_dim, b.head_dim),
    ]
    result.factors = [{"name": name, "old": o, "new": n, "changed": o != n} for name, o, n in rows]


def _vocabulary(result: Inspection, old: Checkpoint, new: Checkpoint, trust_remote_code: bool, sound: bool) -> None:
    """The two tokenizers and, where the sizes in the bases' configs are ``sound``, the tokens they have in common."""
    first = result.old_tokenizer = result.attempt(lambda: load_tokenizer(old.path, trust_remote_code))
    second = result.new_tokenizer = result.attempt(lambda: load_tokenizer(new.path, trust_remote_code))
    if first is None or second is None or not sound:
        return
    common = common_tokens(first, second, old.dims.vocab_size, new.dims.vocab_size)
    inverse = {id_: token for token, id_ in first.get_vocab().items()}
    moved = [
        {"token": inverse.get(int(a), ""), "old": int(a), "new": int(b)}
        for a, b in zip(common.old, common.new, strict=True)
        if int(a) != int(b)
    ]
    result.vocabulary = {"common": len(common), "same": common.same, "renumbered": len(moved), "examples": moved[:5]}
    if old.dims.hidden_size != new.dims.hidden_size and 0 < len(common) < old.dims.hidden_size:
        result.notices.append(
            f"only {len(common)} common tokens for a hidden size of {old.dims.hidden_size}: W_h is underdetermined"
        )
    if not len(common) and old.dims.hidden_size != new.dims.hidden_size:
        result.problems.append(
            Problem("vocabulary", "the two tokenizers share no token", "There is nothing to fit a hidden map on.")
        )


def _modules(result: Inspection, adapter: Adapter, method: str, trains: bool, texts: bool) -> None:
    """One row a role: how many modules have it, and where it goes."""
    old, new = result.old, result.new
    assert old is not None and new is not None
    counts: Counter[Role] = Counter()
    for path in adapter.modules:
        located = old.architecture.locate(path)
        if located is not None:
            counts.update(located[1].roles)
    chosen = None if method == AUTO else transform(method)
    for role in adapter.roles(old.architecture):
        source, target = old.architecture.module(role), new.architecture.module(role)
        why = "" if role in new.every_role else f"the new base has no {role} projection"
        if not why and chosen is not None and not can_move(chosen, role):
            why = f"{method} has no rule for it"
        result.modules.append(
            {
                "role": role,
                "count": counts[role],
                "old": source.name if source else None,
                "new": target.name if target else None,
                "moves": not why,
                "why": why,
            }
        )
    result.modules += expert_rows(adapter, old, new, chosen, texts)
    result.notices += not_moved_notices(adapter, old, new, texts)
    if not any(row["moves"] for row in result.modules):
        result.nothing_moves = True
        found = nothing_moves(adapter, trains and method == AUTO)
        if isinstance(found, Problem):
            result.problems.append(found)
        else:
            result.notices.append(found)
    if chosen is None:
        return
    if isinstance(chosen, ModelTransform) and not adapter.plain(old.architecture):
        what = f"{method} moves updates of blocks only, and the adapter has more"
        result.problems.append(Problem("method", what, "Use --method auto, or another one."))
    shared = tuple(role for role in counts if role in new.every_role)
    result.problems += chosen.problems(old.sizes, new.sizes, shared)


def _tried(
    old: Checkpoint,
    new: Checkpoint,
    adapter: Adapter,
    method: str,
    candidates: Sequence[str],
    trains: bool,
    texts: bool,
    mapped: bool,
) -> list[AnyTransform]:
    """The transforms that would be run."""
    if method != AUTO:
        return [transform(method)]
    roles, plain = adapter.roles(old.architecture), adapter.plain(old.architecture)
    given = {"plain": plain, "texts": texts, "trains": trains, "mapped": mapped}
    return [transform(one) for one in usable(candidates, old, new, roles, **given)]


def _layers_apart(result: Inspection, old: Checkpoint, new: Checkpoint, roles: Sequence[Role]) -> None:
    """Notices of what has no partner where updates go from layer to layer: old layers, and roles of some layers."""
    if old.dims.layers > new.dims.layers:
        result.notices.append(
            f"{old.dims.layers - new.dims.layers} of {old.dims.layers} old layers have no partner and are dropped"
        )
    for name, base in (("old", old), ("new", new)):
        counted: dict[int, list[Role]] = {}
        for role in roles:
            layers = sum(role in base.roles(n) for n in range(base.dims.layers))
            if 0 < layers < base.dims.layers:
                counted.setdefault(layers, []).append(role)
        for layers, members in counted.items():
            result.notices.append(
                f"{', '.join(members)}: in {layers} of {base.dims.layers} layers of the {name} base; updates whose "
                "layer pair has them on one side only are dropped, and listed in the record"
            )


def _outside_factors(result: Inspection, old: Checkpoint, adapter: Adapter, tried: Sequence[AnyTransform]) -> None:
    """What of an adapter is not stored as factors of block weights: what that costs, and what becomes of it.

    Args:
        tried: the transforms that are run; of those, ones that go layer by layer carry over embeddings and biases.
    """
    by_layer = any(isinstance(one, LayerTransform) for one in tried)
    if tried and not adapter.stored:
        result.notices.append(
            f"{adapter.kind}: ΔW is computed and decomposed for each of {len(adapter.modules)} modules, one at a time"
        )
    embeddings = adapter.vocabulary_modules(old.architecture)
    common = result.vocabulary.get("common", 0)
    if embeddings and not common:
        what = f"changes embeddings ({', '.join(embeddings)}), and the two tokenizers share no token"
        result.problems.append(Problem(str(adapter.path), what, "Train without the embeddings."))
    elif embeddings and by_layer:
        result.notices.append(
            f"{', '.join(embeddings)}: changes are carried over for {common} of {old.dims.vocab_size} tokens"
        )
    if by_layer and any(old.find(f"{path}.bias") for path in adapter.contents.biases):
        result.notices.append("biases: changes are carried over where the new base has a bias of the same size")
