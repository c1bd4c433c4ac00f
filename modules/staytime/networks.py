"""Networks for the seconds that a user stays in the comment area of a video, with and without LCU's second stage.

A base is a backbone over the embeddings of fields. LCU adds further tokens to the fields, the text of the video and its
comments, mixes all of them by self-attention, and adds two heads that rank the comments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.choices import BackboneKind
from modules.staytime.backbones import build_backbone


@dataclass(frozen=True)
class StaytimeInputs:
    """Inputs of a batch.

    Attributes:
        fields: ``[batch, fields]`` int64, rows of the packed table, in which every field has its own range.
        dense: ``[batch, n_dense]`` float32.
        item_text: ``[batch, width]`` float32, embedding of the video's text; zeros if it has none.
        comment: ``[batch, comments]`` int64, rows of the table of comments; row 0 is for unknown comments.
        comment_text: ``[batch, comments, width]`` float32, embeddings of the comments' texts; zeros if there is none.
        present: ``[batch, comments]`` bool, False for padding.
    """

    fields: Tensor
    dense: Tensor
    item_text: Tensor
    comment: Tensor
    comment_text: Tensor
    present: Tensor


@dataclass(frozen=True)
class StaytimeOutput:
    """Outputs of a network for a batch.

    Attributes:
        logits: ``[batch, outputs]``, for the base loss.
        popular: ``[batch, comments]``, scores of the comments' popularity with all users; None without LCU.
        touched: ``[batch, comments]``, logits that this user touches each comment; None without LCU.
        watch: ``[batch]``, predicted watch time of the visit, in the units of its label; None without that task.
    """

    logits: Tensor
    popular: Tensor | None = None
    touched: Tensor | None = None
    watch: Tensor | None = None


@dataclass(frozen=True)
class BackboneShape:
    """Kind and sizes of a backbone: arguments of :func:`modules.staytime.backbones.build_backbone`."""

    kind: BackboneKind
    widths: Sequence[int]
    depth: int
    heads: int
    dropout: float


class StaytimeNetwork(nn.Module):
    """Staytime network: fields, optionally LCU, then a backbone and a linear layer for the base's logits.

    Args:
        rows: rows of the packed table.
        fields: number of fields.
        n_dense: number of dense features; if there are any, they form one more token together.
        dim: width of an embedding.
        backbone: kind and sizes of the feature interaction.
        start: ``[outputs]``, first logits: the last layer starts with these biases and with zero weights.
        lcu: comment part of LCU; None for the base alone.
        watch: True to predict the watch time of the visit as well, by one more linear layer on the backbone, which
            starts with zeros.
    """

    def __init__(
        self,
        rows: int,
        fields: int,
        n_dense: int,
        dim: int,
        backbone: BackboneShape,
        start: Tensor,
        lcu: CommentUnderstanding | ReleasedCommentUnderstanding | None = None,
        *,
        watch: bool = False,
    ) -> None:
        super().__init__()
        self.table = _table(rows, dim)
        self.dense = nn.Linear(n_dense, dim) if n_dense else None
        self.lcu = lcu
        tokens = fields + (n_dense > 0) + (lcu.tokens if lcu is not None else 0)
        self.backbone = build_backbone(
            backbone.kind,
            tokens,
            dim,
            widths=backbone.widths,
            depth=backbone.depth,
            heads=backbone.heads,
            dropout=backbone.dropout,
        )
        self.logits = nn.Linear(self.backbone.out_features, len(start))
        nn.init.zeros_(self.logits.weight)
        with torch.no_grad():
            self.logits.bias.copy_(start)
        self.watch = None
        if watch:
            self.watch = nn.Linear(self.backbone.out_features, 1)
            nn.init.zeros_(self.watch.weight)
            nn.init.zeros_(self.watch.bias)

    def forward(self, inputs: StaytimeInputs) -> StaytimeOutput:
        """Return the logits and, where they are asked for, the scores of the comments and the watch time."""
        tokens, popular, touched = self.table(inputs.fields), None, None
        if self.dense is not None:
            tokens = torch.cat([tokens, self.dense(inputs.dense)[:, None]], 1)
        if self.lcu is not None:
            tokens, popular, touched = self.lcu(tokens, inputs)
        hidden = self.backbone(tokens)
        watch = None if self.watch is None else self.watch(hidden)[:, 0]
        return StaytimeOutput(self.logits(hidden), popular, touched, watch)


class CommentUnderstanding(nn.Module):
    """Second stage of LCU: texts and comments as tokens, self-attention with the fields, and two heads.

    The backbone gets the fields, the video's text and the mean of the comments after attention. A head scores each
    comment separately, from its token and the mean of the fields. So no output depends on the order or the number of
    comments.

    Args:
        dim: width of a token.
        item_width: width of the video's embedding; 0 for none.
        comment_width: width of a comment's embedding; 0 for none.
        comment_rows: rows of the table of comment ids, row 0 included; 0 for none.
        heads: number of heads of the attention.
        hidden: hidden width of the two ranking heads.
        dropout: dropout in attention and ranking heads.

    Attributes:
        tokens: number of tokens that it adds to those of the fields.

    Raises:
        ValueError: comments have neither text nor id, or the number of heads does not divide the dimension.
    """

    def __init__(
        self,
        dim: int,
        *,
        item_width: int,
        comment_width: int,
        comment_rows: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not (comment_width or comment_rows):
            raise ValueError("comments need an embedding of their text or of their id")
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a dimension of {dim}")
        self.item_text = TextToken(item_width, dim) if item_width else None
        self.comment_text = TextToken(comment_width, dim) if comment_width else None
        self.comment_id = _table(comment_rows, dim) if comment_rows else None
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.popular = _scorer(2 * dim, hidden, dropout)
        self.touched = _scorer(2 * dim, hidden, dropout)
        self.tokens = 1 + (item_width > 0)

    def forward(self, fields: Tensor, inputs: StaytimeInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the tokens and score the comments.

        Args:
            fields: ``[batch, fields, dim]``.
            inputs: the batch.

        Returns:
            Tokens ``[batch, fields + tokens, dim]`` for the backbone; scores of popularity and logits of being touched,
            both ``[batch, comments]``.
        """
        comments = inputs.present.new_zeros((), dtype=fields.dtype)
        if self.comment_text is not None:
            comments = comments + self.comment_text(inputs.comment_text)
        if self.comment_id is not None:
            comments = comments + self.comment_id(inputs.comment)
        video = [self.item_text(inputs.item_text)[:, None]] if self.item_text is not None else []
        tokens = torch.cat([fields, *video, comments], 1)
        count = inputs.present.shape[1]
        absent = functional.pad(~inputs.present, (tokens.shape[1] - count, 0), value=False)
        normal = self.norm(tokens)
        tokens = tokens + self.attention(normal, normal, normal, key_padding_mask=absent, need_weights=False)[0]
        features, comments = tokens.split([tokens.shape[1] - count, count], 1)
        comments = comments * inputs.present[..., None]
        mean = comments.sum(1, keepdim=True) / inputs.present.sum(1).clamp(min=1)[:, None, None]
        context = features[:, : fields.shape[1]].mean(1, keepdim=True).expand_as(comments)
        scored = torch.cat([comments, context], 2)
        return torch.cat([features, mean], 1), self.popular(scored)[..., 0], self.touched(scored)[..., 0]


class ReleasedCommentUnderstanding(nn.Module):
    """Second stage of LCU as in its released code.

    A text embedding goes through one linear layer. The attention has no residual, no norm and no mask. All tokens,
    including every comment in its place, go to the backbone and, concatenated, to the two heads. Comment ids are not
    used.

    Args:
        fields: number of tokens before LCU's.
        dim: width of a token.
        item_width: width of the video's embedding.
        comment_width: width of a comment's embedding.
        comments: number of comments.
        heads: number of heads of the attention.
        hidden: width of the two hidden layers of each ranking head.
        dropout: dropout in the attention.

    Attributes:
        tokens: number of tokens that it adds to those of the fields.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        *,
        item_width: int,
        comment_width: int,
        comments: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.item_text, self.comment_text = nn.Linear(item_width, dim), nn.Linear(comment_width, dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.tokens = 1 + comments
        width = (fields + self.tokens) * dim
        self.popular, self.touched = (
            nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, comments)
            )
            for _ in range(2)
        )

    def forward(self, fields: Tensor, inputs: StaytimeInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`CommentUnderstanding.forward` returns, with all comments among the backbone's tokens."""
        video = self.item_text(inputs.item_text)[:, None]
        tokens = torch.cat([fields, video, self.comment_text(inputs.comment_text)], 1)
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return tokens, self.popular(tokens.flatten(1)), self.touched(tokens.flatten(1))


class SeparateOpening(nn.Module):
    """Two networks without shared weights, as in LCU's released code: odds of seconds, and odds of an opening.

    The scores of comments come from the first network, so their losses never train the second.
    """

    def __init__(self, staytime: nn.Module, opening: nn.Module) -> None:
        super().__init__()
        self.staytime, self.opening = staytime, opening

    def forward(self, inputs: StaytimeInputs) -> StaytimeOutput:
        """Return the two logits of weighted logistic regression and the first network's scores of comments."""
        staytime: StaytimeOutput = self.staytime(inputs)
        opening: StaytimeOutput = self.opening(inputs)
        return StaytimeOutput(torch.cat([staytime.logits, opening.logits], 1), staytime.popular, staytime.touched)


class PredictedWatch(nn.Module):
    """Two networks without shared weights: one predicts the watch time, the other one has it as one more dense input.

    Args:
        staytime: network with one dense feature more than the inputs have, the last.
        watch: network whose only logit is the watch time.
    """

    def __init__(self, staytime: nn.Module, watch: nn.Module) -> None:
        super().__init__()
        self.staytime, self.watch = staytime, watch

    def forward(self, inputs: StaytimeInputs) -> StaytimeOutput:
        """Return the first network's output, with the second one's watch time; no gradient flows between the two."""
        predicted: Tensor = self.watch(inputs).logits
        output: StaytimeOutput = self.staytime(replace(inputs, dense=torch.cat([inputs.dense, predicted.detach()], 1)))
        return replace(output, watch=predicted[:, 0])


class TextToken(nn.Module):
    """Token of a text embedding: normalised, since language models have single huge dimensions, then an MLP."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., dim]``."""
        token: Tensor = self.layers(x)
        return token


def _table(rows: int, dim: int) -> nn.Embedding:
    """Return an embedding table with small normal initial values."""
    table = nn.Embedding(rows, dim)
    nn.init.normal_(table.weight, std=0.05)
    return table


def _scorer(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Return an MLP that scores one comment."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))
