"""Which features the model sees and how ids become table rows: the ``[features]`` section of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modules.embeddings import Dynamic, Evict
from trainer.config.sections import MAY_CHANGE

IdMapping = Literal["direct", "hash", "lookup", "dynamic"]

MAX_TABLE_ROWS = 1 << 31
"""Hashing spreads 32 bits of a hash over the rows, which is even enough up to here."""


class TableConfig(BaseModel):
    """One embedding table of ids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ids: IdMapping = Field(
        "direct",
        description="How an id becomes a row; row 0 is the unknown id. `direct`: id + 1. `hash`: a 64-bit mix of the "
        "id spread over the rows. `lookup`: the ids of the training range get rows of their own, all others row 0. "
        "`dynamic`: ids get rows while training and lose them to others; those without read row 0. On a CPU only.",
    )
    rows: int | None = Field(
        None,
        ge=2,
        le=MAX_TABLE_ROWS,
        description="Rows of the table, row 0 included. `hash` and `dynamic` need it; `direct` takes the dataset's "
        "largest id + 2 when it is left out; `lookup` counts its ids and does not take it.",
    )
    min_count: int = Field(
        1,
        ge=1,
        description="`lookup` only: ids of fewer training rows than this share row 0, which is thereby trained for "
        "the ids that come later.",
    )
    admit_after: int | None = Field(
        None,
        ge=1,
        description="`dynamic` only: training steps that an id must be seen in before it gets a row; 2 when it is "
        "left out. Until then it is counted, together with at most as many others as there are rows.",
    )
    evict: Evict | None = Field(
        None,
        description="`dynamic` only: which id makes room for a new one. `recency`: the one seen longest ago; this when "
        "it is left out. `frequency`: the one seen in the fewest steps, unless the new one was in fewer. `both`: by "
        "steps seen over steps since.",
    )
    dim: int = Field(16, ge=1, description="Width of an embedding. Every distinct width costs its own exchange.")
    init: Literal["uniform", "normal", "zeros"] = Field("uniform", description="Distribution of the first values.")
    init_scale: float | None = Field(None, gt=0, description="Half-width or deviation of `init`; 0.1 / sqrt(dim).")
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = Field(
        "auto",
        description="How the table is spread over the ranks; `auto` leaves it to the planner.",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def dynamic(self) -> Dynamic | None:
        """How its ids come and go; None where they do not."""
        if self.ids != "dynamic":
            return None
        return Dynamic(self.admit_after or 2, self.evict or "recency")

    @model_validator(mode="after")
    def _rows_fit_mapping(self) -> TableConfig:
        if self.ids in ("hash", "dynamic") and self.rows is None:
            raise ValueError(f"ids = {self.ids!r} needs `rows`")
        if self.ids == "lookup" and self.rows is not None:
            raise ValueError("ids = 'lookup' counts its own rows: leave `rows` out")
        if self.ids != "lookup" and self.min_count != 1:
            raise ValueError(f"`min_count` is for ids = 'lookup', not {self.ids!r}")
        if self.ids != "dynamic" and (self.admit_after, self.evict) != (None, None):
            raise ValueError(f"`admit_after` and `evict` are for ids = 'dynamic', not {self.ids!r}")
        if self.ids == "dynamic" and self.sharding in ("column_wise", "data_parallel"):
            raise ValueError(f"ids = 'dynamic' works with sharding = 'table_wise' or 'row_wise', not {self.sharding!r}")
        return self


class SideTableConfig(BaseModel):
    """The one table of all categorical side features and of the histories' contexts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(16, ge=1, description="Width of an embedding. Every distinct width costs its own exchange.")
    init: Literal["uniform", "normal", "zeros"] = Field("uniform", description="Distribution of the first values.")
    init_scale: float | None = Field(None, gt=0, description="Half-width or deviation of `init`; 0.1 / sqrt(dim).")
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = Field(
        "auto",
        description="How the table is spread over the ranks; `auto` leaves it to the planner.",
        json_schema_extra=MAY_CHANGE,
    )


class HistoryConfig(BaseModel):
    """One sequence of a user's past visits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: Literal["video", "live", "both"] = Field(
        description="Visits of this domain; `both` is for the latest of both, in order of time."
    )
    search: Literal["latest", "top", "author"] = Field(
        "latest",
        description="Which of the user's last 10,000 visits, of those known when the request came. `latest`: the "
        "latest. `top`: those with the largest dot product with the candidate, see `features.search`. `author`: the "
        "latest of the candidate's author.",
    )
    length: int = Field(50, ge=1, le=10_000, description="At most so many.")
    require: tuple[str, ...] = Field(
        (),
        description="`latest` only: keep visits with at least one of these behaviours; empty keeps all that were "
        "watched.",
    )

    @model_validator(mode="after")
    def _fits_search(self) -> HistoryConfig:
        if self.search != "latest" and self.domain == "both":
            raise ValueError(f'search = "{self.search}" looks in one domain: declare a history for each of the two')
        if self.search != "latest" and self.require:
            raise ValueError(f'`require` is for search = "latest", not "{self.search}"')
        return self


class SearchConfig(BaseModel):
    """The space in which histories with ``search = "top"`` are compared with the candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: tuple[Literal["item", "author"], ...] = Field(
        ("item", "author"),
        min_length=1,
        description="The score is the sum of the dot products of these tables' embeddings. Live rooms are new, their "
        "authors are not.",
    )
    refresh_steps: int = Field(
        1000,
        ge=0,
        description="The search uses copies of the tables, taken every so many steps and used from so many steps later "
        "on, so that batches can be made ahead; 0 keeps the first space.",
    )
    dtype: Literal["float16", "int8"] = Field("float16", description="Type of the copies.")
    embedding: str = Field(
        "",
        description="Directory of content embeddings of items, as `limelight embed` makes it: the first space. Without "
        "it the tables' first values are, in which equal ids are near each other and others at random.",
    )

    @model_validator(mode="after")
    def _each_table_once(self) -> SearchConfig:
        if len(set(self.tables)) < len(self.tables):
            raise ValueError("`tables` names one twice")
        return self


class FeatureConfig(BaseModel):
    """Inputs of the ranker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: TableConfig = Field(TableConfig(), description="Table of user ids.")
    author: TableConfig = Field(TableConfig(), description="Table of author ids, of candidates and of histories.")
    item: TableConfig = Field(TableConfig(), description="Table of videos and rooms, of candidates and of histories.")
    side: SideTableConfig = Field(SideTableConfig(), description="Packed table of side features.")
    history: dict[str, HistoryConfig] = Field(
        {"short": HistoryConfig(domain="video"), "live": HistoryConfig(domain="live")},
        description="Histories by name; each becomes one sequence for target attention.",
    )
    tags: bool = Field(
        False,
        description="Visits of a history carry their item's tag, embedded as the candidate's; see `data describe`.",
    )
    author_side: tuple[str, ...] = Field(
        (),
        description="Side features of authors that visits of a history carry, embedded as the candidate's. Their "
        "values are those of the dataset's table of authors when training began.",
    )
    search: SearchConfig = Field(SearchConfig(), description='The space of histories with `search = "top"`.')
    rates: tuple[str, ...] = Field((), description="Behaviours whose rates are inputs. Empty: all of the dataset.")
    smoothing: float = Field(
        10.0,
        gt=0,
        description="A rate is drawn towards the overall rate p as by `smoothing / (2 sqrt(p (1 - p)))` more rows: the "
        "rarer a behaviour, the less a row says about it.",
    )
    clip: float = Field(
        6.0, gt=0, description="Dense inputs are standardised on the training range and cut at so many deviations."
    )
    exclude: tuple[str, ...] = Field(
        (),
        description="Features of the dataset that the model must not see: names of side or dense features, `user_id`, "
        "or a statistic as `stat:user`, `stat:user*author`; `stat:*` means all of them.",
    )

    @model_validator(mode="after")
    def _search_tables_have_rows(self) -> FeatureConfig:
        for name in self.search.tables:
            if self.needs_space and getattr(self, name).ids == "dynamic":
                raise ValueError(
                    f'histories with search = "top" look for rows of `{name}`, and with ids = "dynamic" ids change '
                    "theirs; map its ids otherwise, or leave it out of `search.tables`"
                )
        return self

    @property
    def needs_space(self) -> bool:
        """Whether a history searches by dot product."""
        return any(history.search == "top" for history in self.history.values())
