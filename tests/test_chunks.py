"""Sizes of chunks: a result is the same when a chunk has three rows, for every such constant of the project.

No test has as many rows as a real chunk, so the end of a chunk would never be reached.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.speed.shortlists import HashCodes
from modules.embeddings import Dynamic, Table, initial_values
from modules.search.search import SearchVectors
from tests.checkpoint.stored_checkpoint import write_checkpoint
from tests.distributed.small_model import single_engine
from tests.paths import ROOT
from tests.stream.event_logs import random_events, store
from trainer.checkpoint.reader import Checkpoint
from trainer.config.stream import LabelConfig, StreamConfig
from trainer.data.features.device_listings import AuthorListing, OwnEntries
from trainer.data.features.id_map import IdMap
from trainer.data.features.search_vectors import SearchSpace, SpaceTable
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.importers.published_vectors import write_title_vectors
from trainer.data.importers.staytime_spill import StaytimeSpill, write_staytimes
from trainer.data.simulator.write_dataset import simulate
from trainer.metrics.behaviour_metrics import BehaviourMetrics
from trainer.ranking import device_entries
from trainer.ranking.device_vectors import DeviceVectors
from trainer.ranking.row_mapping import RangeMap
from trainer.ranking.search_refresh import write_content_version
from trainer.ranking.warm_start import _fill
from trainer.runtime.checksums import size_and_crc32
from trainer.runtime.distributed import World
from trainer.serving import scoring
from trainer.sparse.device_ids import DeviceIds
from trainer.sparse.sharded_tables import Shard
from trainer.stream.labels.policy import event_timeouts, report_policy
from trainer.stream.labels.write_rows import Mode, assemble_dataset
from trainer.stream.sources.replay import ReplaySource

LEAST = 64
"""Least value of a constant that the list of all sizes must have."""


def assembled(dataset: Path, tmp_path: Path, mode: Mode) -> Any:
    labels = LabelConfig(policy="fast_slow")
    summary = assemble_dataset(dataset, report_policy(labels), event_timeouts(labels), tmp_path / "rows", mode)
    assert summary.visits > 100
    return pq.read_table(tmp_path / "rows").to_pydict(), summary.rows, summary.unused_events


def staytimes(dataset: Path, tmp_path: Path) -> Any:
    spill, tables = StaytimeSpill(tmp_path / "spill", 2), []
    number = np.arange(20)
    spill.add(
        {"visit_id": number, "item_id": number % 5, "request_ms": 10 * number, "staytime_ms": number * 7 % 11}
        | {"user_id": number % 4}
    )
    builder: Any = SimpleNamespace(texts=lambda name, table: tables.append(table))
    write_staytimes(builder, spill)
    return pa.concat_tables(tables).to_pydict()


def copied_rows(dataset: Path, tmp_path: Path) -> Any:
    weight, momentum = torch.arange(40.0).view(20, 2), torch.arange(20.0)
    table = Checkpoint.open(write_checkpoint(tmp_path, {"user": weight}, {"user": momentum}, {})).model.tables["user"]
    rows = RangeMap([(0, 1, 4), (6, 5, 9), (16, 18, 4)])
    weights = [Shard("user", torch.zeros(12, 2), 0, 0), Shard("user", torch.zeros(11, 1), 12, 1)]
    states = [Shard("user", torch.zeros(12), 0, 0), Shard("user", torch.zeros(11), 12, 0)]
    _fill(table.weight, weights, rows)
    _fill(table.states["momentum1"], states, rows)
    return [shard.values.tolist() for shard in (*weights, *states)]


def content_space(dataset: Path, tmp_path: Path) -> Any:
    ids = np.array([0, 1, 3, 4, 6, 7, 8, 30])
    table = ContentVectors.write(tmp_path / "vectors", ids, np.random.default_rng(0).standard_normal((8, 4)))
    space = SearchSpace({"item": SpaceTable(11, 4)}, {"item": SpaceTable(11, 4)}, "int8", 0)
    missing = write_content_version(space, table, IdMap("item", "direct", 11))
    return missing, space.at(0)["item"].tolist()


def initial_tables(dataset: Path, tmp_path: Path) -> Any:
    with World.join("cpu") as world:
        shards = [(name, values.tolist()) for name, values, *_ in single_engine(world).table_shards()]
    return shards


def initial_rows(dataset: Path, tmp_path: Path) -> Any:
    tables = [Table("a", 50, 2, init="uniform"), Table("b", 50, 2, init="normal"), Table("c", 50, 2, init="zeros")]
    return [initial_values(table, 3, torch.tensor([7, 1, 0, 49, 8, 8, 20]), 0, 2).tolist() for table in tables]


def metrics(dataset: Path, tmp_path: Path) -> Any:
    rng, found = np.random.default_rng(1), BehaviourMetrics(("click", "like"))
    for rows in (1, 1, 1, 5, 2, 0, 1, 9, 3, 1, 1, 1, 1, 1):
        values = torch.from_numpy(rng.random((rows, 2)))
        found.update(torch.from_numpy(rng.integers(0, 4, rows)), values, values.flip(1) < 0.4, values > 0.1)
    return found.rows, found.compute(), {name: column.tolist() for name, column in found.state_dict().items()}


def vector_parts(dataset: Path, tmp_path: Path) -> Any:
    table = ContentVectors.write(tmp_path / "vectors", np.arange(20) * 3, np.arange(40.0).reshape(20, 2))
    ids, vectors = zip(*ContentVectors.open(tmp_path / "vectors").parts(np.arange(2, 19)), strict=True)
    return table.hash, np.concatenate(ids).tolist(), np.concatenate(vectors).tolist()


def title_vectors(dataset: Path, tmp_path: Path) -> Any:
    tmp_path.mkdir(exist_ok=True)
    np.save(tmp_path / "titles.npy", np.arange(16.0).reshape(8, 2))
    left_out = write_title_vectors(
        tmp_path, tmp_path / "titles.npy", np.arange(11), np.array([5, 1, 9, 0, -1, *range(6)])
    )
    tables = [ContentVectors.open(path.parent) for path in tmp_path.rglob("manifest.json")]
    return left_out, [(table.ids.tolist(), table.vectors.tolist()) for table in tables]


def keys_of_texts(dataset: Path, tmp_path: Path) -> Any:
    """Return the keys of a world's segments and of its visits with comments; the chunk is part of the draws' seed."""
    simulate(tmp_path / "world", users=20, days=1, partitions=2, seed=3, texts=True)
    keys = ("item_id", "segment", "visit_id", "user_id", "request_ms")
    found = {}
    for name in ("segments", "visits"):
        table = pq.read_table(tmp_path / "world" / "texts" / f"{name}.parquet")
        found[name] = table.select([key for key in keys if key in table.column_names]).to_pydict()
    return found


def segments_of_world(dataset: Path, tmp_path: Path) -> Any:
    simulate(tmp_path / "world", users=20, days=1, partitions=2, seed=3)
    return pq.read_table(tmp_path / "world" / "segments.parquet").to_pydict()


def factors_of_world(dataset: Path, tmp_path: Path) -> Any:
    simulate(tmp_path / "world", users=20, days=1, partitions=2, seed=3, factors=True)
    return [file.read_bytes() for file in sorted((tmp_path / "world" / "truth").glob("factors-*.parquet"))]


def replayed(dataset: Path, tmp_path: Path) -> Any:
    path = store(tmp_path / "log", random_events(seed=2, events=200), row_group_size=50)
    with ReplaySource(path, StreamConfig(batch_events=40), 0).open(range(3)) as reader:
        return [{name: column.tolist() for name, column in batch.events.items()} for batch in reader]


def codes(dataset: Path, tmp_path: Path) -> Any:
    vectors = SearchVectors(np.random.default_rng(0).standard_normal((10, 16)).astype(np.float16), shift=0)
    return HashCodes.of(vectors, 64, seed=1).codes.tolist()


def checksum(dataset: Path, tmp_path: Path) -> Any:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "file").write_bytes(bytes(range(200)))
    return size_and_crc32(tmp_path / "file")


def ids_of_device(dataset: Path, tmp_path: Path) -> Any:
    ids = DeviceIds(Table("item", 128, 4, dynamic=Dynamic(1, "recency")), 0, 128, torch.device("cpu"))
    rows = [ids.learn(7 * torch.arange(10) + step, step)[0].tolist() for step in range(1, 4)]
    return rows, {name: column.tolist() for name, column in ids.columns.items()}


def scored(dataset: Path, tmp_path: Path) -> Any:
    candidates = {name: 3 * np.arange(10) for name in scoring.REQUIRED}
    model: Any = SimpleNamespace(
        space=None,
        data=SimpleNamespace(histories=None),
        features=SimpleNamespace(
            behaviours=("click", "like"),
            pack=lambda rows, *others: SimpleNamespace(beyond={}, missing={}, user=torch.from_numpy(rows["user_id"])),
        ),
        config=SimpleNamespace(score=SimpleNamespace(exponents={"like": 2.0})),
        logits=lambda batches: (torch.stack([batch.user / 9, 1 - batch.user / 5], 1) for batch in batches),
    )
    with patch.object(scoring, "candidate_rows", lambda *arguments: candidates):
        return scoring.score_candidates(model, "", candidates).to_pydict()


def places_by_author(dataset: Path, tmp_path: Path) -> Any:
    runs, authors = np.array([[5, 9, 9], [9, 9, 15]]), np.array([3, 1, 3, 1, 2, 2, 0, 2, 0, 1])
    listing = AuthorListing([OwnEntries(5, runs - 5, authors, np.arange(10, dtype=np.int32), np.zeros(10, np.int32))])
    return np.concatenate(list(listing.places())).tolist()


def moved_entries(dataset: Path, tmp_path: Path) -> Any:
    moves = np.array([[0, 4, 9, 2], [20, 14, 10, 30], [2, 5, 1, 2]])
    parts = [(total, torch.from_numpy(part)) for total, part in device_entries._parts(moves)]
    return device_entries._moved(torch.arange(20), 40, parts, afresh=False).tolist()


def device_vectors(dataset: Path, tmp_path: Path) -> Any:
    reader: Any = SimpleNamespace(vectors=np.arange(20, dtype=np.float32).reshape(10, 2))
    layout, places = SimpleNamespace(name="items"), SimpleNamespace(read=lambda: iter(()))
    return DeviceVectors(layout, reader, places, torch.device("cpu"))._table.tolist()  # type: ignore[arg-type]


SIZES: dict[str, Callable[[Path, Path], Any]] = {
    "benchmarks.speed.shortlists:_CHUNK_ROWS": codes,
    "modules.embeddings:_CHUNK": initial_rows,
    "trainer.data.features.device_listings:CHUNK_ENTRIES": places_by_author,
    "trainer.data.format.content_vectors:_CHUNK_ROWS": vector_parts,
    "trainer.data.format.content_vectors:_CHUNK_BYTES": vector_parts,
    "trainer.data.importers.published_vectors:_BLOCK": title_vectors,
    "trainer.data.importers.staytime_spill:_ROWS_AT_ONCE": staytimes,
    "trainer.data.simulator.comment_area:VISITS_AT_ONCE": keys_of_texts,
    "trainer.data.simulator.description:SEGMENTS_AT_ONCE": segments_of_world,
    "trainer.data.simulator.factors:VISITS_AT_ONCE": factors_of_world,
    "trainer.data.simulator.texts:SEGMENTS_AT_ONCE": keys_of_texts,
    "trainer.metrics.behaviour_metrics:_CHUNK_ROWS": metrics,
    "trainer.ranking.device_entries:CHUNK_ENTRIES": moved_entries,
    "trainer.ranking.device_vectors:_ROWS_AT_ONCE": device_vectors,
    "trainer.ranking.search_refresh:_CHUNK_ROWS": content_space,
    "trainer.ranking.warm_start:_ROWS_AT_ONCE": copied_rows,
    "trainer.runtime.checksums:_CHUNK_BYTES": checksum,
    "trainer.serving.scoring:BATCH_ROWS": scored,
    "trainer.sparse.device_ids:_IDS_AT_A_TIME": ids_of_device,
    "trainer.sparse.sharded_tables:_INITIALISE_ELEMENTS": initial_tables,
    "trainer.stream.labels.write_rows:_EVENTS_AT_ONCE": lambda *paths: assembled(*paths, "incremental"),
    "trainer.stream.labels.write_rows:_ROWS_AT_ONCE": lambda *paths: assembled(*paths, "batch"),
    "trainer.stream.sources.replay:_MAX_ROWS": replayed,
}
"""Module and constant -> function that makes a result in a directory, with the help of a dataset."""

ELSEWHERE = {
    "modules.blocks:BLOCK_VALUES": "tests/modules/test_esu.py",
    "modules.codebook:SCORES_AT_ONCE": "tests/modules/test_codebook.py",
    "modules.codebook_kernel:VECTORS_AT_ONCE": "tests/modules/test_codebook.py",
    "modules.search.tensor_search:CHUNK_VALUES": "tests/modules/search/test_tensor_search.py",
    "modules.din_kernel:PART_ROWS": "tests/modules/test_din_kernel.py",
    "modules.expert_kernel:BLOCK_ROWS": "tests/modules/test_expert_kernel.py",
    "modules.expert_kernel:PART_ROWS": "tests/modules/test_expert_kernel.py",
    "trainer.checkpoint.model_state:BLOCK_BYTES": "tests/checkpoint/test_model_state.py",
    "trainer.comment_staytime.model:ROWS_AT_ONCE": "tests/comment_staytime/test_scoring.py",
    "trainer.data.features.author_means:BLOCK": "tests/data/features/test_author_means.py",
    "trainer.data.features.author_means:ROWS_AT_ONCE": "tests/data/features/test_author_means.py",
    "trainer.data.features.device_places:CHUNK_ENTRIES": "tests/data/features/test_device_places.py",
    "trainer.data.features.fit:SAMPLE_ROWS": "tests/data/features/test_fit.py",
    "trainer.data.features.fit:_USERS_AT_ONCE": "tests/data/features/test_fit.py",
    "trainer.data.format.growing_history:_SPARE": "tests/data/format/test_growing_history.py",
    "trainer.data.format.statistics:_CHUNK": "tests/data/format/test_statistics.py",
    "trainer.data.format.visit_events:_VISITS_PER_PART": "tests/data/format/test_visit_events.py",
    "trainer.data.importers.kuairand:_ITEMS_AT_ONCE": "tests/data/importers/test_kuairand.py",
    "trainer.data.importers.table_files:_BATCH_ROWS": "tests/data/importers/test_kuailive_m3.py",
    "trainer.data.loading.batch_plan:SHUFFLE_POOL": "tests/data/loading/test_batch_plan.py",
    "trainer.data.loading.batch_plan:_MERGE_ROWS": "tests/data/loading/test_batch_plan.py",
    "trainer.data.loading.batch_plan:_MIN_BLOCK_ROWS": "tests/data/loading/test_batch_plan.py",
    "trainer.data.simulator.segment_vectors:SEGMENTS_AT_ONCE": "tests/data/simulator/test_segment_vectors.py",
    "trainer.data.simulator.user_days:BLOCK": "tests/data/simulator/test_user_days.py",
    "trainer.data.writing.partition_spill:_ROWS_IN_MEMORY": "tests/data/writing/test_builder.py",
    "trainer.data.writing.partition_spill:_ROWS_PER_PARTITION": "tests/data/writing/test_builder.py",
    "trainer.llm.finetuning.token_files:_CHUNK": "tests/llm/finetuning/test_token_files.py",
    "trainer.runtime.mlflow_store:_AT_ONCE": "tests/runtime/test_mlflow_store.py",
    "trainer.semantic_ids.align_content:CHUNK_ROWS": "tests/semantic_ids/test_align_content.py",
    "trainer.semantic_ids.align_features:REQUESTS_AT_ONCE": "tests/semantic_ids/test_align_features.py",
    "trainer.semantic_ids.code_files:APPENDED_ROWS": "tests/semantic_ids/test_code_files.py",
    "trainer.semantic_ids.foresight_baselines:ROWS_AT_ONCE": "tests/semantic_ids/test_foresight_baselines.py",
    "trainer.semantic_ids.foresight_report:ROWS_AT_ONCE": "tests/semantic_ids/test_foresight.py",
    "trainer.semantic_ids.follow_align:ROWS_AT_ONCE": "tests/semantic_ids/test_follow_align.py",
    "trainer.semantic_ids.kmeans_start:_NUMBERS_AT_ONCE": "tests/semantic_ids/test_kmeans.py",
    "trainer.semantic_ids.retrieval:BLOCK_VALUES": "tests/semantic_ids/test_retrieval.py",
    "trainer.semantic_ids.segment_source_lines:READ_CHUNK": "tests/semantic_ids/test_segment_source_lines.py",
    "trainer.semantic_ids.redis_store:CHUNK": "tests/semantic_ids/test_code_store.py",
    "trainer.semantic_ids.sqlite_store:READ_ROWS": "tests/semantic_ids/test_code_store.py",
    "trainer.semantic_ids.vector_source:CHUNK_VALUES": "tests/semantic_ids/test_kmeans.py",
    "trainer.semantic_ids.vector_source:SCATTERED_ROWS": "tests/semantic_ids/test_kmeans.py",
    "trainer.stream.live.live_stream:_SLACK": "tests/stream/live/test_live_stream.py",
    "trainer.stream.sources.kafka_client:READ_MESSAGES": "tests/stream/sources/test_kafka_put_back.py",
    "trainer.stream.sources.kafka_source:_MAX_MESSAGES": "tests/stream/sources/test_kafka_source.py",
}
"""Module and constant -> the test file that makes it small."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chunks") / "world"
    simulate(path, users=30, days=1, partitions=2, seed=1)
    return path


@pytest.mark.parametrize("constant", SIZES)
def test_a_result_does_not_depend_on_the_size_of_a_chunk(
    constant: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = constant.partition(":")
    make = SIZES[constant]
    (tmp_path / "whole").mkdir()
    (tmp_path / "chunks").mkdir()
    whole = make(dataset, tmp_path / "whole")
    monkeypatch.setattr(importlib.import_module(module), name, 3)
    assert make(dataset, tmp_path / "chunks") == whole


def constants(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the names and values of a module's whole numbers that are written as numbers."""
    numbers = (ast.Constant, ast.BinOp, ast.operator)
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if all(isinstance(part, numbers) for part in ast.walk(node.value)):
            value = eval(compile(ast.Expression(node.value), str(path), "eval"))
            if type(value) is int:
                yield node.targets[0].id, value


SIZE = re.compile(r"CHUNK|BLOCK|AT_ONCE|AT_A_TIME|PER_PART|ROWS|SPARE|SLACK|PAGE|MESSAGES|SLOTS|POOL|PORTION|ELEMENTS")
"""Words of the names of such constants."""

OTHER = {
    "modules.search.cpu_intrinsics:BLOCK": "the width of a vector register",
    "trainer.checkpoint.reader:BLOCK_BYTES": "a default; tests/checkpoint/test_reader.py gives other sizes",
    "trainer.config.features:MAX_TABLE_ROWS": "a limit",
    "trainer.data.format.id_index:_FIRST_SLOTS": "a power of two that grows; tests/data/format/test_id_index.py",
    "trainer.data.format.parquet_files:_PAGE_BYTES": "a buffer of pyarrow",
    "trainer.data.format.shards:_TAR_BLOCK": "of the format of tar files",
    "trainer.data.importers.table_files:_BLOCK_BYTES": "a default; the importers' tests give another size",
    "trainer.data.simulator.content:ROOMS_AT_A_TIME": "its number is part of the seed of a room's draws",
    "trainer.data.simulator.cross.exposures:BLOCK": "its number is part of the seed of a user's draws",
    "trainer.runtime.large_pages:LARGE_PAGE": "given by the processor",
    "trainer.llm.finetuning.packed_attention:BLOCK": "of flex attention; its test has rows of several blocks",
    "trainer.semantic_ids.align_content:SCALE_ROWS": "it decides from which vectors the scale is computed",
    "trainer.semantic_ids.foresight_baselines:TUNING_ROWS": "it decides on which rows weights are chosen",
    "trainer.semantic_ids.kmeans:BLOCK": "its numbers are part of the order of mini-batches",
    "trainer.semantic_ids.kmeans_start:DRAWS_AT_ONCE": "it decides which draws are made",
    "trainer.sparse.dynamic_ids:BUCKET_ROWS": "part of the layout of a table",
}
"""Module and constant -> the reason why it is no size of a chunk, or is tested in another way."""


def test_the_list_of_sizes_is_whole() -> None:
    found = {
        f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}:{name}"
        for package in ("trainer", "modules")
        for path in (ROOT / package).rglob("*.py")
        for name, value in constants(path)
        if value >= LEAST and SIZE.search(name)
    }
    known = {*SIZES, *ELSEWHERE, *OTHER}
    assert sorted(found - known) == [], "a new size of chunks needs a test"
    for constant, file in ELSEWHERE.items():
        assert constant.partition(":")[2] in (ROOT / file).read_text(), f"{file} does not set {constant}"
