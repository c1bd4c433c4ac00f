"""Schema of the mapping file of ``limelight data import events``; ``events.py`` describes its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from zoneinfo import available_timezones

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from trainer.config.toml import read_toml, validate
from trainer.data.format.schema import VISIT_EVENTS
from trainer.data.importers.category_codes import category_text
from trainer.data.importers.null_markers import ID_NULLS, VALUE_NULLS, NullMarkers

DomainName = Literal["video", "live"]
IdColumn = Literal["user_id", "author_id", "item_id", "visit_id"]


class _Section(BaseModel):
    """Section of a mapping file; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_each_once(names: Sequence[str], what: str) -> None:
    """Check that names in a column differ, as categories do: ``1`` and ``1.0`` are one name.

    Raises:
        ValueError: two are one name; ``what`` is a word for it.
    """
    spelled = category_text(pa.array(names, pa.string())).to_pylist()
    for name, spelling in zip(names, spelled, strict=True):
        if spelled.count(spelling) > 1:
            raise ValueError(f"the {what} {name!r} is mapped twice")


class ColumnNames(_Section):
    """Columns of the log by canonical name."""

    user_id: str
    author_id: str
    item_id: str
    time: str
    visit_id: str | None = None
    event: str | None = None
    value: str | None = None
    play_ms: str | None = None


class DomainRule(_Section):
    """Rule for the domain of a line: a constant, or the values of a column."""

    constant: DomainName | None = None
    column: str | None = None
    video: tuple[str, ...] = ()
    live: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_one_source(self) -> DomainRule:
        if (self.constant is None) == (self.column is None):
            raise ValueError("give either `constant` or `column`")
        if self.column is not None and not (self.video or self.live):
            raise ValueError("`column` needs a list of its values for `video`, `live` or both")
        _check_each_once((*self.video, *self.live), "value")
        return self


class NullRules(_Section):
    """Texts that mean "no value", besides the empty text; see ``null_markers.py``."""

    values: tuple[str, ...] = VALUE_NULLS
    ids: tuple[str, ...] = ID_NULLS
    columns: dict[str, tuple[str, ...]] = {}


class BehaviourRule(_Section):
    """Rule that derives one behaviour from the log."""

    column: str | None = None
    delay: str | None = None
    at: Literal["start", "end"] = "end"
    events: tuple[str, ...] = ()
    applies: tuple[DomainName, ...] = ("video", "live")


class EventNames(_Section):
    """Names of the log's events that are not behaviours."""

    exposure: tuple[str, ...] = ()
    enter: tuple[str, ...] = ()
    exit: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


class FeatureColumns(_Section):
    """Columns that become features: categorical (``side``) and numeric (``dense``)."""

    side: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


class TableFeatures(FeatureColumns):
    """Features of users, authors or items from a separate table."""

    file: str
    id: str

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the table that are read, each once."""
        return tuple(dict.fromkeys((self.id, *self.side, *self.dense)))


class FeatureRules(_Section):
    """Features by their owner; ``context`` columns are in the log itself."""

    context: FeatureColumns = FeatureColumns()
    user: TableFeatures | None = None
    author: TableFeatures | None = None
    item: TableFeatures | None = None

    def tables(self) -> dict[str, TableFeatures]:
        """Return the configured tables by owner."""
        tables = {"user": self.user, "author": self.author, "item": self.item}
        return {owner: table for owner, table in tables.items() if table is not None}


class EventMapping(_Section):
    """Content of a mapping file."""

    layout: Literal["events", "exposures"]
    name: str = "events"
    source: str = ""
    licence: str = ""
    timezone: str = "UTC"
    files: str = "*"
    time_unit: Literal["s", "ms", "us", "ns"] = "ms"
    out_of_order: Literal["error", "sort"] = "error"
    orphans: Literal["error", "drop"] = "error"
    duplicates: Literal["drop", "keep"] = "drop"
    hash_ids: tuple[IdColumn, ...] = ()
    candidates: tuple[DomainName, ...] = ("video", "live")
    statistics: tuple[tuple[str, ...], ...] = (("user",), ("item",), ("author",), ("user", "author"))
    tag: str = ""
    nulls: NullRules = NullRules()
    columns: ColumnNames
    domain: DomainRule
    behaviours: dict[str, BehaviourRule]
    events: EventNames = EventNames()
    features: FeatureRules = FeatureRules()

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, zone: str) -> str:
        if zone not in available_timezones():
            raise ValueError("not an IANA time zone; use a name such as UTC or Asia/Shanghai")
        return zone

    @field_validator("files")
    @classmethod
    def _check_files(cls, pattern: str) -> str:
        if not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
            raise ValueError('it must be a pattern of paths below the folder of the log, such as "**/*.parquet"')
        return pattern

    @model_validator(mode="after")
    def _check_nulls(self) -> EventMapping:
        known = {*self.log_columns(), *(name for table in self.features.tables().values() for name in table.columns())}
        for name in self.nulls.columns:
            if name not in known:
                raise ValueError(f"nulls.columns has {name!r}, which is no column of this mapping")
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> EventMapping:
        for name, behaviour in self.behaviours.items():
            if not name.isidentifier() or name in VISIT_EVENTS:
                raise ValueError(
                    f"{name!r} cannot name a behaviour; use letters, digits and _, but not exposure, enter or exit"
                )
            if self.layout == "exposures" and (behaviour.column is None or behaviour.events):
                raise ValueError(f'layout = "exposures" needs behaviours.{name}.column, and no `events`')
            if self.layout == "events" and (not behaviour.events or behaviour.column or behaviour.delay):
                raise ValueError(f'layout = "events" needs behaviours.{name}.events, and no `column` or `delay`')
        if not self.behaviours:
            raise ValueError("[behaviours] needs at least one behaviour")
        if self.layout == "events" and self.columns.event is None:
            raise ValueError('layout = "events" needs columns.event')
        if self.layout == "events" and not (self.events.exposure or self.events.enter):
            raise ValueError('layout = "events" needs events.exposure or events.enter: such an event begins a visit')
        _check_each_once([name for _, names in self.event_names() for name in names], "event")
        return self

    def log_columns(self) -> list[str]:
        """Return the columns of the log that the mapping uses, each once."""
        names, rule = self.columns, self.domain
        used = [names.user_id, names.author_id, names.item_id, names.time, names.visit_id, names.play_ms, rule.column]
        used += [names.event, names.value] if self.layout == "events" else []
        used += [column for behaviour in self.behaviours.values() for column in (behaviour.column, behaviour.delay)]
        used += [*self.features.context.side, *self.features.context.dense]
        return list(dict.fromkeys(name for name in used if name is not None))

    def null_markers(self) -> NullMarkers:
        """Return the null markers of the columns of the log and of the tables."""
        return NullMarkers(self.nulls.values, self.nulls.ids, self.nulls.columns)

    def event_names(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return pairs of a canonical event and the log's names for it; ``ignore`` comes last."""
        names = self.events
        fixed = [("exposure", names.exposure), ("enter", names.enter), ("exit", names.exit)]
        behaviours = [(name, behaviour.events) for name, behaviour in self.behaviours.items()]
        return [*fixed, *behaviours, ("ignore", names.ignore)]


def load_mapping(path: str | Path) -> EventMapping:
    """Read a mapping file.

    Raises:
        UserError: the file is missing or not TOML, a key is unknown (the message names the nearest known one), or a
            value is wrong.
    """
    return validate(EventMapping, read_toml(path, "mapping file"), str(path))
