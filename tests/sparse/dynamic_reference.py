"""Id map of a dynamic table in plain Python: dictionaries for each bucket, and the rules in order."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

WORD = (1 << 64) - 1


def hash_row(value: int, table: str, rows: int) -> int:
    mixed = (value & WORD) ^ (zlib.crc32(table.encode()) * 0x9E3779B97F4A7C15 & WORD)
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & WORD
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & WORD
    return 1 + ((mixed >> 32) * (rows - 1) >> 32)


@dataclass
class Slot:
    id: int
    seen: int
    sightings: int


@dataclass
class Bucket:
    rows: range
    served: dict[int, Slot] = field(default_factory=dict)
    candidates: dict[int, Slot] = field(default_factory=dict)


class ReferenceIds:
    """Reference of trainer.sparse.dynamic_ids.DynamicIds for a whole table; ``bucket_rows`` is its BUCKET_ROWS."""

    def __init__(self, table: str, rows: int, admit_after: int, evict: str, bucket_rows: int) -> None:
        self.table, self.rows, self.admit_after, self.evict, self.bucket_rows = (
            table,
            rows,
            admit_after,
            evict,
            bucket_rows,
        )
        self.buckets: dict[int, Bucket] = {}
        self.counts = {"looked_up": 0, "unserved": 0, "admitted": 0, "evicted": 0}

    def bucket(self, value: int) -> Bucket:
        number = hash_row(value, self.table, self.rows) // self.bucket_rows
        first = number * self.bucket_rows
        rows = range(max(1, first), min(self.rows, first + self.bucket_rows))
        return self.buckets.setdefault(number, Bucket(rows))

    def find(self, value: int) -> int:
        served = self.bucket(value).served
        return next((row for row, slot in served.items() if slot.id == value), -1)

    def learn(self, ids: Iterable[int], step: int) -> set[int]:
        """Count the ids of a step and return the rows that have a new id."""
        distinct = sorted(set(ids))
        self.counts["looked_up"] += len(distinct)
        without = []
        for value in distinct:
            row = self.find(value)
            if row < 0:
                without.append(value)
            else:
                slot = self.bucket(value).served[row]
                slot.seen, slot.sightings = step, slot.sightings + 1
        return {row for value in without if (row := self.sighted(value, step)) >= 0}

    def sighted(self, value: int, step: int) -> int:
        bucket = self.bucket(value)
        held = next((row for row, slot in bucket.candidates.items() if slot.id == value), None)
        slot = Slot(value, step, 1 if held is None else bucket.candidates[held].sightings + 1)
        if slot.sightings >= self.admit_after:
            row = self.row_for(bucket, slot, step)
            if row is not None:
                self.counts["admitted"] += 1
                self.counts["evicted"] += row in bucket.served
                bucket.served[row] = slot
                if held is not None:
                    del bucket.candidates[held]
                return row
        self.counts["unserved"] += 1
        if held is None:
            held = min(bucket.rows, key=lambda row: bucket.candidates[row].seen if row in bucket.candidates else 0)
            if held in bucket.candidates and bucket.candidates[held].seen == step:
                return -1
        bucket.candidates[held] = slot
        return -1

    def row_for(self, bucket: Bucket, new: Slot, step: int) -> int | None:
        free = [row for row in bucket.rows if row not in bucket.served]
        if free:
            return free[0]
        old = [row for row in bucket.rows if bucket.served[row].seen < step]
        if not old:
            return None
        row = min(old, key=lambda row: self.worth(bucket.served[row], step))
        return row if self.worth(bucket.served[row], step)[0] <= self.worth(new, step)[0] else None

    def worth(self, slot: Slot, step: int) -> tuple[Any, int]:
        return {
            "recency": (slot.seen, slot.sightings),
            "frequency": (slot.sightings, slot.seen),
            "both": (Fraction(slot.sightings, 1 + step - slot.seen), slot.seen),
        }[self.evict]
