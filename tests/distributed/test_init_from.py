"""Warm start of new models from old runs, against a reference that looks up every row separately."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.embeddings import initial_rows
from tests.distributed.init_ranks import MISTAKES, STARTS, Start
from tests.distributed.old_run import (
    DIMS,
    ITEMS,
    NEW_AUTHORS,
    OLD_AUTHORS,
    config_of,
    features_of,
    old_changes,
    old_features,
    vocabularies,
    write_old_run,
)
from trainer.checkpoint.reader import Checkpoint
from trainer.data.features.fit import feature_layout
from trainer.data.features.packed_side import side_ranges
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.write_dataset import simulate

Outcomes = dict[int, dict[str, Any]]

CHANGED = {STARTS[2]: ({"feature device"}, {"feature city_tier"}), STARTS[3]: (set(), {"feature city_tier"})}
"""Start -> ranges of the packed table that only the old model has, and ranges that only the new model has."""

_made: dict[str, Any] = {}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each old run."""
    if "old" not in _made:
        directory = tmp_path_factory.mktemp("init")
        simulate(directory / "world", 40, 2, 2, 3)
        spec = DatasetSpec.load(directory / "world")
        runs = sorted({(start.seed, start.then) for start in STARTS})
        _made["old"] = {
            f"{seed}-{then}": write_old_run(directory / f"{seed}-{then}", spec, seed, then) for seed, then in runs
        }
        shutil.copytree(directory / f"{STARTS[0].seed}-{STARTS[0].then}", directory / "damaged")
        (file,) = (directory / "damaged").rglob("__1_0.distcp")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        _made["directory"], _made["spec"] = directory, spec
    return _made["old"]


@pytest.fixture(scope="module")
def outcomes(old: dict[str, dict[str, Tensor]], run_ranks: Any) -> Outcomes:
    """Return by number of ranks the results of init_ranks.py, which is started once for all tests."""
    directory, found = _made["directory"], Outcomes()
    for world in (1, 2):
        run_ranks("tests.distributed.init_ranks", directory, directory / "world", ranks=world)
        found[world] = torch.load(directory / f"{world}.pt", weights_only=False)
    return found


def row_pairs(start: Start) -> dict[str, dict[int, int]]:
    """Return by table and new row the old row of the same meaning."""
    theirs, ours = (users.tolist() for users in vocabularies(start.seed))
    users = {ours.index(user) + 1: theirs.index(user) + 1 for user in ours if user in theirs}
    spec = _made["spec"]
    before = side_ranges(old_features(spec, start.seed).fitted.layout, config_of(old_changes(start.seed)).features)
    now = side_ranges(feature_layout(spec), config_of(start.changes).features)
    values = {
        now[name].start + k: rows.start + k for name, rows in before.items() if name in now for k in range(len(rows))
    }
    assert any(new != row for new, row in values.items()), "no range has moved"
    assert (before.keys() - now.keys(), now.keys() - before.keys()) == CHANGED.get(start, (set(), set()))
    return {
        "user": {0: 0, **users},
        "author": {row: row for row in range(OLD_AUTHORS)},
        "item": {row: row for row in range(ITEMS)},
        "side": {0: 0, **values},
    }


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_rows_and_their_optimizer_state_are_those_of_the_same_meaning(
    old: dict[str, dict[str, Tensor]], outcomes: Outcomes, start: Start, world: int
) -> None:
    before, outcome = old[f"{start.seed}-{start.then}"], outcomes[world]["taken"][str(start)]
    features = features_of(_made["spec"], config_of(start.changes), vocabularies(start.seed)[1])
    kept = row_pairs(start)
    for table in features.tables:
        name = table.name
        expected = initial_rows(table, 100 + start.seed, 0, table.rows)
        state = torch.zeros(table.rows, table.dim) if start.now == "adagrad" else torch.zeros(table.rows)
        taken = not start.tables or name in start.tables
        for new, row in kept[name].items() if taken else ():
            expected[new] = before[name][row]
            if start.now == start.then and start.now != "sgd":
                state[new] = before[f"{name}/accumulated"][row]
        assert torch.equal(outcome["tensors"][name], expected), name
        if start.now != "sgd":
            assert torch.equal(outcome["tensors"][f"{name}/accumulated"], state), name
        if taken:
            assert len(kept[name]) > 1 and (name == "item" or len(kept[name]) < table.rows)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_the_dense_network_is_taken_whole_or_not_at_all(
    old: dict[str, dict[str, Tensor]], outcomes: Outcomes, start: Start, world: int
) -> None:
    before, outcome = old[f"{start.seed}-{start.then}"], outcomes[world]["taken"][str(start)]
    names = list(outcome["working"])
    assert len(names) > 5
    for name in names:
        assert torch.equal(outcome["working"][name], outcome["tensors"][name])
        assert torch.equal(outcome["tensors"][name], before[name]) == start.dense, name
        assert not outcome["tensors"][f"{name}/exp_avg"].any()
    assert outcome["tensors"]["dense_step"] == 0


@pytest.mark.parametrize("world", [1, 2])
def test_the_report_tells_what_was_taken(outcomes: Outcomes, world: int) -> None:
    start = STARTS[3]
    report, kept = outcomes[world]["taken"][str(start)]["report"], row_pairs(start)["user"]
    theirs, ours = vocabularies(start.seed)
    (user,) = report.tables
    assert (user.table, user.rows, user.taken) == ("user", len(ours) + 1, len(kept))
    assert user.left == len(theirs) + 1 - len(kept) > 0
    assert not user.optimizer and report.optimizers == ("rowwise_adagrad", "adagrad")
    assert set(report.fresh) == set(report.unused) == {"author", "item", "side"}
    text = outcomes[world]["taken"][str(start)]["text"]
    for words in ("(step 7)", "starts anew: it was rowwise_adagrad and is adagrad", "dense network: fresh"):
        assert words in text
    line = next(line.split() for line in text.splitlines() if line.startswith("user"))
    assert line == ["user", "anew", *(str(n) for n in (91, user.taken, 91 - user.taken, 71 - user.taken))]


def test_a_rank_reads_only_pieces_that_it_has_rows_of(outcomes: Outcomes) -> None:
    start = STARTS[1]
    first, second = (set(pieces) for pieces in outcomes[2]["taken"][str(start)]["pieces"])
    half = math.ceil(NEW_AUTHORS / 2)
    weights = _pieces_of_author(start)
    assert len(weights) > 1
    for rank, pieces in enumerate((first, second)):
        low, high = rank * half, min(NEW_AUTHORS, (rank + 1) * half)
        expected = {piece for piece in weights if piece[1][0] < high and low < piece[1][0] + piece[2][0]}
        assert pieces & weights == expected
    assert first & weights != weights


def _pieces_of_author(start: Start) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    stored = Checkpoint.open(_made["directory"] / f"{start.seed}-{start.then}").model.tables["author"].weight
    return {(str(piece.file), piece.offsets, piece.sizes) for piece in stored.pieces}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_one_line_on_every_rank(outcomes: Outcomes, mistake: str) -> None:
    messages = outcomes[2]["mistakes"][mistake]
    assert len(messages) == 2 and len(set(messages)) == 1
    assert MISTAKES[mistake][1] in messages[0] and "\n" not in messages[0]


def test_the_dimensions_are_the_jobs(outcomes: Outcomes) -> None:
    plan = outcomes[2]["taken"][str(STARTS[0])]["plan"]
    assert {entry["table"]: entry["dim"] for entry in plan} == DIMS
