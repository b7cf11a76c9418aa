"""Seconds of the decompositions that maps of a pair take, in float64, on this machine's CPU and on its GPU, if any.

    python benchmarks/decompositions.py [--sizes 1024 2048]

The second of two calls is shown; random square matrices. Where maps are computed follows from it
(:meth:`lorasuite.correspondence.Moments.double`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: str) -> float:
    """Of the second of two calls, to the end of what it started on the device."""
    for _ in range(2):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[1024, 2048])
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"{torch.get_num_threads()} threads", *([torch.cuda.get_device_name()] if "cuda" in devices else []))
    for size in parser.parse_args().sizes:
        matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for device in devices:
            own = matrix.to(device)
            gram = own @ own.T + size * torch.eye(size, dtype=own.dtype, device=device)
            calls: dict[str, Callable[[], object]] = {
                "svd": lambda own=own: torch.linalg.svd(own),
                "eigh": lambda gram=gram: torch.linalg.eigh(gram),
                "cholesky": lambda gram=gram: torch.linalg.cholesky(gram),
            }
            print(size, device, *(f"{name} {seconds(call, device):.3f}" for name, call in calls.items()))


if __name__ == "__main__":
    main()
