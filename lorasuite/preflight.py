"""What a migration will do, and everything that would stop it, before any heavy work (``lorasuite inspect``)."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lorasuite.adapter import Adapter, OutputType, not_in_adalora
from lorasuite.adapter_types import weight_shape
from lorasuite.architectures import ROLES, Role, architectures, propose
from lorasuite.checkpoint import Checkpoint, Weights, load_tokenizer
from lorasuite.combination import open_adapters
from lorasuite.config import AUTO, MigrationConfig, torch_device
from lorasuite.data import Row, calibration_texts, draw, encode_rows, read_prompts, read_rows, unanswered
from lorasuite.errors import LoRASuiteError, PreflightError, Problem
from lorasuite.estimate import estimate, measure
from lorasuite.similarity import SMALLEST_BATCH
from lorasuite.sweep import FEWEST
from lorasuite.task_evaluation import check_tasks
from lorasuite.teacher import prompt_frame
from lorasuite.transforms import reads_texts, transform
from lorasuite.vocabulary import common_tokens

FLOAT = 4  # bytes of a float32
#: Training rows below which the teacher's were measured to help everywhere (docs/transfer.md).
FEW = 100


@dataclass
class Inspection:
    """What ``lorasuite inspect`` shows. ``factors`` rows: name, old, new, changed."""

    old_base: str
    new_base: str
    factors: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    modules: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    #: seconds a stage, see :func:`lorasuite.estimate.estimate`
    time: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    #: for a base of an unknown architecture: ``{"old_base": {"yaml": a draft of its file, "questions": […]}}``
    proposal: dict[str, Any] = field(default_factory=dict)
    old_tokenizer: Any = field(default=None, repr=False)
    new_tokenizer: Any = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the tokenizers, as JSON-able values."""
        shown = [f.name for f in fields(self) if not f.name.endswith("_tokenizer")]
        return {name: getattr(self, name) for name in shown} | {"problems": [p.to_dict() for p in self.problems]}

    def raise_problems(self) -> None:
        """
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
    timed: bool = False,
) -> Inspection:
    """Compare two bases, and say what of an adapter would move. Headers and configs only: no weight is read.

    Args:
        timed: also estimate the time, which takes a second to measure this machine.
    """
    result = Inspection(old_base, new_base)
    old = _attempt(result, lambda: Checkpoint(old_base))
    new = _attempt(result, lambda: Checkpoint(new_base))
    for side, source, checkpoint in (("old_base", old_base, old), ("new_base", new_base, new)):
        if checkpoint is None:
            _propose(result, side, source)
    opened = _attempt(result, lambda: open_adapters(adapter, allow_pickle)) if adapter else None
    for checkpoint in (old, new):
        if checkpoint is not None:
            result.problems += checkpoint.check() + _own_code(checkpoint, trust_remote_code)
    if old is not None and new is not None:
        _factors(result, old, new)
        _vocabulary(result, old, new, trust_remote_code)
        with contextlib.suppress(LoRASuiteError):  # what cannot be read has been noted
            _memory(result, old, new)
    if old is not None and opened is not None:
        result.problems += opened.check(old) or _attempt(result, lambda: _something_to_move(opened)) or []
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
        if new is not None and not result.problems:
            _modules(result, old, new, opened, method)
            _beside(result, old, opened)
    if timed and old is not None and new is not None and not result.problems:
        result.time = estimate(old, new, opened, measure(old))
    return result


def _attempt(result: Inspection, action: Callable[[], Any]) -> Any:
    """The action's result, or None with its problems noted."""
    try:
        return action()
    except LoRASuiteError as error:
        result.problems += error.problems or [Problem("input", str(error), "")]
        return None


def _propose(result: Inspection, side: str, source: str) -> None:
    """A draft of an architecture file, if what stopped the base from being read is that there is none."""
    with contextlib.suppress(LoRASuiteError):  # noted already
        weights = Weights(source)
        if weights.config.get("model_type") not in architectures():
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


def _vocabulary(result: Inspection, old: Checkpoint, new: Checkpoint, trust_remote_code: bool) -> None:
    first = result.old_tokenizer = _attempt(result, lambda: load_tokenizer(old.path, trust_remote_code))
    second = result.new_tokenizer = _attempt(result, lambda: load_tokenizer(new.path, trust_remote_code))
    if first is None or second is None:
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


def _memory(result: Inspection, old: Checkpoint, new: Checkpoint) -> None:
    """Bytes of weights each kind of stage holds at once, in float32."""

    def layer(checkpoint: Checkpoint) -> int:
        sizes = []
        for n in range(checkpoint.dims.layers):
            dims = checkpoint.layer_dims(n)
            sizes.append(sum(dims.rows(role) * dims.columns(role) for role in checkpoint.roles(n)))
        return FLOAT * max(sizes)

    def embedding(checkpoint: Checkpoint) -> int:
        return FLOAT * checkpoint.dims.vocab_size * checkpoint.dims.hidden_size

    def model(checkpoint: Checkpoint) -> int:
        # on disk in half precision as a rule; a forward pass on a CPU is in float32
        return FLOAT * sum(math.prod(shape) for shape in checkpoint.shapes().values())

    result.memory = {
        "transfer_matrices": embedding(old) + embedding(new),
        "head_mapping": layer(old) + layer(new),
        "transform": layer(old) + layer(new),
        "activations": max(model(old), model(new)),
        "finetune": model(new),
    }


def _modules(result: Inspection, old: Checkpoint, new: Checkpoint, adapter: Adapter, method: str) -> None:
    """One row a role: how many modules have it, and where it goes."""
    counts: Counter[Role] = Counter()
    for path in adapter.modules:
        located = old.architecture.locate(path)
        if located is not None:
            counts.update(located[1].roles)
    for role in ROLES:
        if not counts[role]:
            continue
        source, target = old.architecture.module(role), new.architecture.module(role)
        result.modules.append(
            {
                "role": role,
                "count": counts[role],
                "old": source.name if source else None,
                "new": target.name if target else None,
                "moves": target is not None,
                "why": "" if target else f"the new base has no {role} projection",
            }
        )
    if not any(row["moves"] for row in result.modules):
        result.problems.append(
            Problem(str(adapter.path), "none of its modules has a counterpart in the new base", "It cannot be moved.")
        )
    if old.dims.layers > new.dims.layers:
        result.notices.append(
            f"{old.dims.layers - new.dims.layers} of {old.dims.layers} old layers have no partner and are dropped"
        )
    if method != AUTO and transform(method).joint and not adapter.plain(old.architecture):
        what = f"{method} moves updates of blocks only, and the adapter has more"
        result.problems.append(Problem("method", what, "Use --method auto, or another one."))
    if method == "copy":
        unlike = [
            Problem("method", f"copy: {role} is {a} in the old base, {b} in the new one", "Use --method lorasuite.")
            for role in counts
            if (a := (old.dims.rows(role), old.dims.columns(role)))
            != (b := (new.dims.rows(role), new.dims.columns(role)))
        ]
        result.problems += unlike


def _beside(result: Inspection, old: Checkpoint, adapter: Adapter) -> None:
    """What of an adapter is not stored as factors of block weights: what that costs, and what becomes of it."""
    if not adapter.stored:
        largest = max(math.prod(weight_shape(old, path)) for path in adapter.modules if old.architecture.locate(path))
        # the dense ΔW, its base weight, both in float32, and an SVD of it in float64
        result.memory["read_adapter"] = 10 * FLOAT * largest
        result.notices.append(
            f"{adapter.kind}: ΔW is computed and decomposed for each of {len(adapter.modules)} modules, one at a time"
        )
    embeddings = adapter.vocabulary_modules(old.architecture)
    common = result.vocabulary.get("common", 0)
    if embeddings and not common:
        what = f"changes embeddings ({', '.join(embeddings)}), and the two tokenizers share no token"
        result.problems.append(Problem(str(adapter.path), what, "Train without the embeddings."))
    elif embeddings:
        result.notices.append(
            f"{', '.join(embeddings)}: changes are carried over for {common} of {old.dims.vocab_size} tokens"
        )
    if any(old.find(f"{path}.bias") for path in adapter.contents.biases):
        result.notices.append("biases: changes are carried over where the new base has a bias of the same size")


@dataclass
class Plan:
    """A checked migration: the texts, training rows and held-out rows it will use."""

    inspection: Inspection
    texts: list[str]
    train: list[Row]
    evaluation: list[Row]
    #: What the teacher answers; None: it writes from nothing, or there is none.
    prompts: list[Row] | None = None


def check(config: MigrationConfig) -> Plan:
    """Everything that can be known to be wrong with a migration, found at once, with nothing written.

    Raises:
        PreflightError: with every problem.
    """
    result = inspect(
        config.old_base,
        config.new_base,
        config.adapter,
        config.method,
        config.trust_remote_code,
        config.allow_pickle,
        config.output_type,
    )
    _attempt(result, lambda: torch_device(config.device))
    texts = _calibration(result, config)
    train = _training_rows(result, config)
    held_out = _held_out_rows(result, config)
    prompts = _teacher(result, config) if config.rows_written else None
    if config.include_path is not None and not Path(config.include_path).is_dir():
        result.problems.append(Problem(config.include_path, "is not a directory", "Give one with lm-eval task files."))
    elif config.eval_tasks:
        _attempt(result, lambda: check_tasks(config.eval_tasks, *config.task_folders))
    _output(result, Path(config.output))
    result.raise_problems()
    return Plan(result, texts, train, held_out, prompts)


def _calibration(result: Inspection, config: MigrationConfig) -> list[str]:
    source = config.calibration_data
    if source is None and config.method != AUTO and reads_texts(config.method):
        result.problems.append(
            Problem(
                "calibration", f"{config.method} compares activations, and there are no texts", "Give --calibration."
            )
        )
        return []
    depths = next(((row["old"], row["new"]) for row in result.factors if row["name"] == "layers"), (0, 0))
    if source is None:
        if depths[0] != depths[1] and config.pair.layer_strategy == "dp":
            result.problems.append(
                Problem(
                    "calibration",
                    f"the depths differ ({depths[0]} and {depths[1]}) and there are no texts to compare layers with",
                    "Give --calibration (any text both models should read), or --layer-strategy first|middle|last.",
                )
            )
        elif depths[0] == depths[1]:
            result.notices.append("no calibration texts: layers are mapped one to one, without similarities")
        return []
    texts: list[str] = _attempt(result, lambda: calibration_texts(source, result.new_tokenizer)) or []
    if texts and len(texts) < SMALLEST_BATCH:
        result.problems.append(
            Problem(source, f"has {len(texts)} texts", f"Layers are compared on at least {SMALLEST_BATCH}: add some.")
        )
    return texts[: config.pair.calibration_samples]


def _training_rows(result: Inspection, config: MigrationConfig) -> list[Row]:
    source = config.train_data
    if source is None:
        if config.samples:
            result.problems.append(
                Problem(
                    "finetune_samples",
                    f"is {config.samples}, and there is no training data",
                    "Give --train-data, or --finetune-samples 0.",
                )
            )
        return []
    if not config.samples:
        return []
    rows: list[Row] = draw(_attempt(result, lambda: read_rows(source)) or [], config.samples, config.seed)
    if not rows:
        return []
    if len(rows) < config.samples:
        result.notices.append(f"only {len(rows)} training rows for {config.samples} samples: all are used")
    if len(rows) < FEW and config.method == AUTO and config.teacher_samples is None and not config.written:
        result.notices.append(
            f"{len(rows)} training rows are few: with --prompts or --teacher-imitate the old base with its adapter "
            "writes more"
        )
    if len(config.learning_rates) > 1 and len(rows) + config.written < FEWEST:
        result.problems.append(
            Problem(
                "learning_rates",
                f"a sweep holds out a fifth of the training rows, and there are only {len(rows)}",
                f"Give one learning rate, or at least {FEWEST} rows.",
            )
        )
    tokenizer = result.new_tokenizer
    if tokenizer is not None:
        _attempt(result, lambda: encode_rows(rows, tokenizer, config.finetune.cutoff))
    return rows


def _teacher(result: Inspection, config: MigrationConfig) -> list[Row] | None:
    """What the old base with the adapter is to answer; None where nobody says."""
    with contextlib.suppress(LoRASuiteError):  # what cannot be read has been noted
        old = Checkpoint(config.old_base)
        result.memory["teacher"] = FLOAT * sum(math.prod(shape) for shape in old.shapes().values())
    tokenizer = result.old_tokenizer
    if tokenizer is not None and tokenizer.eos_token_id is None:
        result.problems.append(
            Problem(
                config.old_base, "its tokenizer has no EOS token", "The teacher's rows need one to end with: set it."
            )
        )
    if config.teacher_samples is None and config.written:
        result.notices.append(
            f"the old base with its adapter writes up to {config.written} rows, on which the new base is fine-tuned: "
            "--teacher-samples 0 keeps it from that"
        )
    source = config.prompt_data
    if source is None:
        if not config.teacher.suffix:
            result.notices.append(
                "no prompts for the teacher: it writes from nothing, which suits adapters of running text"
            )
        return None
    rows: list[Row] = _attempt(result, lambda: read_prompts(source)) or []
    words = config.teacher.text_prefix
    distinct = set()
    for number, row in enumerate(rows, start=1):
        prompt = unanswered(row, words)
        if prompt in distinct:
            continue
        distinct.add(prompt)
        if tokenizer is not None and row.kind == "messages" and getattr(tokenizer, "chat_template", None) is None:
            what = f"prompt {number} is a conversation, and the old base's tokenizer has no chat template"
            result.problems.append(Problem(source, what, "Use rows of prompt and completion."))
            break
    fewer = len(distinct) < config.rows_written
    if rows and fewer and config.teacher.imitate and not config.teacher.suffix:
        _attempt(result, lambda: prompt_frame(distinct))
    elif rows and config.teacher.temperature == 0 and len(distinct) < config.written:
        found = f"{len(distinct)} different prompts for {config.written} teacher samples"
        result.notices.append(f"{found}: greedy, there is one answer each")
    return rows or None


def _held_out_rows(result: Inspection, config: MigrationConfig) -> list[Row]:
    source = config.eval_data
    if source is None:
        return []
    rows: list[Row] = _attempt(result, lambda: read_rows(source)) or []
    tokenizers = [t for t in (result.old_tokenizer, result.new_tokenizer) if t is not None]
    _attempt(result, lambda: [row.target(tokenizer) for tokenizer in tokenizers for row in rows])
    return rows


def _output(result: Inspection, output: Path) -> None:
    if output.exists():
        result.problems.append(Problem(str(output), "exists already", "Give a new directory: nothing is overwritten."))
    parent = next((p for p in output.absolute().parents if p.exists()), None)
    if parent is not None and parent.is_file():
        result.problems.append(Problem(str(parent), "is a file, not a directory", "Give another output."))
    elif parent is not None and shutil.disk_usage(parent).free < 64 * 2**20:
        result.problems.append(Problem(str(parent), "has less than 64 MiB free", "Free some space."))
