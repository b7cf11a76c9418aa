"""What a stage's run cost: its own peak of memory, not what stages before it have let go of."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from tasks.recording import Measure


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep other amounts")
def test_what_was_freed_before_a_stage_is_given_back() -> None:
    process, sizes = psutil.Process(), 16_000  # 64 kB each: below what malloc takes from the kernel by itself
    blocks = [torch.zeros(sizes) for _ in range(4_000)]
    last = torch.zeros(sizes)  # what lies below it stays with the process when it is freed
    blocks.clear()
    before = process.memory_info().rss
    Measure()
    assert before - process.memory_info().rss > 200e6 and last.sum() == 0
