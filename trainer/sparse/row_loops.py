"""Compiled loops over rows of a table: reading them, summing their gradients, training them.

Rows are read in random order, so a loop requests the row that it needs :data:`AHEAD` rows later. Addresses are signed:
numba adds signed and unsigned numbers as float64.
"""

from __future__ import annotations

import numpy as np

from modules.compiled import compiled
from modules.search import cpu_intrinsics, cpu_kernels
from modules.search.cpu_kernels import fetch
from trainer.sparse import row_intrinsics
from trainer.sparse.row_intrinsics import LANES, add_row, copy_row, train_adagrad, train_rowwise_adagrad, train_sgd

AHEAD = 24
"""Rows between a request to memory and its use."""

WORK = "reading and training rows of tables"
"""Work of all loops, for the message when they are compiled."""


@compiled(WORK, cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def read_rows(begin: int, end: int, numbers: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """Write row ``numbers[i]`` of ``values`` to row ``i`` of ``out``, for ``i`` in ``[begin, end)``."""
    base, target = np.intp(values.ctypes.data), np.intp(out.ctypes.data)
    row_bytes, vectors = 4 * values.shape[1], np.intp(values.shape[1] // LANES)
    for i in range(begin, end):
        fetch(base, numbers[min(i + AHEAD, end - 1)] * row_bytes, row_bytes)
        copy_row(np.uintp(base + numbers[i] * row_bytes), np.uintp(target + i * row_bytes), vectors)


@compiled(WORK, cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def add_rows(total: np.ndarray, places: np.ndarray, rows: np.ndarray, scale: float) -> None:
    """Add ``scale * rows[i]`` to ``total[places[i]]`` for every ``i``, in order.

    Args:
        total: ``[n, dim]`` float32, contiguous.
        places: ``[m]`` int32.
        rows: ``[m, dim]`` float32, contiguous.
        scale: rounded to float32, as the product is before it is added.
    """
    base, source, row_bytes = np.intp(total.ctypes.data), np.intp(rows.ctypes.data), 4 * total.shape[1]
    vectors, last = np.intp(total.shape[1] // LANES), len(places) - 1
    for i in range(len(places)):
        fetch(base, np.int64(places[min(i + AHEAD, last)]) * row_bytes, row_bytes)
        row = np.uintp(base + np.int64(places[i]) * row_bytes)
        add_row(row, np.uintp(source + i * row_bytes), vectors, np.float32(scale))


@compiled(WORK, cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def sgd(
    begin: int,
    end: int,
    numbers: np.ndarray,
    gradients: np.ndarray,
    values: np.ndarray,
    states: np.ndarray,
    rate: float,
    eps: float,
    scale: float,
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
        scale: factor of the gradients, rounded to float32.
    """
    base, slope, row_bytes = np.intp(values.ctypes.data), np.intp(gradients.ctypes.data), 4 * values.shape[1]
    vectors = np.intp(values.shape[1] // LANES)
    for i in range(begin, end):
        fetch(base, numbers[min(i + AHEAD, end - 1)] * row_bytes, row_bytes)
        row = np.uintp(base + numbers[i] * row_bytes)
        train_sgd(row, np.uintp(slope + i * row_bytes), vectors, np.float32(rate), np.float32(scale))


@compiled(WORK, cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def adagrad(
    begin: int,
    end: int,
    numbers: np.ndarray,
    gradients: np.ndarray,
    values: np.ndarray,
    states: np.ndarray,
    rate: float,
    eps: float,
    scale: float,
) -> None:
    """Do as :func:`sgd` by Adagrad; ``states`` has the same shape as ``values``."""
    base, slope, row_bytes = np.intp(values.ctypes.data), np.intp(gradients.ctypes.data), 4 * values.shape[1]
    state, vectors = np.intp(states.ctypes.data), np.intp(values.shape[1] // LANES)
    for i in range(begin, end):
        later = numbers[min(i + AHEAD, end - 1)] * row_bytes
        fetch(base, later, row_bytes)
        fetch(state, later, row_bytes)
        place, of_row = numbers[i] * row_bytes, np.uintp(slope + i * row_bytes)
        row = np.uintp(base + place)
        train_adagrad(row, np.uintp(state + place), of_row, vectors, np.float32(rate), eps, np.float32(scale))


@compiled(WORK, cpu_intrinsics, cpu_kernels, row_intrinsics, nogil=True)
def rowwise_adagrad(
    begin: int,
    end: int,
    numbers: np.ndarray,
    gradients: np.ndarray,
    values: np.ndarray,
    states: np.ndarray,
    rate: float,
    eps: float,
    scale: float,
) -> None:
    """Do as :func:`sgd` by row-wise Adagrad; ``states`` has one number for each row."""
    base, slope, row_bytes = np.intp(values.ctypes.data), np.intp(gradients.ctypes.data), 4 * values.shape[1]
    state, vectors = np.intp(states.ctypes.data), np.intp(values.shape[1] // LANES)
    for i in range(begin, end):
        later = numbers[min(i + AHEAD, end - 1)]
        fetch(base, later * row_bytes, row_bytes)
        fetch(state, later * 4, 4)
        row, of_row = np.uintp(base + numbers[i] * row_bytes), np.uintp(slope + i * row_bytes)
        place = np.uintp(state + numbers[i] * 4)
        train_rowwise_adagrad(row, place, of_row, vectors, np.float32(rate), np.float32(eps), np.float32(scale))
