"""Forecasts as features of a ranker: from the codes to the batch, nothing that becomes known after a request counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.code_files import write_codes
from tests.data.features.test_content_inputs import make_map, values_of
from tests.paths import ROOT
from tests.semantic_ids.segment_world import make_version
from trainer.config.features import FeatureConfig
from trainer.config.foresight import load_foresight_follow
from trainer.config.ranker import load_config
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.shards import read_rows
from trainer.data.loading.batch import unpack
from trainer.data.simulator.write_dataset import simulate
from trainer.engine.hybrid_engine import StepResult
from trainer.foresight_follow import run_job
from trainer.rank import run_job as train_ranker
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.semantic_ids.foresight_forecast import DECODER, ENCODER, TABLES

TOPICS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated world whose codes are the topics of its segments, a job file, and a run that has followed them."""
    directory = tmp_path_factory.mktemp("features")
    simulate(directory / "world", users=100, days=2, partitions=2, seed=3, segment_noise=0.5)
    version = make_version(directory / "codebook", TOPICS)
    (directory / "job.toml").write_text(
        f'[data]\npath = "{directory}/world"\ncodes = "{directory}/codes.parquet"\n'
        f'codebook = "{directory}/codebook"\nruns = 6\n'
        "[model]\ndim = 8\nheads = 2\nencoder_layers = 1\nfeed_forward = 16\ndropout = 0.1\n"
        f'[train]\nbatch_size = 256\ndevice = "cpu"\nwatchdog_seconds = 300.0\nsampled_codes = 8\n'
        f'deepspeed = "{ROOT}/configs/deepspeed/zero1.json"\n'
    )
    segments = DatasetSegments.read(str(directory / "world"), embedded=False)
    topic = pq.read_table(directory / "world/segments.parquet")["topic"].to_numpy() % TOPICS
    codes = CodeFile(
        *(directory / "codes.parquet", version.name, (TOPICS,)),
        *(segments.item_id, segments.author_id, segments.ids, segments.known_ms, topic[:, None].astype(np.int32)),
        start_ms=segments.start_ms,
    )
    write_codes(codes.path, codes)
    follow(directory, "run")
    return directory


def follow(world: Path, run: str, *overrides: str) -> None:
    config = load_foresight_follow(world / "job.toml", [f"run.directory={world}/{run}", *overrides])
    with World.join("cpu") as ranks:
        run_job(config, ranks, Preemption())


def features_of(world: Path, run: str) -> dict[str, Any]:
    return {name: {"table": f"{world}/{run}/forecasts/{name}", "of": "segment", "dim": 4} for name in TABLES}


class Simulated:
    """The dataset, as :func:`make_map` takes it."""

    def __init__(self, path: Path) -> None:
        self.path = path


def test_segments_after_a_request_change_no_bit_of_what_it_reads(world: Path) -> None:
    codes = CodeFile.read(world / "codes.parquet")
    dataset = world / "world"
    rows = read_rows(dataset, DatasetSpec.load(dataset))
    live = rows["domain"] == 1
    rows = {name: column[live] for name, column in rows.items()}
    now = int(np.median(rows["request_ms"]))
    late = codes.known_ms > now
    other = (codes.codes + np.random.default_rng(0).integers(1, TOPICS, (len(codes), 1))) % TOPICS
    changed = CodeFile(
        *(world / "changed.parquet", codes.version, codes.levels, codes.item_id, codes.author_id, codes.segment),
        *(codes.known_ms, np.where(late[:, None], other, codes.codes).astype(np.int32)),
        start_ms=codes.start_ms,
    )
    write_codes(changed.path, changed)
    follow(world, "changed", f"data.codes={changed.path}")

    def read(run: str, part: dict[str, np.ndarray]) -> dict[str, list[list[float] | None]]:
        config = FeatureConfig.model_validate({"content": features_of(world, run)})
        tables = {name: ContentVectors.open(own.table) for name, own in config.content.items()}
        segments = DatasetSegments.read(str(dataset), embedded=False)
        features, data = make_map(Simulated(dataset), tables, segments, config)
        return values_of(unpack(features.pack(part, data.histories, part["request_ms"]), features.layout, {}))

    early = {name: column[rows["request_ms"] <= now] for name, column in rows.items()}
    before = read("run", early)
    assert before == read("changed", early)
    assert set(before) == set(TABLES)
    for vectors in before.values():
        assert sum(vector is not None for vector in vectors) > 0.9 * len(vectors) > 50
    after = {name: column[rows["request_ms"] > now + 3_600_000] for name, column in rows.items()}
    first, second = read("run", after), read("changed", after)
    for name in TABLES:
        assert np.mean([one != two for one, two in zip(first[name], second[name], strict=True)]) > 0.9


def test_training_a_ranker_leaves_the_predictor_and_its_forecasts_as_they_are(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forecasts of a batch are no parameters and carry no gradient; the learnt projection is what is trained."""
    advance, seen = TrainingState.advance, []

    def recorded(self: TrainingState, result: StepResult) -> None:
        advance(self, result)
        seen.append({name: of_table.vectors for name, of_table in result.batch.content.items()})

    monkeypatch.setattr(TrainingState, "advance", recorded)
    run = world / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    tables = [
        f"features.content.{name}={{table='{run}/forecasts/{name}', of='segment', dim=4}}"
        for name in (ENCODER, DECODER)
    ]
    config = load_config(
        "configs/simulated.toml",
        [
            *(f"data.path={world}/world", f"run.directory={world}/ranker", "data.eval_from=2024-03-05T18:00", *tables),
            *("model.expert_layers=[[16], [8]]", "model.tower=[8]", "features.history.short.length=5"),
            *("features.history.live.length=5", "train.batch_size=64", "train.device=cpu", "data.workers=0"),
        ],
    )
    with World.join("cpu") as ranks:
        train_ranker(config, ranks, Preemption())
    assert len(seen) >= 5
    found = {name: ContentVectors.open(run / "forecasts" / name) for name in (ENCODER, DECODER)}
    for step in seen:
        for name, vectors in step.items():
            assert not vectors.requires_grad and vectors.grad_fn is None
            rows = {row.tobytes() for row in np.asarray(found[name].vectors)}
            assert all(row.tobytes() in rows for row in vectors.numpy())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
