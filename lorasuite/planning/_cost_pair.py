"""What the stages of a pair of bases need: every one is computed once, and read by all adapters of the pair."""

from __future__ import annotations

from collections.abc import Iterator

from lorasuite.bases import ATTENTION, MLP, ROLES
from lorasuite.correspondence import DIRECTIONS, FEATURES
from lorasuite.planning._cost import (
    DOUBLE,
    FLOAT,
    HALF,
    Cost,
    Ops,
    Shape,
    Work,
    activation_bytes,
    depth,
    heads_product,
    pass_ops,
    shared_roles,
    weight_bytes,
)
from lorasuite.transforms import Input, transform

#: Tokens that a pass over texts reads at once: batches are of 16 texts.
TEXTS_AT_ONCE = 16
#: Rows of the embeddings that are in float64 at once.
ROWS_AT_ONCE = 8192


def pair_costs(old: Shape, new: Shape, work: Work) -> list[Cost]:
    """What every stage needs that the transforms of ``work.methods`` read, and the layer map: in the order they run."""
    needed = {one for method in work.methods for one in transform(method).inputs}
    found = [fingerprint(old, new), vocabulary(old, new), transfer_matrices(old, new)]
    if Input.MLP_FACTORS in needed:
        found += mlp_factors(old, new, work)
    if work.texts:
        found += [*activations(old, new, work), similarity(old, new, work)]
    found.append(head_mapping(old, new))
    if work.texts and Input.ALIGNMENT in needed:
        found.append(alignment(old, new, work))
    if work.texts and work.experts and old.experts[0] and new.experts[0]:
        found.append(expert_maps(old, new, work))
    if work.texts and Input.STATE_MAP in needed:
        found.append(state_map(old, new, work))
    return found


def fingerprint(old: Shape, new: Shape) -> Cost:
    """Both bases read and hashed, and once more to look for damaged tensors: their bytes, twice."""
    largest = max(old.head, new.head) * (FLOAT + HALF)
    return Cost("fingerprint", Ops(read=2 * (old.files + new.files)), **Work().held(0, largest))


def vocabulary(old: Shape, new: Shape) -> Cost:
    """Both vocabularies compared, token by token."""
    tokens = old.dims.vocab_size + new.dims.vocab_size
    return Cost("vocabulary", Ops(items=tokens), **Work().held(0, 1024 * tokens), disk=3 * 8 * tokens / 2)


def transfer_matrices(old: Shape, new: Shape) -> Cost:
    """``W_h``: Gram and cross products over the vocabulary, an eigenvalue problem, and a pseudo-inverse by Cholesky;
    nothing for equal sizes. At 7B → 13B (d = 4,096 and 5,120): 32,000 tokens, 3 TFLOP in float64."""
    d_o, d_n = old.dims.hidden_size, new.dims.hidden_size
    if d_o == d_n:
        return Cost("transfer_matrices", Ops(), **Work().held(0))
    tokens, small = min(old.dims.vocab_size, new.dims.vocab_size), min(d_o, d_n)
    products = 2 * tokens * d_o * (d_o + d_n) + 2 * d_o**2 * d_n + 7 * small**2 * max(d_o, d_n)
    held = DOUBLE * (4 * d_o**2 + 4 * d_o * d_n + ROWS_AT_ONCE * (d_o + d_n))
    return Cost(
        "transfer_matrices",
        Ops(double=products, eigen=d_o**3, read=tokens * (d_o * old.stored + d_n * new.stored)),
        **Work().held(0, held),
        disk=2 * DOUBLE * d_o * d_n,
    )


def mlp_factors(old: Shape, new: Shape, work: Work) -> Iterator[Cost]:
    """Half of each MLP projection's Gram matrix and its Cholesky factor, layer by layer of the old base: ``d_o × d_o``,
    of which half is kept.

    At 8B: 32 layers × 3 roles × 0.21 TFLOP in float32, 3.2 GB.
    """
    roles = [role for role in shared_roles(old, new, work.roles) if role in MLP]
    if roles:
        d, i = old.dims.hidden_size, old.dims.intermediate_size
        one = Ops(single=i * d * d + d**3 / 3, read=i * d * old.stored, written=FLOAT * d * d / 2)
        count = old.dims.layers * len(roles)
        held = Work().held(0, FLOAT * (i * d + 4 * d * d))
        yield Cost("mlp_factors", one * count, **held, disk=count * FLOAT * d * d / 2)


def _streaming(shape: Shape, work: Work) -> float:
    """Bytes held while texts go through a base block by block: one block (of a base that is loaded whole, all weights),
    and one batch's activations."""
    tokens = min(TEXTS_AT_ONCE, work.texts) * work.text_tokens
    weights = work.item * shape.block if shape.streams else weight_bytes(shape, work.item)
    return weights + activation_bytes(shape, tokens, work.text_tokens, work.item, kept=False)


def _states(shape: Shape, work: Work) -> float:
    """Bytes of the texts' states before and behind a block."""
    return 2 * work.item * work.positions * shape.dims.hidden_size


def _reading(shape: Shape, work: Work) -> Ops:
    """One pass of a base over the calibration texts, block by block and without the head."""
    return pass_ops(shape, work.positions, work.text_tokens) + Ops(read=shape.blocks * shape.stored)


def activations(old: Shape, new: Shape, work: Work) -> Iterator[Cost]:
    """One pass of each base over the texts; kept is one vector a text and layer."""
    for shape in (old, new):
        pooled = DOUBLE * (shape.dims.layers + 1) * work.texts * shape.dims.hidden_size
        held = work.held(_streaming(shape, work), pooled + _states(shape, work))
        yield Cost("activations", _reading(shape, work), **held, disk=pooled)


def similarity(old: Shape, new: Shape, work: Work) -> Cost:
    """Minibatch CKA of every layer pair: Gram matrices of a minibatch's texts, by layer, and their inner products."""
    batch = min(work.cka_batch, work.texts)
    layers = (old.dims.layers + 1) * (new.dims.layers + 1)
    grams = sum(2 * (s.dims.layers + 1) * work.texts * batch * s.dims.hidden_size for s in (old, new))
    pooled = sum(DOUBLE * (s.dims.layers + 1) * work.texts * s.dims.hidden_size for s in (old, new))
    ops = Ops(double=grams + 2 * layers * work.texts * batch)
    return Cost("similarity", ops, **Work().held(0, 2 * pooled), disk=DOUBLE * layers)


def head_mapping(old: Shape, new: Shape) -> Cost:
    """Each layer pair's head similarities: two layers' attention weights, read once.

    At Llama-2-7B to Llama-3-8B: 5.3 TFLOP in float32 and 7 GB read; nothing ``d × d``.
    """
    pairs = depth(old, new)
    weights = [sum(s.dims.rows(role) * s.dims.columns(role) for role in ATTENTION) for s in (old, new)]
    read = pairs * sum(count * s.stored for count, s in zip(weights, (old, new), strict=True))
    rows = max(s.dims.heads * s.dims.head_dim for s in (old, new))
    held = FLOAT * (2 * sum(weights) + 3 * rows * rows)
    disk = pairs * DOUBLE * old.dims.heads * new.dims.heads
    return Cost(
        "head_mapping", Ops(single=2 * pairs * heads_product(old, new), read=read), **Work().held(0, held), disk=disk
    )


def spaces(old: Shape, new: Shape, work: Work) -> list[tuple[int, int, int]]:
    """Old and new width, and kinds of map, of each space of a layer pair: what projections read has two, what they
    write one. q, k and v read one space, gate and up another, and what gate and up write is what ``down`` reads."""
    roles = shared_roles(old, new, work.roles)
    groups = [ATTENTION, MLP, tuple(role for role in old.roles if role not in ROLES)]
    wanted = [role for group in groups if set(group) & set(roles) for role in shared_roles(old, new, group)]
    reads = [role for role in wanted if role not in ("k", "v", "gate")]
    writes = [role for role in wanted if role not in ("gate", "up")]
    o, n = old.dims, new.dims
    return [(o.columns(role), n.columns(role), 2) for role in reads] + [
        (o.rows(role), n.rows(role), 1) for role in writes
    ]


def alignment(old: Shape, new: Shape, work: Work) -> Cost:
    """One pass of each base over the texts, and every space's maps: dense, or of wide spaces by an orthonormal basis of
    each side's sampled rows and a core of at most N × N, whichever takes less room.

    At 8B with N = 512: 229 TFLOP a base for 256 texts of 64 tokens, 0.1 TFLOP a layer pair of QR, 3.2 GB of maps.
    """
    pairs, sampled = depth(old, new), min(work.map_positions, int(work.positions))
    ops, kept, held = Ops(), 0.0, 0.0
    for a, b, kinds in spaces(old, new, work):
        p, q = min(sampled, a), min(sampled, b)
        if kinds * a * b <= sampled * (a + b) + kinds * p * q:
            squares = b * b if kinds > 1 else 0
            ops += Ops(single=2 * work.positions * (a * b + squares))
            kept, held, p, q = kept + kinds * a * b, held + FLOAT * (a * b + squares), a, b
        else:
            ops += Ops(single=4 * (p * p * a + q * q * b))
            kept, held = kept + p * a + q * b + kinds * p * q, held + FLOAT * sampled * (a + b)
        ops += Ops(svd=min(p, q) ** 2 * max(p, q), double=(kinds - 1) * (q**3 / 3 + 2 * q * q * p))
    disk = HALF * pairs * kept
    both = _reading(old, work) + _reading(new, work)
    block = work.held(_streaming(old, work) + _streaming(new, work) + held, _states(old, work) + _states(new, work))
    return Cost("alignment", both + ops * pairs + Ops(written=disk), **block, disk=disk)


def expert_maps(old: Shape, new: Shape, work: Work) -> Cost:
    """One pass of each base over the texts, what matched experts compute at some positions, and a map for each pair.

    For two bases of Qwen3-30B-A3B's shape: 180 TFLOP beside the passes, and 7 GB of maps.
    """
    (layers, count_o, i_o), (others, count_n, i_n) = old.experts, new.experts
    experts, pairs = min(count_o, count_n), min(layers, others)
    d_o, d_n = old.dims.hidden_size, new.dims.hidden_size
    rows = min(work.positions, max(work.map_positions, 2 * max(i_o, i_n)))
    sampled = min(work.map_positions, int(work.positions))
    p, q = min(sampled, i_o), min(sampled, i_n)
    kept = min(3 * i_o * i_n, sampled * (i_o + i_n) + 3 * p * q)
    one = Ops(single=6 * rows * (d_o * i_o + d_n * i_n) + 2 * rows * i_o * i_n, svd=min(i_o, i_n) ** 3)
    disk = HALF * pairs * (experts * kept + 3 * d_o * d_n)
    held = FLOAT * 2 * work.positions * (d_o + d_n)
    block = work.held(_streaming(old, work) + _streaming(new, work) + held, _states(old, work) + _states(new, work))
    both = _reading(old, work) + _reading(new, work)
    return Cost("expert_maps", both + one * (pairs * experts) + Ops(written=disk), **block, disk=disk)


def state_map(old: Shape, new: Shape, work: Work) -> Cost:
    """One pass of each base, and for each new block ridge maps from k coordinates of F features of old states: to its
    stream, to what q and up read, to what o writes, and ``down`` where a norm follows it. ``12·N·F·k`` for the
    coordinates, ``2·N·k·w`` for spaces of w columns together.

    At 8B with F = 2,048 and k = 1,200: 32 blocks of 20,480 columns, 1.6 GB of maps in half precision.
    """
    features = min(FEATURES, sum(2 * old.dims.hidden_size + old.dims.intermediate_size for _ in range(old.dims.layers)))
    kept = min(DIRECTIONS, features, int(work.positions))
    groups = sum(bool(set(group) & set(work.roles)) for group in (ATTENTION, MLP))
    columns = (1 + 2 * groups) * new.dims.hidden_size
    layers, tokens = new.dims.layers, work.positions
    sums = Ops(single=2 * tokens * kept * (6 * features + layers * columns), svd=kept**3)
    disk = HALF * (layers * kept * columns + features * kept)
    held = FLOAT * (3 * tokens * features + 2 * kept * columns)
    block = work.held(max(_streaming(old, work), _streaming(new, work)), held + _states(old, work) + _states(new, work))
    both = _reading(old, work) + _reading(new, work)
    return Cost("state_map", both + sums + Ops(written=disk), **block, disk=disk)
