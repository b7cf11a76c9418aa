"""What two base models do with the same text, module by module: the statistics of the activation-aligned transforms
(METHOD section 8).

Rows are token positions of both models that have read the same text up to and including their token. The statistics
are sums over rows, so memory does not grow with the number of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasuite.bases import Architecture, Dimensions, Module, Role, paired_positions
from lorasuite.errors import DataError, Problem
from lorasuite.progress import Progress

#: A space activations live in: what a role's projection reads or what it writes.
Space = tuple[Role, str]


@dataclass
class Moments:
    """Sums over paired rows, ``x (n, a)`` of the old model and ``y (n, b)`` of the new: enough for covariances."""

    rows: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def empty(cls, a: int, b: int) -> Moments:
        zeros = [torch.zeros(*shape, dtype=torch.float64) for shape in ((a,), (b,), (a, a), (a, b), (b, b))]
        return cls(0, *zeros)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows, ``(n, a)`` and ``(n, b)``."""
        x, y = x.double(), y.double()
        self.rows += x.shape[0]
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.T @ y

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances ``(a, a)``, ``(a, b)``, ``(b, b)``."""
        n = max(self.rows, 1)
        x, y = self.x / n, self.y / n
        return (
            self.xx / n - torch.outer(x, x),
            self.xy / n - torch.outer(x, y),
            self.yy / n - torch.outer(y, y),
        )

    def unexplained(self) -> float:
        """Share of the new side's variance that the best linear map from the old side leaves: ``1 − R²``, in sample.

        With fewer rows than columns it is small whatever the two sides are.
        """
        xx, xy, yy = self.centred()
        xx.diagonal().add_(1e-8 * xx.diagonal().mean().clamp(min=torch.finfo(xx.dtype).tiny))
        explained = (xy * torch.linalg.solve(xx, xy)).sum() / yy.diagonal().sum().clamp(min=1e-30)
        return float((1 - explained).clamp(0, 1))

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The sums by name, for storing."""
        yield f"{prefix}.rows", torch.tensor(self.rows)
        for name in ("x", "y", "xx", "xy", "yy"):
            yield f"{prefix}.{name}", getattr(self, name)

    @classmethod
    def read(cls, prefix: str, tensor: Callable[[str], Tensor]) -> Moments:
        """The inverse of :meth:`tensors`."""
        return cls(int(tensor(f"{prefix}.rows")), *(tensor(f"{prefix}.{n}") for n in ("x", "y", "xx", "xy", "yy")))


@dataclass
class Recorder:
    """Captures what the linear modules of chosen blocks read and write in one forward pass."""

    model: Any
    architecture: Architecture
    dims: Dimensions
    layers: Sequence[int]
    seen: dict[tuple[int, Role, str], Tensor] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Recorder:
        for layer in self.layers:
            for module in self.architecture.modules:
                try:
                    linear = self.model.get_submodule(self.architecture.path(layer, module))
                except AttributeError:  # some layers lack it: a mixture of experts where others have an MLP
                    continue
                self._handles.append(linear.register_forward_hook(self._hook(layer, module)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int, module: Module) -> Callable[..., None]:
        def hook(_module: Any, args: Any, output: Tensor) -> None:
            written = module.split(output.detach().movedim(-1, 0), self.dims)
            for role in module.roles:
                self.seen[layer, role, "in"] = args[0].detach()
                self.seen[layer, role, "out"] = written[role].movedim(0, -1)

        return hook


def align(
    models: tuple[Any, Any],
    tokenizers: tuple[Any, Any],
    architectures: tuple[Architecture, Architecture],
    dims: tuple[Dimensions, Dimensions],
    layers: Mapping[int, int],
    roles: Sequence[Role],
    texts: Sequence[str],
    *,
    cutoff: int = 256,
    progress: Progress | None = None,
) -> dict[tuple[int, Role, str], Moments]:
    """Moments of what each mapped module reads (``"in"``) and writes (``"out"``) in both models.

    Args:
        layers: old → new layer.
        roles: those both architectures have.
        cutoff: tokens of a text read at most, in each model.

    Returns:
        ``{(old layer, role, "in" | "out"): moments}``.

    Raises:
        DataError: if no two positions pair.
    """
    found: dict[tuple[int, Role, str], Moments] = {}
    recorders = (
        Recorder(models[0], architectures[0], dims[0], list(layers)),
        Recorder(models[1], architectures[1], dims[1], list(layers.values())),
    )
    with recorders[0], recorders[1], torch.inference_mode():
        for done, text in enumerate(texts, 1):
            encoded = [t(text, return_offsets_mapping=True, truncation=True, max_length=cutoff) for t in tokenizers]
            pairs = paired_positions(*(e["offset_mapping"] for e in encoded))
            if not pairs:
                continue
            for model, e in zip(models, encoded, strict=True):
                device = next(model.parameters()).device
                model(input_ids=torch.tensor([e["input_ids"]], device=device), use_cache=False)
            rows = torch.tensor(pairs)
            for o, n in layers.items():
                for role in roles:
                    for end in ("in", "out"):
                        key = (o, role, end)
                        if key not in recorders[0].seen or (n, role, end) not in recorders[1].seen:
                            continue
                        x, y = recorders[0].seen[key].flatten(0, -2), recorders[1].seen[n, role, end].flatten(0, -2)
                        if key not in found:
                            found[key] = Moments.empty(x.shape[1], y.shape[1])
                        found[key].add(x.cpu()[rows[:, 0]], y.cpu()[rows[:, 1]])
            if progress is not None:
                progress(done, len(texts))
    if not found:
        raise DataError(
            Problem("calibration", "no position of the two tokenizations pairs", "Give texts of several words.")
        )
    return found
