"""Tables of a report on the meaning of codes, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from trainer.console.text_table import text_table
from trainer.data.format.text_schema import SEGMENT_MS

_TEXT_WIDTH = 48
_LEAST_TOPIC_SHARE = 0.1


class RoomRun(NamedTuple):
    """Neighbouring segments of a room with one code and no pause.

    Attributes:
        begin_ms, end_ms: from the start of the room.
        code: codes of the levels; None without one.
        watch_ms: time watched.
        events: behaviour -> number of events.
        shows: topics or a text.
    """

    begin_ms: int
    end_ms: int
    code: list[int] | None
    watch_ms: float
    events: dict[str, float]
    shows: str


def meaning_text(document: dict[str, Any], count: int) -> str:
    """Format the answer of ``report_meaning``: behaviours, codes that carry one, codes, and the room.

    Args:
        document: the answer.
        count: largest number of lines of a table of codes, and of the room.
    """
    blocks = [_heading(document), _behaviour_table(document), _find_text(document, count)]
    blocks += [_code_table(document, count), _room_text(document, count)]
    return "\n\n".join(blocks)


def room_runs(room: dict[str, Any]) -> list[RoomRun]:
    """Return the runs of a room, in order of time; ``room`` is that of ``report_meaning``."""
    runs: list[RoomRun] = []
    segments = room["segments"]
    for place, segment in enumerate(segments):
        begin_ms = segment["start_ms"] - room["start_ms"]
        end_ms = begin_ms + SEGMENT_MS
        if place + 1 < len(segments):
            end_ms = min(end_ms, segments[place + 1]["start_ms"] - room["start_ms"])
        shows = segment["topic"] or _short(segment["text"] or "")
        last = runs[-1] if runs else None
        if last is not None and last.code == segment["code"] and last.end_ms == begin_ms:
            events = {name: number + segment["events"][name] for name, number in last.events.items()}
            known = last.shows.split(", ")
            shows = last.shows if shows in known or segment["topic"] is None else f"{last.shows}, {shows}"
            runs[-1] = last._replace(
                end_ms=end_ms, watch_ms=last.watch_ms + segment["watch_ms"], events=events, shows=shows
            )
        else:
            runs.append(RoomRun(begin_ms, end_ms, segment["code"], segment["watch_ms"], dict(segment["events"]), shows))
    return runs


def code_text(code: Sequence[int] | None) -> str:
    """Format a code, such as ``16/168``."""
    return "-" if code is None else "/".join(map(str, code))


def clock_text(ms: int) -> str:
    """Format a time from the start of a room, such as ``1:02:30``."""
    seconds = ms // 1000
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def room_title(document: dict[str, Any]) -> str:
    """Return author, room and start of the room of a report."""
    room = document["room"]
    begin = datetime.fromtimestamp(room["start_ms"] / 1000, UTC).astimezone(ZoneInfo(document["timezone"]))
    author = "an unknown author" if room["author_id"] < 0 else f"author {room['author_id']}"
    return f"room {room['item_id']} of {author}, from {begin:%Y-%m-%d %H:%M} ({document['timezone']})"


def _heading(document: dict[str, Any]) -> str:
    levels = len(document["levels"])
    of_level = "" if levels == 1 else f", the first {document['level']} of {levels} levels"
    lines = [
        f"{document['version']}{of_level}: {document['used_codes']:,} of {document['possible_codes']:,} codes, "
        f"{document['segments']:,} segments with a code, {document['watch_hours']:,.1f} hours watched in "
        f"{document['visits']:,} visits to rooms",
        "An event belongs to the segment on air at its time.",
    ]
    spread = {name: found["spread"] for name, found in document["behaviours"].items() if found["spread"]}
    if spread:
        lines.append(
            "Events at the end of their visit have no time of their own; they are spread over the segments watched: "
            + ", ".join(f"{number:,} {name}" for name, number in spread.items())
        )
    reasons = next(iter(document["behaviours"].values()))["unattributed"] if document["behaviours"] else {}
    for reason in reasons:
        counts = {name: found["unattributed"][reason] for name, found in document["behaviours"].items()}
        if any(counts.values()):
            lines.append(f"left out, {reason}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items() if n))
    if document["without_exit"]:
        lines.append(f"visits without an exit, whose watch time is not known: {document['without_exit']:,}")
    return "\n".join(lines)


def _behaviour_table(document: dict[str, Any]) -> str:
    lines = [
        [name, found["per"], f"{found['events']:,.0f}", _rate(found["rate"]), str(found["more"]), str(found["less"])]
        for name, found in document["behaviours"].items()
    ]
    return text_table(["behaviour", "per", "events", "rate", "codes above", "codes below"], lines, texts=2)


def _find_text(document: dict[str, Any], count: int) -> str:
    """Return the pairs of code and behaviour whose interval excludes the rate of all segments."""
    title = (
        f"codes with another rate than all segments, of {document['tested']:,} tested pairs; at most "
        f"{document['false_finds']:.0%} of them are expected to be false"
    )
    lines, left_out = [], 0
    behaviours = document["behaviours"]
    each = max(1, count // max(1, sum(bool(found["more"] + found["less"]) for found in behaviours.values())))
    for name, overall in behaviours.items():
        found = [(code, code["behaviours"][name]) for code in document["codes"]]
        finds = [(code, rate) for code, rate in found if rate["carries"]]
        finds.sort(key=lambda pair: pair[1]["p_value"])
        left_out += max(0, len(finds) - each)
        for code, rate in sorted(finds[:each], key=lambda pair: -pair[1]["rate"]):
            interval = f"{_rate(rate['low'])} to {_rate(rate['high'])}"
            times = f"{rate['rate'] / overall['rate']:.2f}"
            lines.append(
                [
                    *(name, code_text(code["code"]), f"{rate['events']:,.0f}", _rate(rate["rate"]), interval),
                    *(_rate(overall["rate"]), times, f"  {_shows(code)}".rstrip()),
                ]
            )
    if not lines:
        return f"{title}: none"
    header = ["behaviour", "code", "events", "rate", "interval", "all", "times", "  shows"]
    table = _with_last_column(header, lines, texts=2)
    more = f"\n{left_out:,} more: --json has all" if left_out else ""
    return f"{title}\n{table}{more}"


def _code_table(document: dict[str, Any], count: int) -> str:
    """Return the codes with most watch time; a rate with + or - is one of the finds."""
    names = list(document["behaviours"])
    lines = []
    for code in document["codes"][:count]:
        rates = [
            _rate(rate["rate"]) + {"more": "+", "less": "-", None: " "}[rate["carries"]]
            for rate in code["behaviours"].values()
        ]
        shares = [f"{code['segment_share']:.1%}", f"{code['watch_share']:.1%}"]
        lines.append([code_text(code["code"]), f"{code['segments']:,}", *shares, *rates, f"  {_shows(code)}".rstrip()])
    header = ["code", "segments", "of segments", "of watch time", *(f"{name} " for name in names), "  shows"]
    shown, codes = len(lines), len(document["codes"])
    which = "all codes" if shown == codes else f"the {shown:,} codes with most watch time, of {codes:,}"
    return f"{which}; + and - mark the finds\n{_with_last_column(header, lines, texts=1)}"


def _room_text(document: dict[str, Any], count: int) -> str:
    """Return the runs of the room; of more than ``count`` those with most interactions."""
    runs, names = room_runs(document["room"]), list(document["behaviours"])
    totals = {name: max(1.0, sum(run.events[name] for run in runs)) for name in names}
    weight = [sum(run.events[name] / totals[name] for name in names) for run in runs]
    chosen = sorted(sorted(range(len(runs)), key=lambda place: (-weight[place], place))[:count])
    lines = []
    for place in chosen:
        run = runs[place]
        events = [f"{run.events[name]:.3g}" if run.events[name] else "" for name in names]
        minutes = f"{run.watch_ms / 60_000:.1f}"
        times = [clock_text(run.begin_ms), clock_text(run.end_ms - run.begin_ms)]
        lines.append([*times, code_text(run.code), minutes, *events, f"  {run.shows}".rstrip()])
    header = ["at", "for", "code", "minutes watched", *names, "  shows"]
    left_out = len(runs) - len(lines)
    more = f"\n{left_out:,} runs with fewer interactions are not shown; --json has all" if left_out else ""
    return f"{room_title(document)}\n{_with_last_column(header, lines, texts=0)}{more}"


def _with_last_column(header: Sequence[str], lines: Sequence[Sequence[str]], texts: int) -> str:
    """Return a table whose last column is aligned left; without it if it is empty."""
    if not any(line[-1].strip() for line in lines):
        return text_table(header[:-1], [line[:-1] for line in lines], texts)
    width = max(len(line[-1]) for line in (header, *lines))
    padded = [[*line[:-1], line[-1].ljust(width)] for line in (header, *lines)]
    return text_table(padded[0], padded[1:], texts)


def _shows(code: dict[str, Any]) -> str:
    """Return the topics of a code, or else a text of it."""
    if code["topics"]:
        shares = {topic: share for topic, share in code["topics"].items() if share >= _LEAST_TOPIC_SHARE}
        return ", ".join(f"{topic} {share:.0%}" for topic, share in shares.items())
    texts = [example["text"] for example in code["examples"] if example["text"]] or code["comments"]
    return _short(texts[0]) if texts else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_WIDTH else f"{text[: _TEXT_WIDTH - 3]}..."


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
