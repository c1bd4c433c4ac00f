"""Inputs of the towers: pairs of training rows, and requests for authors that give the same author vector."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.embeddings import initial_rows
from tests.semantic_ids.align_world import job_arguments, simulate_world
from trainer.config.align import load_align
from trainer.console.errors import UserError
from trainer.data.features.fit import fit_features
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import Rows
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import RankingBatch, unpack
from trainer.semantic_ids import align_features
from trainer.semantic_ids.align_content import AuthorContent
from trainer.semantic_ids.align_features import AuthorRequests, PairFeatures, choose_positives, tower_inputs
from trainer.semantic_ids.align_model import build_towers, make_features
from trainer.semantic_ids.align_popularity import AuthorPopularity, positive_rows
from trainer.semantic_ids.segments import SegmentVectors

TRAINING = Selection(emit_until=1_709_654_400_000)
"""Rows of the first two days, until 2024-03-05T16:00 UTC."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_world(tmp_path_factory.mktemp("align_features") / "world")


@pytest.fixture(scope="module")
def data(world: Path) -> Dataset:
    return Dataset.open(str(world))


@pytest.fixture(scope="module")
def features(world: Path, data: Dataset) -> PairFeatures:
    settings = ("towers.content_only=0.5", 'towers.unseen="content"', "towers.log_q_hours=0")
    settings += ("features.past.user={half_life_minutes=60}",)
    file, *overrides = job_arguments(world, world / "run", *settings)
    config = load_align(file, overrides)
    fitted = fit_features(data.spec, data.store, data.histories, config.features, TRAINING)
    popularity = AuthorPopularity.count(data, TRAINING, [0])
    content = AuthorContent(SegmentVectors.open(str(world)), 2.0)
    return make_features(config, data.spec, fitted, content, popularity)


def some_rows(data: Dataset) -> Rows:
    """Rows of all times, also of authors that the training range does not have."""
    return {
        name: np.concatenate([data.store.read(part, 0)[name] for part in range(4)])  # type: ignore[index]
        for name in data.store.read(0, 0) or {}
    }


def outputs(world: Path, features: PairFeatures, batch: RankingBatch) -> Tensor:
    """Return the outputs of the towers with initial values."""
    file, *overrides = job_arguments(world, world / "run")
    towers = build_towers(load_align(file, overrides), features)
    tables = {table.name: initial_rows(table, 1, 0, table.rows) for table in features.base.tables}
    table_of = {lookup.name: lookup.table for lookup in features.base.lookups}
    embedded, lengths = {}, {}
    for keyed in batch.ids:
        for name in keyed.keys():  # noqa: SIM118
            embedded[name] = tables[table_of[name]][keyed[name].values()]
            lengths[name] = keyed[name].lengths()
    with torch.no_grad():
        return towers(embedded, lengths, batch.dense)


def unpacked(features: PairFeatures, packed: PackedBatch) -> RankingBatch:
    return unpack(packed, features.layout, {})


def test_a_batch_has_the_positive_rows_alone(data: Dataset, features: PairFeatures) -> None:
    rows = some_rows(data)
    positive = positive_rows(rows, [0])
    assert 0 < positive.sum() < len(positive)
    batch = unpacked(features, features.pack(rows, data.histories, rows["request_ms"]))
    assert batch.rows == positive.sum() and batch.left_out_rows == (~positive).sum()
    assert batch.author_id is not None and batch.log_q is not None and batch.label.shape == (batch.rows, 0)
    for name in ("visit_id", "user_id", "request_ms", "author_id"):
        assert getattr(batch, name).tolist() == rows[name][positive].tolist()
    author, request = rows["author_id"][positive], rows["request_ms"][positive]
    assert batch.log_q.tolist() == features.popularity.log_q(author, request, 1.0).tolist()
    content = features.content.read(author, request)
    assert torch.equal(batch.dense[:, features.base.n_dense : -1], torch.from_numpy(content))
    known = features.popularity.known(author)
    share = float(batch.dense[:, -1].sum()) / known.sum()
    assert 0.3 < share < 0.7, "half of the rows of known authors use content alone"
    assert not batch.dense[~known, -1].any()
    evaluated = unpacked(features, features.evaluated().pack(rows, data.histories, rows["request_ms"]))
    assert (evaluated.dense[:, -1].numpy() > 0).tolist() == known.tolist()


def author_ids(batch: RankingBatch, name: str = "author") -> np.ndarray:
    (found,) = (keyed[name].values().numpy() for keyed in batch.ids if name in keyed.keys())  # noqa: SIM118
    return np.asarray(found)


def test_authors_who_are_not_trained_on_and_a_share_of_the_rows_read_the_unknown_id(
    data: Dataset, features: PairFeatures
) -> None:
    dropped = dataclasses.replace(features, id_dropout=0.3, seed=5)
    rows = some_rows(data)

    def pack(of: PairFeatures, chosen: Rows = rows) -> RankingBatch:
        return unpacked(of, of.pack_all(chosen, data.histories, chosen["request_ms"]))

    plain, training, evaluated = pack(features.evaluated()), pack(dropped), pack(dropped.evaluated())
    known = features.known(rows["author_id"])
    assert (evaluated.dense[:, -1] == 1).all() and (training.dense[:, -1] == 1).all(), "the gate reads the id"
    kept = author_ids(evaluated)
    assert (kept[~known] == 0).all() and (kept[known] == author_ids(plain)[known]).all() and (kept[known] > 0).all()
    read = author_ids(training)
    hidden = read == 0
    assert 0.25 < hidden[known].mean() < 0.35 and hidden[~known].all() and (read[~hidden] == kept[~hidden]).all()
    assert training.author_id is not None and training.author_id.tolist() == rows["author_id"].tolist()
    assert torch.equal(training.dense[:, :-1], plain.dense[:, :-1])
    for lookup in ("short_author", "live_author", "side"):
        assert (author_ids(training, lookup) == author_ids(plain, lookup)).all(), "the id of the candidate alone"
    # The choice depends on the visit and the seed alone: not on the order, the batch or the rank that reads a row.
    order = np.random.default_rng(0).permutation(len(hidden))
    for part in (order[: len(order) // 3], order[len(order) // 3 :]):
        again = pack(dropped, {name: column[part] for name, column in rows.items()})
        assert (author_ids(again) == read[part]).all()
    other = author_ids(pack(dataclasses.replace(dropped, seed=6))) == 0
    assert 0.25 < other[known].mean() < 0.35 and 0.5 < (other == hidden)[known].mean() < 0.66


def test_the_job_decides_what_an_unseen_author_reads(world: Path, data: Dataset, features: PairFeatures) -> None:
    def made(*overrides: str) -> PairFeatures:
        file, *rest = job_arguments(world, world / "run", "run.seed=7", *overrides)
        config, base = load_align(file, rest), features.base
        return make_features(config, data.spec, base.fitted, features.content, features.popularity)

    assert made('towers.unseen="content"').id_dropout is None
    hiding = made('towers.unseen="unknown_id"', "towers.id_dropout=0.4")
    assert (hiding.id_dropout, hiding.seed, hiding.evaluated().id_dropout) == (0.4, 7, 0.0)
    assert made('towers.unseen="unknown_id"', 'towers.author="features"').id_dropout is not None
    assert made('towers.unseen="unknown_id"', 'towers.author="content"').id_dropout is None
    assert made("towers.log_q_hours=0").window_ms is None and made("towers.log_q_hours=1.5").window_ms == 5_400_000


def test_authors_below_the_least_count_of_their_table_use_content_alone(data: Dataset, features: PairFeatures) -> None:
    rows = some_rows(data)
    vocabulary = features.popularity.authors[::2]
    some = dataclasses.replace(features.evaluated(), vocabulary=vocabulary)
    batch = unpacked(some, some.pack(rows, data.histories, rows["request_ms"]))
    assert batch.author_id is not None
    known, author = batch.dense[:, -1] > 0, batch.author_id.numpy()
    expected = np.isin(author, vocabulary) & features.popularity.known(author)
    assert known.tolist() == expected.tolist() and 0 < known.sum() < len(known)


def test_a_request_for_an_author_gives_the_vector_of_a_row_at_that_time(
    world: Path, data: Dataset, features: PairFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, evaluated = some_rows(data), features.evaluated()
    positive = positive_rows(rows, [0])
    batch = unpacked(evaluated, evaluated.pack(rows, data.histories, rows["request_ms"]))
    of_rows = outputs(world, evaluated, batch)
    requests = AuthorRequests(data, evaluated)
    blocks = list(requests.batches(rows["author_id"][positive], rows["request_ms"][positive], rows=50))
    assert all(block.rows == 50 for block in blocks), "the last batch is filled up"
    of_requests = torch.cat([outputs(world, evaluated, block) for block in blocks])[: batch.rows]
    dim = of_rows.shape[1] // 2
    torch.testing.assert_close(of_requests[:, dim:], of_rows[:, dim:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(of_requests[:, :dim], of_rows[:, :dim]), "requests have no user"
    monkeypatch.setattr(align_features, "REQUESTS_AT_ONCE", 100)
    again = list(requests.batches(rows["author_id"][positive], rows["request_ms"][positive], rows=50))
    assert [block.dense.tolist() for block in again] == [block.dense.tolist() for block in blocks]
    none = list(requests.batches(np.empty(0, np.int64), np.empty(0, np.int64), rows=50))
    assert none == []


def test_the_towers_read_features_of_their_own_side_only(features: PairFeatures) -> None:
    inputs, spec = tower_inputs(features), features.spec
    sides = [side.of for side in spec.side]
    assert {sides[place] for place in inputs.user_ids["side"]} == {"user"}
    assert {sides[place] for place in inputs.author_ids["side"]} == {"author"}
    names = features.base.dense_names
    assert {names[k].split(":")[1] for k in inputs.user_dense} == {"user"}
    assert {names[k].split(":")[0] for k in inputs.user_dense} == {"stat", "past"}
    assert {names[k].split(":")[1] for k in inputs.author_dense} == {"author"}
    assert inputs.content == len(names) and inputs.vector_dim == 128
    assert [history[0] for history in inputs.histories] == ["short_item", "live_item"]


def test_positives_are_clicks_or_what_the_job_says(world: Path, features: PairFeatures) -> None:
    def chosen(*overrides: str) -> tuple[str, ...]:
        file, *rest = job_arguments(world, world / "run", *overrides)
        return choose_positives(features.spec, load_align(file, rest))

    assert chosen() == ("click",)
    assert chosen("data.positives=['gift', 'follow']") == ("gift", "follow")
    with pytest.raises(UserError, match=r"data\.positives: the dataset has no behaviour 'x'; it has click, "):
        chosen("data.positives=['x']")
