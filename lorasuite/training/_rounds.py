"""The rounds of successive halving: how many arms are trained how far, within a budget of optimizer steps."""

from __future__ import annotations

import math

#: An arm in so many stays in each round.
DROPPED = 3


def rounds(arms: int, steps: int, budget: int) -> list[tuple[int, int]]:
    """How many arms go to which step in each round: one in :data:`DROPPED` stays, and the last goes to the end.

    Rounds have equal shares of what is left for them (an arm needs one step, so the first has more where arms are
    many), and what the last arm needs to go to the end is kept for it, where the budget is enough for that.

    Args:
        arms: there are, likely ones first.
        steps: of a whole run.
        budget: optimizer steps of all arms together.

    Returns:
        of each round the arms in it and the step that they are trained to.
    """
    for most in range(budget, 0, -1):
        found = _halving(min(arms, most), steps, most)
        last = found[-1][1]
        spent = sum(kept * (stop - begin) for (kept, stop), (_, begin) in zip(found, [(0, 0), *found], strict=False))
        if spent + steps - last <= budget:
            return [*found, (1, steps)] if last < steps else found
    return [(1, min(budget, steps))]


def _halving(arms: int, steps: int, budget: int) -> list[tuple[int, int]]:
    """The rounds of successive halving down to two arms."""
    found: list[tuple[int, int]] = []
    kept, reached = arms, 0
    while not found or (kept < found[-1][0] and reached < steps):
        later = 1 if kept <= 2 else math.ceil(math.log(kept, DROPPED))
        further = min(max(budget // later // kept, 1), steps - reached)
        if found and kept * further > budget:
            break
        reached, budget = reached + further, budget - kept * further
        found.append((kept, reached))
        kept = min(kept, max(math.ceil(kept / DROPPED), 2))
    return found
