"""The mapping file of ``limelight data import events``; ``events.py`` describes its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from zoneinfo import available_timezones

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from trainer.config.toml import read_toml, validate
from trainer.data.format.schema import VISIT_EVENTS

DomainName = Literal["video", "live"]
IdColumn = Literal["user_id", "author_id", "item_id", "visit_id"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnNames(_Section):
    """Your column for each canonical one."""

    user_id: str
    author_id: str
    item_id: str
    time: str
    visit_id: str | None = None
    event: str | None = None
    value: str | None = None
    play_ms: str | None = None


class DomainRule(_Section):
    """Where a line's domain comes from: one for all, or a column's values."""

    constant: DomainName | None = None
    column: str | None = None
    video: tuple[str, ...] = ()
    live: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> DomainRule:
        if (self.constant is None) == (self.column is None):
            raise ValueError("give either `constant` or `column`")
        if self.column is not None and not (self.video or self.live):
            raise ValueError("`column` needs its values for `video`, `live` or both")
        return self


class Behaviour(_Section):
    """How one behaviour is told from the log."""

    column: str | None = None
    delay: str | None = None
    at: Literal["start", "end"] = "end"
    events: tuple[str, ...] = ()
    applies: tuple[DomainName, ...] = ("video", "live")


class EventNames(_Section):
    """Your names of the events that are no behaviours."""

    exposure: tuple[str, ...] = ()
    enter: tuple[str, ...] = ()
    exit: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


class Features(_Section):
    """Columns that become features: categorical (``side``) and numeric (``dense``)."""

    side: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


class TableFeatures(Features):
    """Features of a user, author or item, in a table of their own."""

    file: str
    id: str


class FeatureRules(_Section):
    """Features by what they belong to; ``context`` columns stand in the log itself."""

    context: Features = Features()
    user: TableFeatures | None = None
    author: TableFeatures | None = None
    item: TableFeatures | None = None

    def tables(self) -> dict[str, TableFeatures]:
        """Owner -> its table, of those that were given."""
        given = {"user": self.user, "author": self.author, "item": self.item}
        return {owner: table for owner, table in given.items() if table is not None}


class EventMapping(_Section):
    """The whole file."""

    layout: Literal["events", "exposures"]
    name: str = "events"
    source: str = ""
    licence: str = ""
    timezone: str = "UTC"
    files: str = "*"
    time_unit: Literal["s", "ms", "us", "ns"] = "ms"
    out_of_order: Literal["error", "sort"] = "error"
    orphans: Literal["error", "drop"] = "error"
    hash_ids: tuple[IdColumn, ...] = ()
    candidates: tuple[DomainName, ...] = ("video", "live")
    statistics: tuple[tuple[str, ...], ...] = (("user",), ("item",), ("author",), ("user", "author"))
    tag: str = ""
    columns: ColumnNames
    domain: DomainRule
    behaviours: dict[str, Behaviour]
    events: EventNames = EventNames()
    features: FeatureRules = FeatureRules()

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, zone: str) -> str:
        if zone not in available_timezones():
            raise ValueError("no IANA time zone; write UTC, Asia/Shanghai, ...")
        return zone

    @model_validator(mode="after")
    def _complete(self) -> EventMapping:
        for name, behaviour in self.behaviours.items():
            if not name.isidentifier() or name in VISIT_EVENTS:
                raise ValueError(
                    f"{name!r} cannot name a behaviour; take letters, digits and _, not exposure, enter, exit"
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
            raise ValueError('layout = "events" needs events.exposure, or events.enter, where a visit begins')
        names = [name for _, names in self.event_names() for name in names]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the event {name!r} is mapped twice")
        return self

    def event_names(self) -> list[tuple[str, tuple[str, ...]]]:
        """Canonical event -> your names of it, ``ignore`` last."""
        own = self.events
        fixed = [("exposure", own.exposure), ("enter", own.enter), ("exit", own.exit)]
        behaviours = [(name, behaviour.events) for name, behaviour in self.behaviours.items()]
        return [*fixed, *behaviours, ("ignore", own.ignore)]


def load_mapping(path: str | Path) -> EventMapping:
    """Read a mapping file.

    Raises:
        UserError: missing file, not TOML, unknown key (the nearest known one is named), wrong value.
    """
    return validate(EventMapping, read_toml(path, "mapping file"), str(path))
