"""The highlight benchmark: its metrics, its parts by time, its inputs, and all of it at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau
from sklearn.metrics import average_precision_score, f1_score

from benchmarks.quality import highlights, paired_users
from benchmarks.quality.foresight_world import write_topic_codes
from benchmarks.quality.highlight_metrics import (
    METRICS,
    average_precision,
    f1_of_half,
    find_highlights,
    room_metrics,
    tau_of_distant,
)
from benchmarks.quality.highlight_models import (
    RoomBatch,
    SegmentInputs,
    SegmentsModel,
    highlight_loss,
)
from benchmarks.quality.highlight_rooms import (
    PARTS,
    TEST,
    TRAIN,
    VALIDATE,
    HighlightRoom,
    HighlightRooms,
    read_scores,
    rule_predictions,
)
from trainer.console.errors import UserError
from trainer.data.format.segment_codes import CodeFile
from trainer.data.simulator.segment_vectors import DEFAULT_NOISE
from trainer.data.simulator.write_dataset import simulate

numbers = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=12)
MINUTE_MS, DAY_MS = 60_000, 86_400_000


def code_file(rooms: dict[int, tuple[int, int, int]]) -> CodeFile:
    """Return a code file of rooms: item -> author, start in minutes, number of segments of one minute."""
    rows = [(item, author, start + place) for item, (author, start, count) in rooms.items() for place in range(count)]
    item, author, minute = np.array(rows, np.int64).T
    codes = (np.arange(len(rows)) % 3).astype(np.int32)[:, None]
    start_ms = minute * MINUTE_MS
    segment = np.arange(len(rows))
    return CodeFile(Path("codes"), "v", (3,), item, author, segment, start_ms + MINUTE_MS, codes, "", start_ms)


@given(numbers)
def test_average_precision_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, highlight = np.array([one for one, _ in pairs]), np.array([other > 3 for _, other in pairs])
    if highlight.all() or not highlight.any():
        assert np.isnan(average_precision(predicted, highlight))
    else:
        expected = average_precision_score(highlight, predicted)
        assert average_precision(predicted.astype(float), highlight) == pytest.approx(expected)


@given(numbers, st.integers(0, 5))
def test_f1_of_a_half_is_the_mean_over_the_orders_of_equal_predictions(pairs: list[tuple[int, int]], seed: int) -> None:
    predicted, highlight = np.array([float(one) for one, _ in pairs]), np.array([other > 3 for _, other in pairs])
    found = f1_of_half(predicted, highlight)
    if not highlight.any():
        assert np.isnan(found)
        return
    # Equal predictions in every rotation of their order: each of them is called equally often.
    count, expected = max(1, len(predicted) // 2), []
    tied = np.flatnonzero(predicted == np.sort(predicted)[-count])
    above = predicted > np.sort(predicted)[-count]
    for turn in range(len(tied)):
        called = above.copy()
        called[np.roll(tied, turn)[: count - above.sum()]] = True
        expected.append(f1_score(highlight, called))
    assert found == pytest.approx(np.mean(expected))


@given(numbers, st.sampled_from([0.0, 1.0, 2.5]))
def test_tau_of_distant_pairs_is_that_of_two_loops(pairs: list[tuple[int, int]], delta: float) -> None:
    predicted, score = np.array(pairs, float).T
    signs = [
        np.sign(predicted[i] - predicted[j]) * np.sign(score[i] - score[j])
        for i in range(len(pairs))
        for j in range(i)
        if abs(score[i] - score[j]) > delta
    ]
    found = tau_of_distant(predicted, score, delta)
    assert np.isnan(found) if not signs else found == pytest.approx(np.mean(signs))


def test_the_metrics_of_a_room() -> None:
    score = np.linspace(0, 1, 11)
    highlight = find_highlights(score)
    assert highlight.tolist() == [False] * 7 + [True] * 4
    perfect = room_metrics(score**3, score, highlight)
    # Five segments are called, four are highlights.
    assert perfect == pytest.approx({name: 1.0 for name in METRICS} | {"F1@50%": 2 * 4 / 9})
    worst = room_metrics(-score, score, highlight)
    assert worst["tau"] == worst["rho"] == worst["tau > 0.4"] == -1 and worst["F1@50%"] == 0
    constant = room_metrics(np.ones(11), score, highlight)
    assert constant["tau"] == constant["rho"] == constant["tau > 0.2"] == 0
    assert constant["mAP"] == pytest.approx(4 / 11)
    assert np.isnan(room_metrics(score, np.ones(11), np.ones(11, bool))["tau"])
    shuffled = np.random.default_rng(1).permutation(score)
    assert tau_of_distant(shuffled, score, 0.0) == pytest.approx(kendalltau(shuffled, score).statistic)


def test_no_room_is_in_two_parts_and_scores_have_the_units_of_the_training_rooms() -> None:
    rooms = {
        1: (7, 0, 10),
        2: (7, 40, 12),
        3: (8, 90, 20),
        4: (8, 120, 8),
        5: (7, 210, 9),
        6: (9, 300, 6),
        7: (9, 0, 4),
    }
    codes = code_file(rooms)
    score = np.random.default_rng(1).random(len(codes))
    # Room 3 goes on behind the first border; room 5 ends behind the second and begins before the third.
    borders = [100 * MINUTE_MS, 215 * MINUTE_MS, 250 * MINUTE_MS]
    found = HighlightRooms.make(codes, score, borders, history=15, limits=(9, 9, 9))
    items = {part: [int(codes.item_id[room.segments[0]]) for room in found.parts[part]] for part in PARTS}
    assert items == {TRAIN: [1, 2], VALIDATE: [4], TEST: [6]}
    trained = np.isin(codes.item_id, [1, 2])
    low, high = score[trained].min(), score[trained].max()
    assert np.allclose(found.score, (score - low) / (high - low))
    second = found.parts[TRAIN][1]
    assert codes.item_id[second.history].tolist() == [1] * 10, "all of the author's earlier segments"
    assert np.array_equal(second.score, found.score[second.segments[1:]])
    assert np.array_equal(second.highlight, find_highlights(score[second.segments])[1:])
    shorter = HighlightRooms.make(codes, score, borders, history=3, limits=(1, 1, 1))
    assert len(shorter.parts[TRAIN]) == 1
    assert {len(room.history) for room in shorter.parts[TRAIN]} <= {0, 3}
    # A room whose scores are not all known is left out.
    score[codes.item_id == 1] = np.nan
    assert HighlightRooms.make(codes, score, borders, 3, (9, 9, 9)).without_scores == 1
    with pytest.raises(UserError, match="no room with scores is in the part 'test'"):
        HighlightRooms.make(codes, score, [*borders[:2], DAY_MS], 3, (9, 9, 9))


def test_scores_come_from_a_plain_parquet_file(tmp_path: Path) -> None:
    codes, file = code_file({5: (1, 0, 3), 3: (1, 10, 4)}), tmp_path / "scores.parquet"
    columns: dict[str, Any] = {
        "room": [3, 3, 3, 3, 5, 5],
        "segment": [1, 0, 2, 3, 0, 1],
        "score": [1.0, 0.5, 2.0, 3.0, 7.0, 8.0],
    }
    pq.write_table(pa.table(columns), file)
    found = read_scores(file, codes)
    assert found[codes.item_id == 3].tolist() == [0.5, 1.0, 2.0, 3.0]
    assert np.isnan(found[codes.item_id == 5]).all(), "one of its segments has no score"
    for change, message in (
        ({"score": [np.nan] * 6}, "no finite number"),
        ({"segment": [0] * 6}, "has a segment twice"),
        ({"room": ["a"] * 6}, "columns of other types"),
    ):
        pq.write_table(pa.table({**columns, **change}), file)
        with pytest.raises(UserError, match=message):
            read_scores(file, codes)
    with pytest.raises(UserError, match=r"no such file; --scores takes a Parquet file with the columns room, segment"):
        read_scores(tmp_path / "none.parquet", codes)


def room_of(length: int, history: int, seed: int) -> HighlightRoom:
    """Return a room whose segments follow those of its history."""
    rng = np.random.default_rng(seed)
    score = rng.random(length).astype(np.float32)
    segments = history + np.arange(length + 1)
    return HighlightRoom(1, segments, np.arange(history), score, find_highlights(score))


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_a_prediction_depends_on_no_later_segment_and_on_no_other_room(kind: Any) -> None:
    torch.manual_seed(1)
    values = np.random.default_rng(2).standard_normal((30, 3)).astype(np.float32)
    inputs = SegmentInputs(sequence=values, row=values.copy())
    model = SegmentsModel(inputs, kind, 40).eval()
    rooms = [room_of(12, 5, 3), room_of(20, 0, 4)]
    with torch.no_grad():
        together = model(RoomBatch.of(rooms))
        alone = model(RoomBatch.of(rooms[:1]))
        np.testing.assert_allclose(together[0, :12], alone[0], atol=1e-6)
        # The history is 5 segments, so position 6 is the segment at place 11.
        for table in (inputs.sequence, inputs.row):
            assert table is not None
            table[12:] += 1
        changed = model(RoomBatch.of(rooms[:1]))[0]
        np.testing.assert_allclose(changed[:7], alone[0, :7], atol=1e-6)
        assert not np.allclose(changed[7:], alone[0, 7:], atol=1e-4)


def test_the_loss_is_that_of_loops_over_positions_and_pairs() -> None:
    rng = np.random.default_rng(5)
    predicted, score = rng.random((2, 2, 6)).astype(np.float32)
    known = np.array([[True] * 6, [True] * 4 + [False] * 2])
    error = (predicted - score) ** 2
    weight = np.zeros_like(error)
    pairs = []
    for room, length in enumerate((6, 4)):
        for t in range(length):
            near = [other for other in (t - 1, t + 1) if 0 <= other < length]
            weight[room, t] = 1 + 2 * sum(abs(score[room, t] - score[room, other]) > 0.15 for other in near)
        losses = [
            np.log1p(np.exp(predicted[room, j] - predicted[room, i]))
            for i in range(length)
            for j in range(length)
            if score[room, i] - score[room, j] > 0.2
        ]
        pairs.append(np.mean(losses))
    expected = error[known].mean() + 0.5 * np.mean(pairs) + 0.3 * (weight * error).sum() / weight.sum()
    found = highlight_loss(*(torch.from_numpy(part) for part in (predicted, score, known)))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_rules_know_the_past_only() -> None:
    codes = code_file({item: (item, 20 * item, 12) for item in range(1, 9)})
    score = np.random.default_rng(6).random(len(codes))
    rooms = HighlightRooms.make(codes, score, [105 * MINUTE_MS, 135 * MINUTE_MS, 135 * MINUTE_MS], 4, (9, 9, 9))
    found = rule_predictions(rooms)
    test = rooms.parts[TEST][0]
    assert np.array_equal(found["last score"][0], rooms.score[test.segments[:-1]])
    assert len(set(np.concatenate(found["mean"]).tolist())) == 1
    assert np.array_equal(found["position"][0], found["position"][1]), "the same for all rooms"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a benchmark that was begun, with a small world and its true topics as codes."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(highlights, "HighlightWork", Mock(side_effect=KeyboardInterrupt))
        highlights.main(["--work", str(folder), *SETTINGS, "--predictor", *PREDICTOR])
    simulate(folder / "world", 30, 4, 2, 1, segment_noise=DEFAULT_NOISE)
    write_topic_codes(folder / "world", folder / "codebook", folder / "codes.parquet")
    return folder


SETTINGS = ("--borders", "2024-03-06", "2024-03-07", "2024-03-07", "--rooms", "8", "3", "5", "--epochs", "1")
PREDICTOR = (
    "model.dim=8",
    "model.heads=2",
    "model.feed_forward=16",
    "data.runs=12",
    "model.encoded_runs=4",
    "train.batch_size=512",
)


def test_all_models_at_a_size_of_seconds(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(highlights, "HISTORY", 16)
    monkeypatch.setattr(paired_users, "DRAWS", 20)
    out = tmp_path / "highlights.json"
    arguments = ["--work", str(work), "--out", str(out), "--seeds", "1", *SETTINGS, "--predictor", *PREDICTOR]
    highlights.main(arguments)
    printed = capsys.readouterr()
    assert "score: the intensity of a simulated world; no --scores of imported data are named" in printed.err
    document = json.loads(out.read_text())
    groups = document["groups"]
    assert {(group, name) for group, models in groups.items() for name in models} >= set(highlights.MODELS)
    assert document["rooms"] == {TRAIN: 8, VALIDATE: 3, TEST: 5} and 0.25 < document["highlights"] < 0.45
    truth = {name: groups["truth"]["truth"]["metrics"][name]["mean"] for name in METRICS}
    rules = {name: groups["rules"]["mean"]["metrics"][name]["mean"] for name in METRICS}
    assert truth["mAP"] > rules["mAP"] + 10 and truth["rho"] > 30 and rules["rho"] == 0
    gru = groups["codes"]["GRU"]["metrics"]["mAP"]
    assert gru["low"] < gru["mean"] < gru["high"] and f"{gru['mean']:.2f} [" in printed.out
    # The same command finds all parts, and computes nothing.
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    highlights.main(arguments)
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert json.loads(out.read_text())["groups"] == groups
    # A model that reads other inputs now is trained again, and no other.
    other = highlights.ModelInputs(row=("code", "score"))
    monkeypatch.setitem(highlights.MODELS, (highlights.CODES, "last code"), other)
    highlights.main(arguments)
    assert [path.name for path, time in before.items() if path.stat().st_mtime_ns != time] == ["codes-last-code.npz"]


def test_a_missing_file_of_scores_is_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        highlights.main(["--work", str(work), "--dataset", str(work / "world"), "--scores", str(work / "none.parquet")])
    assert "none.parquet: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        highlights.main(["--work", str(work), "--dataset", str(work / "world")])
    assert "--dataset and --scores belong together" in capsys.readouterr().err


def test_inputs_are_scaled_by_the_training_rooms_and_recent_scores_are_past(work: Path) -> None:
    options = SimpleNamespace(
        work=work, dataset=None, borders=SETTINGS[1:4], rooms=(8, 3, 5), predictor=PREDICTOR, seeds=[1]
    )
    made = highlights.HighlightWork(options, None)  # type: ignore[arg-type]
    trained = made.rooms.positions(TRAIN)
    for name in ("code", "score", "recent"):
        values = made.inputs(name, 1)
        np.testing.assert_allclose(values[trained].mean(0), 0, atol=1e-4)
        # The second part of ``score`` is that all scores are known.
        assert set(np.round(values[trained].std(0), 3).tolist()) <= {0.0, 1.0}
        assert not np.allclose(values[made.rooms.positions(TEST)].mean(0), 0, atol=1e-4)
    room, recent = made.rooms.parts[TEST][0], made._recent()
    score = made.rooms.score[room.segments]
    for place, segment in enumerate(room.positions[:20]):
        past = score[: place + 1]
        np.testing.assert_allclose(recent[segment], [past[-1], past[-5:].mean(), past.mean()], atol=1e-5)
