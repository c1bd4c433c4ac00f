"""Numbers of candidates and past visits without a code or a pre-trained vector; they read a learnt value instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

CODE, VECTOR = "no_code/", "no_vector/"
"""Beginning of the name of an input: the name of a code set, or of a table of pre-trained vectors, comes after it."""

_KINDS = (
    (CODE, "code", "past live visits", "they read row 0 of its tables"),
    (VECTOR, "content vector", "past visits", "they read a learnt one"),
)


class MissingCounts(NamedTuple):
    """Numbers of ids that have no value in an input, and of all ids that can have one.

    Attributes:
        candidates: candidates without a value, such as unknown authors, and authors without a segment that is known.
        all_candidates: all candidates.
        entries: past visits without a value; 0 if histories do not have the input. Of segments only live visits count.
        all_entries: all past visits.
    """

    candidates: int = 0
    all_candidates: int = 0
    entries: int = 0
    all_entries: int = 0

    def __add__(self, other: MissingCounts) -> MissingCounts:  # type: ignore[override]
        """Add two counts, field by field."""
        return MissingCounts(*(a + b for a, b in zip(self, other, strict=True)))


class MissingTally:
    """Sums of :class:`MissingCounts` by input.

    Args:
        parts: counts to add.

    Attributes:
        counts: name of an input -> sums; an input without a batch is not there.
    """

    def __init__(self, *parts: Mapping[str, MissingCounts]) -> None:
        self.counts: dict[str, MissingCounts] = {}
        for part in parts:
            self.add(part)

    def add(self, counts: Mapping[str, MissingCounts]) -> None:
        """Add the numbers of a batch."""
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, MissingCounts()) + count

    @property
    def mostly(self) -> bool:
        """True if most candidates have no value in an input."""
        return any(2 * count.candidates > count.all_candidates for count in self.counts.values())

    def shares(self) -> dict[str, float]:
        """Return name of an input -> share of the candidates without a value."""
        return {name: count.candidates / max(1, count.all_candidates) for name, count in self.counts.items()}

    def messages(self) -> list[str]:
        """Return a line about codes and one about vectors, with a part for each input; none without such inputs."""
        lines = []
        for kind, what, entries, instead in _KINDS:
            parts = []
            for name, count in self.counts.items():
                if name.startswith(kind):
                    past = f" and {count.entries:,} of {count.all_entries:,} {entries}" if count.all_entries else ""
                    own = name.removeprefix(kind)
                    parts.append(f"{own}: {count.candidates:,} of {count.all_candidates:,} candidates{past}")
            if parts:
                lines.append(f"without a {what} of {'; of '.join(parts)} ({instead})")
        return lines
