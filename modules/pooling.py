"""Sums and means over the entries of each row of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_row(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the sums of ``values [sum of lengths, dim]`` over each row, ``[batch, dim]``."""
    row = torch.repeat_interleave(lengths, output_size=len(values))
    return values.new_zeros(len(lengths), values.shape[1]).index_add(0, row, values)


def mean_by_row(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the means of ``values [sum of lengths, dim]`` over each row, ``[batch, dim]``; zeros for empty rows."""
    return sum_by_row(values, lengths) / lengths.clamp(min=1)[:, None].to(values.dtype)
