"""What every stage of a checked run needs on this machine, into what the check shows."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasuite.bases import unstreamed
from lorasuite.planning._config import MigrationConfig, torch_device
from lorasuite.planning._cost import FLOAT, HALF, Shape, Work
from lorasuite.planning._estimate import Data, estimate, planned_work, shortages
from lorasuite.planning._inspection import Inspection
from lorasuite.planning._machine import Machine, Throughput, in_dtype, measure
from lorasuite.planning._policy import RowPlan

#: How many times slower than float32 a dtype must measure to be called slower: one measurement is that uncertain.
SLOWER = 1.25


def count(
    result: Inspection,
    config: MigrationConfig,
    rows: RowPlan,
    data: Data,
    home: Path | None,
    adapter: bool,
    timed: bool,
) -> None:
    """What every stage needs, into ``result.cost``.

    Args:
        result: without problems.
        home: where artifacts go; None does not look at any disk.
        adapter: also the stages that run for an adapter, beside the pair's.
        timed: also seconds, which takes about one or two to measure this machine.
    """
    old, new = result.old, result.new
    assert old is not None and new is not None
    device = torch_device(config.device)
    work = planned_work(config, old, new, result.opened, device, rows, data, result.nothing_moves)
    machine = Machine.here(device, home)
    if config.loading.device_map == "auto" and machine.gpu is not None:
        machine = machine.spreading()
    speed, running = None, {}
    if timed:
        speed = measure(old.dims, old.weight_files[0], device, work.item)
        if adapter:
            half = torch.float16 if config.loading.dtype == "float16" else torch.bfloat16
            dtypes: dict[float, torch.dtype] = {FLOAT: torch.float32, HALF: half}
            running = {
                item: in_dtype(speed, old.dims, dtypes[item])
                for item in sorted({work.run_item, work.training_item} - {work.item})
                if item in dtypes  # quantized weights are multiplied in 16 bits, as texts are read on a GPU
            }
            _slower(result, config, work, speed, running)
    bases = (old, new) if work.texts else ()
    whole = {base.source: why for base in bases if (why := unstreamed(base, config.trust_remote_code))}
    result.notices += [f"{base}: {why}: it is loaded whole where the texts are read" for base, why in whole.items()]
    shapes = Shape.of(old, old.source not in whole), Shape.of(new, new.source not in whole)
    found = estimate(*shapes, work, machine, speed, adapter, running)
    result.cost = {**found, "assumed": data.assumed, "shortages": shortages(found)}


def _slower(
    result: Inspection, config: MigrationConfig, work: Work, speed: Throughput, running: dict[float, Throughput]
) -> None:
    """A notice where 16 bits were asked for that a CPU is slower in than in float32."""
    if work.gpu or HALF not in running:
        return
    times = speed.forward / running[HALF].forward
    if times > SLOWER:
        name = "finetune.precision bf16" if config.loading.dtype == "auto" else f"dtype {config.loading.dtype}"
        told = "it saves memory, not time"
        result.notices.append(f"{name}: measured {times:.2g} times slower than float32 on this CPU: {told}")
