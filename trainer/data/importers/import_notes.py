"""Notes on an import: how many lines and files were left out, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def import_notes(extra: Mapping[str, Any]) -> list[str]:
    """Return a line for each count of ``DatasetSpec.extra`` that is not 0 and that a user must know."""
    end = "kept" if extra.get("duplicates") == "keep" else "dropped"
    shared = sum(extra.get("hash_collisions", {}).values())
    counts = (
        ("repeated lines", "duplicate_lines", f"equal to an earlier line in all columns that are read; {end}"),
        (
            "conflicting lines",
            "conflicting_visits_dropped",
            "user, item and time of an earlier line, and other values; dropped",
        ),
        ("events without a visit", "orphans_dropped", "none began before them; dropped"),
        (
            "files left out",
            "files_left_out",
            f"{extra.get('first_file_left_out')}, ...: no tables, or `files` of the mapping does not match them",
        ),
    )
    notes = [f"{name}: {extra[key]:,} ({why})" for name, key, why in counts if extra.get(key)]
    if shared:
        notes.append(f"texts that share an id with another text: {shared:,} (their hashes are equal)")
    return notes
