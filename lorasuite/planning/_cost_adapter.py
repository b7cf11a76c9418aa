"""What the stages need that run for each adapter: transforms, the fine-tunes and the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorasuite.bases import MLP
from lorasuite.correspondence import DIRECTIONS, FEATURES
from lorasuite.planning._cost import (
    DOUBLE,
    FLOAT,
    HALF,
    LOGITS,
    Cost,
    Ops,
    Shape,
    Work,
    activation_bytes,
    depth,
    lora_weights,
    pass_ops,
    scoring,
    shared_roles,
    weight_bytes,
    writing,
)
from lorasuite.planning._cost_pair import spaces
from lorasuite.planning._cost_teacher import teacher_costs, template_fit
from lorasuite.training import LABELLED, OWN_TEXTS, OWN_TOKENS
from lorasuite.transforms import Input, ModelTransform, can_move, transform

#: Scales that ``auto`` tries on the best transform, beside 1.
OTHER_SCALES = 5
#: Bytes a trained weight takes beside itself: gradient and AdamW's two means, in float32, and its master copy.
TRAINED = 4 * FLOAT
#: A step over what its operations take at the speed of an MLP block: attention, norms, padding, the optimizer, and what
#: a call costs. 2.1 was measured on a base of 0.27 billion weights; wider ones lose less.
BESIDE = 1.7
#: Bytes that a fine-tune in 16 bits on a CPU comes to beside what is counted: kernels that oneDNN compiles for every
#: shape, and memory that is freed in pieces. On the first real pair 0.4 GiB after 16 steps, and more with every step.
COMPILED = 400 * 2**20
#: Stages that run the new base, after others may have run the old one.
NEW_STAGES = (
    "teacher_worth", "select", "rehearsal", "screen", "search", "finetune", "second_step", "evaluate", "general_text",
    "serving",
)  # fmt: skip


def adapter_costs(old: Shape, new: Shape, work: Work) -> list[Cost]:
    """What every stage of one adapter's migration needs, in the order they run."""
    found = [read_adapter(work.dense)] if work.dense else []
    found += [transforming(old, new, work, method) for method in work.methods if not _fits_models(method)]
    if work.fitted_rows:
        found.append(template_fit(old, work))
    found += teacher_costs(old, new, work)
    found += [transforming(old, new, work, method) for method in work.methods if _fits_models(method)]
    if work.rows and not work.methods:
        found.append(unmoved(new, work))
    if work.chosen_by:
        found.append(select(new, work))
    if work.rows:
        if work.rehearsal:
            found.append(rehearsal(new, work))
        tuned = {"screen": work.screened, "search": work.searched, "finetune": work.fine_tunes}
        found += [training(stage, new, work, whole) for stage, whole in tuned.items() if whole]
    if work.second_step != "none" and work.synthetic_rows:
        found.append(second_step(old, new, work))
    if work.evaluation_rows:
        found.append(evaluate(old, new, work))
    if work.general_texts:
        found.append(general_text(old, new, work))
    found.append(serving(new, work))
    return found


def kept_loaded(costs: Sequence[Cost], old: Shape, new: Shape, work: Work, room: float) -> list[Cost]:
    """The same costs with the old base's weights where the new one runs: a process keeps both, while they are less than
    half of its memory (:class:`lorasuite.bases.ModelCache`), and drops one where that is wanted.

    Args:
        room: bytes of memory where models run.
    """
    extra = weight_bytes(old, work.run_item)
    if not work.teacher_rows or extra + weight_bytes(new, work.run_item) > room / 2:
        return list(costs)
    place = "gpu" if work.gpu else "ram"
    return [
        replace(one, **{place: getattr(one, place) + extra}, spare=one.spare + extra)
        if one.stage in NEW_STAGES
        else one
        for one in costs
    ]


def _fits_models(method: str) -> bool:
    return isinstance(transform(method), ModelTransform)


def read_adapter(shapes: Sequence[tuple[int, int]]) -> Cost:
    """Updates that are not stored as factors: each ΔW ``(out, in)`` computed and decomposed, one module at a time."""
    ops = Ops(svd=sum(min(shape) ** 2 * max(shape) for shape in shapes))
    # the dense ΔW and its base weight, both in float32, and an SVD of it in float64
    return Cost("read_adapter", ops, **Work().held(0, 10 * FLOAT * max(a * b for a, b in shapes)))


def transforming(old: Shape, new: Shape, work: Work, method: str) -> Cost:
    """One adapter's updates moved by one transform; only maps and factors are multiplied, at the adapter's rank.

    At 7B → 8B and rank 16: 25 GFLOP and 3.2 GB of maps read (procrustes, functional); equation 3 reads the weights.
    """
    chosen, r = transform(method), work.rank
    roles = shared_roles(old, new, work.roles)
    disk = FLOAT * lora_weights(new, work)
    if _fits_models(method):
        return _fitting(old, new, work, disk)
    pairs = depth(old, new)
    if Input.ALIGNMENT in chosen.inputs:
        sampled = min(work.map_positions, max(int(work.positions), 1))
        products = kept = 0.0
        for a, b, kinds in spaces(old, new, work):
            p, q = min(sampled, a), min(sampled, b)
            dense = kinds * a * b <= sampled * (a + b) + kinds * p * q
            products += 2 * r * (a * b if dense else a * p + p * q + q * b)
            kept += a * b if dense else a * p + p * q + q * b
        ops = Ops(single=3 * pairs * products, read=HALF * pairs * kept)
        return Cost("transform", ops, **Work().held(0, 2 * FLOAT * kept), disk=disk)
    d_o, d_n = old.dims.hidden_size, new.dims.hidden_size
    roles = [role for role in roles if can_move(chosen, role)]
    looked_at = chosen.weights(roles)  # type: ignore[union-attr]
    weights = [sum(s.dims.rows(role) * s.dims.columns(role) for role in looked_at) for s in (old, new)]
    products = sum(2 * old.dims.rows(role) * old.dims.columns(role) + 2 * d_o * d_n for role in looked_at)
    read = pairs * sum(count * s.stored for count, s in zip(weights, (old, new), strict=True))
    factors = FLOAT * d_o**2 * sum(role in MLP for role in roles)
    read += pairs * factors / 2 if Input.MLP_FACTORS in chosen.inputs else 0
    sizes = [HALF if s.stored == HALF else FLOAT for s in (old, new)]  # of 16 bits they are multiplied as they are
    held = sum(size * count for size, count in zip(sizes, weights, strict=True)) + factors + 2 * DOUBLE * d_o * d_n
    return Cost("transform", Ops(single=2 * pairs * r * products, read=read), **Work().held(0, held), disk=disk)


def _fitting(old: Shape, new: Shape, work: Work, disk: float) -> Cost:
    """The new base fitted module by module on the task's rows: one pass of the old base with its adapter, and of each
    new block one to go on with and, for each group of modules, one as far as to what these read: 3.2 in all. Sums are
    float32; what reads one space shares them. A reduced-rank fit of every module is float64."""
    tokens, length = work.rows * work.row_tokens, work.row_tokens
    again = pass_ops(new, tokens, length) * 3.2
    roles = [role for role in work.roles if role in new.roles]
    widths = [(new.dims.columns(role), new.dims.rows(role)) for role in roles]
    d = new.dims.hidden_size
    groups = [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}]
    wanted = [group for group in groups if group & set(roles)]
    sums = 0.0
    for group in wanted:
        a = new.dims.columns(next(role for role in roles if role in group))
        if len(group) > 1:
            sums += 2 * tokens * 3 * a * a
        elif tokens >= a:  # rows that are fewer are kept, and multiplied in the fit
            sums += 2 * tokens * a * (a + d)
    mapped = 2 * tokens * DIRECTIONS * d * (len(wanted) + ("o" in roles))
    fits = [
        _fit_of_rows(tokens, a, b) if role in ("o", "down") and tokens < a else _fit_of_sums(a, b)
        for role, (a, b) in zip(roles, widths, strict=True)
    ]
    solved = sum(operations for operations, _ in fits)
    layers = new.dims.layers
    ops = pass_ops(old, tokens, length) + again + Ops(double=layers * solved, single=layers * (sums + mapped))
    largest = max((size for _, size in fits), default=0)
    block = FLOAT * DIRECTIONS * 5 * d
    held = largest + FLOAT * tokens * (FEATURES + DIRECTIONS) + block
    return Cost(
        "model_fit", ops, **work.held(weight_bytes(old, work.item) + weight_bytes(new, work.item), held), disk=disk
    )


def _fit_of_sums(a: int, b: int) -> tuple[float, float]:
    """Operations of a reduced-rank fit from sums of ``a`` inputs and ``b`` outputs, and bytes it holds."""
    return a**3 / 3 + 2 * a * a * min(a, b), DOUBLE * 3 * (a * a + a * b)


def _fit_of_rows(n: float, a: int, b: int) -> tuple[float, float]:
    """The same from ``n`` rows, fewer than inputs."""
    return n * n * a + n**3 / 3 + 2 * n * b * (n + b), FLOAT * n * (a + b) + DOUBLE * (3 * n * n + 3 * n * b + b * b)


def select(new: Shape, work: Work) -> Cost:
    """The held-out loss of the bare base, and where there are candidates that of each, and of the best at other scales;
    kept is the best one."""
    ops, held = scoring(new, work, work.chosen_by, work.run_item)
    passes = 1 + (len(work.methods) + OTHER_SCALES if work.methods else 0)
    return Cost("select", ops * passes, **work.held(held), disk=FLOAT * lora_weights(new, work))


def unmoved(new: Shape, work: Work) -> Cost:
    """A fresh LoRA, drawn and written, where no transform is tried."""
    size = FLOAT * lora_weights(new, work)
    return Cost("unmoved", Ops(written=size), **Work().held(0, 2 * size), disk=size)


def step_ops(shape: Shape, work: Work, rows: float) -> Ops:
    """Forward and backward of so many rows: the weights are frozen, so a token costs four operations a weight and not
    six, the adapter six, and the head four at each label."""
    tokens = rows * work.row_tokens
    plain = pass_ops(shape, tokens, work.row_tokens, rows * work.label_tokens) * 2
    again = pass_ops(shape, tokens, work.row_tokens) if work.checkpointing else Ops()
    return Ops(trained=BESIDE * (plain.forward + again.forward + 6 * tokens * lora_weights(shape, work)))


def rehearsal(new: Shape, work: Work) -> Cost:
    """Texts that the bare new base writes from nothing, once for all adapters."""
    ops, held = writing(new, work, OWN_TEXTS, 1, OWN_TOKENS, OWN_TEXTS)
    return Cost("rehearsal", ops, **work.held(held))


def training(stage: str, new: Shape, work: Work, whole: float) -> Cost:
    """All runs of a stage together, as whole fine-tunes; the bytes are those of one, which run one after another.

    Texts of the base's own are read by a search's last run, and by no short one.
    """
    ops = step_ops(new, work, work.rows * work.epochs) * whole
    if work.rehearsal and stage != "screen":
        texts = replace(work, row_tokens=OWN_TOKENS, label_tokens=OWN_TOKENS / LABELLED)
        ops += step_ops(new, texts, work.rehearsal * work.epochs) * (1 if stage == "search" else whole)
    held, spare = _training_bytes(new, work)
    disk = whole * 3 * FLOAT * lora_weights(new, work)
    return Cost(stage, ops, **work.held(held), disk=disk, spare=spare)


def _training_bytes(new: Shape, work: Work) -> tuple[float, float]:
    """Bytes of one run on the device, and those of them that a run does without that may take fewer rows a pass, and
    recompute activations."""
    trained, rows = lora_weights(new, work), min(work.micro_batch or work.batch, work.rows)
    always = weight_bytes(new, work.training_item) + (FLOAT + TRAINED) * trained
    half = work.training_item < FLOAT
    always += COMPILED if half and not work.gpu else 0
    # the LoRA is float32, and reads what its module reads in that
    copied = FLOAT * sum(new.dims.columns(role) for role in work.roles if role in new.roles) if half else 0

    def passing(rows: int, kept: bool) -> float:
        """Bytes of the activations of a pass over so many rows, and of their logits."""
        tokens = rows * work.row_tokens
        logits = min(3 * FLOAT * rows * work.label_tokens * new.dims.vocab_size, 3 * FLOAT * LOGITS)
        copies = tokens * copied * (new.dims.layers if kept else 1)
        return logits + copies + activation_bytes(new, tokens, work.row_tokens, work.training_item, kept=kept)

    held = passing(rows, not work.checkpointing)
    return always + held, held - passing(1, work.checkpointing is False) if work.micro_batch is None else 0.0


def second_step(old: Shape, new: Shape, work: Work) -> Cost:
    """The first step again without the rows held out, the second step without them and with them, and the losses of the
    rows held out after each of the first two. Both bases are loaded.

    On-policy, the student answers every prompt of every step, and the teacher reads the answer; cached, the teacher
    reads its own rows, once for each of the two runs.
    """
    taught = work.synthetic_rows * work.second_step_epochs
    further = step_ops(new, work, taught)
    if work.second_step == "on-policy":
        written, _ = writing(new, work, taught, work.prompt_tokens, work.teacher_tokens, work.batch)
        further += written + scoring(old, work, taught, work.run_item)[0]
    else:
        further += scoring(old, work, work.synthetic_rows, work.run_item)[0]
    held_out = max(work.chosen_by, work.rows // 5)
    judged = scoring(old, work, held_out, work.run_item)[0] + scoring(new, work, held_out, work.run_item)[0] * 2
    ops = step_ops(new, work, work.rows * work.epochs) + further * 2 + judged
    held, spare = _training_bytes(new, work)
    _, reading = scoring(old, work, work.batch, work.run_item)
    disk = 3 * FLOAT * lora_weights(new, work)
    return Cost("second_step", ops, **work.held(held + reading), disk=disk, spare=spare)


def evaluate(old: Shape, new: Shape, work: Work) -> Cost:
    """Every arm on the held-out rows: the loss of each answer, and an answer written to compare with it."""
    ops, held = Ops(), 0.0
    for shape, arms in ((old, work.old_arms), (new, work.new_arms)):
        scored, needs = scoring(shape, work, work.evaluation_rows, work.run_item)
        held = max(held, needs)
        new_tokens = work.evaluation_new_tokens
        written, _ = writing(shape, work, work.evaluation_rows, work.row_tokens, new_tokens, work.evaluation_batch)
        ops += (scored + written) * arms
    return Cost("evaluate", ops, **work.held(held))


def general_text(old: Shape, new: Shape, work: Work) -> Cost:
    """Both bases, bare and with their adapters, on general text: every token is scored, the head some at a time."""
    tokens, ops, held = work.general_texts * work.general_tokens, Ops(), 0.0
    batch = min(work.evaluation_batch, work.general_texts) * work.general_tokens
    for shape in (old, new):
        ops += pass_ops(shape, tokens, work.general_tokens, tokens) * 2
        states = activation_bytes(shape, batch, work.general_tokens, work.run_item, kept=False)
        logits = 3 * FLOAT * min(batch * shape.dims.vocab_size, LOGITS)
        held = max(held, weight_bytes(shape, work.run_item) + logits + states)
    return Cost("general_text", ops, **work.held(held))


def serving(new: Shape, work: Work) -> Cost:
    """The published adapter beside the base, and merged into it: the base read once, every ΔW added to its weight."""
    merged = 2 * work.rank * new.active
    ops = Ops(forward=merged + 4 * 32 * new.active, read=new.files)
    return Cost("serving", ops, **work.held(weight_bytes(new, work.run_item), work.run_item * new.head))
