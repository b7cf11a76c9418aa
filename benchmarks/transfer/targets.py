"""Part *targets*: what is fitted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.transfer.lab import RANK, Base, Reading, Row, Task, Updates, Variant
from benchmarks.transfer.whole_models import fit_jointly
from benchmarks.zoo import train as trained
from lorasuite.adapters import LowRank
from lorasuite.bases import Role, common_tokens, linear_modules
from lorasuite.correspondence import SpaceMap, polar, reduced_rank, ridge
from lorasuite.transforms import LayerPair
from lorasuite.transforms.procrustes import Procrustes


def fitted(x: Tensor, wanted: Tensor) -> LowRank:
    """The update that gives what is wanted ``(n, out)`` of inputs ``(n, in)``."""
    x, wanted = x.double(), wanted.double()
    return reduced_rank(x.T @ x, x.T @ wanted, (wanted * wanted).sum(), rank=RANK)[0]


def affine(x: Tensor, y: Tensor) -> Tensor:
    """Ridge map of centred rows."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return ridge(x.T @ x, x.T @ y)


def residual(task: Task) -> Updates:
    """Output projections fitted to the mapped change of the hidden state, from what they read in the bare new base."""
    lab = task.lab
    known_o, known_n = lab.moments.readings
    bare, adapted, new = task.readings
    parts: dict[tuple[int, Role], LowRank] = {}
    reached: Tensor | float = 0.0
    for o, n in sorted(lab.layers.items(), key=lambda item: item[1]):

        def state(reading: Reading, layer: int, middle: bool) -> Tensor:
            if middle:
                return reading["stream", layer] + reading[layer, "o", "out"]
            return reading["stream", layer + 1]

        for role, middle in (("o", True), ("down", False)):
            carry = affine(state(known_o, o, middle), state(known_n, n, middle))
            change = (state(adapted, o, middle) - state(bare, o, middle)).double() @ carry
            parts[n, role] = fitted(new[n, role, "in"], change - reached)  # type: ignore[index]
            reached = change
    return lab.new.cut(parts)


def proxied(task: Task, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """At paired positions of the teacher's rows: the new base's logits, the change to make, and the ids they are of."""
    lab, t = task.lab, task.texts
    a, b = lab.old, lab.new
    common = common_tokens(a.tokenizer, b.tokenizer, a.dims.vocab_size, b.dims.vocab_size)
    with torch.no_grad():
        before = a.model(input_ids=t.old).logits[t.old_rows]
        with task.adapted():
            after = a.model(input_ids=t.old).logits[t.old_rows]
        own = b.model(input_ids=t.new).logits[t.new_rows]
    change = torch.zeros_like(own)
    change[:, common.new] = alpha * (after - before)[:, common.old]
    return own, change - change.mean(1, keepdim=True), t.new[t.new_rows]


def proxy(task: Task, alpha: float) -> Updates:
    """The last layer's output projections fitted to a change of the final state that makes the proxy's logits."""
    b = task.lab.new
    _, change, _ = proxied(task, alpha)
    head = b.model.get_output_embeddings().weight.detach().double()
    last = b.dims.layers - 1
    final = task.readings[2]["stream", last + 1].double()
    norm = b.model.model.norm if hasattr(b.model, "model") else b.model.gpt_neox.final_layer_norm
    centred = final - final.mean(1, keepdim=True) if hasattr(norm, "bias") else final
    size = (centred.square().mean(1, keepdim=True)).sqrt()
    wanted = ridge(head.T @ head, head.T @ change.double().T, 1e-3).T / norm.weight.detach().double() * size
    updates: Updates = {}
    for role in ("o", "down"):
        module, _ = b.module(last, role)  # type: ignore[arg-type]
        path = b.architecture.path(last, module)
        with b.changed(updates):
            now = b.read(task.texts.new, task.texts.new_rows)
        moved = now["stream", last + 1].double() - final
        updates[path] = fitted(now[last, role, "in"], wanted - moved)
    return updates


def gradients(base: Base, rows: Sequence[Row], offsets: Sequence[Tensor]) -> Reading:
    """Each role's inputs and gradients of the loss by its outputs, at some positions of labelled rows."""
    ids, labels = base.rows(rows)
    kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    handles = []

    def keep(key: tuple[int, str], _module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept[key] = args[0].detach(), output

    for layer in range(base.dims.layers):
        for module, linear in linear_modules(base.loaded, layer).values():
            handles.append(linear.register_forward_hook(partial(keep, (layer, module.name))))
    try:
        predicted = base.model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        torch.nn.functional.cross_entropy(predicted, labels[:, 1:], ignore_index=trained.IGNORED).backward()
    finally:
        for handle in handles:
            handle.remove()
    base.model.zero_grad(set_to_none=True)
    found: Reading = {}
    for layer in range(base.dims.layers):
        for module, _ in linear_modules(base.loaded, layer).values():
            reads, output = kept[layer, module.name]
            assert output.grad is not None
            split = module.split(output.grad[tuple(offsets)].double().T, base.dims)
            for role in module.roles:
                found[layer, role, "in"] = reads[tuple(offsets)].double()
                found[layer, role, "out"] = split[role].T
    return found


def gradient(task: Task, how: str) -> Updates:
    """Output maps (or B itself) from one backward pass over 32 labelled rows."""
    lab = task.lab
    # encode() pads on the right with the same words in both tokenizations, so positions pair one to one
    ids, _ = lab.old.rows(task.labelled)
    at = (ids != lab.old.tokenizer.pad_token_id).nonzero(as_tuple=True)
    new = gradients(lab.new, task.labelled, at)
    with task.adapted() if how == "adapted" else contextlib.nullcontext():
        old = gradients(lab.old, task.labelled, at)

    class ByGradient(Procrustes):
        def __init__(self, o: int, n: int) -> None:
            self.layers = o, n

        def output_map(self, pair: LayerPair, role: Role) -> SpaceMap:
            o, n = self.layers
            return SpaceMap(polar(old[o, role, "out"].T @ new[n, role, "out"]))

        def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
            moved = super().move(pair, updates)
            if how != "B":
                return moved
            n = self.layers[1]
            for role, update in moved.items():
                step = LowRank(-new[n, role, "out"].T @ (new[n, role, "in"] @ update.A.T), update.A)
                moved[role] = step.scaled(update.norm() / max(step.norm(), 1e-30))
            return moved

    return lab.moved(task.parts, ByGradient)


def targets(task: Task) -> Iterator[Variant]:
    """Residual-stream targets, logits and gradients."""
    yield "residual stream", "functional", lambda: residual(task)
    for alpha in (1.0, 2.0):
        yield f"proxy logits, alpha {alpha:g}", "bare", lambda alpha=alpha: proxy(task, alpha)
    yield (
        "logits",
        "proxy logits, alpha 1",
        lambda: fit_jointly("logits", task.lab, task.adapted, task.rows, task.roles),
    )
    yield "output maps from gradients, old base", "procrustes", lambda: gradient(task, "bare")
    yield "output maps from gradients, old base + adapter", "procrustes", lambda: gradient(task, "adapted")
    yield "B from the new base's gradient", "procrustes", lambda: gradient(task, "B")


def proxy_itself(task: Task, alpha: float) -> dict[str, float]:
    """What the proxy's own logits say: the target of its fit, on the teacher's rows."""
    own, change, ids = proxied(task, alpha)
    which = task.texts.new_rows[0]
    said, wanted = (own + change)[:-1], ids[1:]
    inside = which[1:] == which[:-1]
    starts = {}
    for row, (text, at) in enumerate(zip(which.tolist(), ids.tolist(), strict=True)):
        if at == task.lab.new.tokenizer.convert_tokens_to_ids("="):
            starts[text] = row
    answer = torch.tensor([inside[n] and n >= starts.get(int(which[n]), len(which)) for n in range(len(inside))])
    right = (said.argmax(1) == wanted) | ~answer
    whole = dict.fromkeys(starts, True)
    for n in range(len(inside)):
        whole[int(which[n])] &= bool(right[n])
    loss = torch.nn.functional.cross_entropy(said[answer], wanted[answer])
    return {"exact_match": sum(whole.values()) / len(whole), "loss": float(loss)}
