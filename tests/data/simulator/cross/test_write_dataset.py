"""Tests of the cross world: each interest is visible in its own sequence only, and no input leaks an outcome."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from trainer.data.format.content_vectors import ITEM_VECTORS, ContentVectors
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.config import BEHAVIOURS
from trainer.data.simulator.cross import exposures
from trainer.data.simulator.cross.config import AUTHORS, GENRES, NICHES, STYLES, CrossConfig
from trainer.data.simulator.cross.population import genre_of, make_catalogue, make_users, style_of
from trainer.data.simulator.cross.write_dataset import simulate_cross

# A run is wrong, not unlucky, beyond so many standard errors.
SIGMAS = 4.5
SEQUENCES = ("short", "long", "author", "live_long", "mixed")
CLICK, EFFECTIVE, LONG = range(3)
LENGTH = 30


@dataclass(frozen=True)
class Rows:
    """Candidates late in the log: rows, true probabilities ``[n, behaviours]``, and an estimate from each sequence."""

    columns: dict[str, np.ndarray]
    truth: np.ndarray
    estimates: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cross") / "dataset"
    simulate_cross(out, users=64, days=60, partitions=2, seed=5)
    return out


@pytest.fixture(scope="module")
def rows(path: Path) -> Rows:
    spec = DatasetSpec.load(path)
    columns = read_rows(str(path), spec)
    late = np.flatnonzero(columns["request_ms"] > spec.span_ms[0] + 3 * (spec.span_ms[1] - spec.span_ms[0]) // 4)
    late = np.random.default_rng(0).permutation(late)[:3_000]
    columns = {name: column[late] for name, column in columns.items()}
    truth = pa.concat_tables([pq.read_table(file) for file in sorted((path / "truth").glob("*.parquet"))])
    visit = truth["visit_id"].to_numpy()
    order = np.argsort(visit)
    line = order[np.searchsorted(visit[order], columns["visit_id"])]
    chances = np.stack([truth[f"p_{name}"].to_numpy()[line] for name in BEHAVIOURS], axis=1)
    return Rows(columns, chances.astype(np.float64), _read_sequences(path, spec, columns))


def _read_sequences(path: Path, spec: DatasetSpec, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a simple estimate of each interest from the sequence that reveals it, by candidate."""
    history = Histories(path, spec)
    first, stop = history.runs(columns["user_id"], columns["request_ms"])
    item, author, bits, ordinal = (history.column(name) for name in ("item_id", "author_id", "bits", "ordinal"))
    vector = ContentVectors.open(path / ITEM_VECTORS).vectors.astype(np.float32)
    estimates: dict[str, list[float]] = {name: [] for name in SEQUENCES}
    for row, (candidate, candidate_author) in enumerate(zip(columns["item_id"], columns["author_id"], strict=True)):
        video, live = (np.arange(first[row, domain], stop[row, domain]) for domain in range(2))

        def nearest(entries: np.ndarray, candidate: int = candidate) -> np.ndarray:
            return bits[entries[np.argsort(-(vector[item[entries]] @ vector[candidate]), kind="stable")[:LENGTH]]]

        def share(entries: np.ndarray, behaviour: int, expected: float = 0.5) -> float:
            return ((entries >> behaviour & 1).sum() + 2 * expected) / (len(entries) + 2)

        estimates["short"].append(np.mean(genre_of(author[video[-20:]]) == genre_of(candidate_author)))
        similar = nearest(video)
        estimates["long"].append(share(similar[similar & 1 == 1], EFFECTIVE))
        estimates["author"].append(share(bits[video[author[video] == candidate_author][-LENGTH:]], CLICK))
        estimates["live_long"].append(share(nearest(live), CLICK, 0.3))
        both = np.concatenate([video[-1_000:], live[-200:]])
        both = both[bits[both] >> LONG & 1 == 1]
        both = both[np.argsort(ordinal[both])][-20:]
        estimates["mixed"].append(np.mean(style_of(author[both]) == style_of(candidate_author)))
    return {name: np.array(values) for name, values in estimates.items()}


def _achievable(rows: Rows, behaviour: str, names: tuple[str, ...]) -> float:
    """Return the AUC of a linear model of the estimates ``names``, fitted on one half of the rows, tested on the other.

    Labels are the true probabilities: a row counts as a positive with weight p and as a negative with weight 1 - p.
    """
    p = rows.truth[:, BEHAVIOURS.index(behaviour)]
    inputs = np.stack([np.ones(len(p)), *(rows.estimates[name] for name in names)], axis=1)
    half = len(p) // 2
    weights = np.linalg.lstsq(inputs[:half], np.log(p / (1 - p))[:half])[0]
    score, p = (inputs @ weights)[half:], p[half:]
    return _soft_auc(score, p)


def _soft_auc(score: np.ndarray, p: np.ndarray) -> float:
    order = np.argsort(score, kind="stable")
    positive, negative = p[order], 1 - p[order]
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("behaviour", ["click", "long_view", "like", "gift"])
def test_without_a_sequence_less_can_be_achieved(rows: Rows, name: str, behaviour: str) -> None:
    others = tuple(other for other in SEQUENCES if other != name)
    full, without = (_achievable(rows, behaviour, names) for names in (SEQUENCES, others))
    best = _soft_auc(rows.truth[:, BEHAVIOURS.index(behaviour)], rows.truth[:, BEHAVIOURS.index(behaviour)])
    assert without + 0.003 < full < best, (name, behaviour)


def test_labels_follow_the_truth_and_no_input_knows_more(rows: Rows) -> None:
    """Test that label minus probability is uncorrelated with every input that is known at the request.

    An input that leaked an outcome would be correlated with it.
    """
    columns = rows.columns
    inputs = {f"side {k}={value}": columns["side"][:, k] == value for k in range(7) for value in range(1, 7)}
    inputs |= {f"dense {k}": columns["dense"][:, k] for k in range(columns["dense"].shape[1])}
    inputs |= {f"statistic {k}": np.log1p(columns["stat"][:, k]) for k in range(columns["stat"].shape[1])}
    inputs |= {f"sequence {name}": values for name, values in rows.estimates.items()}
    inputs["constant"] = np.ones(len(rows.truth))
    for k, behaviour in enumerate(BEHAVIOURS):
        p = rows.truth[:, k]
        surprise = columns["label"][:, k] - p
        for name, values in inputs.items():
            values = values.astype(np.float64)
            error = np.sqrt((values**2 * p * (1 - p)).sum())
            assert abs((values * surprise).sum()) <= SIGMAS * error, (behaviour, name)


def test_what_is_shown_and_when_does_not_depend_on_what_users_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CrossConfig(users=5, days=4, seed=2)
    catalogue, users = make_catalogue(config), make_users(config)
    before = next(exposures.simulate_visits(config, catalogue, users))
    monkeypatch.setattr(exposures, "LIVE_WEIGHTS", {"constant": (3.0,) * len(BEHAVIOURS)})
    after = next(exposures.simulate_visits(config, catalogue, users))
    for name in ("visit_id", "user_id", "item_id", "author_id", "domain", "request_ms"):
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    live = before["domain"] == 1
    assert (before["delay"] >= 0)[:, live].sum() * 1.5 < (after["delay"] >= 0)[:, live].sum()


def test_a_visit_is_over_before_the_next(path: Path) -> None:
    """Test that visits do not overlap, so a history at a request holds all earlier visits, and only finished ones."""
    spec = DatasetSpec.load(path)
    events = pa.concat_tables([pq.read_table(file) for file in sorted((path / "events").glob("*.parquet"))])
    of = {name: events.filter(pc.equal(events["event"].cast(pa.string()), name)) for name in ("exposure", "exit")}
    names = ["visit_id", "user_id", "item_id", "author_id", "domain", "time_ms"]
    start, end = (table.select(names).sort_by("visit_id").to_pydict() for table in of.values())
    assert start["visit_id"] == end["visit_id"] and len(start["visit_id"]) == spec.exposures
    user, begins, ends = np.array(start["user_id"]), np.array(start["time_ms"]), np.array(end["time_ms"])
    same = user[1:] == user[:-1]
    assert (begins[1:] > ends[:-1])[same].all() and same.mean() > 0.99
    items = pq.read_table(path / "items.parquet").to_pydict()
    item = np.array(start["item_id"])
    assert (np.array(items["start_ms"])[item] <= begins).all(), "nothing is shown before it is there"
    assert (np.array(items["author_id"])[item] == np.array(start["author_id"])).all()
    assert (np.array(items["domain"])[item] == np.array(start["domain"])).all()
    lengths = np.bincount(user)
    assert lengths.max() > 10_000 and 2_000 < np.median(lengths) < 5_000


def test_items_have_a_tag_and_a_vector(path: Path) -> None:
    spec = DatasetSpec.load(path)
    assert spec.tag == "item_niche"
    niche = pq.read_table(path / "items.parquet")["item_niche"].to_numpy()
    assert niche.min() == 1 and niche.max() == NICHES
    table = ContentVectors.open(path / ITEM_VECTORS)
    assert table.ids.tolist() == list(range(len(niche)))
    vectors = table.vectors[:2_000].astype(np.float32)
    similar = vectors @ vectors.T
    same = niche[:2_000, None] == niche[:2_000]
    assert similar[same].min() > 0.6 and (similar[~same] > similar[same].min()).mean() < 0.01
    history = Histories(path, spec)
    np.testing.assert_array_equal(history.column("tag"), niche[history.column("item_id")])


def test_same_values_same_world() -> None:
    config = CrossConfig(users=3, days=3, seed=9)
    first, second = (
        next(exposures.simulate_visits(config, make_catalogue(config), make_users(config))) for _ in range(2)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    other = CrossConfig(users=3, days=3, seed=10)
    assert not np.array_equal(make_users(config).bond, make_users(other).bond)


def test_genres_and_styles_are_crossed() -> None:
    author = np.arange(AUTHORS)
    pairs = np.bincount(genre_of(author) * STYLES + style_of(author), minlength=GENRES * STYLES)
    assert (pairs == AUTHORS // (GENRES * STYLES)).all()
