"""The job file of ``limelight staytime``: typed, frozen, checked before anything is read.

``python -m trainer.config.staytime`` prints every key.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from modules.staytime.backbones import BackboneKind
from modules.staytime.base_losses import BaseKind
from trainer.config.reference import reference
from trainer.config.sections import Positive, Rate, RunConfig, Section, Share

Peculiarity = Literal[
    "swapped_weights",
    "softmax_listmle",
    "softmax_touched",
    "separate_opening",
    "bare_network",
    "fit_on_all",
]

PECULIARITIES: tuple[Peculiarity, ...] = get_args(Peculiarity)


class DataConfig(Section):
    """Which visits are trained on and which are held out. Times are ISO dates or times, in the dataset's time zone."""

    path: str = Field(..., description="Dataset directory with `texts/visits.parquet`.", min_length=1)
    train_from: str = Field("", description="First request of training. Empty: the dataset's first.")
    train_until: str = Field(
        "", description="End of training: only visits whose comment area was left before it. Empty: `eval_from`."
    )
    eval_from: str = Field(..., description="First request of the held-out range.", min_length=1)
    eval_until: str = Field("", description="End of the held-out range. Empty: the dataset's end.")


class InputConfig(Section):
    """What is known of user and video."""

    dim: Positive = Field(16, description="Width of an embedding.")
    min_count: Positive = Field(
        3, description="Ids of fewer training rows than this share the row of unknown ids: those of users, items, ..."
    )
    hide_items: Share = Field(
        0.25,
        description="Share of the training rows whose video is taken as an unknown one. That row of the table then "
        "learns what new videos are like; it would know only unpopular old ones otherwise.",
    )
    exclude: tuple[str, ...] = Field(
        (),
        description="Features that the model must not see: names of side or dense features, `user_id`, `item_id` or "
        "`author_id`.",
    )


class BaseConfig(Section):
    """The base model: what the logits say, and the backbone that makes them."""

    loss: BaseKind = Field(
        "wlr",
        description="`vr` value regression, `wlr` weighted logistic regression, `d2q` quantiles of duration groups, "
        "`ndt` normalised dwell time, `pcr` share of the duration, `tpm` tree of ranges.",
    )
    backbone: BackboneKind = Field("dcn", description="Feature interaction.")
    widths: tuple[Positive, ...] = Field((64, 64), description="Hidden layers of the MLP.", min_length=1)
    depth: Positive = Field(2, description="Cross layers of DCN, attention layers of AutoInt.")
    heads: Positive = Field(2, description="Heads of AutoInt.")
    dropout: Share = Field(0.0, description="Dropout in the backbone.")
    duration_groups: Positive = Field(10, description="`d2q`: quantile groups of the videos' duration.")
    leaves: int = Field(16, description="`tpm`: ranges of seconds, that of no stay included.", ge=2)


class LcuConfig(Section):
    """LCU's second stage on top of the base: texts, comments, and two tasks of ranking them."""

    enabled: bool = Field(True, description="False trains the base alone.")
    mode: Literal["corrected", "released"] = Field(
        "corrected",
        description="`released` has all peculiarities of the paper's released code, in the metrics too; it is for "
        "base.loss = 'wlr'.",
    )
    peculiarities: tuple[Peculiarity, ...] = Field(
        (),
        description="Single ones of the released code. `swapped_weights`: lambda1 is the weight of the user's own "
        "comments and lambda2 of the popular ones. `softmax_listmle`, `softmax_touched`: that loss after a softmax. "
        "`separate_opening`: a second network learns the opening and gives the ranking. `bare_network`: attention "
        "without residual, norm and mask, comments by place, no comment ids. `fit_on_all`: the base is fitted on held-"
        "out rows too.",
    )
    lambda1: float = Field(0.01, description="Weight of ranking comments by popularity (ListMLE).", ge=0)
    lambda2: float = Field(0.3, description="Weight of telling which comments this user touches.", ge=0)
    item_embeddings: str = Field("", description="Embedding table of the videos' texts. Empty: none.")
    comment_embeddings: str = Field("", description="Embedding table of the comments' texts. Empty: none.")
    comment_ids: bool | None = Field(
        None,
        description="Comments have an embedding of their id. Unset: where they have none of their text; beside one, it "
        "learns the popularity of training's comments by heart.",
    )
    comments: Positive = Field(6, description="Comments of a row; fewer are padded and masked.")
    candidates: Literal["known", "touched"] = Field(
        "known",
        description="Which comments. `known`: what the user touched here before, then the most popular, all as of the "
        "request. `touched`: those that are touched in this very visit come first, which tells the outcome.",
    )
    heads: Positive = Field(4, description="Heads of the attention over all tokens.")
    hidden: Positive = Field(32, description="Hidden width of the heads that rank comments.")
    dropout: Share = Field(0.0, description="Dropout in attention and heads.")

    @property
    def with_comment_ids(self) -> bool:
        """Whether a comment has an embedding of its id."""
        return not self.comment_embeddings if self.comment_ids is None else self.comment_ids

    @property
    def peculiar(self) -> frozenset[Peculiarity]:
        """The peculiarities that hold."""
        return frozenset(PECULIARITIES if self.mode == "released" else self.peculiarities)


class TrainConfig(Section):
    """The loop: AdamW, dense and embeddings alike."""

    batch_size: Positive = Field(1024, description="Rows of an optimizer step.")
    epochs: Positive = Field(2, description="Passes over the training range.")
    learning_rate: Rate = Field(1e-3, description="Peak learning rate.")
    weight_decay: float = Field(0.0, description="Decoupled weight decay.", ge=0)
    warmup: Share = Field(0.05, description="Share of all steps over which the learning rate rises from 0.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How it goes on; all but constant to 0."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes the GPU if there is one.")


class StaytimeConfig(Section):
    """One job of ``limelight staytime``."""

    run: RunConfig = Field(default_factory=lambda: RunConfig(name="staytime"))
    data: DataConfig
    input: InputConfig = Field(default_factory=InputConfig)
    base: BaseConfig = Field(default_factory=BaseConfig)
    lcu: LcuConfig = Field(default_factory=LcuConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

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
            raise ValueError("comments need lcu.comment_embeddings or lcu.comment_ids = true, to be told apart")
        elif "bare_network" in lcu.peculiar and not (lcu.item_embeddings and lcu.comment_embeddings):
            raise ValueError(
                "`bare_network` needs lcu.item_embeddings and lcu.comment_embeddings: it knows no comment ids"
            )
        if "separate_opening" in lcu.peculiar and base.loss != "wlr":
            raise ValueError("`separate_opening`, and so lcu.mode = 'released', is for base.loss = 'wlr'")
        return self


if __name__ == "__main__":
    print(reference(StaytimeConfig))
