"""Staytime model of a job: network, joint loss, batches, and the loops of training and prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from modules.staytime.base_losses import BaseLoss, fit_base
from modules.staytime.comment_losses import (
    listmle,
    mean_over,
    ranked_rows,
    released_listmle,
    released_touched_bce,
    touched_bce,
)
from modules.staytime.networks import (
    BackboneShape,
    CommentUnderstanding,
    PredictedWatch,
    ReleasedCommentUnderstanding,
    SeparateOpening,
    StaytimeInputs,
    StaytimeNetwork,
    StaytimeOutput,
)
from trainer.comment_staytime.comment_texts import StaytimeComments
from trainer.comment_staytime.inputs import StaytimeData
from trainer.config.staytime import LcuConfig, StaytimeConfig
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.runtime.host_copy import HostCopy, one_behind, to_device
from trainer.runtime.tracking import record_scalars

ROWS_AT_ONCE = 8192
"""Rows of a prediction batch."""


@dataclass(frozen=True)
class Labels:
    """Training labels of a batch.

    Attributes:
        seconds: ``[batch]`` float32, length of the stay.
        duration: ``[batch]`` float32, duration of the video in seconds.
        popular: ``[batch, comments]`` float32, popularity of the comments in training; None without LCU.
        touched: ``[batch, comments]`` bool, True if the user touched the comment in the visit; None without LCU.
        watch: ``[batch]`` float32, standardised watch time of the visit, NaN if unknown; None without that task.
    """

    seconds: Tensor
    duration: Tensor
    popular: Tensor | None
    touched: Tensor | None
    watch: Tensor | None = None


@dataclass(frozen=True)
class StaytimePredictions:
    """Predictions of the model for some rows, in their order.

    Attributes:
        seconds: ``[n]`` float64, predicted seconds.
        score: ``[n]`` float64, ranking score of a user's rows: the predicted seconds, or with ``separate_opening`` the
            second network's logit of the opening.
        popular: ``[n, comments]`` float32, scores of the popularity task; None without LCU.
        touched: ``[n, comments]`` float32, logits of the interaction task; None without LCU.
        watch: ``[n]`` float32, predicted watch time in the units of its label; None without that task.
    """

    seconds: np.ndarray
    score: np.ndarray
    popular: np.ndarray | None
    touched: np.ndarray | None
    watch: np.ndarray | None = None


def fit_base_on(config: StaytimeConfig, data: StaytimeData) -> BaseLoss:
    """Fit the base loss of a job on its training rows (with ``fit_on_all``, on the held-out rows too)."""
    rows = data.training
    if "fit_on_all" in config.lcu.peculiar:
        rows = np.concatenate([data.training, data.held_out])
    base = config.base
    return fit_base(
        base.loss,
        data.seconds[rows],
        data.duration[rows],
        duration_groups=base.duration_groups,
        leaves=base.leaves,
    )


def build_network(config: StaytimeConfig, data: StaytimeData, base: BaseLoss) -> nn.Module:
    """Build the network of a job, from ``StaytimeInputs`` to ``StaytimeOutput``; uses torch's current random state."""
    if "separate_opening" in config.lcu.peculiar:
        return SeparateOpening(*(_build_network(config, data, start) for start in base.start.split(1)))
    if config.watch.task == "feature":
        watch = _build_network(config, replace(data, comments=None), torch.zeros(1))
        return PredictedWatch(_build_network(config, data, base.start, more_dense=1), watch)
    return _build_network(config, data, base.start, watch=config.watch.task == "joint")


def _build_network(
    config: StaytimeConfig, data: StaytimeData, start: Tensor, *, more_dense: int = 0, watch: bool = False
) -> StaytimeNetwork:
    base, dim = config.base, config.input.dim
    fields_, n_dense = len(data.field_names), len(data.dense_names) + more_dense
    lcu = None if data.comments is None else _build_lcu(config.lcu, data.comments, fields_ + (n_dense > 0), dim)
    shape = BackboneShape(base.backbone, base.widths, base.depth, base.heads, base.dropout)
    return StaytimeNetwork(data.rows, fields_, n_dense, dim, shape, start, lcu, watch=watch)


def _build_lcu(
    lcu: LcuConfig, comments: StaytimeComments, tokens: int, dim: int
) -> CommentUnderstanding | ReleasedCommentUnderstanding:
    item_width, comment_width = (
        0 if texts is None else texts.vectors.shape[1] for texts in (comments.item_text, comments.comment_text)
    )
    if "bare_network" in lcu.peculiar:
        return ReleasedCommentUnderstanding(
            tokens,
            dim,
            comments=lcu.comments,
            item_width=item_width,
            comment_width=comment_width,
            heads=lcu.heads,
            hidden=lcu.hidden,
            dropout=lcu.dropout,
        )
    return CommentUnderstanding(
        dim,
        item_width=item_width,
        comment_width=comment_width,
        comment_rows=comments.id_rows if lcu.with_comment_ids else 0,
        heads=lcu.heads,
        hidden=lcu.hidden,
        dropout=lcu.dropout,
    )


def make_batch(
    data: StaytimeData, rows: np.ndarray, device: torch.device, hidden: np.ndarray | None = None
) -> tuple[StaytimeInputs, Labels]:
    """Return inputs and labels of some rows on a device; the rows ``hidden`` (``[n]`` bool) are of unknown videos."""
    comments, categories = data.comments, data.fields[rows].astype(np.int64)
    if hidden is not None and data.unknown_item is not None:
        column, unknown = data.unknown_item
        categories[hidden, column] = unknown
    if comments is None:
        # A network without LCU gets comment inputs of width 0.
        nothing = np.zeros((len(rows), 0), np.float32)
        chosen = np.zeros((len(rows), 0), np.int64)
        arrays = [nothing, chosen, nothing[..., None], chosen >= 0]
    else:
        chosen = comments.chosen[rows]
        item, comment = comments.item_text, comments.comment_text
        arrays = [
            np.zeros((len(rows), 0), np.float32) if item is None else item.gather(rows),
            np.where(chosen >= 0, comments.id_row[chosen], 0),
            np.zeros((*chosen.shape, 0), np.float32) if comment is None else comment.gather(chosen),
            chosen >= 0,
        ]

    def moved(array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array), device)

    inputs = StaytimeInputs(*map(moved, (categories, data.dense[rows], *arrays)))
    popular, touched = (None, None)
    if comments is not None:
        popular, touched = moved(comments.popular[chosen]), moved(comments.touched[rows])
    watch = None if data.watch is None else moved(data.watch.target[rows])
    return inputs, Labels(moved(data.seconds[rows]), moved(data.duration[rows]), popular, touched, watch)


def joint_loss(
    output: StaytimeOutput, base: BaseLoss, labels: Labels, present: Tensor, lcu: LcuConfig, watch_weight: float = 0.0
) -> dict[str, Tensor]:
    """Compute ``L = L_staytime + lambda1 L_R1 + lambda2 L_R2 + weight L_watch``.

    Each term is the mean over the rows that it applies to. R1 ranks the comments by popularity, in rows whose comments
    differ in popularity. R2 predicts which comments the user touched, in rows with a touched comment. The last one is
    the squared error of the standardised watch time, in rows where it is known.

    Returns:
        ``loss`` and its terms before weighting: ``staytime``, with LCU ``popular`` and ``touched``, and ``watch`` if it
        is predicted.
    """
    parts = {"staytime": base.loss(output.logits, labels.seconds, labels.duration).mean()}
    total = parts["staytime"]
    if output.popular is not None and output.touched is not None:
        assert labels.popular is not None and labels.touched is not None
        popular_loss = released_listmle if "softmax_listmle" in lcu.peculiar else listmle
        touched_loss = released_touched_bce if "softmax_touched" in lcu.peculiar else touched_bce
        parts["popular"] = mean_over(
            popular_loss(output.popular, labels.popular, present), ranked_rows(labels.popular, present)
        )
        parts["touched"] = mean_over(touched_loss(output.touched, labels.touched, present), labels.touched.any(1))
        weights = (lcu.lambda1, lcu.lambda2)
        popular, touched = reversed(weights) if "swapped_weights" in lcu.peculiar else weights
        total = total + popular * parts["popular"] + touched * parts["touched"]
    if output.watch is not None:
        assert labels.watch is not None
        known = ~labels.watch.isnan()
        # The unknown ones are replaced before the difference: the gradient of NaN would be NaN, also with weight 0.
        parts["watch"] = mean_over((output.watch - labels.watch.where(known, 0)).square(), known)
        total = total + watch_weight * parts["watch"]
    return {"loss": total, **parts}


def train(
    config: StaytimeConfig, data: StaytimeData, base: BaseLoss, network: nn.Module, device: torch.device, *, quiet: bool
) -> list[dict[str, float]]:
    """Train a network in place. Returns the mean losses of each epoch.

    The losses of a step are read when the next one is queued, so that the host does not wait for a GPU.

    Raises:
        UserError: the loss is not finite.
    """
    settings, generator = config.train, np.random.default_rng(config.run.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    steps_of_epoch = -(-len(data.training) // settings.batch_size)
    total, step = settings.epochs * steps_of_epoch, 0
    network.train()
    epochs, unread = list[dict[str, float]](), list[_QueuedStep]()

    def read() -> None:
        while unread:
            queued = unread.pop()
            losses = dict(zip(queued.names, queued.copies.numbers(), strict=True))
            if not np.isfinite(losses["loss"]):
                rate = f"train.learning_rate = {settings.learning_rate:g}"
                raise UserError(f"the loss of step {queued.step} is {losses['loss']}; lower {rate}")
            for name, loss in losses.items():
                epochs[queued.epoch][name] = epochs[queued.epoch].get(name, 0.0) + loss / steps_of_epoch
            progress.advance(queued.rows, f"loss {losses['loss']:.4f}")
            if (queued.step + 1) % steps_of_epoch == 0:
                record_scalars(epochs[queued.epoch], queued.epoch + 1)

    with Progress("train", settings.epochs * len(data.training), "rows", quiet=quiet) as progress:
        for epoch in range(settings.epochs):
            epochs.append({})
            for rows in _portions(generator.permutation(data.training), settings.batch_size):
                factor = learning_rate_factor(step, total, settings.warmup, settings.decay)
                for group in optimizer.param_groups:
                    group["lr"] = factor * settings.learning_rate
                hidden = None
                if data.unknown_item is not None:
                    # Teach the row of unknown videos what new videos are like, see input.hide_items.
                    hidden = generator.random(len(rows)) < config.input.hide_items
                inputs, labels = make_batch(data, rows, device, hidden)
                losses = joint_loss(network(inputs), base, labels, inputs.present, config.lcu, config.watch.weight)
                optimizer.zero_grad()
                losses["loss"].backward()
                optimizer.step()
                read()
                values = torch.stack(list(losses.values()))
                unread.append(_QueuedStep(epoch, step, len(rows), tuple(losses), HostCopy((values,))))
                step += 1
        read()
    return epochs


class _QueuedStep(NamedTuple):
    """Step whose losses are not read yet: the names of the losses, and their copies in one tensor."""

    epoch: int
    step: int
    rows: int
    names: tuple[str, ...]
    copies: HostCopy


@torch.no_grad()
def predict(
    config: StaytimeConfig,
    data: StaytimeData,
    base: BaseLoss,
    network: nn.Module,
    device: torch.device,
    rows: np.ndarray,
) -> StaytimePredictions:
    """Predict some rows, without dropout."""
    network.eval()
    parts: dict[str, list[Tensor]] = {field.name: [] for field in fields(StaytimePredictions)}

    def copies() -> Iterator[tuple[list[str], HostCopy]]:
        for portion in _portions(rows, ROWS_AT_ONCE):
            inputs, labels = make_batch(data, portion, device)
            output = network(inputs)
            seconds = base.seconds(output.logits, labels.duration).double()
            separate = "separate_opening" in config.lcu.peculiar
            found = {"seconds": seconds, "score": output.logits[:, 1].double() if separate else seconds}
            for name, scores in (("popular", output.popular), ("touched", output.touched), ("watch", output.watch)):
                if scores is not None:
                    found[name] = scores.float()
            yield list(found), HostCopy(found.values())

    for names, copied in one_behind(copies()):
        for name, values in zip(names, copied, strict=True):
            parts[name].append(values)
    return StaytimePredictions(**{name: torch.cat(part).numpy() if part else None for name, part in parts.items()})  # type: ignore[arg-type]


def _portions(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
