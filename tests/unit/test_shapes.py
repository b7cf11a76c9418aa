"""The shapes and types that signatures promise are checked while tests run, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from lorasuite.adapters import LowRank
from lorasuite.correspondence import Moments, TransferMatrix, polar

MATRIX = torch.eye(3, dtype=torch.float64)


def test_a_wrong_shape_is_refused() -> None:
    LowRank.from_dense(MATRIX)
    with pytest.raises(TypeCheckError):
        LowRank.from_dense(MATRIX[0])
    with pytest.raises(TypeCheckError):
        TransferMatrix(MATRIX[:2], MATRIX[:2])  # the inverse of (2, 3) is (3, 2)
    with pytest.raises(TypeCheckError):
        Moments.empty(3, 2).add(MATRIX, MATRIX[:2, :2])
    with pytest.raises(TypeCheckError):
        polar(MATRIX.float())


def test_a_user_pays_for_no_check() -> None:
    code = (
        "import sys, torch; from lorasuite.correspondence import polar;"
        "polar(torch.eye(3)); assert 'beartype' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
