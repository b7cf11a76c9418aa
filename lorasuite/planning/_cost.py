"""The one cost model behind ``inspect``, the refusals before a run, and ``benchmarks/scale.py``: counts, no seconds.

A :class:`Shape` holds what costs depend on of a base (weights of a block, widths, depth), a :class:`Work` what a run
does (texts, rows, tokens), and a :class:`Cost` what one stage then needs: operations of each kind, bytes moved, and
bytes held in RAM, on the GPU and on disk. Seconds come from :mod:`lorasuite.planning._machine`, which measures how many
operations of each kind a machine does in one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lorasuite.bases import ATTENTION, ROLES, Architecture, Checkpoint, Dimensions, Role
from lorasuite.correspondence import POSITIONS

#: Bytes of a float32, of a float64, and of a weight in half precision.
FLOAT, DOUBLE, HALF = 4, 8, 2
#: Logits computed at once.
LOGITS = 2**26
#: Resident bytes of a process that has imported torch, transformers, PEFT and Prefect, knows both tokenizers and has
#: read a few texts: 1.1 GiB of the first real pair's. Before a flow begins they are 0.8.
PROCESS = 1100 * 2**20


@dataclass(frozen=True)
class Ops:
    """Work of one stage by kind; what each is measured as says :class:`lorasuite.planning.Throughput`.

    ``forward``, ``trained``, ``single`` and ``double`` are floating-point operations: of models in the dtype and on the
    device they run in, and of a fine-tune's passes there and back; of float32 and of float64 products on the CPU.
    ``eigen`` and ``svd`` are the ``d³`` of decompositions of ``d × d`` float64 matrices. ``read`` and ``written`` are
    bytes of files, ``streamed`` bytes of weights read from memory by the steps of a generation, ``items`` entries that
    Python handles one by one.
    """

    forward: float = 0.0
    trained: float = 0.0
    single: float = 0.0
    double: float = 0.0
    eigen: float = 0.0
    svd: float = 0.0
    read: float = 0.0
    written: float = 0.0
    streamed: float = 0.0
    items: float = 0.0

    def __add__(self, other: Ops) -> Ops:
        """The work of both."""
        return Ops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Ops:
        """So many times the work."""
        return Ops(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Cost:
    """What one stage needs: work, and the bytes it holds at most in RAM and on the GPU and leaves on disk.

    ``spare``: bytes of those where models run that it does without, where there are fewer.
    """

    stage: str
    ops: Ops
    ram: float = 0.0
    gpu: float = 0.0
    disk: float = 0.0
    spare: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What costs depend on of one base.

    ``block`` is the number of weights of its largest block, ``blocks`` of all blocks, ``active`` those of all blocks
    that one token is multiplied with (of experts a share), ``total`` all weights, and ``stored`` the bytes of a weight
    in its files. ``experts``: layers that have some, how many each has, and their width. ``streams``: whether texts go
    through it with one block in memory at a time; else it is loaded whole (:func:`lorasuite.bases.unstreamed`).
    """

    dims: Dimensions
    roles: tuple[Role, ...]
    block: int
    blocks: int
    active: int
    total: int
    stored: float
    experts: tuple[int, int, int] = (0, 0, 0)
    streams: bool = True

    @property
    def head(self) -> int:
        """Weights of the language-model head, which may be those of the embedding."""
        return self.dims.vocab_size * self.dims.hidden_size

    @property
    def files(self) -> float:
        """Bytes of its files."""
        return self.total * self.stored

    @classmethod
    def of(cls, base: Checkpoint, streams: bool = True) -> Shape:
        """Of a checkpoint, by its headers."""
        embedding = base.find(base.architecture.embedding + ".weight")
        outside = [embedding, base.find(base.architecture.unembedding + ".weight")]
        count, width = base.architecture.expert_numbers(base.config)
        share = _expert_share(base.architecture.settings(base.config), count)
        blocks = active = total = 0.0
        for name, shape in base.shapes().items():
            size = math.prod(shape)
            total += size
            if name not in outside and len(shape) > 1:
                blocks += size
                active += size * (share if ".experts." in name else 1)
        block = 0
        for n in range(base.dims.layers):
            dims = base.layer_dims(n)
            block = max(block, sum(dims.rows(role) * dims.columns(role) for role in base.roles(n)))
        block = max(block, int(blocks / base.dims.layers))  # experts, which no role names
        files = sum(file.stat().st_size for file in base.weight_files)
        mixed = sum(base.experts(n) is not None for n in range(base.dims.layers))
        experts = (mixed, count, width) if mixed else (0, 0, 0)
        weights = (block, int(blocks), int(active), int(total))
        return cls(base.sizes, base.every_role, *weights, files / total, experts, streams)

    @classmethod
    def configured(cls, architecture: Architecture, config: Mapping[str, Any], stored: float = HALF) -> Shape:
        """Of a configuration alone, of a dense model."""
        dims, roles = architecture.dimensions(config), tuple(role for role in architecture.roles if role in ROLES)
        block = sum(dims.rows(role) * dims.columns(role) for role in roles)
        blocks = block * dims.layers
        embeddings = (1 if architecture.tied(config) else 2) * dims.vocab_size * dims.hidden_size
        return cls(dims, roles, block, blocks, blocks, blocks + embeddings, stored)


def _expert_share(settings: Mapping[str, Any], described: int) -> float:
    """The share of a mixture's experts that read a token; 1 where there are none.

    Args:
        described: how many a layer has, where the architecture file says so.
    """
    experts = described or next((n for key in ("num_local_experts", "num_experts") if (n := settings.get(key))), 0)
    chosen = next((n for key in ("num_experts_per_tok", "moe_topk", "moe_k") if (n := settings.get(key))), 1)
    return (chosen if isinstance(chosen, int) else max(chosen)) / experts if experts else 1.0


def active(base: Checkpoint) -> int:
    """Weights that one token is multiplied with: all matrices but the input embedding, experts by their share."""
    shape = Shape.of(base)
    return shape.active + shape.head


@dataclass(frozen=True)
class Work:
    """What a run does, as counts. Tokens are means a text or row, padding left out; rows are those there are.

    ``gpu``: whether models run on one. ``item``: bytes of a weight where texts are read for the pair (4 in float32,
    2 in half precision), ``run_item`` where models answer and are scored, ``training_item`` where they are
    fine-tuned: 1 in eight bits, about 0.6 in four.
    """

    roles: tuple[Role, ...] = ROLES
    methods: tuple[str, ...] = ()
    rank: int = 16
    #: Whether the adapter has updates of experts.
    experts: bool = False
    #: Shapes ``(out, in)`` of the weights whose update the adapter does not store as factors.
    dense: tuple[tuple[int, int], ...] = ()
    gpu: bool = False
    item: float = FLOAT
    run_item: float = FLOAT
    training_item: float = FLOAT
    texts: int = 0
    text_tokens: float = 256
    #: Paired positions that wide spaces are mapped by.
    map_positions: int = POSITIONS
    cka_batch: int = 64
    rows: int = 0
    row_tokens: float = 256
    label_tokens: float = 64
    epochs: float = 3
    batch: int = 16
    #: Rows of a forward pass of the fine-tune; None: as many of a step's as fit.
    micro_batch: int | None = None
    #: Whether its activations are recomputed in the backward pass; None: where one row does not fit otherwise.
    checkpointing: bool | None = None
    #: Whole fine-tunes there are, the control's among them; and that the short ones of candidates and all runs of the
    #: search come to.
    fine_tunes: float = 1.0
    screened: float = 0.0
    searched: float = 0.0
    #: Texts of the new base's own that a fine-tune reads beside its rows.
    rehearsal: int = 0
    #: Rows that the bare new base and the candidates are scored by; 0 where nothing is chosen.
    chosen_by: int = 0
    #: Rows, once for each template that is tried, by which it is asked whether the adapter knows them.
    fitted_rows: int = 0
    teacher_rows: int = 0
    teacher_tokens: float = 256
    teacher_batch: int = 32
    #: Of the teacher's rows those that are trained on, and the sources that its prompts come from where none are given.
    synthetic_rows: int = 0
    prompt_sources: int = 0
    #: Whether prompts are given that more are written like.
    examples: bool = False
    #: What the teacher is asked of the tokens of training rows: its distributions, and how much each counts.
    soft_labels: bool = False
    token_weights: bool = False
    #: The second step after the fine-tune, and its passes over the teacher's rows.
    second_step: str = "none"
    second_step_epochs: float = 3
    evaluation_rows: int = 0
    evaluation_new_tokens: float = 64
    evaluation_batch: int = 16
    #: Texts that every base is measured on with and without its adapter, and their tokens.
    general_texts: int = 0
    general_tokens: float = 0.0
    #: Arms that are evaluated on the old base, and on the new one.
    old_arms: int = 2
    new_arms: int = 3

    @property
    def positions(self) -> float:
        """Tokens of all calibration texts, in one base."""
        return self.texts * self.text_tokens

    @property
    def prompt_tokens(self) -> float:
        """Tokens of a row that are no labels."""
        return max(self.row_tokens - self.label_tokens, 1.0)

    def held(self, on_device: float, on_host: float = 0.0) -> dict[str, float]:
        """Bytes by place, as :class:`Cost` names them: what models hold lies on the GPU, where there is one."""
        if self.gpu:
            return {"ram": PROCESS + on_host, "gpu": on_device}
        return {"ram": PROCESS + on_host + on_device, "gpu": 0.0}


def shared_roles(old: Shape, new: Shape, roles: tuple[Role, ...]) -> list[Role]:
    """Those of some roles that both bases have."""
    return [role for role in roles if role in old.roles and role in new.roles]


def depth(old: Shape, new: Shape) -> int:
    """Layer pairs."""
    return min(old.dims.layers, new.dims.layers)


def pass_ops(shape: Shape, tokens: float, length: float, heads: float = 0.0) -> Ops:
    """One forward pass over so many tokens, in texts of a length: the blocks, attention, and the head at some tokens.

    A token costs two operations a weight, and attention over a text of T tokens ``4·T·d`` a layer and token.
    """
    attention = 4 * length * shape.dims.heads * shape.dims.head_dim * shape.dims.layers
    return Ops(forward=tokens * (2 * shape.active + attention) + 2 * heads * shape.head)


def inner(shape: Shape, role: Role) -> int:
    """Rows of a projection's weight on the side of the heads."""
    return shape.dims.columns(role) if role == "o" else shape.dims.rows(role)


def weight_bytes(shape: Shape, item: float) -> float:
    """Bytes of a model that is loaded whole; what is quantized are the linear modules of its blocks."""
    return item * shape.blocks + max(item, HALF) * (shape.total - shape.blocks)


def activation_bytes(shape: Shape, tokens: float, length: float, item: float, kept: bool) -> float:
    """Bytes of activations of a batch of so many tokens: of one block, or of all that a backward pass keeps.

    A block keeps its streams and norms (8·d), what its projections write, and its attention weights (heads·T).
    """
    dims = shape.dims
    written = sum(dims.rows(role) for role in shape.roles)
    block = max(item, HALF) * tokens * (8 * dims.hidden_size + 2 * written + dims.heads * length)
    return block * (dims.layers if kept else 1)


def lora_weights(shape: Shape, work: Work) -> float:
    """Weights of a LoRA of the rank on every module of the roles."""
    roles = [role for role in work.roles if role in shape.roles]
    return work.rank * shape.dims.layers * sum(shape.dims.rows(r) + shape.dims.columns(r) for r in roles)


def scoring(shape: Shape, work: Work, rows: float, item: float) -> tuple[Ops, float]:
    """Losses of so many rows, a batch at once with the head at the label tokens: work, and bytes on the device."""
    tokens = min(work.evaluation_batch, rows) * work.row_tokens
    logits = 3 * FLOAT * min(min(work.evaluation_batch, rows) * work.label_tokens * shape.dims.vocab_size, LOGITS)
    held = weight_bytes(shape, item) + logits + activation_bytes(shape, tokens, work.row_tokens, item, kept=False)
    return pass_ops(shape, rows * work.row_tokens, work.row_tokens, rows * work.label_tokens), held


def writing(
    shape: Shape, work: Work, rows: float, read: float, written: float, batch: int | None = None
) -> tuple[Ops, float]:
    """So many answers: every step of a batch reads the model's weights from memory once. Work, and bytes on the device.

    Args:
        read: tokens of a prompt.
        written: tokens of an answer.
        batch: answers written at once; the teacher's if None.
    """
    tokens, batch = read + written, work.teacher_batch if batch is None else batch
    ops = pass_ops(shape, rows * tokens, tokens, rows * written)
    ops += Ops(streamed=math.ceil(rows / batch) * written * work.run_item * (shape.active + shape.head))
    together, dims = min(batch, rows), shape.dims
    cache = 2 * max(work.run_item, HALF) * together * tokens * dims.layers * dims.kv_heads * dims.head_dim
    states = activation_bytes(shape, together * read, read, work.run_item, kept=False)
    return ops, weight_bytes(shape, work.run_item) + cache + 3 * FLOAT * together * dims.vocab_size + states


def heads_product(old: Shape, new: Shape) -> float:
    """Multiplications of one layer pair's head similarity: of k and v between the bases, of what that gives with q and
    o, of norms, and with ``W_h`` on the old side."""
    d_o, d_n = old.dims.hidden_size, new.dims.hidden_size
    carried = 0 if d_o == d_n else sum(inner(old, role) for role in ATTENTION) * d_o * d_n
    norms = sum(inner(shape, role) * shape.dims.head_dim for shape in (old, new) for role in ATTENTION)
    (q_o, k_o), (q_n, k_n) = ((inner(shape, "q"), inner(shape, "k")) for shape in (old, new))
    return (2 * (k_o * k_n + min(q_o * k_n, k_o * q_n)) + norms) * d_n + carried
