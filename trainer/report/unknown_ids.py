"""Warnings about the tables of a ranker: ids of the held-out range that are unknown, or share a row with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.data.features.id_map import hash_rows, hash_salt
from trainer.report.held_out import HeldOutRows
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number
from trainer.runtime.stored_files import load_arrays

UNKNOWN = 0.5
"""Share of the held-out rows with an unknown id above which there is a warning."""

SHARED = 0.1
"""Share of the held-out ids with a row that is not their own above which there is a warning."""

VOCABULARIES = "features/vocabularies.npz"


def unknown_id_warnings(run: StoredRun) -> Iterator[str]:
    """Yield a warning for each table whose held-out ids are mostly unknown, or collide with each other."""
    held_out = run.models[0].held_out
    if held_out is None or not len(held_out.visit_id):
        return
    rows = {str(entry.get("table")): number(entry.get("rows")) for entry in run.models[0].plan}
    vocabularies = _vocabularies(run)
    for table, ids in _ids(held_out).items():
        kind = mapping(mapping(run.config.get("features")).get(table)).get("ids")
        size, known = rows.get(table), vocabularies.get(table)
        share = None
        if kind == "lookup" and known is not None:
            share = 1 - float(np.isin(ids, known).mean())
        elif kind == "direct" and size is not None:
            # Row 0 is the unknown id, and the row of an id is the id + 1.
            share = float((ids >= size - 1).mean())
        if share is not None and share > UNKNOWN:
            yield (
                f"{100 * share:.0f} % of the held-out rows have an unknown {table}: their ids share the row 0 of the "
                f"table {table} (features.{table}.ids = {kind})."
            )
        if kind == "hash" and size is not None and 2 <= size < 1 << 31:
            shared = _sharing(table, np.unique(ids), int(size))
            if shared > SHARED:
                yield (
                    f"{100 * shared:.0f} % of the held-out ids of the table {table} share their row with another of "
                    f"these ids, and with more ids of the training range: more features.{table}.rows help."
                )


def _ids(held_out: HeldOutRows) -> dict[str, np.ndarray]:
    """Return table -> ids of the held-out rows, as far as they are known."""
    found = {"user": held_out.user_id}
    found |= {name.removesuffix("_id"): values[values >= 0] for name, values in held_out.ids.items()}
    return {table: ids for table, ids in found.items() if len(ids)}


def _vocabularies(run: StoredRun) -> Mapping[str, Any]:
    try:
        return load_arrays(run.directory / VOCABULARIES)
    except FileNotFoundError:
        return {}
    except (OSError, UserError) as error:
        run.notes.append(one_line(error))
        return {}


def _sharing(table: str, ids: np.ndarray, rows: int) -> float:
    """Return the share of distinct ids whose row is also that of another one of them."""
    places = np.empty(len(ids), np.int64)
    hash_rows(np.ascontiguousarray(ids, np.int64), hash_salt(table), rows, places)
    _, index, counts = np.unique(places, return_inverse=True, return_counts=True)
    return float((counts[index] > 1).mean())
