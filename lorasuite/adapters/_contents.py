"""What an adapter holds, whatever its kind: factored updates by module, and what lies beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lorasuite.bases import Checkpoint
from lorasuite.errors import Problem


@dataclass(frozen=True, eq=False)
class Update:
    """Where one module's update comes from.

    ``read`` gives the factors ``B (out, r)``, ``A (r, in)`` before scaling, from the old base where it needs that;
    ``shape`` is ``(out, in)``, None where only the old base knows it; ``stored`` tells factors that lie in the file
    from those that take a computation.
    """

    rank: int
    scaling: float
    shape: tuple[int, int] | None
    read: Callable[[Checkpoint | None], tuple[Tensor, Tensor]]
    stored: bool = True


#: Reads from the old base what was added to a module's bias ``(out,)`` float64; None where it has none, or keeps it.
BiasChange = Callable[[Checkpoint], Tensor | None]


@dataclass(frozen=True, eq=False)
class Contents:
    """What an adapter holds, by module path of the base model: updates, changes of biases, names of other tensors.

    ``tokens``: embedding path → its tensor, and the ids its rows stand for. ``copies``: whole weights that the config
    does not name as trained. ``frozen``: copies of what trained modules were before, which are never read.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    biases: dict[str, BiasChange] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


#: What a reader of one kind of adapter gives: the contents, empty where there are problems.
Read = tuple[Contents, list[Problem]]
