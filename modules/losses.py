"""Losses of the ranker."""

from __future__ import annotations

import math

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


def retraction(logits: Tensor, mask: Tensor, weight: Tensor, limit: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the loss that turns an earlier negative into a positive that came late (Moment&Cross, equation 3).

    The paper's ``-(log p - log(1 - p))`` equals minus the logit and is computed this way. Its gradient is -1
    everywhere; the gradient of the earlier negative was ``p``; they add up to ``p - 1``, the gradient of a positive. On
    its own the term has no lower bound. It may occur only in rows of kind ``slow``, once for each visit and behaviour,
    after a ``fast`` row with label 0. The sum is exact only if the parameters have not changed between the two rows.

    The same gradient is that of a positive, ``p - 1``, with the importance weight ``1 / (1 - p)``, which has no bound
    either. A ``limit`` w bounds this weight: the gradient is ``-min(1, w (1 - p))``, so it ends by itself where p
    approaches 1, and the loss is not below 0. For a behaviour with the true probability q, of which the fast row has
    the share s, the two rows have the expected gradient ``p - q s - q (1 - s) min(1, w (1 - p))``:

    * bias: none up to ``p = 1 - 1 / w``; above that ``q (1 - s) (1 - w (1 - p))`` is missing. With w = 1, which is a
      second row with label 1, the expected gradient is zero at ``p = q / (1 + q (1 - s))`` instead of q.
    * variance: the second moment of the slow row's gradient, ``q (1 - s)`` in the paper, is at most that, times
      ``min(1, w (1 - p)) ** 2``.

    Args:
        logits: ``[batch, behaviours]`` float.
        mask: ``[batch, behaviours]``, 1 where a positive was trained as a negative before, 0 elsewhere.
        weight: ``[behaviours]``, weight of each behaviour.
        limit: largest importance weight, above 0; 0 for the paper's formula.

    Returns:
        The two sums of :func:`masked_bce`.
    """
    logits = logits.float()
    if not limit:
        return _sums(-logits, mask, weight)
    if limit <= 1:
        return _sums(limit * functional.softplus(-logits), mask, weight)
    # From this logit on the weight is at its limit; both parts have the same value and slope there.
    edge = math.log(limit - 1)
    linear = edge - logits + limit * math.log1p(math.exp(-edge))
    return _sums(linear.where(logits < edge, limit * functional.softplus(-logits)), mask, weight)


def report_loss(
    logits: Tensor, label: Tensor, mask: Tensor, slow: Tensor, weight: Tensor, limit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the sum of ``retraction`` over rows of kind ``slow`` and ``masked_bce`` over the other rows.

    Args:
        logits: ``[batch, behaviours]`` float.
        label: ``[batch, behaviours]``, 0 or 1.
        mask: ``[batch, behaviours]``, 1 where the label counts.
        slow: ``[batch]`` bool, True for rows of kind ``slow``.
        weight: ``[behaviours]``, weight of each behaviour.
        limit: of the importance weight of a retraction; 0 for none.

    Returns:
        The two sums of :func:`masked_bce`.
    """
    late, late_sums = retraction(logits, mask * slow[:, None], weight, limit)
    plain, plain_sums = masked_bce(logits, label, mask * ~slow[:, None], weight)
    return late + plain, late_sums + plain_sums


def _sums(losses: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the losses that count, and their unweighted sums by behaviour, detached."""
    # ``where`` and not a product with the mask: the loss of a masked logit may be infinite.
    sums = losses.where(mask > 0, losses.new_zeros(())).sum(0)
    return (sums * weight.to(sums.dtype)).sum(), sums.detach()
