"""Deterministic kernels of a GPU, for runs that must be repeatable bit for bit."""

from __future__ import annotations

import os

import torch


def use_deterministic_kernels() -> None:
    """Make this process use deterministic GPU kernels; call it before the first work on a GPU. No effect on a CPU.

    By default fbgemm sums the gradients of an id that occurs often, and torch the rows of ``index_add``, with atomic
    additions, whose order changes from run to run; so do NCCL's reductions in NVLink switches. torch's flag covers all
    three: fbgemm then gives each row to one block of threads, and torch keeps NCCL from these switches. An operation
    without a deterministic kernel prints a warning with its name.
    """
    # cuBLAS reads the variable when it is first used; without it, its results depend on the streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise every new tensor would be filled first, which nothing here reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
