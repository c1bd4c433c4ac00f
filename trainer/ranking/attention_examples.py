"""Attention to the histories of a few held-out rows, which the evaluation of a model keeps for its report.

``RUN/attention_examples.json`` has ``timezone`` and ``examples``, each the document of
``trainer/ranking/history_attention.py`` and in addition::

    visit_id                  of the row
    did                       behaviours of the visit
    earlier_visits_of_author  visits of the user to the candidate's author that the histories show

The rows follow from the ids and labels of the visits, and from which of them have entries in a history: visits in which
the user did something come first. So every number of ranks, and every model with the same histories, has the same ones.
The shares follow from the definition of the attention, whatever has computed the predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.history_sequences import Space
from trainer.data.format.dataset import Dataset
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import Rows, partition_of
from trainer.data.format.statistics import FrozenStatistics
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import unpack
from trainer.data.loading.loader import freeze_rows
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.evaluation import Predictions
from trainer.ranking.history_attention import Explanation, HistoryAttention, explanation_document, same_values
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json

ATTENTION_EXAMPLES = "attention_examples.json"

EXAMPLES = 4
"""Largest number of rows of the file."""

ENTRIES = 3
"""Largest number of entries of a history: those with the most attention."""

_CONSIDERED = 32
"""Number of rows among which those with entries in a history are looked for."""

_HASHES = (1 << 31) - 1

_Key = tuple[bool, int, int, int]
"""Order of a row among those of all ranks: True if nothing was done, hash of its visit, visit, user."""


@dataclass(frozen=True)
class HeldOutInputs:
    """Rows and histories of a held-out range, as its loader reads them.

    Attributes:
        data: the dataset.
        selection: the held-out range.
        features: map from rows to the model's inputs.
        space: search vectors, for histories that need them.
        frozen: statistics at the end of training, in an evaluation with frozen features.
        as_of_limit_ms: end of training, in such an evaluation.
    """

    data: Dataset
    selection: Selection
    features: FeatureMap
    space: Space | None = None
    frozen: FrozenStatistics | None = None
    as_of_limit_ms: int | None = None

    def read(self, user_id: np.ndarray, visit_id: np.ndarray) -> Iterator[tuple[int, Rows]]:
        """Yield the stored row of each visit as a number in ``visit_id [n]`` and columns of length 1.

        A visit whose record is corrupt is left out.
        """
        store = self.data.store
        partitions = partition_of(user_id, self.data.spec.partitions)
        for partition in np.unique(partitions).tolist():
            wanted = np.flatnonzero(partitions == partition)
            for record in np.flatnonzero(self.selection.touches(store.records(partition))).tolist():
                if not len(wanted):
                    break
                rows = store.read(partition, record, ("visit_id",))
                if rows is None or not np.isin(visit_id[wanted], rows["visit_id"]).any():
                    continue
                if (rows := store.read(partition, record)) is None:
                    continue
                for number in wanted.tolist():
                    at = (rows["visit_id"] == visit_id[number]) & (rows["user_id"] == user_id[number])
                    for place in np.flatnonzero(at & self.selection.mask(rows))[:1].tolist():
                        wanted = wanted[wanted != number]
                        yield number, {name: column[place : place + 1].copy() for name, column in rows.items()}

    def histories(self, row: Rows) -> dict[str, HistorySlice]:
        """Return the entries of a row's histories, by the name of the history."""
        return self.features.read_histories(row, self.data.histories, self._as_of(row), self.space)

    def _as_of(self, rows: Rows) -> np.ndarray:
        return freeze_rows(rows, self.as_of_limit_ms, self.frozen)

    def attention(self, engine: HybridEngine, rows: Sequence[Rows]) -> list[dict[str, np.ndarray]]:
        """Return the shares of the entries of each row's histories, ``[entries, heads]``. Collective."""
        packed = [self.features.pack(row, self.data.histories, self._as_of(row), self.space) for row in rows]
        batches = (unpack(batch, self.features.layout, {}) for batch in packed)
        shares = [weights for _, weights in engine.attention(batches)]
        # After its own rows, a rank yields empty batches as long as others have rows.
        return [
            {name: of_history.cpu().numpy() for name, of_history in of_row.items()} for of_row in shares[: len(rows)]
        ]

    def earlier_visits(self, row: Rows) -> int:
        """Return the number of visits of a row's user to its author that the histories show."""
        authors = self.data.histories.column("author_id")
        runs = zip(
            *(ends[0].tolist() for ends in self.data.histories.runs(row["user_id"], self._as_of(row))), strict=True
        )
        return sum(int(np.count_nonzero(authors[first:stop] == row["author_id"][0])) for first, stop in runs)


def write_attention_examples(
    file: Path,
    engine: HybridEngine,
    held_out: Predictions,
    behaviours: Sequence[str],
    inputs: HeldOutInputs,
    world: World,
) -> None:
    """Write the attention to the histories of a few rows of all ranks. Collective.

    Args:
        file: to write, by the first rank.
        engine: the trained model.
        held_out: predictions of this rank.
        behaviours: names of their columns.
        inputs: the held-out range.
        world: the ranks.

    Raises:
        UserError: a record is corrupt and the dataset does not skip such records.
    """
    did: np.ndarray = held_out.label.numpy() * held_out.mask.numpy() > 0
    user_id, visit_id = held_out.user_id.numpy(), held_out.visit_id.numpy()
    columns: list[np.ndarray] = [did.sum(1) == 0, partition_of(visit_id, _HASHES), visit_id, user_id]
    first = np.lexsort(columns[::-1])[:_CONSIDERED]
    keys: list[_Key] = list(zip(*(column[first].tolist() for column in columns), strict=True))
    rows: dict[_Key, Rows] = {}
    for number, row in inputs.read(user_id[first], visit_id[first]):
        if any(entries.lengths.any() for entries in inputs.histories(row).values()):
            rows[keys[number]] = row
    everyone = world.gather([(key, key in rows) for key in keys])
    considered = sorted(entry for of_rank in everyone or () for entry in of_rank)[:_CONSIDERED]
    chosen = world.agree([key for key, has_entries in considered if has_entries][:EXAMPLES])
    place = dict(zip(keys, first.tolist(), strict=True))
    own = [key for key in chosen if key in rows]
    documents = {}
    for key, shares in zip(own, inputs.attention(engine, [rows[key] for key in own]), strict=True):
        row, at = rows[key], place[key]
        histories = {
            name: HistoryAttention(entries, shares[name], same_values(inputs.features, row, entries))
            for name, entries in inputs.histories(row).items()
        }
        explanation = Explanation(
            user_id=int(row["user_id"][0]),
            item_id=int(row["item_id"][0]),
            author_id=int(row["author_id"][0]),
            at_ms=int(row["request_ms"][0]),
            probabilities=dict(zip(behaviours, held_out.probability[at].tolist(), strict=True)),
            histories=histories,
        )
        documents[key] = {
            "visit_id": int(row["visit_id"][0]),
            "did": [name for name, happened in zip(behaviours, did[at].tolist(), strict=True) if happened],
            "earlier_visits_of_author": inputs.earlier_visits(row),
            **explanation_document(explanation, inputs.data.spec.behaviours, ENTRIES),
        }
    parts = world.gather(documents)
    if parts is not None:
        found: dict[_Key, Any] = {key: document for part in parts for key, document in part.items()}
        examples = [found[key] for key in sorted(found)]
        write_json(file, {"timezone": inputs.data.spec.timezone, "examples": examples})
