"""Forecasts of a finished predictor: tables of what was known, in any batch and on any ranks, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modules.foresight import ForesightPredictor
from tests.conftest import RunRanks
from tests.semantic_ids.foresight_world import model_of, run, write_codes, write_foresight
from tests.semantic_ids.segment_world import START_MS, assigned, make_version, write_segments
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import DatasetSegments, has_text_ids
from trainer.forecast import run_job
from trainer.runtime.distributed import World
from trainer.semantic_ids import foresight_forecast
from trainer.semantic_ids.code_features import run_features
from trainer.semantic_ids.code_files import CodesAsOf
from trainer.semantic_ids.foresight_forecast import TABLES
from trainer.semantic_ids.foresight_model import TrainedPredictor

TRAINED_UNTIL_MS = START_MS + 15 * 60_000
UNSEEN = 10 * (40 - 29)
"""Segments from the end of training on: 29 of each of the 10 rooms became known before."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, and a finished run on it."""
    path = tmp_path_factory.mktemp("forecast")
    write_foresight(path)
    run(path, "train.epochs=1")
    return path


@pytest.fixture
def data(finished: Path, tmp_path: Path) -> Path:
    """A directory for tables, and a copy of the code file."""
    shutil.copy(finished / "world/codes.parquet", tmp_path)
    return tmp_path


def forecast(finished: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Write forecasts in this process."""
    words = {"run": finished / "run", "out": out, "codes": None, "time_from": None, "every": False, "pooling": "mean"}
    with World.join("cpu") as world:
        return run_job(SimpleNamespace(**words | options), world)


def tables(out: Path) -> dict[str, ContentVectors]:
    return {name: ContentVectors.open(out / name) for name in TABLES}


def assert_same(one: Path, other: Path) -> None:
    """Compare the tables of two directories bit for bit."""
    for name, table in tables(one).items():
        assert (table.hash, table.origin) == (tables(other)[name].hash, tables(other)[name].origin), name


def test_each_segment_after_the_training_has_one_forecast(finished: Path, data: Path) -> None:
    document = forecast(finished, data / "out")
    assert document == {
        "out": data / "out",
        **{"segments": UNSEEN, "earlier": 290, "seen": 0, "without_author": 0, "short_contexts": 0, "runs": 8},
    }
    codes = CodeFile.read(finished / "world/codes.parquet")
    wanted = np.sort(codes.segment[codes.known_ms >= TRAINED_UNTIL_MS])
    # The last segment of a room has a forecast, though nothing follows it.
    assert {40 * room + 39 for room in range(10)} <= set(wanted.tolist())
    for name, table in tables(data / "out").items():
        assert np.array_equal(table.ids, wanted) and table.dim == 8
        assert table.origin.pooling.startswith("Foresight: ") and table.origin.model == "run"
        segments = DatasetSegments.read(str(finished / "world"), has_text_ids(table.origin))
        segments.check_table(table)
        with pytest.raises(UserError, match="made from other segments"):
            replace(segments, start_ms=segments.start_ms + 1).check_table(table)
        assert len(np.unique(np.asarray(table.vectors, np.float32), axis=0)) > UNSEEN / 3, name


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_a_forecast_is_that_of_a_store_of_codes_as_of_its_segment(finished: Path, data: Path, pooling: str) -> None:
    """The predictor and the contexts are read by other code than the command's."""
    forecast(finished, data / "out", pooling=pooling)
    model = TrainedPredictor.open(finished / "run")
    predictor = model.predictor()
    stored = model_of(finished / "run")
    for name, parameter in predictor.named_parameters():
        assert torch.equal(parameter, stored[f"{name}/parameter"])
    codes = CodeFile.read(finished / "world/codes.parquet")
    row = np.argsort(codes.segment)[tables(data / "out")["encoder"].ids]
    found = run_features(CodesAsOf(codes, codes.codes[:, 0]), codes.author_id[row], codes.known_ms[row], 8)
    code, length = torch.from_numpy(found.code), torch.from_numpy(found.length)
    with torch.no_grad():
        output = predictor(code, length)
        weight = (code >= 0).float()
        if pooling == "last":
            weight = torch.nn.functional.one_hot(torch.full((len(code),), 7), 8).float()
        if pooling == "attention":
            weight = torch.einsum("nld,nd->nl", output.history, output.future / 8**0.5).exp() * weight
        encoder = (weight[:, :, None] * output.history).sum(1) / weight.sum(1, keepdim=True)
        # The product with the table of the codes is the logit of the predictor.
        logits = output.future @ predictor.table().T
        p = predictor.log_p(code, output).exp()
    table = {
        name: torch.from_numpy(np.asarray(found.vectors, np.float32)) for name, found in tables(data / "out").items()
    }
    close = {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(table["encoder"], encoder, **close)
    torch.testing.assert_close(table["decoder"] @ predictor.table.vectors.T, logits, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(table["expected"], p @ model.version.codebook.levels[0], **close)


def test_bits_do_not_depend_on_the_batch_the_ranks_or_later_segments(
    finished: Path, data: Path, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecast(finished, data / "whole", every=True)
    run_ranks("trainer.forecast", finished / "run", "--out", data / "ranks", "--all", "--json")
    assert_same(data / "whole", data / "ranks")
    # Another start moves each segment to another place of its block.
    forecast(finished, data / "later", time_from="2024-03-04T00:16:30")
    codes = CodeFile.read(data / "codes.parquet")
    border = START_MS + 18 * 60_000
    late = codes.known_ms > border
    write_codes(
        codes, ~(late & (codes.author_id == 101)), codes=np.where(late[:, None], 0, codes.codes).astype(np.int32)
    )
    forecast(finished, data / "changed", codes=str(data / "codes.parquet"))
    monkeypatch.setattr(foresight_forecast.ForecastSpool, "CHUNK_ROWS", 7)
    forecast(finished, data / "chunks", every=True)
    assert_same(data / "whole", data / "chunks")
    known_ms = dict(zip(codes.segment.tolist(), codes.known_ms.tolist(), strict=True))
    for name, whole in tables(data / "whole").items():
        for other in ("later", "changed"):
            table = tables(data / other)[name]
            early = np.array([known_ms[segment] <= border for segment in table.ids.tolist()])
            same = np.asarray(table.vectors) == whole.vectors[whole.lookup(table.ids)]
            assert same[early].all() and early.sum() >= 40, (name, other)
            assert same.all() if other == "later" else not same[~early].all()
    monkeypatch.setattr(foresight_forecast, "ROWS_AT_ONCE", 5)
    forecast(finished, data / "small", every=True)
    for name, whole in tables(data / "whole").items():
        # Blocks of another shape are other sums in float32; float16 has a step of 1e-3.
        small = tables(data / "small")[name]
        np.testing.assert_allclose(np.asarray(small.vectors), np.asarray(whole.vectors), rtol=2e-3, atol=1e-5)


def test_segments_that_the_predictor_has_seen_are_refused_or_said(finished: Path, data: Path) -> None:
    seen = r"--from = 2024-03-04 is before 2024-03-04T00:15:00.000\+00:00, up to which the predictor of .*run has seen"
    with pytest.raises(UserError, match=seen):
        forecast(finished, data / "out", time_from="2024-03-04")
    assert not (data / "out").exists()
    document = forecast(finished, data / "out", every=True)
    assert (document["segments"], document["earlier"], document["seen"]) == (400, 0, 290)
    document = forecast(finished, data / "out", every=True, time_from="2024-03-04T00:10")
    assert (document["segments"], document["earlier"], document["seen"]) == (210, 190, 100)


def test_unknown_authors_and_short_contexts_are_counted(finished: Path, data: Path) -> None:
    codes = CodeFile.read(data / "codes.parquet")
    unknown = np.where(codes.author_id == 103, -1, codes.author_id)
    # The rooms of author 100 are moved behind the others, so that their first segments have few runs.
    later = codes.known_ms + np.where(codes.author_id == 100, 20 * 60_000, 0)
    write_codes(codes, author_id=unknown, known_ms=later)
    document = forecast(finished, data / "out", codes=str(data / "codes.parquet"))
    assert document["without_author"] == 80 and document["segments"] == 3 * 22 + 80
    assert 0 < document["short_contexts"] < 80


def test_what_does_not_fit_is_one_line_and_writes_nothing(finished: Path, data: Path) -> None:
    codes = data / "codes.parquet"
    other = make_version(data / "other", 11)
    write_segments(data / "elsewhere", np.arange(2), np.array([START_MS, START_MS]), {0: 1, 1: 1})
    shutil.copytree(finished / "world/embeddings", data / "elsewhere/embeddings")
    shutil.copytree(finished / "world", data / "world")
    assigned(other, data / "world")
    with pytest.raises(UserError, match=rf"is of the codebook version '{other.name}'.*codebook is "):
        forecast(finished, data / "out", codes=str(data / "world/codes.parquet"))
    with pytest.raises(UserError, match=r"no segment of a known author became known from 2025-01-01.*nothing to forec"):
        forecast(finished, data / "out", time_from="2025-01-01")
    found = CodeFile.read(codes)
    write_codes(found, author_id=np.full(len(found), -1))
    with pytest.raises(UserError, match=r"became known from .* on \(none\)"):
        forecast(finished, data / "out", codes=str(codes))
    write_codes(found, segment=np.where(found.segment == 7, 8, found.segment))
    with pytest.raises(UserError, match="has segment 8 twice"):
        forecast(finished, data / "out", codes=str(codes))
    with pytest.raises(UserError, match="--from = 'soon': not a time"):
        forecast(finished, data / "out", time_from="soon")
    (data / "out").mkdir()
    (data / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: something else than tables of forecasts is here"):
        forecast(finished, data / "out")
    assert [path.name for path in (data / "out").iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in data.iterdir() if path.name.startswith(".")) == []


def test_a_run_that_cannot_be_used_is_one_line(finished: Path, data: Path) -> None:
    shutil.copytree(finished / "run", data / "run")
    (data / "run/metrics.json").unlink()
    with pytest.raises(UserError, match="run: this run has not finished"):
        forecast(finished, data / "out", run=data / "run")
    shutil.copy(finished / "run/metrics.json", data / "run")
    (piece,) = (data / "run/checkpoints").glob("*/model/*.distcp")
    piece.write_bytes(piece.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"damaged \(model/.* has another content than was written\)"):
        forecast(finished, data / "out", run=data / "run")
    write_foresight(data / "open", rooms=2, segments=6)
    run(data / "open", "train.epochs=1", 'data.train_until=""')
    with pytest.raises(UserError, match=r"trained on all segments \(data.train_until is empty\)"):
        forecast(finished, data / "out", run=data / "open/run", time_from="2030-01-01")
    config = json.loads((data / "open/run/config.json").read_text())
    shutil.rmtree(config["data"]["codebook"])
    make_version(Path(config["data"]["codebook"]), 11)
    with pytest.raises(UserError, match=r"trained on codes of the codebook version .* now; restore that version"):
        forecast(finished, data / "out", run=data / "open/run", every=True)


def test_a_failure_leaves_the_tables_that_were_there(
    finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecast(finished, data / "out")
    forecast(finished, data / "before")
    whole = ForesightPredictor.forecast

    def infinite(self: ForesightPredictor, *arguments: Any) -> Any:
        found = whole(self, *arguments)
        return found._replace(expected=found.expected * 1e9)

    monkeypatch.setattr(ForesightPredictor, "forecast", infinite)
    with pytest.raises(UserError, match=f"{UNSEEN} of {UNSEEN} vectors are not finite in float16"):
        forecast(finished, data / "out")
    assert_same(data / "out", data / "before")
    assert sorted(path.name for path in data.iterdir()) == ["before", "codes.parquet", "out"]
