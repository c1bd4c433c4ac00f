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
    return _sums(losses, mask, weight)


def retraction(logits: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a positive that came late adds to the negative it was first trained as (Moment&Cross, equation 3).

    The paper's ``-(log p - log(1 - p))`` is minus the logit, and is computed so: its gradient is -1 everywhere, the
    negative's was ``p``, and the two add to ``p - 1``, that of a positive. On its own the term has no lower bound.
    It is to stand only in rows of kind ``slow``, once a visit and behaviour, behind a ``fast`` row that said 0; and the
    sum is exact only as far as the parameters have not moved between the two rows.

    Args:
        logits: ``[batch, behaviours]`` float.
        mask: ``[batch, behaviours]``, 1 where a positive was denied and 0 elsewhere.
        weight: ``[behaviours]``, of each behaviour.

    Returns:
        As ``masked_bce``.
    """
    return _sums(-logits.float(), mask, weight)


def report_loss(logits: Tensor, label: Tensor, mask: Tensor, slow: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``retraction`` of the rows of kind ``slow`` and ``masked_bce`` of the others, summed.

    Args:
        logits: ``[batch, behaviours]`` float.
        label: ``[batch, behaviours]``, 0 or 1.
        mask: ``[batch, behaviours]``, 1 where the label counts.
        slow: ``[batch]`` bool, which rows are of kind ``slow``.
        weight: ``[behaviours]``, of each behaviour.

    Returns:
        As ``masked_bce``.
    """
    late, late_sums = retraction(logits, mask * slow[:, None], weight)
    plain, plain_sums = masked_bce(logits, label, mask * ~slow[:, None], weight)
    return late + plain, late_sums + plain_sums


def _sums(losses: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses that count, and their unweighted sums by behaviour, detached."""
    # Chosen, not multiplied: the loss of a masked logit may be infinite.
    sums = losses.where(mask > 0, losses.new_zeros(())).sum(0)
    return (sums * weight.to(sums.dtype)).sum(), sums.detach()
