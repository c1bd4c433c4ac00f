"""Losses of the ranker."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def masked_bce(logits: Tensor, label: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the binary cross-entropy of the known labels, summed over rows (Moment&Cross, equation 5).

    It returns sums and not means: the caller divides by the number of rows of all ranks, which is not known here.

    Args:
        logits: ``[batch, behaviours]`` float.
        label: ``[batch, behaviours]``, 0 or 1.
        mask: ``[batch, behaviours]``, 1 where the label counts and 0 where it is unknown.
        weight: ``[behaviours]``, weight of each behaviour.

    Returns:
        The weighted sum over rows and behaviours, a scalar to be differentiated, and the unweighted sums
        ``[behaviours]``, detached, for logging; both in nats and float32.
    """
    logits = logits.float()
    losses = functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
    return _sums(losses, mask, weight)


def retraction(logits: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss that turns an earlier negative into a positive that came late (Moment&Cross, equation 3).

    The paper's ``-(log p - log(1 - p))`` equals minus the logit and is computed this way. Its gradient is -1
    everywhere; the gradient of the earlier negative was ``p``; they add up to ``p - 1``, the gradient of a positive. On
    its own the term has no lower bound. It may occur only in rows of kind ``slow``, once for each visit and behaviour,
    after a ``fast`` row with label 0. The sum is exact only if the parameters have not changed between the two rows.

    Args:
        logits: ``[batch, behaviours]`` float.
        mask: ``[batch, behaviours]``, 1 where a positive was trained as a negative before, 0 elsewhere.
        weight: ``[behaviours]``, weight of each behaviour.

    Returns:
        The two sums of :func:`masked_bce`.
    """
    return _sums(-logits.float(), mask, weight)


def report_loss(logits: Tensor, label: Tensor, mask: Tensor, slow: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of ``retraction`` over rows of kind ``slow`` and ``masked_bce`` over the other rows.

    Args:
        logits: ``[batch, behaviours]`` float.
        label: ``[batch, behaviours]``, 0 or 1.
        mask: ``[batch, behaviours]``, 1 where the label counts.
        slow: ``[batch]`` bool, True for rows of kind ``slow``.
        weight: ``[behaviours]``, weight of each behaviour.

    Returns:
        The two sums of :func:`masked_bce`.
    """
    late, late_sums = retraction(logits, mask * slow[:, None], weight)
    plain, plain_sums = masked_bce(logits, label, mask * ~slow[:, None], weight)
    return late + plain, late_sums + plain_sums


def _sums(losses: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the losses that count, and their unweighted sums by behaviour, detached."""
    # ``where`` and not a product with the mask: the loss of a masked logit may be infinite.
    sums = losses.where(mask > 0, losses.new_zeros(())).sum(0)
    return (sums * weight.to(sums.dtype)).sum(), sums.detach()
