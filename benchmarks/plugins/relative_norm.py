"""The paper's transform with every update brought to the size that the old one had beside its weight."""

from __future__ import annotations

from collections.abc import Mapping

from lorasuite.adapters import LowRank
from lorasuite.bases import Role
from lorasuite.transforms import LayerPair
from lorasuite.transforms.lorasuite import LoRASuite


class LoRASuiteRelative(LoRASuite):
    """Equation 3 up to one factor a projection: ``‖ΔW_n‖ / ‖W_n‖`` is what ``‖ΔW_o‖ / ‖W_o‖`` was.

    Equation 3 multiplies by weights of both bases and does not keep an update's size; this keeps its direction and
    takes the size from the old base. Norms are Frobenius norms of the projection as a whole.
    """

    name = "lorasuite-relative"

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """Equation 3 for every role, scaled."""
        moved = super().move(pair, updates)
        for role, update in moved.items():
            size = update.norm()
            if size:
                wanted = updates[role].norm() / float(pair.old[role].norm()) * float(pair.new[role].norm())
                moved[role] = update.scaled(wanted / size)
        return moved
