"""Searches on a device: the batches, steps and metrics of the loader's searches, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.search.search import padded_width
from tests.data.code_files import write_codes_of
from tests.data.vector_tables import vectors_beside, write_vectors_of
from tests.ranking.test_train_loop import job as training_job
from tests.ranking.test_train_loop import train_counted
from trainer.config.ranker import JobConfig, load_config
from trainer.console.errors import UserError
from trainer.data.features.code_inputs import open_codes
from trainer.data.features.content_inputs import open_reader
from trainer.data.features.content_tables import open_segments, open_tables
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures, fit_features
from trainer.data.features.packed_side import gap_bucket
from trainer.data.features.search_vectors import SearchSpace, SpaceTable
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch import RankingBatch
from trainer.data.loading.loader import Loader
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking import device_histories
from trainer.ranking.device_histories import (
    _gap_bucket,
    _refuse_if_too_large,
    check_device,
    memory_for,
    open_device_histories,
)
from trainer.ranking.setup import split_in_time

REFRESH, BATCH = 3, 5
HISTORIES = {
    "long": {"domain": "video", "search": "top", "length": 4},
    "author": {"domain": "video", "search": "author", "length": 4},
    # Longer than any history here: the search finds all entries.
    "live_long": {"domain": "live", "search": "top", "length": 500},
    "live_author": {"domain": "live", "search": "author", "length": 3},
    "mixed": {"domain": "both", "length": 5, "require": '["click"]'},
    "all": {"domain": "both", "length": 6},
    "clicked": {"domain": "live", "length": 3, "require": '["click", "like"]'},
}
HISTORY_KEYS = {
    f"features.history.{name}.{key}": value for name, own in HISTORIES.items() for key, value in own.items()
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
# The interpreter runs the GPU's kernel on a CPU.
DEVICE = torch.device("cuda") if torch.cuda.is_available() and not INTERPRETED else CPU
ON_GPU = [
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
    pytest.mark.skipif(
        not importlib.util.find_spec("triton") or not (INTERPRETED or DEVICE.type == "cuda"),
        reason="needs Triton, and a GPU or its interpreter: run `make test-triton`",
    ),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "world"
    simulate(path, users=50, days=2, partitions=3, seed=4)
    codes = write_codes_of(path, path.parent / "codes.parquet")
    write_vectors_of(path, codes, path.parent / "vectors")
    return path


def job(dataset: Path, *overrides: str) -> JobConfig:
    histories = [
        f"features.history.{name}.{key}={value}" for name, own in HISTORIES.items() for key, value in own.items()
    ]
    fixed = [f"data.path={dataset}", "data.eval_from=", f"features.search.refresh_steps={REFRESH}"]
    return load_config("configs/simulated.toml", [*fixed, *histories, "features.search.device=device", *overrides])


def fitted_for(config: JobConfig, data: Dataset) -> FittedFeatures:
    split, tables = split_in_time(config, data.spec), open_tables(config.features)
    segments = open_segments(config.features, config.data.path, tables)
    return fit_features(data.spec, data.store, data.histories, config.features, split.fitting, tables, segments)


def features_for(config: JobConfig, data: Dataset) -> FeatureMap:
    fitted = fitted_for(config, data)
    codes = open_codes(config.features, fitted.codes)
    content = open_reader(config.features, config.data.path, fitted.content)
    return FeatureMap(data.spec, config.features, fitted, codes=codes, content=content)


def random_space(config: JobConfig, features: FeatureMap, seed: int) -> tuple[SearchSpace, Any]:
    """Return a space, and a function that writes its next version."""
    search = config.features.search
    tables = {table.name: SpaceTable(table.rows, table.dim) for table in features.tables if table.name in search.tables}
    # The first version has another width, as content embeddings have.
    first = {name: SpaceTable(own.rows, 40) for name, own in tables.items()}
    space, rng = SearchSpace(first, tables, search.dtype, REFRESH), np.random.default_rng(seed)

    def write() -> None:
        version = space.newest + 1
        for name, values in space.at(version).items():
            dim = space.tables(version)[name].dim
            assert values.shape[1] == padded_width(dim)
            # Few different values, so that there are ties.
            values[:] = 0
            values[1:, :dim] = rng.integers(-2, 3, (len(values) - 1, dim)) * (rng.random((len(values) - 1, 1)) < 0.7)
        space.newest = version

    write()
    return space, write


def everything(batch: RankingBatch) -> dict[str, Tensor]:
    """Return all tensors of a batch by name."""
    found = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for keyed in batch.ids:
        for key in keyed.keys():  # noqa: SIM118 (not a dict)
            found |= {f"{key} ids": keyed[key].values(), f"{key} lengths": keyed[key].lengths()}
    for name, of_table in batch.content.items():
        found[f"{name} vectors"] = of_table.vectors
        found |= {f"{lookup} places": places for lookup, places in of_table.places.items()}
    return found


def assert_same(ours: RankingBatch, theirs: RankingBatch) -> None:
    # The device counts the unknown ids that its searches found, and the loader all others.
    counted = dict(ours.beyond)
    if ours.searched_beyond is not None:
        counted["histories"] = counted.get("histories", 0) + int(ours.searched_beyond)
    assert ours.missing_with(ours.searched_missing) == theirs.missing
    ours = replace(ours, searched_beyond=None, searched_missing=None)
    assert {name: count for name, count in counted.items() if count} == theirs.beyond
    mine, other = everything(ours), everything(theirs)
    assert mine.keys() == other.keys() and ours.left is None
    for name, tensor in other.items():
        assert torch.equal(mine[name], tensor), name
    assert ours.position == theirs.position


def pairs_of_batches(
    config: JobConfig,
    data: Dataset,
    features: FeatureMap,
    seed: int,
    rank: int,
    ranks: int,
    device: torch.device = CPU,
    **options: Any,
) -> Iterator[tuple[RankingBatch, RankingBatch]]:
    """Yield the batches of a rank with searches on the device, and with those of the loader."""
    space, write = random_space(config, features, seed)
    world: Any = SimpleNamespace(rank=rank, size=ranks, device=device)
    no_engine: Any = SimpleNamespace(allocate=lambda: 0)
    on_device = open_device_histories(config, features, data.histories, space, world, no_engine)
    assert on_device is not None
    reading: dict[str, Any] = {"rank": rank, "world": ranks, "batch_size": BATCH, "seed": 0, "shuffle_ms": 3_600_000}
    reading |= {"space": space, "first_step": 0, **options}
    loaders = (
        Loader(data.store, data.histories, features, left_to=left, **reading) for left in (on_device.places, None)
    )
    for step, (left, whole) in enumerate(zip(*map(iter, loaders), strict=True), 1):
        assert left.left is not None and whole.left is None
        yield on_device.complete(left.to(device)).finished().to(CPU), whole
        if space.is_due(step):
            write()


VECTORS = [
    "features.content.air.on_air=longest",
    'features.content.now={table="VECTORS/segments", of="segment", dim=3, histories=true}',
    'features.content.only={table="VECTORS/items", dim=2}',
]
VARIANTS = {
    "vectors": VECTORS,
    "direct": [],
    "hash": ["features.item.ids=hash", "features.item.rows=40", "features.author.ids=lookup", "features.tags=true"],
    "int8": ["features.search.dtype=int8", "features.author_side=['author_genre']"],
    "codes": ["features.codes.shown.history=longest", "features.codes.first.history=entry"],
    "dynamic": ["features.item.ids=dynamic", "features.item.rows=50", "features.search.tables=['author']"],
}


def variant_of(dataset: Path, name: str) -> list[str]:
    """Return the settings of a variant, with the files of its code sets and tables of vectors."""
    overrides = [override.replace("VECTORS", str(dataset.parent / "vectors")) for override in VARIANTS[name]]
    sets = dict.fromkeys(key.split(".")[2] for key in overrides if key.startswith("features.codes."))
    files = [f"features.codes.{name}.file={dataset.parent / 'codes.parquet'}" for name in sets]
    tables = vectors_beside(dataset) if name == "vectors" else ()
    return [*files, *(f"features.codes.{name}.dim=8" for name in sets), *tables, *overrides]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_the_batches_are_those_of_the_loaders_searches(dataset: Path, variant: str, rank: int, ranks: int) -> None:
    config = job(dataset, *variant_of(dataset, variant))
    data = Dataset.open(str(dataset), "error")
    features = features_for(config, data)
    steps, sizes = 0, set[int]()
    for ours, theirs in pairs_of_batches(config, data, features, seed=rank, rank=rank, ranks=ranks):
        assert_same(ours, theirs)
        lengths = everything(theirs)["long_item lengths"]
        steps, sizes = steps + 1, sizes | set(lengths.tolist())
    # Three versions of the vectors were in use.
    assert steps > 3 * REFRESH and 4 in sizes and (ranks > 1 or {0, 1, 4} <= sizes)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=ON_GPU) for name in ("direct", "int8")])
def test_the_batches_of_the_gpus_kernel(dataset: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.search import triton_kernel

    monkeypatch.setattr(device_histories, "_kernel", lambda device: triton_kernel.top)
    config = job(dataset, *VARIANTS[variant], "features.history.live_long.length=30")
    data = Dataset.open(str(dataset), "error")
    features = features_for(config, data)
    pairs = pairs_of_batches(config, data, features, 5, 0, 1, device=DEVICE)
    for ours, theirs in itertools.islice(pairs, 4):
        assert_same(ours, theirs)


def test_histories_of_an_evaluation_with_frozen_features(dataset: Path) -> None:
    config = job(dataset)
    data = Dataset.open(str(dataset), "error")
    features = features_for(config, data)
    middle = sum(data.spec.span_ms) // 2
    found = list(pairs_of_batches(config, data, features, 0, 0, 1, as_of_limit_ms=middle, workers=1, prefetch=1))
    for ours, theirs in found:
        assert_same(ours, theirs)
    assert len(found) > 10


def test_direct_ids_beyond_their_tables_are_counted(dataset: Path) -> None:
    config = job(dataset)
    data = Dataset.open(str(dataset), "error")
    fitted = fitted_for(config, data)
    rows = {name: rows * 2 // 3 if name in ("item", "author") else rows for name, rows in fitted.table_rows.items()}
    features = FeatureMap(data.spec, config.features, replace(fitted, table_rows=rows))
    searched = 0
    for ours, theirs in pairs_of_batches(config, data, features, 1, 0, 1):
        assert ours.searched_beyond is not None
        searched += int(ours.searched_beyond)
        assert_same(ours, theirs)
    assert searched > 0


@pytest.mark.parametrize("vectors", [False, True])
def test_a_job_takes_the_same_steps_and_waits_no_more(dataset: Path, tmp_path: Path, vectors: bool) -> None:
    """Also the metrics of the held-out range, whose histories end with the training.

    With pre-trained vectors the host reads how many of them a batch has. They were counted a step before.
    """
    operations = {"model.compiled_attention": "false", "model.compiled_experts": "false"}
    settings = {
        **HISTORY_KEYS,
        **operations,
        **{"features.search.refresh_steps": REFRESH, "train.log_every": 3, "data.workers": 0, "train.epochs": 3},
        **{"data.eval_from": "2024-03-05", "data.frozen": "true"},
        **{"features.codes.shown.file": dataset.parent / "codes.parquet", "features.codes.shown.history": "longest"},
    }
    runs, reports = {}, {}
    for where in ("cpu", "device"):
        more = [f"{key}={value}" for key, value in settings.items()]
        more += vectors_beside(dataset) if vectors else ()
        config = training_job(dataset, tmp_path / where, "linear", *more, f"features.search.device={where}")
        runs[where] = train_counted(config, later=True)
        reports[where] = json.loads((tmp_path / where / "metrics.json").read_text())["behaviours"]
    assert reports["device"] == reports["cpu"] and reports["cpu"]
    assert len(runs["device"].waits) > 3 * REFRESH
    # The loader's searches are of the host; a version of the vectors is read from the tables every few steps.
    for step, (ours, theirs) in enumerate(zip(runs["device"].waits, runs["cpu"].waits, strict=True), 1):
        # One reading for each of the two tables.
        assert sorted(ours) == sorted([*theirs, *["values of a step"] * 2 * vectors]), f"step {step}"
    assert runs["device"].history == runs["cpu"].history
    for name, values in runs["cpu"].tensors.items():
        assert torch.equal(runs["device"].tensors[name], values), name


def test_ages_are_in_the_buckets_of_the_loader() -> None:
    edges = [round(1000 * (2 ** (k / 2) - 1)) for k in range(60)]
    ages = np.unique([edge + more for edge in edges for more in range(-3, 4)] + [-5, 0, 1, 2**40, 2**52 + 1])
    random = np.random.default_rng(0).integers(0, 10**12, 10_000)
    for each in (ages.astype(np.int64), random):
        assert _gap_bucket(torch.from_numpy(each)).tolist() == gap_bucket(each).tolist()


STREAM = {
    "data.train_until": "2024-03-02",
    "stream.until": "2024-03-03",
    "optimizer.decay": "constant",
    "optimizer.warmup": "0",
}
CODES = {"features.codes.c.file": "x", "features.codes.c.history": "entry"}
CONTENT = {"features.content.v.table": "x", "features.content.v.histories": "true"}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (CODES, "features.codes.c.history = 'entry' of a stream needs the entries on the host"),
        (CONTENT, "features.content.v.histories = true of a stream needs the entries on the host"),
    ],
)
def test_streams_that_need_the_entries_on_the_host(dataset: Path, keys: dict[str, str], reason: str) -> None:
    overrides = [f"{key}={value}" for key, value in keys.items()]
    check_device(job(dataset, *overrides))
    overrides += [f"{key}={value}" for key, value in STREAM.items()]
    with pytest.raises(UserError, match=reason) as error:
        check_device(job(dataset, *overrides))
    assert str(error.value).startswith('features.search.device = "device": ')
    for device in ("cpu", "auto"):
        check_device(job(dataset, *overrides, f"features.search.device={device}"))
    # A job that searches nothing by dot product searches nothing on a device.
    check_device(
        job(dataset, *overrides, *(f"features.history.{name}.search=latest" for name in ("long", "live_long")))
    )


@pytest.mark.parametrize("own", [None, 100])
def test_a_device_that_is_too_small_is_an_error_on_every_rank(own: int | None) -> None:
    """The device of this rank has enough memory; that of another one has not, unless ``own`` is free on this one."""
    told: list[str | None] = []

    def first_problem(problem: str | None) -> str | None:
        told.append(problem)
        return problem or "on host-2 (rank 1): too small"

    world: Any = SimpleNamespace(device=torch.device("cuda:0"), first_problem=first_problem)
    with pytest.raises(UserError) as error:
        _refuse_if_too_large("7 visits take 200 B", 200, own or 300, world)
    assert told == [None] if own is None else told == [str(error.value)]
    assert ("cuda:0 has 100 B free" if own else "host-2 (rank 1)") in str(error.value)


@pytest.mark.parametrize("where", ["auto", "device"])
def test_a_device_that_runs_out_of_memory_while_histories_are_copied(
    dataset: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(dataset, f"features.search.device={where}")
    data = Dataset.open(str(dataset), "error")
    features = features_for(config, data)
    space, _ = random_space(config, features, 0)
    world: Any = SimpleNamespace(rank=0, size=1, device=CPU)
    monkeypatch.setattr(device_histories, "is_wanted", lambda *job: True)

    def no_memory(*columns: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device_histories.DeviceEntries, "write", no_memory)
    unused: Any = None
    if where == "auto":
        assert open_device_histories(config, features, data.histories, space, world, unused) is None
        return
    with pytest.raises(UserError, match=r'"device": cpu ran out of memory while [\d,]+ visits and the .*; use "cpu"$'):
        open_device_histories(config, features, data.histories, space, world, unused)


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_without_a_gpu_the_loader_searches(dataset: Path, where: str) -> None:
    unused: Any = None
    space = SearchSpace({"item": SpaceTable(4, 8)}, {}, "float16", 0)
    world: Any = SimpleNamespace(rank=0, size=1, device=CPU)
    config = job(dataset, f"features.search.device={where}")
    assert open_device_histories(config, unused, unused, space, world, unused) is None
    assert open_device_histories(job(dataset), unused, unused, None, world, unused) is None


@pytest.mark.parametrize(("where", "free", "allowed"), [("auto", 640, 300), ("auto", 620, None), ("device", 640, 600)])
def test_memory_of_the_first_step_stays_free(
    dataset: Path, where: str, free: int, allowed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's state is allocated before the free memory is read, and the gradients are left free."""
    calls: list[str] = []
    engine: Any = SimpleNamespace(allocate=lambda: calls.append("allocate") or 40)

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        calls.append("free memory")
        return free, 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    world: Any = SimpleNamespace(device=torch.device("cuda:0"), first_problem=lambda problem: problem)
    config = job(dataset, f"features.search.device={where}")
    assert memory_for(config, "7 visits", 300, world, engine) == allowed
    assert calls == ["allocate", "free memory"]
    with pytest.raises(UserError, match=r'"device": 7 visits take 300 B, and cuda:0 has 200 B free; use "cpu"$'):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (240, 1000))
        memory_for(job(dataset), "7 visits", 300, world, engine)
