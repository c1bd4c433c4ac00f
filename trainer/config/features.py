"""Settings of the features and of the embedding tables: the ``[features]`` section of a job."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modules.choices import Dynamic, Evict
from trainer.config.paths import InputFile, StoreInput
from trainer.config.sections import MAY_CHANGE

IdMapping = Literal["direct", "hash", "lookup", "dynamic"]

MAX_TABLE_ROWS = 1 << 31
"""Largest number of rows of a table: hashing maps 32 bits to the rows, which is even enough up to this size."""


class EmbeddingTableConfig(BaseModel):
    """Keys of every embedding table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(
        16,
        ge=4,
        multiple_of=4,
        description="Dimension of an embedding, a multiple of 4: fbgemm reads rows in vectors of four floats. Each "
        "distinct dimension needs its own all-to-all.",
    )
    init: Literal["uniform", "normal", "zeros"] = Field("uniform", description="Distribution of the initial values.")
    init_scale: float | None = Field(
        None,
        gt=0,
        description="Half-width of a uniform `init`, or standard deviation of a normal one. Default: 0.1 / sqrt(dim).",
    )
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = Field(
        "auto",
        description="Sharding of the table over the ranks; `auto` leaves the choice to the planner.",
        json_schema_extra=MAY_CHANGE,
    )


class TableConfig(EmbeddingTableConfig):
    """Embedding table of one kind of id."""

    ids: IdMapping = Field(
        "direct",
        description="Mapping from ids to rows; row 0 is the unknown id. `direct`: the row is id + 1; later "
        "ids beyond the table share row 0. `hash`: the row is a hash of the id. `lookup`: each id of "
        "the training range gets a row, all others share row 0. `dynamic`: ids get rows during training and can "
        "lose them to other ids; ids without a row share row 0.",
    )
    rows: int | None = Field(
        None,
        ge=2,
        le=MAX_TABLE_ROWS,
        description="Number of rows of the table, including row 0. `hash` and `dynamic` need it. The default for "
        "`direct` is the largest id of the dataset + 2. `lookup` counts its ids and does not accept it.",
    )
    min_count: int = Field(
        1,
        ge=1,
        description="`lookup` only: ids with fewer training rows than this share row 0. So row 0 is trained, which "
        "helps for ids that appear later.",
    )
    admit_after: int | None = Field(
        None,
        ge=1,
        description="`dynamic` only: number of training steps in which an id must occur before it gets a row. Default: "
        "2. Until then the id is only counted; at most as many ids are counted as the table has rows.",
    )
    evict: Evict | None = Field(
        None,
        description="`dynamic` only: the id that is evicted for a new one if the table is full. `recency` (the "
        "default): the id seen longest ago. `frequency`: the id seen in the fewest steps, unless the new one was seen "
        "in fewer. `both`: the id with the lowest ratio of steps in which it was seen to steps since then.",
    )

    @property
    def dynamic(self) -> Dynamic | None:
        """Rules of admission and eviction; None if the ids of the table are not dynamic."""
        if self.ids != "dynamic":
            return None
        return Dynamic(self.admit_after or 2, self.evict or "recency")

    @model_validator(mode="after")
    def _rows_fit_mapping(self) -> TableConfig:
        """Check that the keys of the table fit its mapping of ids."""
        if self.ids in ("hash", "dynamic") and self.rows is None:
            raise ValueError(f"ids = {self.ids!r} needs `rows`")
        if self.ids == "lookup" and self.rows is not None:
            raise ValueError("ids = 'lookup' counts its rows itself; remove `rows`")
        if self.ids != "lookup" and self.min_count != 1:
            raise ValueError(f"`min_count` works only with ids = 'lookup', not {self.ids!r}")
        if self.ids != "dynamic" and (self.admit_after, self.evict) != (None, None):
            raise ValueError(f"`admit_after` and `evict` work only with ids = 'dynamic', not {self.ids!r}")
        if self.ids == "dynamic" and self.sharding in ("column_wise", "data_parallel"):
            raise ValueError(f"ids = 'dynamic' works with sharding = 'table_wise' or 'row_wise', not {self.sharding!r}")
        return self


class SideTableConfig(EmbeddingTableConfig):
    """Embedding table that all categorical side features and the contexts of histories share."""


class HistoryConfig(BaseModel):
    """One history: a sequence of a user's past visits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: Literal["video", "live", "both"] = Field(
        description="Domain of the visits. `both`: the latest visits of both domains, in order of time."
    )
    search: Literal["latest", "top", "author"] = Field(
        "latest",
        description="Selection among the user's last 10,000 visits that were known at the request. `latest`: the "
        "latest visits. `top`: the visits with the largest dot product with the candidate, see `features.search`. "
        "`author`: the latest visits to the candidate's author.",
    )
    length: int = Field(50, ge=1, le=10_000, description="Largest number of visits.")
    require: tuple[str, ...] = Field(
        (),
        description="`latest` only: use only visits with at least one of these behaviours. Empty: use all visits that "
        "were watched.",
    )

    @model_validator(mode="after")
    def _fits_search(self) -> HistoryConfig:
        """Check that domain and required behaviours fit the search."""
        if self.search != "latest" and self.domain == "both":
            raise ValueError(f'search = "{self.search}" searches one domain; declare one history for each domain')
        if self.search != "latest" and self.require:
            raise ValueError(f'`require` works only with search = "latest", not "{self.search}"')
        return self


class PastConfig(BaseModel):
    """Counts of the user's past visits and of their behaviours, as numbers of a row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: Literal["video", "live", "both"] = Field("both", description="Domain of the visits that count.")
    same: Literal["any", "author", "item", "tag"] = Field(
        "any",
        description="What a visit must share with the candidate to count: its author, its item, the tag of its item, "
        "or nothing (`any`). The last 10,000 visits of the user that ended before the request are looked at.",
    )
    half_life_minutes: float = Field(
        0.0,
        ge=0,
        description="Minutes after the end of a visit in which its weight falls by half. 0: all visits count alike.",
    )


class SearchConfig(BaseModel):
    """Search vectors with which histories with ``search = "top"`` are compared with the candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: tuple[Literal["item", "author"], ...] = Field(
        ("item", "author"),
        min_length=1,
        description="The score of a visit is the sum of the dot products of these tables' embeddings. Live rooms are "
        "new at the request, so their items say little, but their authors are known.",
    )
    refresh_steps: int = Field(
        1000,
        ge=0,
        description="Training steps between two copies of the tables for the search. A copy comes into use one such "
        "interval after it was taken, so that batches can be made ahead. 0: keep the first search vectors.",
    )
    dtype: Literal["float16", "int8"] = Field("float16", description="Data type of the copies.")
    embedding: InputFile = Field(
        "",
        description="Directory of content embeddings of items, made by `limelight embed`, to use as the first search "
        "vectors. Empty: the initial values of the tables, in which equal ids match and other ids are random.",
    )

    device: Literal["cpu", "device", "auto"] = Field(
        "cpu",
        description="Where training, and the evaluation after it, make the searches of all histories (of a stream, "
        "those by dot product only), if one of them searches by dot product. `cpu`: in the loader's processes. "
        "`device`: on the device of `train.device`, whose memory then holds the histories of the rank's users and the "
        "search vectors; on a CPU with PyTorch's operations, which only tests need. `auto`: on a GPU if the job "
        "allows it and half of the free memory is enough, else `cpu`. All find the same visits.",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _each_table_once(self) -> SearchConfig:
        """Check that no table is listed twice."""
        if len(set(self.tables)) < len(self.tables):
            raise ValueError("`tables` names a table twice; each one may be listed once")
        return self


class CodesConfig(EmbeddingTableConfig):
    """Codes of segments as features: what a room shows, as a code of a codebook version, with learnable tables."""

    file: InputFile = Field(
        ...,
        min_length=1,
        description="Code file that `limelight quantize assign` wrote. The model keeps the name of its codebook "
        "version, and refuses codes of another one.",
        json_schema_extra=MAY_CHANGE,
    )
    store: StoreInput = Field(
        "",
        description="Store of recent codes of the same version, for requests that are later than the last segment of "
        "`file`: an SQLite file, or `redis://HOST:PORT/NUMBER`. Only candidates read it. Its address has no password, "
        "since a run keeps its settings.",
        json_schema_extra=MAY_CHANGE,
    )
    levels: int | None = Field(
        None, ge=1, description="Number of levels of the codes to use, from the first on. Default: all of the file."
    )
    tables: Literal["levels", "prefixes", "both"] = Field(
        "both",
        description="Tables of embeddings. `levels`: one for each level, with a row for each of its codes. `prefixes`: "
        "one for each number of first levels, with a row for each tuple of their codes. Row 0 of each table is the row "
        "of no code.",
    )
    prefix_rows: int = Field(
        100_000,
        ge=2,
        le=MAX_TABLE_ROWS,
        description="Largest number of rows of a table of prefixes, including row 0. If there are more tuples, they "
        "are hashed to the rows.",
    )
    history: Literal["none", "entry", "longest"] = Field(
        "entry",
        description="Codes of the visits of all histories. `entry`: of the segment on air when the user entered the "
        "room. `longest`: of the segment that the user watched longest. `none`: only the candidate has codes, those of "
        "the latest segment of its author. Only segments that were known at the request count.",
    )

    @model_validator(mode="after")
    def _store_has_no_password(self) -> CodesConfig:
        """Check that the address of the store may be kept in a run."""
        if "://" in self.store and "@" in self.store:
            raise ValueError("`store` has a user or a password, which a run would keep; use an address without them")
        return self


class ContentConfig(BaseModel):
    """One table of pre-trained vectors as an input of the ranker. The table is not trained; a learnt layer reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: InputFile = Field(
        ...,
        min_length=1,
        description="Directory of the vectors, as `limelight embed`, `limelight data simulate --segment-vectors` and "
        "the importers write it. It is memory-mapped, so it must be local. A table inside of `data.path` is looked for "
        "in the other dataset where `--data` names one.",
        json_schema_extra=MAY_CHANGE,
    )
    of: Literal["item", "author", "segment"] = Field(
        "item",
        description="Owners of the vectors. `item`, `author`: the vector of the candidate, or of its author. "
        "`segment`: vectors of the segments of live rooms that were known at the request, see `reading` and `on_air`.",
    )
    dim: int = Field(16, ge=1, description="Width of the learnt projection of a vector.")
    histories: bool = Field(
        False,
        description="Add the vector to the entries of all histories, too: that of the visit's item or author, or that "
        "of the segment that was on air while the user watched.",
    )
    reading: Literal["latest", "mean"] = Field(
        "latest",
        description='`of = "segment"` only: the vector of a candidate is that of the latest segment of its author '
        "(`latest`), or the mean over all segments of the author (`mean`), of those known at the request.",
    )
    on_air: Literal["entry", "longest"] = Field(
        "entry",
        description='`of = "segment"` with `histories` only: the segment of the room that was on air when the user '
        "entered (`entry`), or the one that the user watched longest (`longest`). Segments that were not known at the "
        "request do not count.",
    )

    @model_validator(mode="after")
    def _fits_owner(self) -> ContentConfig:
        """Check that the keys of segments are used with segments only."""
        if self.of != "segment" and self.reading != "latest":
            raise ValueError(f'`reading` works only with of = "segment", not "{self.of}"')
        if self.on_air != "entry" and not (self.of == "segment" and self.histories):
            raise ValueError('`on_air` works only with of = "segment" and histories = true')
        return self


CONTENT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""Names of content vectors: they are a part of the names of the network's parameters."""

_LOOKUPS = ("user", "author", "item", "side")
_ENTRY_LOOKUPS = ("item", "author", "context")


class FeatureConfig(BaseModel):
    """Features of the ranker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: TableConfig = Field(TableConfig(), description="Embedding table of user ids.")
    author: TableConfig = Field(
        TableConfig(), description="Embedding table of author ids, shared by candidates and histories."
    )
    item: TableConfig = Field(
        TableConfig(), description="Embedding table of ids of videos and rooms, shared by candidates and histories."
    )
    side: SideTableConfig = Field(SideTableConfig(), description="Embedding table that all side features share.")
    history: dict[str, HistoryConfig] = Field(
        {"short": HistoryConfig(domain="video"), "live": HistoryConfig(domain="live")},
        description="Histories by name; each one becomes a sequence for target attention.",
    )
    past: dict[str, PastConfig] = Field(
        {},
        description="Counts of the user's past visits by name. Each one becomes a number for the visits and a rate "
        "for each behaviour of `rates`, smoothed as the statistics are.",
    )
    tags: bool = Field(
        False,
        description="Add the tag of the item to each visit of a history. It uses the same embedding as the candidate's "
        "tag. The dataset must have tags, see `limelight data describe`.",
    )
    author_side: tuple[str, ...] = Field(
        (),
        description="Side features of authors to add to each visit of a history. They use the same embeddings as the "
        "candidate's. Their values are read from the dataset's table of authors when training begins.",
    )
    codes: dict[str, CodesConfig] = Field(
        {},
        description="Codes of segments, one set for each code file. Its name has letters, digits and hyphens.",
    )
    content: dict[str, ContentConfig] = Field(
        {},
        description="Pre-trained vectors by name; each one becomes an input of the candidate and, if wanted, of the "
        "entries of histories.",
    )
    search: SearchConfig = Field(SearchConfig(), description='Search vectors of histories with `search = "top"`.')
    rates: tuple[str, ...] = Field(
        (), description="Behaviours whose rates are inputs. Empty: all behaviours of the dataset."
    )
    smoothing: float = Field(
        10.0,
        gt=0,
        description="Smoothing of rates: the overall rate p of a behaviour counts like `smoothing / (2 sqrt(p (1 - "
        "p)))` additional rows. The weight is larger for rare behaviours, about which one row says less.",
    )
    clip: float = Field(
        6.0,
        gt=0,
        description="Dense inputs are standardised on the training range and clipped at this number of standard "
        "deviations.",
    )
    exclude: tuple[str, ...] = Field(
        (),
        description="Features of the dataset that are not inputs of the model: names of side or dense features, "
        "`user_id`, `domain`, or a statistic such as `stat:user` or `stat:user*author`; `stat:*` means all statistics.",
    )

    @model_validator(mode="after")
    def _search_tables_have_rows(self) -> FeatureConfig:
        """Check that an id keeps its row in all tables that are searched."""
        for name in self.search.tables:
            if self.needs_space and getattr(self, name).ids == "dynamic":
                raise ValueError(
                    f'histories with search = "top" need fixed rows in the table `{name}`, and with ids = "dynamic" '
                    "rows change their ids; use another mapping, or remove the table from `search.tables`"
                )
        return self

    @model_validator(mode="after")
    def _names_of_codes(self) -> FeatureConfig:
        """Check that names of code sets cannot be mixed up with those of other tables and lookups."""
        for name in self.codes:
            # Lookups of histories have an underscore after the name of the history.
            if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", name):
                raise ValueError(
                    f"`codes` has a set named {name!r}; a name has letters, digits and hyphens, at most 40 of them"
                )
        return self

    @model_validator(mode="after")
    def _content_has_its_own_names(self) -> FeatureConfig:
        """Check that content vectors have names that no other input of the network has."""
        taken = {*_LOOKUPS, *(f"{history}_{key}" for history in self.history for key in _ENTRY_LOOKUPS)}
        for name, content in self.content.items():
            if not CONTENT_NAME.fullmatch(name):
                raise ValueError(
                    f"content vectors are named by letters, digits and underscores, and a letter first; not {name!r}"
                )
            for lookup in (name, *(f"{history}_{name}" for history in self.history if content.histories)):
                if lookup in taken:
                    raise ValueError(f"content vectors cannot be named {name!r}: {lookup!r} is another input")
                taken.add(lookup)
        return self

    @property
    def needs_space(self) -> bool:
        """True if a history searches by dot product."""
        return any(history.search == "top" for history in self.history.values())
