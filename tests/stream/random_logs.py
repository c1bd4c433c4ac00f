"""Random small logs for tests of the assemblers, and their conversion to columns and back."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from tests.stream.reference import Event, Row, StartedVisit, UnusedEvent
from trainer.data.format.schema import DOMAINS, KINDS, DatasetSpec, DenseFeature, Rows, SideFeature
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_names
from trainer.stream.labels.assembled_rows import EVENT_TYPES, REASONS
from trainer.stream.labels.policy import EventTimeouts, FastSlow, Full, Realtime, RealtimeNaive

BEHAVIOURS = ("click", "like", "gift")
SPEC = DatasetSpec(
    name="random",
    source="random numbers",
    licence="none",
    partitions=4,
    timezone="UTC",
    behaviours=BEHAVIOURS,
    applies={"click": ("video", "live"), "like": ("video", "live"), "gift": ("live",)},
    candidates=("video", "live"),
    side=(SideFeature("tab", "context", 50), SideFeature("age", "user", 8)),
    dense=(DenseFeature("load", "context"),),
    statistics=(("user",), ("item", "tab")),
)
LIVE_ONLY = ("live",)

POLICIES = (Full(), FastSlow(fast_ms=50, slow_ms=120), Realtime(tick_ms=30), RealtimeNaive(tick_ms=30))
TIMEOUTS = EventTimeouts(idle_ms=100, max_out_of_orderness_ms=20)

_NAMES = ("exposure", "enter", "exit", *BEHAVIOURS)
# Edges of all windows; offsets are drawn at an edge or a millisecond beside it.
_EDGES = (0, 30, 50, 60, 90, 100, 120, 150)
_OFFSET = st.builds(lambda edge, beside: max(edge + beside, 0), st.sampled_from(_EDGES), st.integers(-1, 1))
_EVENT = st.tuples(_OFFSET, st.sampled_from(_NAMES))


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    """Draw events in order of arrival.

    Visits start, have behaviours at and beside the edges of windows (repeated, and after the exit), and some of them
    exit. A user has several open visits, ids repeat, and events are duplicated, out of order, late, or without a start.
    """
    sent: list[Event] = []
    for _ in range(draw(st.integers(1, 6))):
        user, visit = draw(st.integers(0, 2)), draw(st.integers(0, 3))
        start = draw(st.integers(0, 30)) * 10
        begin = draw(st.sampled_from([("exposure", "enter"), ("exposure",), ("enter",), ()]))
        happened = [(0, name) for name in begin] + draw(st.lists(_EVENT, max_size=7))
        # A visit is in one domain. Its other ids may change; those of the first event count.
        domain = DOMAINS[visit % 2]
        for offset, name in happened:
            author = draw(st.integers(0, 1))
            sent.append(Event(user, visit, author, 10 + author, domain, name, start + offset))
    sent += [sent[draw(st.integers(0, len(sent) - 1))] for _ in range(draw(st.integers(0, 3))) if sent]
    delay = [draw(st.integers(0, 35)) if draw(st.booleans()) else 0 for _ in sent]
    arrival = sorted(range(len(sent)), key=lambda place: sent[place].time_ms + delay[place])
    return [sent[place] for place in arrival]


def columns_of(events: list[Event]) -> Columns:
    """Return events as columns for an assembler."""
    codes = {name: code for code, name in enumerate(event_names(SPEC))}
    values = {
        name: [getattr(event, name) for event in events] for name in ("user_id", "visit_id", "author_id", "item_id")
    }
    values |= {"time_ms": [event.time_ms for event in events], "value": [0.0] * len(events)}
    values["domain"] = [DOMAINS.index(event.domain) for event in events]
    values["event"] = [codes[event.event] for event in events]
    return {name: np.array(values[name], dtype) for name, dtype in EVENT_TYPES.items()}


def portions(columns: Columns, cuts: list[int]) -> list[Columns]:
    """Split columns at the positions ``cuts``."""
    edges = [0, *sorted(cuts), len(columns["time_ms"])]
    return [{name: column[first:stop] for name, column in columns.items()} for first, stop in pairwise(edges)]


def rows_as_tuples(rows: Rows) -> list[Row]:
    """Return the rows of an assembler in the form of the reference."""
    return [
        Row(
            int(rows["emit_ms"][place]),
            int(rows["user_id"][place]),
            int(rows["visit_id"][place]),
            int(rows["request_ms"][place]),
            KINDS[rows["kind"][place]],
            int(rows["author_id"][place]),
            int(rows["item_id"][place]),
            DOMAINS[rows["domain"][place]],
            tuple(rows["label"][place].tolist()),
            tuple(rows["mask"][place].tolist()),
        )
        for place in range(len(rows["kind"]))
    ]


def started_as_tuples(started: Rows) -> list[StartedVisit]:
    """Return the started visits of an assembler in the form of the reference."""
    columns = {name: started[name].tolist() for name in StartedVisit._fields}
    columns["domain"] = [DOMAINS[code] for code in columns["domain"]]
    return [StartedVisit(*values) for values in zip(*columns.values(), strict=True)]


def unused_as_tuples(unused: Columns) -> list[UnusedEvent]:
    """Return the unused events of an assembler in the form of the reference."""
    names = event_names(SPEC)
    return [
        UnusedEvent(
            REASONS[unused["reason"][place]],
            Event(
                int(unused["user_id"][place]),
                int(unused["visit_id"][place]),
                int(unused["author_id"][place]),
                int(unused["item_id"][place]),
                DOMAINS[unused["domain"][place]],
                names[unused["event"][place]],
                int(unused["time_ms"][place]),
            ),
        )
        for place in range(len(unused["time_ms"]))
    ]
