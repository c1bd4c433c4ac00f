"""Commands as a user types them, one after the other, on a small dataset: simulate, train, evaluate, score."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.rank import main as train_one_rank
from trainer.serving.scoring import ranking_score

SETTINGS = (
    "configs/simulated.toml",
    "data.eval_from=2024-03-06",
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "features.history.short.length=5",
    "features.history.live.length=5",
    "train.batch_size=128",
    "train.epochs=1",
    "train.log_every=5",
)
READ_TOGETHER = ("model.attention_kind=twin", "alignment.anchor=live")


@pytest.fixture(scope="module")
def world(limelight: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "world"
    limelight("data", "simulate", path, "--users", 200, "--days", 3, "--partitions", 4, "--seed", 5)
    return path


@pytest.fixture(scope="module")
def run(limelight: Any, world: Path) -> Path:
    """Return a run on two ranks, with a baseline, attention over all histories, and aligned histories."""
    directory = world.parent / "run"
    printed = limelight(
        "train",
        *SETTINGS,
        f"data.path={world}",
        f"run.directory={directory}",
        'train.baselines=["logistic"]',
        *READ_TOGETHER,
        "--ranks",
        2,
    ).stdout
    table = [line.split() for line in printed.splitlines() if line.startswith(("click", "gift"))]
    assert [line[:2] for line in table] == [
        ["click", "ple"],
        ["click", "logistic"],
        ["gift", "ple"],
        ["gift", "logistic"],
    ]
    assert printed.rstrip().endswith(f"run: {directory}")
    return directory


def test_a_run_leaves_what_the_readme_says(run: Path, world: Path) -> None:
    for name in ("config.json", "environment.json", "plan.json", "report.html", "features", "checkpoints", "logs"):
        assert (run / name).exists(), name
    document = json.loads((run / "metrics.json").read_text())
    spec = DatasetSpec.load(world)
    assert tuple(document["behaviours"]) == spec.behaviours
    click = document["behaviours"]["click"]
    held_out = read_rows(world, spec, request_from=spec.span_ms[0] + 2 * 86_400_000 - 60_000)
    assert click["rows"] == pytest.approx(len(held_out["visit_id"]), rel=0.02)
    # The margin of 0.005 covers the sampling error of the AUC of the true probabilities.
    assert 0.5 < click["auc"] < click["best_auc"] + 0.005
    assert document["training"]["rows"] > 1000
    assert sum(document["training"]["share_of_time"].values()) == pytest.approx(1)
    assert {entry["table"] for entry in json.loads((run / "plan.json").read_text())} == {
        "user",
        "author",
        "item",
        "side",
    }
    assert json.loads((run / "baselines" / "logistic" / "metrics.json").read_text())["model"] == "logistic"


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluating_again_gives_the_same_metrics(limelight: Any, run: Path, ranks: int) -> None:
    again = json.loads(limelight("evaluate", run, "--json", "--ranks", ranks).stdout)["behaviours"]
    first = json.loads((run / "metrics.json").read_text())["behaviours"]
    assert again.keys() == first.keys()
    for behaviour, metrics in first.items():
        # Batches of another size have other rounding errors, which may swap two nearly equal scores.
        pair = 1 / (metrics["positives"] * (metrics["rows"] - metrics["positives"]))
        for name, value in metrics.items():
            close = pytest.approx(value, rel=1e-4, abs=3 * pair if name == "auc" else 0)
            assert again[behaviour][name] == close, f"{behaviour} {name}"


def test_a_range_with_offsets_narrows_the_rows(limelight: Any, run: Path) -> None:
    whole = json.loads(limelight("evaluate", run, "--json").stdout)["behaviours"]["click"]["rows"]
    part = limelight(
        "evaluate", run, "--json", "--from", "2024-03-06T12:00+08:00", "--until", "2024-03-06T20:00"
    ).stdout
    assert 0 < json.loads(part)["behaviours"]["click"]["rows"] < whole


def test_scoring_a_request_gives_what_evaluation_predicted(
    limelight: Any, run: Path, world: Path, tmp_path: Path
) -> None:
    predicted = tmp_path / "predictions.parquet"
    limelight("evaluate", run, "--predictions", predicted)
    lines = {line["visit_id"]: line for line in pq.read_table(predicted).to_pylist()}
    spec = DatasetSpec.load(world)
    rows = read_rows(world, spec)
    visit = sorted(lines)[len(lines) // 2]
    at = int(np.flatnonzero(rows["visit_id"] == visit)[0])
    columns = {name: [int(rows[name][at])] for name in ("user_id", "item_id", "author_id", "request_ms")}
    for k, side in enumerate(spec.side):
        if side.of == "context":
            columns[side.name] = [int(rows["side"][at, k])]
    dense = {
        feature.name: [float(rows["dense"][at, k])] for k, feature in enumerate(spec.dense) if feature.of == "context"
    }
    candidates, scored = tmp_path / "candidates.parquet", tmp_path / "scored.parquet"
    pq.write_table(pa.table({**columns, **dense}), candidates)
    limelight("score", run, candidates, scored)
    (score,) = pq.read_table(scored).to_pylist()
    probabilities = [score[f"p_{behaviour}"] for behaviour in spec.behaviours]
    assert probabilities == pytest.approx([lines[visit][f"p_{behaviour}"] for behaviour in spec.behaviours], rel=1e-5)
    exponents = [{"gift": 4, "follow": 2, "comment": 2}.get(behaviour, 1) for behaviour in spec.behaviours]
    assert score["score"] == pytest.approx(
        np.prod([(1 + p) ** e for p, e in zip(probabilities, exponents, strict=True)])
    )


def test_a_run_explains_a_prediction_with_the_attention_that_its_evaluation_has_kept(
    limelight: Any, run: Path, world: Path, tmp_path: Path
) -> None:
    kept = json.loads((run / "attention_examples.json").read_text())["examples"]
    assert len(kept) == 4 and not (run / "baselines" / "logistic" / "attention_examples.json").exists()
    example = max(kept, key=lambda one: one["histories"]["short"]["found"])
    user, room, picture = example["user_id"], example["item_id"], tmp_path / "picture.png"
    at = datetime.fromtimestamp(example["at_ms"] / 1000, UTC).isoformat(timespec="milliseconds")
    arguments = ["--user", user, "--candidate", room, "--at", at, "--top", 3, "--out", picture]
    printed = limelight("explain", run, *arguments).stdout
    assert printed.startswith(f"user {user}, candidate {room} of author {example['author_id']}")
    assert "\nshort: found 5; the 3 with the most attention" in printed and "\nlive: found " in printed
    lines = [line.split() for line in printed.splitlines()]
    for history in example["histories"].values():
        for entry in history["entries"]:
            shown = [entry["domain"], str(entry["item_id"]), str(entry["author_id"])]
            (share,) = {line[0] for line in lines if line[1:4] == shown and line[0].endswith("%")}
            assert float(share[:-1]) == pytest.approx(100 * entry["attention"], abs=0.06)
    assert picture.read_bytes().startswith(b"\x89PNG")
    unknown = limelight("explain", run, "--user", 10**9, "--candidate", room, expect=2)
    errors = [line for line in unknown.stderr.splitlines() if line.startswith("limelight: error:")]
    assert len(errors) == 1 and "--user 1000000000: is not in the histories of the dataset" in errors[0]


def test_the_ranking_score_is_equation_4() -> None:
    probability = np.random.default_rng(0).random((7, 3))
    expected = (1 + probability[:, 0]) ** 0.5 * (1 + probability[:, 1]) ** 2 * (1 + probability[:, 2]) ** 0
    np.testing.assert_allclose(ranking_score(probability, (0.5, 2.0, 0.0)), expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.path=/nowhere"], "/nowhere: no dataset here"),
        (["train.epoch=1"], "unknown key train.epoch; did you mean train.epochs?"),
        (['data.behaviours=["clik"]'], "no behaviour 'clik'"),
        (["train.weights.smile=2"], "no behaviour 'smile'"),
        (['features.exclude=["stat:usr"]'], "did you mean 'stat:user'?"),
        (["train.device=cuda"], 'train.device = "cuda"'),
        (["alignment.anchor=mixed"], "alignment.anchor = 'mixed': must be one of two or more histories"),
        (["train.deepspeed=none.json"], "train.deepspeed = 'none.json': no such file"),
        (["data.eval_from=2024-04-01"], "is after the dataset's last request"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run(
    world: Path, tmp_path: Path, overrides: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tests the output and status of a rank; the next test has the same for the whole command."""
    status = train_one_rank([*SETTINGS, f"data.path={world}", f"run.directory={tmp_path / 'run'}", *overrides])
    output = capfd.readouterr().err
    assert status == 2
    assert_one_error(output, expected)
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_all_ranks_is_printed_once(limelight: Any, world: Path, tmp_path: Path) -> None:
    arguments = [*SETTINGS, f"data.path={world}", f"run.directory={tmp_path / 'run'}", "train.batch_size=127"]
    done = limelight("train", *arguments, "--ranks", 2, expect=2)
    assert_one_error(done.stderr, "train.batch_size = 127 is not a multiple of the 2 ranks")
    assert not (tmp_path / "run").exists()


def assert_one_error(output: str, expected: str) -> None:
    errors = [line for line in output.splitlines() if line.startswith("limelight: error:")]
    assert len(errors) == 1 and expected in errors[0], output[-3000:]
    assert "Traceback" not in output


def test_more_ranks_than_partitions_are_refused(limelight: Any, world: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    limelight("data", "simulate", small, "--users", 60, "--days", 3, "--partitions", 1, "--seed", 1)
    done = limelight(
        "train", *SETTINGS, f"data.path={small}", f"run.directory={tmp_path / 'run'}", "--ranks", 2, expect=2
    )
    assert "partition" in done.stderr


def test_a_finished_run_is_kept(limelight: Any, run: Path, world: Path) -> None:
    def files() -> dict[str, bytes]:
        return {name: (run / name).read_bytes() for name in ("metrics.json", "report.html", "plan.json")}

    before = files()
    arguments = ("train", *SETTINGS, *READ_TOGETHER, f"data.path={world}", f"run.directory={run}")
    again = limelight(*arguments, 'train.baselines=["logistic"]')
    assert "ple: finished already" in again.stdout and "logistic: finished already" in again.stdout
    assert [line.split()[:2] for line in again.stdout.splitlines() if line.startswith("click")] == [
        ["click", "ple"],
        ["click", "logistic"],
    ]
    refused = limelight(*arguments, "resume.enabled=false", expect=2)
    assert "a run is already here" in refused.stderr
    refused = limelight(*arguments, "train.batch_size=64", "optimizer.warmup=0.5", expect=2)
    assert "optimizer.warmup = 0.05 then, 0.5 now; train.batch_size = 128 then, 64 now" in refused.stderr
    assert files() == before


def test_a_new_model_starts_from_an_old_one(limelight: Any, run: Path, world: Path, tmp_path: Path) -> None:
    arguments = ("train", *SETTINGS, *READ_TOGETHER, f"data.path={world}", f"run.directory={tmp_path / 'run'}")
    started = limelight(*arguments, f"init_from.run={run}", "init_from.dense=true", "tables.learning_rate=1e-6").stdout
    (author,) = [line.split() for line in started.splitlines() if line.startswith("author ") and "taken" in line]
    assert author[1] == "taken" and author[2] == author[3] and author[4:] == ["0", "0"]
    clicks = [
        json.loads((each / "metrics.json").read_text())["behaviours"]["click"] for each in (run, tmp_path / "run")
    ]
    assert clicks[0]["rows"] == clicks[1]["rows"]
    fresh = limelight(*arguments[:-1], f"run.directory={tmp_path / 'fresh'}", "tables.learning_rate=1e-6").stdout
    assert "taken" not in fresh
    assert first_loss(tmp_path / "run") < first_loss(tmp_path / "fresh"), "it begins as a trained model"


def first_loss(run: Path) -> float:
    """Return the loss of the first steps of a finished run."""
    *_, last = sorted(run.glob("checkpoints/*/job.json"))
    loss: float = json.loads(last.read_text())["trace"][0]["loss"]
    return loss


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"user_id": [1]}, "column 'item_id' is missing"),
        (
            {"user_id": [1], "item_id": [-5], "author_id": [1], "request_ms": [1709700000000]},
            "row 1: column 'item_id' is -5",
        ),
        ({"user_id": [], "item_id": [], "author_id": [], "request_ms": []}, "no candidates"),
    ],
)
def test_candidates_that_cannot_be_scored_leave_no_file(
    limelight: Any, run: Path, tmp_path: Path, table: dict[str, list[int]], expected: str
) -> None:
    candidates = tmp_path / "candidates.parquet"
    pq.write_table(pa.table({name: pa.array(values, pa.int64()) for name, values in table.items()}), candidates)
    done = limelight("score", run, candidates, tmp_path / "out.parquet", expect=2)
    assert expected in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["candidates.parquet"]


def test_a_new_user_is_scored_as_unknown(limelight: Any, run: Path, tmp_path: Path) -> None:
    candidates, out = tmp_path / "candidates.parquet", tmp_path / "out.parquet"
    table = {"user_id": [10**9, 1], "item_id": [1, 1], "author_id": [1, 1], "request_ms": [1709700000000] * 2}
    pq.write_table(pa.table({name: pa.array(values, pa.int64()) for name, values in table.items()}), candidates)
    assert "unknown ids: 1 of user" in limelight("score", run, candidates, out).stdout
    assert len(pq.read_table(out)) == 2
