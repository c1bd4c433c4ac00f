"""Rows of candidates in the form that an export's ``score_one.py`` reads, and its probabilities for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.features.dense_inputs import statistic_name
from trainer.data.features.past_counts import PastCounts
from trainer.data.features.segment_index import SegmentIndex
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS, Rows
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.validation import Columns
from trainer.serving.exported_model import ExportedModel
from trainer.serving.scoring import candidate_rows

REFUSED = ("trainer", "modules", "launch", "configs", "torchrec", "fbgemm_gpu", "deepspeed", "pyarrow")

DRIVER = f"""
import json, runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REFUSED}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
exports = json.load(sys.stdin)
found = []
for directory, rows in exports.items():
    probabilities = runpy.run_path(directory + "/score_one.py")["probabilities"]
    found.append([probabilities(row) for row in rows])
assert not {set(REFUSED)} & set(sys.modules)
print(json.dumps(found))
"""


def row_documents(model: ExportedModel, path: str, candidates: Columns) -> list[dict[str, Any]]:
    """Return a document for each candidate: the features, counts and visits that were known at its request."""
    spec, rows = model.data.spec, candidate_rows(model, path, candidates)
    space = None if model.space is None else model.space.at(model.space.newest)
    slices = model.features.read_histories(rows, model.data.histories, rows["request_ms"], space)
    starts = {name: np.cumsum(visits.lengths) - visits.lengths for name, visits in slices.items()}
    past = PastCounts(spec, model.config.features)
    of_past = past.read(rows, model.data.histories, rows["request_ms"])
    names = (*map(statistic_name, spec.statistics), *past.keys)
    counts = np.concatenate([rows["stat"], of_past], axis=1).reshape(len(rows["user_id"]), len(names), -1)
    of_rows, of_visits = codes_of(model, rows, slices)
    vectors = vectors_of(model, rows)
    documents = []
    for row in range(len(rows["user_id"])):
        histories = {
            name: [
                {
                    "item_id": int(visits.item_id[at]),
                    "author_id": int(visits.author_id[at]),
                    "request_ms": int(visits.request_ms[at]),
                    "domain": DOMAINS[visits.domain[at]],
                    "tag": int(visits.tag[at]) if spec.tag else 0,
                    "behaviours": [name for bit, name in enumerate(spec.behaviours) if visits.bits[at] >> bit & 1],
                    **({"codes": {set_: codes[at] for set_, codes in of_visits[name].items()}} if of_visits else {}),
                    "content": {
                        table: vectors[f"{name}_{table}"][at]
                        for table in model.config.features.content
                        if f"{name}_{table}" in vectors
                    },
                }
                for at in range(starts[name][row], starts[name][row] + visits.lengths[row])
            ]
            for name, visits in slices.items()
        }
        documents.append(
            {
                **{name: int(rows[name][row]) for name in ("user_id", "item_id", "author_id", "request_ms")},
                "domain": DOMAINS[rows["domain"][row]],
                "side": {side.name: int(rows["side"][row, k]) for k, side in enumerate(spec.side)},
                "dense": {dense.name: float(rows["dense"][row, k]) for k, dense in enumerate(spec.dense)},
                "statistics": {
                    name: dict(zip(("rows", *spec.behaviours), map(float, counts[row, k]), strict=True))
                    for k, name in enumerate(names)
                },
                "histories": histories,
                **({"codes": {set_: codes[row] for set_, codes in of_rows.items()}} if of_rows else {}),
                "content": {table: vectors[table][row] for table in model.config.features.content},
            }
        )
    return documents


def codes_of(
    model: ExportedModel, rows: Rows, slices: Mapping[str, HistorySlice]
) -> tuple[dict[str, list[list[int]]], dict[str, dict[str, list[list[int]]]]]:
    """Return code set -> codes of each candidate, and history -> code set -> codes of each visit; empty without one."""
    of_rows: dict[str, list[list[int]]] = {}
    of_visits: dict[str, dict[str, list[list[int]]]] = (
        {name: {} for name in slices} if model.config.features.codes else {}
    )
    for code_set in model.features.codes.sets:
        file = CodeFile.read(Path(code_set.config.file))
        index = SegmentIndex(file.author_id, file.item_id, file.start_ms, file.known_ms)

        def tuples(places: np.ndarray, file: CodeFile = file) -> list[list[int]]:
            return [file.codes[place].tolist() if place >= 0 else [] for place in places.tolist()]

        of_rows[code_set.name] = tuples(index.latest(rows["author_id"], rows["request_ms"]))
        for name, visits in slices.items() if code_set.in_histories else ():
            as_of = np.repeat(rows["request_ms"], visits.lengths)
            begin = visits.request_ms
            places = index.on_air(visits.item_id, begin, begin + 1, as_of, "entry")
            of_visits[name][code_set.name] = tuples(np.where(visits.domain == DOMAINS.index("live"), places, -1))
    return of_rows, of_visits


def vectors_of(model: ExportedModel, rows: Rows) -> dict[str, list[list[float] | None]]:
    """Return lookup -> vector of each candidate or visit, None without one."""
    space = None if model.space is None else model.space.at(model.space.newest)
    packed = model.features.pack(rows, model.data.histories, rows["request_ms"], space)
    found: dict[str, list[list[float] | None]] = {}
    for of_table in packed.content(model.features.layout).values():
        vectors = of_table.vectors.tolist()
        for name, places in of_table.places.items():
            found[name] = [vectors[place] if place >= 0 else None for place in places.tolist()]
    return found


def plain_probabilities(exports: Mapping[Path, Sequence[Mapping[str, Any]]]) -> list[np.ndarray]:
    """Run each export's script on rows, in one process that cannot import Limelight; ``[rows, behaviours]`` each."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", DRIVER],
        input=json.dumps({str(directory): list(rows) for directory, rows in exports.items()}),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [np.array([list(row.values()) for row in rows]) for rows in json.loads(done.stdout)]
