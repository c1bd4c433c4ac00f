"""Schema of a ``limelight staytime`` job file. ``limelight config staytime`` prints its reference."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from modules.choices import BackboneKind, BaseKind
from trainer.config.paths import InputFile
from trainer.config.sections import Decay, Device, Positive, Rate, RunConfig, Section, Share

Peculiarity = Literal[
    "swapped_weights",
    "softmax_listmle",
    "softmax_touched",
    "separate_opening",
    "bare_network",
    "fit_on_all",
]

WatchTask = Literal["none", "joint", "feature"]

PECULIARITIES: tuple[Peculiarity, ...] = get_args(Peculiarity)


class StaytimeDataConfig(Section):
    """The visits to train and to evaluate on. Times are ISO dates or times, in the dataset's time zone."""

    path: InputFile = Field(..., description="Dataset directory with `texts/visits.parquet`.", min_length=1)
    train_from: str = Field("", description="First request of training. Empty: the dataset's first.")
    train_until: str = Field(
        "", description="End of training: only visits whose comment area was left before it. Empty: `eval_from`."
    )
    eval_from: str = Field(..., description="First request of the held-out range.", min_length=1)
    eval_until: str = Field("", description="End of the held-out range. Empty: the dataset's end.")


class InputConfig(Section):
    """Features of user and video."""

    dim: Positive = Field(16, description="Embedding dimension.")
    min_count: Positive = Field(
        3,
        description="Minimum number of training rows for an id (user, video, author, comment) to get its own "
        "embedding; rarer ids share the row of unknown ids.",
    )
    hide_items: Share = Field(
        0.25,
        description="Share of the training rows in which the video's id is replaced by the unknown id. It teaches the "
        "unknown row what new videos are like; without it, the row would only learn from unpopular old videos.",
    )
    duration: bool = Field(
        False,
        description="Add the logarithm of the video's duration, the dense feature `log_video_seconds`. Some datasets "
        "have the duration among their features already.",
    )
    past_watch: int = Field(
        0,
        description="Number of the user's latest visits whose watch times are described by dense features "
        "(`trainer/comment_staytime/watch_times.py`); only visits that ended before the request count. 0: none.",
        ge=0,
    )
    exclude: tuple[str, ...] = Field(
        (),
        description="Features to leave out: names of side or dense features, `user_id`, `item_id` or `author_id`.",
    )


class BaseConfig(Section):
    """The base model: its loss, which defines the meaning of the logits, and the backbone that computes them."""

    loss: BaseKind = Field(
        "wlr",
        description="`vr` value regression, `wlr` weighted logistic regression, `d2q` quantiles within groups of "
        "similar duration, `ndt` normalised dwell time, `pcr` share of the duration, `tpm` tree of ranges.",
    )
    backbone: BackboneKind = Field("dcn", description="Feature-interaction network.")
    widths: tuple[Positive, ...] = Field((64, 64), description="Hidden widths of the MLP.", min_length=1)
    depth: Positive = Field(2, description="Number of cross layers (DCN) or attention layers (AutoInt).")
    heads: Positive = Field(2, description="Attention heads of AutoInt.")
    dropout: Share = Field(0.0, description="Dropout in the backbone.")
    duration_groups: Positive = Field(10, description="`d2q` only: number of quantile groups of video duration.")
    leaves: int = Field(
        16, description="`tpm` only: number of ranges of seconds, including the range of no stay.", ge=2
    )


class WatchConfig(Section):
    """Prediction of the visit's own watch time, which is known only after the visit, so it is a label and no input."""

    task: WatchTask = Field(
        "none",
        description="`joint`: one more output of the network learns it. `feature`: a second network learns it from the "
        "same features, and its prediction is an input of the first; no gradient flows back. The first pass predicts "
        "every training row before it learns it; later passes do not, so use one epoch.",
    )
    weight: float = Field(
        0.1,
        description="Weight of its loss: squared error of `log(1 + seconds)` in units of the variance in training. "
        "With `feature` it only scales the gradient of the second network.",
        ge=0,
    )


class LcuConfig(Section):
    """LCU, the second stage on top of the base model: texts, comments, and two comment-ranking tasks."""

    enabled: bool = Field(True, description="Train with LCU; false trains the base model alone.")
    mode: Literal["corrected", "released"] = Field(
        "corrected",
        description="`released` reproduces all peculiarities of the paper's released code, including its metrics. It "
        "needs base.loss = 'wlr'.",
    )
    peculiarities: tuple[Peculiarity, ...] = Field(
        (),
        description="Single peculiarities of the released code to reproduce. `swapped_weights`: lambda1 weights the "
        "user's own comments and lambda2 the popular ones. `softmax_listmle`, `softmax_touched`: that loss is computed "
        "after a softmax. `separate_opening`: a second network learns the opening and provides the ranking score. "
        "`bare_network`: attention without residual, norm and mask; comments are told apart by position, without "
        "comment ids. `fit_on_all`: the base loss is fitted on held-out rows too.",
    )
    lambda1: float = Field(
        0.01, description="Weight of the popularity task: rank comments by popularity (ListMLE).", ge=0
    )
    lambda2: float = Field(
        0.3, description="Weight of the interaction task: predict which comments the user interacts with.", ge=0
    )
    item_embeddings: InputFile = Field("", description="Table of text embeddings of the videos. Empty: none.")
    comment_embeddings: InputFile = Field("", description="Table of text embeddings of the comments. Empty: none.")
    comment_ids: bool | None = Field(
        None,
        description="Give each comment an embedding of its id. Unset: only if there are no text embeddings of "
        "comments. With both, the id embedding memorises the popularity of the training comments.",
    )
    comments: Positive = Field(6, description="Comments of a row. Shorter lists are padded and masked.")
    candidates: Literal["known", "touched"] = Field(
        "known",
        description="Selection of a row's comments. `known`: comments of the video that the user interacted with in "
        "earlier visits, then the most popular ones, all as of the request. `touched`: comments that the user "
        "interacts with in this very visit come first, which leaks the label.",
    )
    heads: Positive = Field(4, description="Attention heads over all tokens.")
    hidden: Positive = Field(32, description="Hidden width of the two comment-ranking heads.")
    dropout: Share = Field(0.0, description="Dropout in attention and ranking heads.")

    @property
    def with_comment_ids(self) -> bool:
        """True if a comment has an embedding of its id."""
        return not self.comment_embeddings if self.comment_ids is None else self.comment_ids

    @property
    def peculiar(self) -> frozenset[Peculiarity]:
        """Peculiarities of the released code that are active."""
        return frozenset(PECULIARITIES if self.mode == "released" else self.peculiarities)


class StaytimeTrainConfig(Section):
    """The training loop: AdamW on dense weights and embeddings alike."""

    batch_size: Positive = Field(1024, description="Rows of an optimizer step.")
    epochs: Positive = Field(2, description="Passes over the training range.")
    learning_rate: Rate = Field(1e-3, description="Peak learning rate.")
    weight_decay: float = Field(0.0, description="Decoupled weight decay.", ge=0)
    warmup: Share = Field(0.05, description="Share of all steps over which the learning rate rises from 0.")
    decay: Decay = Field("cosine", description="Schedule after the warm-up; `linear` and `cosine` end at 0.")
    device: Device = "auto"


class StaytimeConfig(Section):
    """A ``limelight staytime`` job."""

    run: RunConfig = Field(default_factory=lambda: RunConfig(name="staytime"))
    data: StaytimeDataConfig
    input: InputConfig = Field(default_factory=InputConfig)
    base: BaseConfig = Field(default_factory=BaseConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)
    lcu: LcuConfig = Field(default_factory=LcuConfig)
    train: StaytimeTrainConfig = Field(default_factory=StaytimeTrainConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> StaytimeConfig:
        lcu, base = self.lcu, self.base
        if base.backbone == "autoint" and self.input.dim % base.heads:
            raise ValueError(f"base.heads = {base.heads} must divide input.dim = {self.input.dim}")
        if not lcu.enabled:
            if lcu.peculiar - {"fit_on_all", "separate_opening"}:
                raise ValueError("peculiarities of LCU need lcu.enabled = true")
        elif self.input.dim % lcu.heads:
            raise ValueError(f"lcu.heads = {lcu.heads} must divide input.dim = {self.input.dim}")
        elif not (lcu.with_comment_ids or lcu.comment_embeddings):
            raise ValueError("LCU cannot tell comments apart: set lcu.comment_embeddings or lcu.comment_ids = true")
        elif "bare_network" in lcu.peculiar and not (lcu.item_embeddings and lcu.comment_embeddings):
            raise ValueError(
                "`bare_network` needs lcu.item_embeddings and lcu.comment_embeddings, because it has no comment ids"
            )
        if "separate_opening" in lcu.peculiar and base.loss != "wlr":
            raise ValueError("`separate_opening` and lcu.mode = 'released' need base.loss = 'wlr'")
        if "separate_opening" in lcu.peculiar and self.watch.task != "none":
            raise ValueError("`separate_opening` and lcu.mode = 'released' need watch.task = 'none'")
        return self
