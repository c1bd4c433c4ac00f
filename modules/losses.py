"""Losses of the ranker."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def masked_bce(logits: Tensor, label: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of the labels that count, summed over rows (Moment&Cross, equation 5).

    Sums, not means: the caller divides by the rows of all ranks, which a rank does not know.

    Args:
        logits: ``[batch, behaviours]`` float.
        label: ``[batch, behaviours]``, 0 or 1.
        mask: ``[batch, behaviours]``, 1 where the label counts and 0 where nothing is known.
        weight: ``[behaviours]``, of each behaviour.

    Returns:
        The weighted sum over rows and behaviours, a scalar to be differentiated, and the unweighted sums
        ``[behaviours]``, detached, for logging; both in nats and float32.
    """
    logits = logits.float()
    losses = functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
    # Chosen, not multiplied: a masked logit may be infinite.
    sums = losses.where(mask > 0, losses.new_zeros(())).sum(0)
    return (sums * weight.to(sums.dtype)).sum(), sums.detach()
