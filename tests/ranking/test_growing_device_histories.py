"""Searches of a stream's histories on a device: the batches and steps of the host's searches, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import trainer.rank
from tests.distributed.stream_ranks import JOB
from tests.ranking.test_device_histories import (
    CPU,
    DEVICE,
    ON_GPU,
    VARIANTS,
    assert_same,
    everything,
    fitted_for,
    random_space,
)
from tests.ranking.test_train_loop import train_counted
from trainer.config.load import parse_time
from trainer.config.ranker import JobConfig, load_config
from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format import growing_history, history
from trainer.data.format.dataset import Dataset
from trainer.data.format.growing_history import VISIT_COLUMNS, GrowingHistories
from trainer.data.format.schema import DOMAINS, Rows, partition_of
from trainer.data.format.shards import read_rows
from trainer.data.loading.batch import RankingBatch, unpack
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking import device_entries, device_histories, growing_device_histories
from trainer.ranking.growing_device_histories import GrowingDeviceHistories, open_growing_histories

BATCH = 4
# Visits of a stream have neither codes nor vectors on a device.
OF_STREAMS = [variant for variant in VARIANTS if variant not in ("codes", "vectors")]
HISTORIES = {
    "long": {"domain": "video", "search": "top", "length": 4},
    "author": {"domain": "video", "search": "author", "length": 4},
    "live_long": {"domain": "live", "search": "top", "length": 500},
    "mixed": {"domain": "both", "length": 5},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("growing") / "world"
    simulate(path, users=60, days=2, partitions=3, seed=5)
    return path


def job(dataset: Path, *overrides: str) -> JobConfig:
    histories = [
        f"features.history.{name}.{key}={value}" for name, own in HISTORIES.items() for key, value in own.items()
    ]
    fixed = [*JOB, f"data.path={dataset}", "features.search.refresh_steps=3", *histories]
    return load_config("configs/moment.toml", [*fixed, "features.search.device=device", *overrides])


class Stream:
    """The visits of a dataset as a rank's stream, in portions of random length, and the requests after each.

    Attributes:
        histories: histories of the rank, as far as the stream has come.
    """

    def __init__(self, data: Dataset, dataset: Path, since_ms: int, owned: list[int], seed: int) -> None:
        stored, partitions = data.histories, data.spec.partitions
        self._random = np.random.default_rng(seed)
        self._owned, self._since_ms = owned, since_ms
        user_id, _ = stored.lengths()
        user_id = user_id[np.isin(partition_of(user_id, partitions), owned)]
        first, stop = stored.runs(user_id, np.full(len(user_id), 1 << 62))
        at = [np.arange(begin, end) for begin, end in zip(first.reshape(-1), stop.reshape(-1), strict=True)]
        lengths = (stop - first).reshape(-1)
        places = np.concatenate(at)
        visits = {name: stored.column(name)[places] for name in VISIT_COLUMNS if name not in ("user_id", "domain")}
        visits["user_id"] = np.repeat(np.repeat(user_id, len(DOMAINS)), lengths)
        visits["domain"] = np.repeat(np.tile(np.arange(len(DOMAINS), dtype=np.uint8), len(user_id)), lengths)
        visits = {name: column[np.argsort(visits["known_ms"], kind="stable")] for name, column in visits.items()}
        self._visits, self._owner = visits, partition_of(visits["user_id"], partitions)
        rows = read_rows(dataset, data.spec)
        mine = np.isin(partition_of(rows["user_id"], partitions), owned) & (rows["request_ms"] >= since_ms)
        self._rows = {name: column[mine] for name, column in rows.items()}
        self.histories = GrowingHistories(
            stored, lambda user: np.isin(partition_of(user, partitions), owned), owned, since_ms
        )

    def portions(self, number: int) -> Iterator[Rows]:
        """Add a portion of visits, and yield the requests until then; in the end there is nothing left."""
        last = int(self._visits["known_ms"].max()) + 1
        times = np.sort(self._random.integers(self._since_ms, last, number - 1)).tolist()
        begin = self._since_ms
        for stop in (*times, last):
            due = (self._visits["request_ms"] >= self._since_ms) & (self._visits["known_ms"] >= begin)
            due &= self._visits["known_ms"] < stop
            for partition in self._owned:
                part = due & (self._owner == partition)
                self.histories.append(partition, {name: self._visits[name][part] for name in VISIT_COLUMNS}, stop)
            asked = np.flatnonzero((self._rows["request_ms"] >= begin) & (self._rows["request_ms"] < stop))
            yield {name: column[asked] for name, column in self._rows.items()}
            begin = stop


def opened(
    config: JobConfig, features: FeatureMap, histories: GrowingHistories, space: SearchSpace, device: torch.device
) -> GrowingDeviceHistories:
    world: Any = SimpleNamespace(device=device)
    engine: Any = SimpleNamespace(allocate=lambda: 0, copy_stream=None)
    found = open_growing_histories(config, features, histories, space, world, engine)
    assert found is not None
    return found


def feature_map(dataset: Path, config: JobConfig) -> tuple[Dataset, FeatureMap, int]:
    data = Dataset.open(str(dataset), "error")
    since = parse_time(config.data.train_until, data.spec.timezone, "data.train_until")
    return data, FeatureMap(data.spec, config.features, fitted_for(config, data)), since


def compare(
    dataset: Path,
    config: JobConfig,
    seed: int,
    owned: list[int],
    features: FeatureMap | None = None,
    device: torch.device = CPU,
    most: int = 1 << 30,
) -> Iterator[RankingBatch]:
    """Compare a stream's batches, some portions apart, and yield the host's."""
    data, usual, since = feature_map(dataset, config)
    features = usual if features is None else features
    space, write = random_space(config, features, seed)
    stream = Stream(data, dataset, since, owned, seed)
    copy = opened(config, features, stream.histories, space, device)
    batches = 0
    for portion, requests in enumerate(stream.portions(25)):
        n = len(requests["user_id"])
        if portion % 3 == 1 or not n:
            # The copy need not follow each portion.
            continue
        assert copy.update()
        for begin in range(0, n, BATCH):
            rows = {name: column[begin : begin + BATCH] for name, column in requests.items()}
            left, whole = (
                unpack(
                    replace(features.pack(rows, stream.histories, rows["request_ms"], searched), version=space.newest),
                    features.layout,
                    {},
                )
                for searched in (copy.places, space.at(space.newest))
            )
            assert left.left is not None and whole.left is None
            assert_same(copy.complete(left.to(device)).to(CPU), whole)
            yield whole
            if (batches := batches + 1) >= most:
                return
        write()
    # Followed step by step, and copied whole at the end: the same.
    assert copy.update()
    stream.histories._changed = None
    again = opened(config, features, stream.histories, space, device)
    assert again.update()
    user_id, _ = stream.histories.lengths()
    first, stop = stream.histories.runs(user_id, np.full(len(user_id), 1 << 62))
    assert (stop > first).any()
    at = np.concatenate([np.arange(b, e) for b, e in zip(first.reshape(-1), stop.reshape(-1), strict=True)])
    for ours, theirs in (
        *((copy.entries.ids[name], column) for name, column in again.entries.ids.items()),
        (copy.entries.context, again.entries.context),
        (copy.entries.request_ms, again.entries.request_ms),
    ):
        assert torch.equal(ours[at], theirs[at])


@pytest.mark.parametrize("variant", OF_STREAMS)
@pytest.mark.parametrize(("seed", "owned"), [(0, [0, 1, 2]), (1, [0, 2]), (2, [1])])
def test_the_batches_of_a_stream(
    dataset: Path, variant: str, seed: int, owned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed == 2:
        # Users lose their oldest visits, runs move often, gaps are removed, and all in small parts.
        for where in (history, growing_history):
            monkeypatch.setattr(where, "HISTORY_LIMIT", 20)
        monkeypatch.setattr(growing_history, "SLACK", 4)
        monkeypatch.setattr(growing_history, "_SPARE", 0)
        for where in (device_entries, growing_device_histories):
            monkeypatch.setattr(where, "CHUNK_ENTRIES", 16)
    config = job(dataset, *VARIANTS[variant])
    sizes, batches = set[int](), 0
    for whole in compare(dataset, config, seed, owned):
        lengths = everything(whole)
        for name in ("long", "live_long"):
            sizes.update(lengths[f"{name}_item lengths"].tolist())
        batches += 1
    assert batches > 10 and 4 in sizes and len(sizes) > 4


@pytest.mark.parametrize("variant", [pytest.param(name, marks=ON_GPU) for name in ("direct", "int8")])
def test_the_batches_of_the_gpus_kernel(dataset: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.search import triton_kernel

    monkeypatch.setattr(device_histories, "_kernel", lambda device: triton_kernel.top)
    config = job(dataset, *VARIANTS[variant], "features.history.live_long.length=30")
    assert len(list(compare(dataset, config, 3, [0, 1, 2], device=DEVICE, most=4))) == 4


def test_direct_ids_beyond_their_tables_are_counted(dataset: Path) -> None:
    config = job(dataset)
    data, usual, _ = feature_map(dataset, config)
    rows = {
        name: rows * 2 // 3 if name in ("item", "author") else rows for name, rows in usual.fitted.table_rows.items()
    }
    features = FeatureMap(data.spec, config.features, replace(usual.fitted, table_rows=rows))
    assert sum(whole.beyond.get("histories", 0) for whole in compare(dataset, config, 4, [0, 1, 2], features)) > 0


@pytest.mark.parametrize("late", [False, True])
def test_histories_that_no_longer_fit(dataset: Path, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the limit of the job, or because the device has no memory; ``auto`` goes on without it."""
    found = []
    for required in (False, True):
        config = job(dataset)
        data, features, since = feature_map(dataset, config)
        space, _ = random_space(config, features, 0)
        stream = Stream(data, dataset, since, [0, 1, 2], 0)
        copy = opened(config, features, stream.histories, space, CPU)
        copy._required = required
        portions = stream.portions(3)
        next(portions)
        assert copy.update() and len(copy.entries.request_ms)
        list(portions)
        if late:
            monkeypatch.setattr(copy.entries, "write", _no_memory)
        else:
            copy._limit = 1
        if required:
            with pytest.raises(UserError) as error:
                copy.update()
            found.append(str(error.value))
        else:
            assert not copy.update()
        assert not len(copy.entries.request_ms) and not copy._vectors
    (text,) = found
    assert text.startswith('features.search.device = "device": the visits of the stream and the search vectors take ')
    assert text.endswith("features.search.device=cpu resumes from the last checkpoint") and "\n" not in text


def _no_memory(*unused: Any) -> None:
    raise torch.OutOfMemoryError


def test_a_job_takes_the_same_steps_and_waits_no_more(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the metrics of the held-out range after the stream, whose rows read the histories of the dataset."""
    monkeypatch.setattr(trainer.rank, "write_last_report", lambda directory: None)
    settings = {
        **{"model.compiled_attention": "false", "model.compiled_experts": "false", "train.batch_size": 8},
        **{"stream.publish_minutes": 0, "checkpoint.every_steps": 1000, "features.search.refresh_steps": 2},
        **{"data.eval_from": "2024-03-05T20:00", "stream.until": "2024-03-05T12:00", "train.log_every": 3},
    }
    runs, reports = {}, {}
    for where in ("cpu", "device"):
        more = [f"{key}={value}" for key, value in settings.items()]
        config = job(dataset, *more, f"run.directory={tmp_path / where}", f"features.search.device={where}")
        runs[where] = train_counted(config, later=True)
        reports[where] = json.loads((tmp_path / where / "metrics.json").read_text())
    for part in ("behaviours", "stream"):
        assert reports["device"][part] == reports["cpu"][part] and reports["cpu"][part]
    assert len(runs["device"].waits) > 10
    for step, (ours, theirs) in enumerate(zip(runs["device"].waits, runs["cpu"].waits, strict=True), 1):
        assert ours == theirs, f"step {step}"
    assert runs["device"].history == runs["cpu"].history
    for name, values in runs["cpu"].tensors.items():
        assert torch.equal(runs["device"].tensors[name], values), name
