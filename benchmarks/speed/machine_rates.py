"""Rates of the machine, which a benchmark measures just before its runs: products of matrices, and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def clock(device: torch.device) -> float:
    """Return the seconds of a clock when the device has done all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine_rates(threads: int) -> dict[str, float]:
    """Return the rates of a matrix product in fp32 and bf16 (GFLOP/s) and of a copy (GB/s), the best of six tries."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source, target = torch.empty(1 << 26), torch.empty(1 << 26)
    matrices = {kind: torch.randn(2048, 2048).to(kind) for kind in (torch.float32, torch.bfloat16)}
    best: dict[str, float] = {}
    for _ in range(6):
        for kind, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            rate = 2 * 2048**3 / (time.perf_counter() - start) / 1e9
            key = "product_gflops" if kind == torch.float32 else "bf16_product_gflops"
            best[key] = max(best.get(key, 0.0), rate)
        start = time.perf_counter()
        target.copy_(source)
        rate = 2 * source.numel() * 4 / (time.perf_counter() - start) / 1e9
        best["copy_gb_per_second"] = max(best.get("copy_gb_per_second", 0.0), rate)
    torch.set_num_threads(before)
    return best


def device_rates(device: torch.device, size: int = 8192) -> dict[str, Any]:
    """Return the rates of one device: a matrix product in each precision (GFLOP/s), and a copy (GB/s).

    Args:
        device: the device.
        size: of the matrices; too small ones do not fill a GPU.
    """
    before = torch.get_float32_matmul_precision()
    products, source = dict[str, float](), torch.empty(size * size * 4, device=device)
    target = torch.empty_like(source)
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        matrix = torch.randn(size, size, device=device).to(dtype)
        seconds = _shortest(lambda matrix=matrix: matrix @ matrix, device)  # type: ignore[misc]
        products[precision] = 2 * size**3 / seconds / 1e9
    torch.set_float32_matmul_precision(before)
    copied = 2 * source.nbytes / _shortest(lambda: target.copy_(source), device) / 1e9
    return {"device_product_gflops": products, "device_copy_gb_per_second": copied}


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run of some work, the shortest of six."""
    seconds = []
    for _ in range(6):
        begin = clock(device)
        work()
        seconds.append(clock(device) - begin)
    return min(seconds)
