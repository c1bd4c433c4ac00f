"""The gap of a run: it names the factor that the run does not know, and refuses rows and worlds that do not match."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.quality import attainable_bound, gap
from benchmarks.quality.attainable_bound import ATTAINABLE
from benchmarks.quality.gap_fit import (
    FOLDS,
    LEAST,
    cross_fit,
    folds_of,
    greedy_order,
    log_loss,
    reason_to_skip,
    score_statistics,
)
from benchmarks.quality.gap_report import BEST, tables, waterfall
from benchmarks.quality.world_factors import WorldFactors
from trainer.config.ranker import parse_config
from trainer.data.simulator.config import BEHAVIOURS
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking.held_out_rows import HELD_OUT

USERS, DAYS, SEED = 200, 3, 1
KEYS = ("user_id", "visit_id", "request_ms")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "DRAWS", 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gap") / "world"
    simulate(out, USERS, DAYS, 2, SEED, factors=True)
    return out


@pytest.fixture(scope="module")
def rooms(world: Path) -> dict[str, np.ndarray]:
    """All visits to rooms: keys, and a label for each behaviour."""
    events = pa.concat_tables(map(pq.read_table, sorted((world / "events").glob("*.parquet"))))
    events = events.filter(pc.equal(events["domain"], 1))
    shown = events.filter(pc.equal(events["event"], "exposure")).sort_by("visit_id")
    found = {name: shown[name].to_numpy() for name in ("user_id", "visit_id")}
    found["request_ms"] = shown["time_ms"].to_numpy()
    for behaviour in BEHAVIOURS:
        acted = events.filter(pc.equal(events["event"], behaviour))["visit_id"].to_numpy()
        found[f"label_{behaviour}"] = np.isin(found["visit_id"], acted).astype(np.uint8)
    return found


@pytest.fixture(scope="module")
def factors(world: Path, rooms: dict[str, np.ndarray]) -> WorldFactors:
    return WorldFactors.read(str(world), *(rooms[name] for name in KEYS))


def write_run(directory: Path, world: Path, rooms: dict[str, np.ndarray], **columns: np.ndarray) -> str:
    """Write a run with the predictions ``columns`` of behaviours; it keeps true probabilities that are in them, too."""
    directory.mkdir(parents=True)
    settings = {"data": {"path": str(world), "eval_from": "2024-03-06"}}
    (directory / "config.json").write_text(json.dumps(parse_config(settings, "test").model_dump(mode="json")))
    behaviours = [name for name in columns if not name.startswith("truth_")]
    table = {name: rooms[name] for name in KEYS}
    for name in behaviours:
        table |= {f"p_{name}": columns[name].astype(np.float32), f"label_{name}": rooms[f"label_{name}"]}
        table |= {f"mask_{name}": np.ones(len(columns[name]), np.uint8)}
    table |= {name: values for name, values in columns.items() if name.startswith("truth_")}
    pq.write_table(pa.table(table), directory / HELD_OUT)
    return str(directory)


def without(factors: WorldFactors, name: str) -> np.ndarray:
    """Return the probability of a click of a model that knows all but one factor."""
    row = factors.names.index(name)
    term = factors.weights[factors.context, 0, row] * factors.values[row]
    return 1 / (1 + np.exp(-(factors.log_odds()[0] - term + term.mean())))


@pytest.mark.parametrize("unknown", ["bait", "taste"])
def test_the_factor_that_a_run_does_not_know_is_named(
    unknown: str, world: Path, rooms: dict[str, np.ndarray], factors: WorldFactors, tmp_path: Path
) -> None:
    click = without(factors, unknown)
    directory = write_run(tmp_path / "run", world, rooms, click=click)
    found = gap.read_gap([directory], None, None).measure()["behaviours"]["click"]
    assert next(iter(found["alone"])) == unknown and found["steps"][0]["factor"] == unknown
    run, best = found["run"], found["bounds"][BEST]
    told = found["steps"][0]
    # One factor closes the gap but for the error of its fit on other users.
    assert best["auc"][0] - run["auc"][0] > 0.01
    assert told["auc"][0] - run["auc"][0] > 0.8 * (best["auc"][0] - run["auc"][0])
    assert told["log_loss"][0] < 0.3 * best["log_loss"][0] + 0.7 * run["log_loss"][0]
    assert found["alone"][unknown]["auc_gain"]["low"] > 0
    # Told again, a factor that the run knows says nothing.
    others = [line["auc_gain"]["mean"] for name, line in found["alone"].items() if name != unknown]
    assert max(others) < found["alone"][unknown]["auc_gain"]["mean"] / 3


def test_a_run_that_knows_the_truth_has_no_gap(
    world: Path, rooms: dict[str, np.ndarray], factors: WorldFactors, tmp_path: Path
) -> None:
    truth = factors.probabilities(factors.log_odds())
    directory = write_run(tmp_path / "run", world, rooms, click=truth[0], truth_click=truth[0])
    found = gap.read_gap([directory], None, None).measure()["behaviours"]["click"]
    assert found["run"] == found["bounds"][BEST] and len(found["steps"]) <= 4
    assert all(line["log_loss"][0] > found["run"]["log_loss"][0] - 0.002 for line in found["alone"].values())
    assert found["all"]["auc"][0] < found["run"]["auc"][0] + 0.003


def test_effects_of_first_order_are_near_the_truth(factors: WorldFactors) -> None:
    truth = factors.probabilities(factors.log_odds())
    effects = factors.effects(BEHAVIOURS)
    for k, behaviour in enumerate(BEHAVIOURS):
        rows = truth[k] > 0
        odds = np.log(truth[k, rows] / (1 - truth[k, rows]))
        total = np.sum(list(effects[k].values()), axis=0)[rows]
        assert np.corrcoef(total, odds)[0, 1] > (0.999999 if behaviour == "click" else 0.97), behaviour
    # A click comes before all else: what happens after it has no effect on it.
    assert {"hold", "taste", "mood", "scene", "inclination"} <= effects[0].keys()
    assert "generosity" not in effects[0] and "generosity" in effects[BEHAVIOURS.index("gift")]
    rows = factors.names.index("inclination_click")
    assert np.allclose(effects[0]["inclination"], factors.values[rows], atol=1e-3)


def test_no_row_is_predicted_from_its_own_user() -> None:
    rng = np.random.default_rng(1)
    user = rng.integers(0, 60, 3000)
    fold = folds_of(user)
    assert set(fold) == set(range(FOLDS)) and all(len(set(fold[user == one])) == 1 for one in range(60))
    column = rng.standard_normal(3000)
    label = (rng.random(3000) < 1 / (1 + np.exp(-column))).astype(np.uint8)
    found = cross_fit([column, np.zeros(3000)], label, fold)
    assert log_loss(found, label) < 0.69 and np.corrcoef(found, column)[0, 1] > 0.99
    # Other labels of the users of a part change the predictions of all parts but this one.
    changed = np.where(fold == 2, 1 - label, label)
    again = cross_fit([column, np.zeros(3000)], changed, fold)
    assert np.array_equal(again[fold == 2], found[fold == 2])
    assert not np.isclose(again[fold != 2], found[fold != 2]).any()


def test_the_order_ends_where_no_term_helps() -> None:
    rng = np.random.default_rng(2)
    fold = folds_of(rng.integers(0, 200, 4000))
    terms = {name: rng.standard_normal(4000) for name in ("small", "noise", "large")}
    odds = 0.6 * terms["small"] + 1.5 * terms["large"]
    label = (rng.random(4000) < 1 / (1 + np.exp(-odds))).astype(np.uint8)
    assert greedy_order([rng.standard_normal(4000)], terms, label, fold)[:2] == ["large", "small"]
    assert greedy_order([odds], terms, label, fold) in ([], ["noise"], ["small"], ["large"])


def test_a_score_statistic_is_the_gain_of_likelihood() -> None:
    rng = np.random.default_rng(3)
    column, term = rng.standard_normal((2, 20_000))
    odds = 0.5 * column + 0.05 * term
    label = (rng.random(20_000) < 1 / (1 + np.exp(-odds))).astype(np.uint8)
    # Both parts have the same rows, so the held-out likelihood is that of the fit.
    half = np.repeat([0, 1], 20_000)
    both = [np.tile(values, 2) for values in (column, term)]
    labels = np.tile(label, 2)
    small, large = (cross_fit(columns, labels, half) for columns in (both[:1], both))
    gain = 20_000 * (log_loss(small, labels) - log_loss(large, labels))
    found = score_statistics([column], [term, column, 2 * column + 1, 3 * term - column], small[:20_000], label)
    assert found[0] / 2 == pytest.approx(gain, rel=0.02) and found[3] == pytest.approx(found[0])
    # What the columns say already adds nothing.
    assert found[1] == found[2] == 0


def test_behaviours_without_positives_are_left_out_with_the_reason(
    world: Path, rooms: dict[str, np.ndarray], factors: WorldFactors, tmp_path: Path
) -> None:
    truth = factors.probabilities(factors.log_odds())
    none = {**rooms, "label_gift": np.zeros_like(rooms["label_gift"])}
    directory = write_run(tmp_path / "run", world, none, gift=truth[5], click=truth[0])
    found = gap.read_gap([directory], None, None).measure()
    assert list(found["behaviours"]) == ["click"]
    assert found["left_out"] == {"gift": f"0 positives and {len(truth[5]):,} negatives; {LEAST} of each are needed"}
    fold = np.arange(1000) % FOLDS
    assert (
        reason_to_skip((fold == 1).astype(int), fold)
        == "all positives, or all negatives, are of users in one of 5 parts"
    )
    assert reason_to_skip((np.arange(1000) % 3 == 0).astype(int), fold) is None
    only = write_run(tmp_path / "only", world, none, gift=truth[5])
    with pytest.raises(SystemExit, match=r"limelight: error: .*only: no behaviour can be measured \(gift: 0 positives"):
        gap.main([only])


def test_rows_and_worlds_that_do_not_match_are_refused(
    world: Path, rooms: dict[str, np.ndarray], factors: WorldFactors, tmp_path: Path
) -> None:
    click = without(factors, "mood")
    directory = write_run(tmp_path / "run", world, rooms, click=click)
    simulate(tmp_path / "plain", 30, 1, 2, 9)
    simulate(tmp_path / "plain correlated", 30, 1, 2, 9, interest_correlation=0.0, conflict=0.5)
    simulate(tmp_path / "other", USERS, 1, 2, 9, lookahead=True, newcomers=0.5, factors=True)

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            gap.main(arguments)
        message = str(ended.value)
        assert message.startswith("limelight: error: ") and "\n" not in message
        return message

    message = refused(directory, "--data", str(tmp_path / "plain"))
    command = "limelight data simulate OUT --users 30 --days 1 --partitions 2 --seed 9"
    assert f"{tmp_path / 'plain'}: has no factors; " in message and message.endswith(f"{command} --factors")
    message = refused(directory, "--data", str(tmp_path / "plain correlated"))
    assert message.endswith(f"{command} --interest-correlation 0.0 --conflict 0.5 --factors")
    assert "other/truth/factors-0000" in (found := refused(directory, "--data", str(tmp_path / "other")))
    assert "of another world: it has no line of some rows" in found
    # Visits have the same ids in all worlds, so their times are compared, and then their true probabilities.
    early = {name: values[:5] for name, values in rooms.items()}
    moved = write_run(tmp_path / "moved", world, {**early, "request_ms": early["request_ms"] + 1}, click=click[:5])
    assert "its visits have other times than the rows of the run" in refused(moved)
    wrong = write_run(tmp_path / "wrong", world, rooms, click=click, truth_click=click)
    assert "do not give the true probabilities" in refused(wrong)
    fewer = write_run(tmp_path / "fewer", world, early, click=click[:5])
    assert "fewer: has other held-out rows than" in refused(directory, fewer)
    assert "no run" in refused(str(tmp_path / "none")) or "none" in refused(str(tmp_path / "none"))
    (tmp_path / "bound.npz").write_text("no numbers")
    assert "bound.npz: damaged" in refused(directory, "--attainable", str(tmp_path / "bound.npz"))


def test_main_measures_trained_runs_and_the_attainable_bound(
    limelight: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["data.eval_from=2024-03-05", "train.batch_size=256", "model.expert_layers=[[8],[8]]", "model.tower=[4]"]
    small += ["data.workers=0", "train.device=cpu", f"data.path={world}"]
    small += ['data.behaviours=["click", "gift"]', "score.exponents={click=1.0, gift=1.0}"]
    run = tmp_path / "run"
    limelight("train", "configs/simulated.toml", "--ranks", "1", f"run.directory={run}", *small)
    asked = []

    def bound(config: Any, visit_id: np.ndarray, truth: np.ndarray, *others: Any) -> dict[str, np.ndarray]:
        asked.append((config.users, config.days, config.seed, len(visit_id)))
        return {ATTAINABLE: 0.9 * truth}

    monkeypatch.setattr(attainable_bound, "attainable_probabilities", bound)
    out, file = tmp_path / "results" / "gap.json", tmp_path / "attainable.npz"
    arguments = ["--out", str(out), "--attainable", str(file)]
    gap.main([str(run), *arguments])
    printed, document = capsys.readouterr().out, json.loads(out.read_text())
    click = document["behaviours"]["click"]
    assert "told alone" in printed and "(attainable)" in printed and "left out" not in printed
    room = click["room"]
    assert room["low"] < room["mean"] < room["high"] and not click["above_attainable"] and "too low" not in printed
    assert room["mean"] == pytest.approx(100 * (click["bounds"][ATTAINABLE]["auc"][0] - click["run"]["auc"][0]))
    assert "of AUC from the run to the attainable bound" in printed
    assert document["world"] == {"users": USERS, "days": DAYS, "seed": SEED} and document["environment"]["packages"]
    assert set(click["bounds"]) == {BEST, ATTAINABLE} and 0.4 < click["run"]["auc"][0] < click["bounds"][BEST]["auc"][0]
    assert click["run"]["auc"][1] is None and list(document["behaviours"]) == ["click", "gift"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    metrics = json.loads((run / "metrics.json").read_text())["behaviours"]["click"]
    assert click["run"]["auc"][0] == pytest.approx(metrics["auc"], abs=1e-6)
    assert click["run"]["gauc"][0] == pytest.approx(metrics["gauc"], abs=1e-6)
    assert click["run"]["log_loss"][0] == pytest.approx(metrics["logloss"], abs=1e-5)
    assert click["bounds"][BEST]["auc"][0] == pytest.approx(metrics["best_auc"], abs=1e-4)

    # A run that has kept no rows is evaluated again; two runs are measured together.
    shutil.copytree(run, tmp_path / "second")
    (run / HELD_OUT).unlink()
    monkeypatch.setattr(gap, "run_limelight", limelight)
    gap.main([str(run), str(tmp_path / "second"), *arguments])
    again = json.loads(out.read_text())
    assert asked == [(USERS, DAYS, SEED, document["rows"])], "the bound is kept in its file"
    mean, half = again["behaviours"]["click"]["run"]["auc"]
    assert again["runs"] == 2 and (mean, half) == pytest.approx((click["run"]["auc"][0], 0), abs=1e-6)


def test_lines_and_tables_have_every_step() -> None:
    def line(auc: float) -> dict[str, Any]:
        return {"auc": [auc, None], "gauc": [None, None], "log_loss": [0.5, 0.01]}

    found = {
        "rows": 2000,
        "positives": 100,
        "run": line(0.7),
        "calibrated": line(0.71),
        "alone": {"mood": line(0.75) | {"auc_gain": {"mean": 4.0, "low": 3.5, "high": 4.5}}},
        "steps": [{"factor": "mood", **line(0.75)}],
        "others": ["hour", "bait"],
        "all": line(0.76),
        "bounds": {BEST: line(0.8)},
    }
    names = [name for name, _ in waterfall(found)]
    assert names == ["run", "calibrated", "+ mood", "+ all others", BEST]
    printed = tables({"behaviours": {"click": found}, "left_out": {"gift": "0 positives"}})
    assert (
        "+4.00 [+3.50, +4.50]" in printed
        and "0.5000 ±0.0100" in printed
        and printed.endswith("gift: left out, 0 positives")
    )
    assert ATTAINABLE not in printed
