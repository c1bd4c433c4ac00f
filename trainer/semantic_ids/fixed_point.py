"""Sums over vectors in 64-bit integers, which are the same in any order, in any chunks and over any ranks.

A value is multiplied by a power of two and rounded to an integer. The power is the largest one with which the sum over
all vectors cannot overflow: with weights that add up to at most 2^w and magnitudes of at most 2^e, it is
``2^(62 - w - e)``. So an addend is wrong by at most ``2^(e + w - 63)``, and a mean by no more than that: 2^-39 of the
largest magnitude for 10 million vectors, where float32 itself rounds to 2^-24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from modules.compiled import compiled

_BITS = 62


@dataclass(frozen=True)
class FixedPoint:
    """Scale of sums in fixed point.

    Attributes:
        exponent: a value is stored as the nearest integer to ``value * 2^exponent``.
    """

    exponent: int

    @staticmethod
    def of(total_weight: int, magnitude: int) -> FixedPoint:
        """Return the finest scale for values up to ``2^magnitude`` whose weights add up to ``total_weight``."""
        return FixedPoint(_BITS - max(1, total_weight).bit_length() - magnitude)

    def integers(self, values: Tensor) -> Tensor:
        """Round values to integers of this scale, in int64."""
        # A power of two as a number: as a tensor it would be copied to the device, for which the host waits.
        return (values.double() * math.ldexp(1.0, self.exponent)).round_().long()

    def add_rows(self, sums: Tensor, codes: Tensor, values: Tensor, weights: Tensor) -> None:
        """Add ``weight * value`` of each row to the row of ``sums`` that its code names.

        Args:
            sums: ``[k, d] int64``, changed.
            codes: ``[n] int32``.
            values: ``[n, d] float32``.
            weights: ``[n] int64``.
        """
        if sums.device.type == "cpu":
            factor = math.ldexp(1.0, self.exponent)
            _add_rows(sums.numpy(), codes.numpy(), values.contiguous().numpy(), weights.numpy(), factor)
        else:
            self.add_rows_by_index(sums, codes, values, weights)

    def add_rows_by_index(self, sums: Tensor, codes: Tensor, values: Tensor, weights: Tensor) -> None:
        """Add rows as :meth:`add_rows` does, with PyTorch's operations, on any device."""
        sums.index_add_(0, codes.long(), self.integers(values) * weights[:, None])

    def values(self, integers: Tensor) -> Tensor:
        """Return integers of this scale as float64."""
        return integers.double() * math.ldexp(1.0, -self.exponent)

    def value(self, integer: int) -> float:
        """Return an integer of this scale as a number."""
        return math.ldexp(integer, -self.exponent)


def magnitude_of(largest: float) -> int:
    """Return the smallest e with ``largest <= 2^e``; at least -60, so that scales stay finite."""
    mantissa, exponent = math.frexp(largest)
    if mantissa == 0:
        return -60
    return max(-60, exponent - 1 if mantissa == 0.5 else exponent)


@compiled("adding vectors", nogil=True)
def _add_rows(sums: np.ndarray, codes: np.ndarray, values: np.ndarray, weights: np.ndarray, factor: float) -> None:
    """Add rows in fixed point on a CPU; the products with a power of two are exact."""
    for row in range(len(codes)):
        code, weight = codes[row], weights[row]
        for place in range(values.shape[1]):
            sums[code, place] += np.int64(np.rint(np.float64(values[row, place]) * factor)) * weight
