"""Past visits to which the model attended most, for a few held-out rows, in words and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.report.page_parts import ReportSection, ReportTable
from trainer.report.stored_values import mapping, number

_UNITS = (("day", 86_400_000), ("hour", 3_600_000), ("minute", 60_000), ("second", 1000))

_NAMED = 2
"""Largest number of histories that the sentences name: those whose attention is the least even."""

_PREDICTED = 3
"""Largest number of behaviours whose probabilities the sentences name: the first ones of the job."""

_EVEN = 1.1
"""Ratio to an equal share of all visits, up to which attention counts as even."""


class _AttendedVisit(NamedTuple):
    """A past visit with its share of the attention of a history of ``found`` visits."""

    history: str
    found: int
    share: float
    visit: Mapping[str, Any]

    @property
    def times_even(self) -> float:
        """Share, in shares of an even attention."""
        return self.share * self.found


def attention_section(document: Mapping[str, Any]) -> ReportSection:
    """Return sentences and a table for each example; empty without examples."""
    title = "What the model attends to"
    stored = document.get("examples")
    examples = [mapping(example) for example in stored] if isinstance(stored, list) else []
    tables = [table for example in examples if (table := _example(example)).rows]
    if not tables:
        return ReportSection(title)
    text = (
        "Held-out visits, and the past visits with the largest shares of the model's attention. The held-out visits "
        "were chosen by a hash of their ids; those in which the user did something come first. The shares of all "
        "visits of a history add up to 100 %. Attention says what was read, not what the prediction would be without "
        "it."
    )
    return ReportSection(title, text, tables)


def _example(example: Mapping[str, Any]) -> ReportTable:
    """Return the sentences and the table of one row."""
    visits = [visit for name, history in mapping(example.get("histories")).items() for visit in _visits(name, history)]
    rows = [
        [
            f"{visit.history} ({visit.found:,})",
            f"{_percent(visit.share)} ({visit.times_even:.1f} ×)",
            _ago(example, visit.visit),
            _name(example, visit.visit),
            _words(visit.visit.get("behaviours")) or "–",
        ]
        for visit in visits
    ]
    user, author = _id(example.get("user_id")), _id(example.get("author_id"))
    earlier = number(example.get("earlier_visits_of_author"))
    times = "" if earlier is None else f" for the {_ordinal(int(earlier) + 1)} time"
    header = ["history (visits)", "share (× an even one)", "when", "past visit", "did"]
    return ReportTable(
        f"User {user} met author {author}{times}", header, rows, len(header), _sentences(example, visits)
    )


def _visits(name: str, history: Any) -> list[_AttendedVisit]:
    """Return the stored visits of a history, the one with the most attention first."""
    found, entries = number(mapping(history).get("found")), mapping(history).get("entries")
    visits = []
    for entry in entries if isinstance(entries, list) and found else ():
        share = number(mapping(entry).get("attention"))
        if share is not None:
            visits.append(_AttendedVisit(name, int(found or 0), share, mapping(entry)))
    return sorted(visits, key=lambda visit: -visit.share)


def _sentences(example: Mapping[str, Any], visits: list[_AttendedVisit]) -> str:
    """Return what the user did, what was predicted, and the visits with the most attention."""
    did = _words(example.get("did"))
    text = f"The user did {did}." if did else "The user did nothing that is predicted."
    predicted = [(name, number(value)) for name, value in mapping(example.get("probabilities")).items()]
    shown = [f"{name} {_percent(p)}" for name, p in predicted if p is not None][:_PREDICTED]
    if shown:
        text += f" Predicted were {', '.join(shown)}."
    first: dict[str, _AttendedVisit] = {}
    for visit in visits:
        first.setdefault(visit.history, visit)
    uneven = [visit for visit in first.values() if visit.times_even > _EVEN]
    if not uneven:
        return f"{text} The attention to the past visits is about even."
    for visit in sorted(uneven, key=lambda visit: -visit.times_even)[:_NAMED]:
        done = _words(visit.visit.get("behaviours"))
        text += (
            f" In the history {visit.history}, {_percent(visit.share)} of the attention is on one of {visit.found:,} "
            f"visits: to {_author(example, visit.visit)}, {_ago(example, visit.visit)}{f' ({done})' if done else ''}."
        )
    return text


def _author(example: Mapping[str, Any], visit: Mapping[str, Any]) -> str:
    """Return the author of a past visit in words."""
    author = visit.get("author_id")
    return "the same author" if author == example.get("author_id") else f"author {_id(author)}"


def _name(example: Mapping[str, Any], visit: Mapping[str, Any]) -> str:
    """Return the item and the author of a past visit, and what it shares with the candidate."""
    alike = [name for name in ("author", "item") if visit.get(f"{name}_id") == example.get(f"{name}_id")]
    alike += _list(visit.get("as_the_candidate"))
    name = f"{_id(visit.get('domain'))} {_id(visit.get('item_id'))} of author {_id(visit.get('author_id'))}"
    return f"{name} (same {', '.join(alike)})" if alike else name


def _ago(example: Mapping[str, Any], visit: Mapping[str, Any]) -> str:
    """Return the age of a past visit at the request, such as ``2.5 days ago``."""
    at, then = number(example.get("at_ms")), number(visit.get("request_ms"))
    if at is None or then is None:
        return "an unknown time ago"
    for unit, size in _UNITS:
        if (count := (at - then) / size) >= 1:
            return f"{count:.1f} {unit}s ago"
    return "a moment ago"


def _ordinal(value: int) -> str:
    """Return a number as a word of an order, such as ``3rd``."""
    ending = "th" if 10 <= value % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value:,}{ending}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _list(value: object) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _words(value: object) -> str:
    """Return the texts of a list, with commas."""
    return ", ".join(_list(value))


def _id(value: object) -> str:
    """Return an id or a word of a document; a question mark for anything else."""
    return str(value) if isinstance(value, int | str) else "?"
