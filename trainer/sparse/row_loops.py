"""Compiled loops over rows of a table: reading them, summing their gradients, training them.

Rows are read in random order, so a loop requests the row that it needs :data:`AHEAD` rows later.
"""

from __future__ import annotations

import numpy as np

from modules.compiled import compiled
from modules.search import cpu_intrinsics, cpu_kernels
from modules.search.cpu_kernels import fetch
from trainer.sparse import row_intrinsics
from trainer.sparse.row_intrinsics import LANES, copy_row, train_adagrad, train_rowwise_adagrad, train_sgd

AHEAD = 24
"""Rows between a request to memory and its use."""


@compiled(cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def read_rows(begin: int, end: int, numbers: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """Write row ``numbers[i]`` of ``values`` to row ``i`` of ``out``, for ``i`` in ``[begin, end)``."""
    base, target, row_bytes = values.ctypes.data, out.ctypes.data, 4 * values.shape[1]
    for i in range(begin, end):
        fetch(base, numbers[min(i + AHEAD, end - 1)] * row_bytes, row_bytes)
        copy_row(
            np.uintp(base + numbers[i] * row_bytes), np.uintp(target + i * row_bytes), np.intp(values.shape[1] // LANES)
        )


@compiled(nogil=True)
def add_rows(total: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
    """Add ``rows[i]`` to ``total[places[i]]`` for every ``i``, in order."""
    for i in range(len(places)):
        place = places[i]
        for column in range(total.shape[1]):
            total[place, column] += rows[i, column]


@compiled(cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def sgd(
    begin: int,
    end: int,
    numbers: np.ndarray,
    gradients: np.ndarray,
    values: np.ndarray,
    states: np.ndarray,
    rate: float,
    eps: float,
) -> None:
    """Train row ``numbers[i]`` of ``values`` on row ``i`` of the gradients, for ``i`` in ``[begin, end)``.

    Args:
        begin, end: as above.
        numbers: ``[n]`` int64, each row at most once.
        gradients: ``[n, dim]`` float32, contiguous.
        values: ``[rows, dim]`` float32, contiguous.
        states: nothing is read; the other loops have the same arguments.
        rate: learning rate.
        eps: nothing is read.
    """
    base, slope, row_bytes = values.ctypes.data, gradients.ctypes.data, 4 * values.shape[1]
    vectors = np.intp(values.shape[1] // LANES)
    for i in range(begin, end):
        fetch(base, numbers[min(i + AHEAD, end - 1)] * row_bytes, row_bytes)
        row = np.uintp(base + numbers[i] * row_bytes)
        train_sgd(row, np.uintp(slope + i * row_bytes), vectors, np.float32(rate))


@compiled(cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def adagrad(
    begin: int,
    end: int,
    numbers: np.ndarray,
    gradients: np.ndarray,
    values: np.ndarray,
    states: np.ndarray,
    rate: float,
    eps: float,
) -> None:
    """Do as :func:`sgd` by Adagrad; ``states`` has the same shape as ``values``."""
    base, slope, row_bytes = values.ctypes.data, gradients.ctypes.data, 4 * values.shape[1]
    state, vectors = states.ctypes.data, np.intp(values.shape[1] // LANES)
    for i in range(begin, end):
        later = numbers[min(i + AHEAD, end - 1)] * row_bytes
        fetch(base, later, row_bytes)
        fetch(state, later, row_bytes)
        place, of_row = numbers[i] * row_bytes, np.uintp(slope + i * row_bytes)
        train_adagrad(np.uintp(base + place), np.uintp(state + place), of_row, vectors, np.float32(rate), eps)


@compiled(cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def rowwise_adagrad(
    begin: int,
    end: int,
    numbers: np.ndarray,
    gradients: np.ndarray,
    values: np.ndarray,
    states: np.ndarray,
    rate: float,
    eps: float,
) -> None:
    """Do as :func:`sgd` by row-wise Adagrad; ``states`` has one number for each row."""
    base, slope, row_bytes = values.ctypes.data, gradients.ctypes.data, 4 * values.shape[1]
    state, vectors = states.ctypes.data, np.intp(values.shape[1] // LANES)
    for i in range(begin, end):
        later = numbers[min(i + AHEAD, end - 1)]
        fetch(base, later * row_bytes, row_bytes)
        fetch(state, later * 4, 4)
        row, of_row = np.uintp(base + numbers[i] * row_bytes), np.uintp(slope + i * row_bytes)
        place = np.uintp(state + numbers[i] * 4)
        train_rowwise_adagrad(row, place, of_row, vectors, np.float32(rate), np.float32(eps))
