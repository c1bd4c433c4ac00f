"""All systems in one ranker, from nothing: the commands of `make full`, with a ranker that is killed and resumed."""

from __future__ import annotations

import json
import shlex
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.faults.faulty_rank import DIRECTORY_VARIABLE, FAULT_VARIABLE
from tests.full_chain import commands
from tests.nursery import Nursery
from tests.paths import ROOT
from trainer.checkpoint.manifest import list_checkpoints, read_manifest
from trainer.config.load import parse_time
from trainer.config.ranker import load_config
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import DatasetSegments
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import event_timeouts, report_policy

SMALL = {
    "align": ("train.epochs=1", "train.batch_size=256", "towers.dim=8"),
    "quantize": ("codebook.iterations=2",),
    "foresight": ("train.epochs=1", "model.dim=8", "model.heads=2", "model.encoder_layers=1", "data.runs=8"),
}
RANKER = (
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "stream.flush_seconds=3600",
    "features.search.refresh_steps=5",
    "train.log_every=10",
    "checkpoint.every_steps=6",
    "checkpoint.every_minutes=0",
)
KILLED_AFTER = 20
"""Step after which one of two ranks is killed; there are about 60."""


def expected_rows(directory: Path) -> Counter[int]:
    """Count the rows of each visit that the label stream of the job gives."""
    config = load_config(ROOT / "configs/full.toml")
    log = EventLog(directory / config.data.path)
    times = (config.data.train_until, config.data.eval_from)
    since, until = (parse_time(text, log.spec.timezone, "t") for text in times)
    found: Counter[int] = Counter()
    for partition in range(log.spec.partitions):
        events = log.read(partition)
        inside = (events["time_ms"] >= since) & (events["time_ms"] < until)
        events = {name: column[inside] for name, column in events.items()}
        rows = assemble_batch(log.spec, report_policy(config.labels), event_timeouts(config.labels), events).rows
        found.update(rows["visit_id"].tolist())
    return found


def trained_visits(record: Path, last_step: int | None = None) -> Counter[int]:
    """Count the rows of each visit in the steps up to ``last_step``, by the record of ``faulty_rank``."""
    found: Counter[int] = Counter()
    for file in record.glob("rows-*"):
        for step, visits in map(json.loads, file.read_text().splitlines()):
            if last_step is None or step <= last_step:
                found.update(visits)
    return found


@pytest.mark.slow
def test_every_row_code_and_forecast_is_there_once_after_a_kill(nursery: Nursery, tmp_path: Path) -> None:
    nursery.compile_search()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data/full").mkdir(parents=True)
    *before, ranker = (shlex.split(line)[1:] for line in commands("USERS=120", "RANKS=1"))
    for words in before:
        # Only lines with a job file take overrides.
        small = SMALL[words[0]] if any(word.startswith("configs/") for word in words) else ()
        ended = nursery.run("launch.cli.main", [*words, *small], directory=tmp_path)
        assert not ended.status, (words, ended.stderr[-4000:])

    (killed := tmp_path / "killed").mkdir()
    (resumed := tmp_path / "resumed").mkdir()
    arguments = [ranker[1], *RANKER]
    assert ranker[:2] == ["train", "configs/full.toml"]
    fault = {"kind": "signal", "signal": signal.SIGKILL, "to": "rank", "rank": 1, "step": KILLED_AFTER, "delay": 0}
    environment = {DIRECTORY_VARIABLE: str(killed), FAULT_VARIABLE: json.dumps(fault)}
    ended = nursery.run("tests.faults.faulty_rank", arguments, ranks=2, environment=environment, directory=tmp_path)
    assert ended.status and (killed / "struck").exists(), ended.stderr[-4000:]
    saved = list_checkpoints(tmp_path / "runs/full/ranker/checkpoints")[-1]
    step = read_manifest(saved).step
    assert 0 < step <= KILLED_AFTER + 6
    environment = {DIRECTORY_VARIABLE: str(resumed)}
    ended = nursery.run("tests.faults.faulty_rank", arguments, ranks=1, environment=environment, directory=tmp_path)
    assert not ended.status, ended.stderr[-4000:]

    expected = expected_rows(tmp_path)
    first, rest = trained_visits(killed, step), trained_visits(resumed)
    assert first and rest and first + rest == expected
    metrics = json.loads((tmp_path / "runs/full/ranker/metrics.json").read_text())
    assert metrics["training"]["rows"] == expected.total()
    assert set(metrics["behaviours"]) == set(metrics["stream"]["progressive"])

    segments = DatasetSegments.read(str(tmp_path / "data/full/world"), embedded=False)
    for name in ("aligned", "shown"):
        codes = CodeFile.read(tmp_path / f"data/full/codes-{name}.parquet")
        assert sorted(codes.segment.tolist()) == sorted(segments.ids.tolist())
    config = load_config(ROOT / "configs/full.toml")
    timezone = DatasetSpec.load(tmp_path / "data/full/world").timezone
    begin = parse_time(config.data.train_until, timezone, "data.train_until")
    later = np.sort(segments.ids[segments.known_ms >= begin])
    for name in ("encoder", "decoder"):
        table = ContentVectors.open(tmp_path / "runs/full/follow/forecasts" / name)
        assert np.array_equal(np.sort(table.ids), later)
