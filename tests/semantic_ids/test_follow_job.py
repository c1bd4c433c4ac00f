"""``limelight embed --follow`` with a language model: the command, a kill, versions, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modules.codebook import Codebook
from tests.conftest import Limelight
from tests.nursery import Nursery
from tests.paths import ROOT
from tests.runtime.recorded_mlflow import RecordedRun
from tests.semantic_ids.follow_parts import NOW_MS, lines_of, message
from trainer.config.embed import load_embedding
from trainer.config.finetune import SmallConfig
from trainer.console.errors import UserError
from trainer.console.exit_status import INTERRUPTED_STATUS, PREEMPTED_STATUS
from trainer.embed import follow
from trainer.llm.models.small_model import write_small_model
from trainer.runtime.distributed import World
from trainer.semantic_ids import follow_setup
from trainer.semantic_ids.code_store import CodeStore, StoreSettings
from trainer.semantic_ids.codebook_version import CodebookVersion, FittedVectors, write_version
from trainer.semantic_ids.store_address import open_store
from trainer.semantic_ids.vector_cache_reader import CachedVectors

DIM = 16
WORDS = ("red", "blue", "boat", "cat", "song", "very", "quick", "dance", "late", "show")
Settings = Callable[..., list[str]]


def texts_of(seed: int, rooms: int, segments: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        message(room, number, text=" ".join(rng.choice(WORDS, rng.integers(1, 30))))
        for number in range(segments)
        for room in range(rooms)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("follow") / "model"
    small = SmallConfig(vocabulary=300, hidden=DIM, layers=2, heads=2)
    write_small_model(path, (" ".join(WORDS) for _ in range(50)), small, seed=3, length=64)
    return path


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> Settings:
    """``settings(folder, name=value)`` returns the arguments of a job that reads the lines of a folder to their end."""

    def make(folder: Path, **changed: Any) -> list[str]:
        keys = {
            "data.path": "",
            "model.path": model,
            "model.adapter": "",
            "embed.directory": folder,
            "embed.template": ROOT / "configs/templates/embed.txt",
            "embed.device": "cpu",
            "embed.dtype": "float32",
            "embed.length": 64,
            "follow.source": "lines",
            "follow.path": tmp_path / "rooms",
            "follow.until_end": "true",
            "follow.batch": 4,
            **{name.replace("__", "."): value for name, value in changed.items()},
        }
        return [str(ROOT / "configs/embed_follow.toml"), *(f"{name}={value}" for name, value in keys.items())]

    (tmp_path / "rooms").mkdir()
    return make


def run(arguments: list[str]) -> None:
    with World.join("cpu") as world:
        follow(load_embedding(arguments[0], arguments[1:], follow=True), world)


def version_for(folder: Path, path: Path, seed: int = 0) -> CodebookVersion:
    """Write a codebook version for the vectors of a cache."""
    with CachedVectors(folder / "follow" / "cache") as reader:
        origin = reader.settings.origin
    levels = tuple(torch.randn(4, DIM, generator=torch.Generator().manual_seed(seed + level)) for level in range(2))
    fitted = FittedVectors(dataset="", table="", count=1, hash="", from_ms=0, until_ms=1)
    return write_version(path, Codebook(levels), origin=origin, vectors=fitted, settings={})


def content_of(folder: Path, codes: Path, version: str) -> tuple[Any, ...]:
    with CachedVectors(folder / "follow" / "cache") as reader:
        authors, as_of = np.arange(3), np.full(3, NOW_MS)
        latest, mean = reader.latest(authors, as_of), reader.mean(authors, as_of)
        table = reader.write_table(folder / "table")
    with closing(open_store(str(codes), StoreSettings(version))) as store:
        runs = store.recent(authors, as_of, 300)
    columns = [runs.counts, runs.code, runs.length, runs.first_ms, runs.last_ms, latest.segment, mean.counts]
    vectors = [latest.vectors.tobytes(), mean.vectors.tobytes(), table.vectors.tobytes()]
    return *(column.tolist() for column in columns), *vectors, table.ids.tolist(), table.texts.tolist()


def test_vectors_and_codes_do_not_depend_on_the_batches(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job reads all lines at once, the other one as they arrive."""
    lines = lines_of(texts_of(0, rooms=4, segments=6)).splitlines(keepends=True)
    rooms = tmp_path / "rooms" / "a.jsonl"
    rooms.write_bytes(b"".join(lines))
    mlflow_runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    run(settings(tmp_path / "whole", run__mlflow=tmp_path / "store"))
    assert ("follow/embedded", 24, 24) in mlflow_runs[0].scalars and mlflow_runs[0].ends == [("finished", "")]
    version = version_for(tmp_path / "whole", tmp_path / "version")
    places = {name: tmp_path / f"{name}.sqlite" for name in ("whole", "parts")}
    for name, stops in (("whole", (24,)), ("parts", (1, 3, 10, 17, 24))):
        for stop in stops:
            rooms.write_bytes(b"".join(lines[:stop]))
            run(settings(tmp_path / name, follow__codebook=version.path, follow__store=places[name]))
    whole, parts = (content_of(tmp_path / name, places[name], version.name) for name in places)
    assert whole == parts and len(whole[-2]) == 24 and sum(whole[2]) == 24


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_bits_as_an_undisturbed_command(
    settings: Settings, tmp_path: Path, limelight: Limelight, nursery: Nursery
) -> None:
    messages = texts_of(0, rooms=4, segments=6)
    lines = lines_of(messages).splitlines(keepends=True)
    rooms = tmp_path / "rooms" / "a.jsonl"
    rooms.write_bytes(lines[0])
    run(settings(tmp_path / "first"))
    version = version_for(tmp_path / "first", tmp_path / "version")
    places = {name: tmp_path / f"{name}.sqlite" for name in ("whole", "killed")}
    arguments = {
        name: settings(tmp_path / name, follow__codebook=version.path, follow__store=place)
        for name, place in places.items()
    }
    # Segments of other batches, since lines arrive between the two starts.
    rooms.write_bytes(b"".join(lines[:11]))
    job = ["job", "after the cache", *arguments["killed"], "--follow"]
    assert nursery.run("tests.semantic_ids.killed_follow", job).status == -signal.SIGKILL
    rooms.write_bytes(b"".join(lines))
    run(arguments["killed"])
    ended = limelight("embed", *arguments["whole"], "--follow")
    assert "24 segments of 4 rooms" in ended.stdout and "lag p50" in ended.stdout
    whole, killed = (content_of(tmp_path / name, places[name], version.name) for name in places)
    assert whole == killed
    assert len(whole[-2]) == 24 and sum(whole[2]) == 24
    stored = json.loads((tmp_path / "whole" / "follow" / "stored.json").read_text())
    assert stored["codebook"] == version.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, PREEMPTED_STATUS), (signal.SIGINT, INTERRUPTED_STATUS)]
)
def test_a_signal_ends_the_command_with_its_status(
    settings: Settings, tmp_path: Path, nursery: Nursery, number: int, status: int
) -> None:
    (tmp_path / "rooms" / "a.jsonl").write_bytes(lines_of(texts_of(1, 2, 2)))
    words = settings(tmp_path / "out", follow__until_end="false", follow__report_seconds=0.1)
    process = nursery.start("launch.cli.main", ["embed", *words, "--follow"], 0, {}, tmp_path / "log")
    until = time.monotonic() + 600
    while not (tmp_path / "out" / "follow" / "metrics.jsonl").exists():
        assert time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(process, number)
    assert nursery.wait(process, 600) == status
    with CachedVectors(tmp_path / "out" / "follow" / "cache") as reader:
        assert len(reader) == 4


def test_versions_and_models_are_refused_by_name(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "rooms" / "a.jsonl").write_bytes(lines_of(texts_of(1, 2, 2)))
    run(settings(tmp_path / "out"))
    one, other = (version_for(tmp_path / "out", tmp_path / f"v{seed}", seed) for seed in (0, 7))
    store = tmp_path / "codes.sqlite"
    run(settings(tmp_path / "out", follow__codebook=one.path, follow__store=store))
    with pytest.raises(UserError, match=f"codes of the codebook '{one.name}', not '{other.name}'"):
        run(settings(tmp_path / "out", follow__codebook=other.path, follow__store=store))
    with pytest.raises(UserError, match="vectors are from another model"):
        run(settings(tmp_path / "mean", embed__pooling="mean", follow__codebook=one.path, follow__store=store))
    with pytest.raises(UserError, match="has vectors of another model, adapter, template or pooling"):
        run(settings(tmp_path / "out", embed__pooling="mean"))
    with pytest.raises(UserError, match="frames need a model of the Qwen2-VL family"):
        run(settings(tmp_path / "out", follow__frames=tmp_path))


def test_a_password_of_the_store_is_not_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rooms" / "a.jsonl").write_bytes(lines_of(texts_of(1, 2, 2)))
    run(settings(tmp_path / "out"))
    version, places = version_for(tmp_path / "out", tmp_path / "version"), []

    def stand_in(place: str, settings: StoreSettings, retry_seconds: float) -> CodeStore:
        places.append(place)
        return open_store(str(tmp_path / "codes.sqlite"), settings, retry_seconds)

    monkeypatch.setattr(follow_setup, "open_store", stand_in)
    address = "redis://me:hidden@host:1/0?prefix=a"
    run(settings(tmp_path / "out", follow__codebook=version.path, follow__store=address))
    assert places == [address]
    stored = json.loads((tmp_path / "out" / "follow" / "stored.json").read_text())
    assert stored["store"] == "redis://host:1/0?prefix=a"
    shown = capsys.readouterr()
    assert "4 segments of the cache were appended to redis://host:1/0" in shown.out
    assert "hidden" not in shown.out + shown.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and not any(b"hidden" in path.read_bytes() for path in files)


def test_a_locked_store_is_named_after_its_retries(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "rooms" / "a.jsonl").write_bytes(lines_of(texts_of(1, 2, 2)))
    run(settings(tmp_path / "out"))
    version, store = version_for(tmp_path / "out", tmp_path / "version"), tmp_path / "codes.sqlite"
    open_store(str(store), StoreSettings(version.name)).close()
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match=rf"{store}: another process writes it for too long"):
            run(
                settings(
                    tmp_path / "out", follow__codebook=version.path, follow__store=store, follow__retry_seconds=0.1
                )
            )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"follow.path": "''"}, "follow.path is missing; name a file or a folder of JSON lines"),
        ({"follow.source": "replay"}, "data.path is missing; name a dataset with texts"),
        ({"follow.source": "kafka"}, "needs `brokers` and `topic`"),
        ({"follow.codebook": "here"}, "`codebook` and `store` need each other"),
        ({"follow.store": "s3://bucket/codes", "follow.codebook": "x"}, "follow.store = s3://bucket/codes"),
        ({"follow.keep_hours": 0}, "follow.keep_hours"),
    ],
)
def test_mistakes_of_the_job_file_are_named(
    settings: Settings, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    arguments = settings(tmp_path / "out", **changed)
    with pytest.raises(UserError) as error:
        load_embedding(arguments[0], arguments[1:], follow=True)
    assert message in str(error.value)


def test_several_processes_are_refused(settings: Settings, tmp_path: Path, limelight: Limelight) -> None:
    ended = limelight("embed", *settings(tmp_path / "out"), "--follow", "--ranks", "2", expect=2)
    assert "--follow is one process, and --ranks is 2" in ended.stderr and not (tmp_path / "out").exists()
