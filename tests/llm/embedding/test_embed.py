"""Vectors of texts: the same in any batch, on any number of ranks, after a kill, and after an incremental update."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.paths import ROOT
from tests.runtime.recorded_mlflow import RecordedRun
from trainer.config.embed import load_embedding
from trainer.config.finetune import LoraConfig, SmallConfig
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import MANIFEST, ContentVectors
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.text_schema import SCHEMAS, read_texts, segment_ids
from trainer.data.writing.text_writer import TextWriter
from trainer.embed import embed
from trainer.llm.embedding.learned_query import fit_query
from trainer.llm.embedding.text_encoder import Encoder, batches_by_length
from trainer.llm.embedding.vector_table_update import PARTS
from trainer.llm.models.adapter import save_adapter
from trainer.llm.models.base_model import BaseModelFiles, add_adapter
from trainer.llm.models.prompt_templates import Template
from trainer.llm.models.small_model import write_small_model
from trainer.report.run_report import make_report
from trainer.runtime.distributed import World

TEMPLATE = ROOT / "configs/templates/embed.txt"
WEIGHTS = "model.safetensors"
DIM = 32
TIMEOUTS = 600
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}
"""Tolerance of float32 vectors that were computed in other batches."""

WORDS = ("red", "blue", "boat", "cat", "song", "very", "quick", "dance", "late", "show")


def sentence(rng: np.random.Generator, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, most)).tolist())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embed") / "dataset"
    rng = np.random.default_rng(0)
    writer = TextWriter(path)
    items = rng.permutation(1000)[:60]
    item_texts = [sentence(rng) for _ in items]
    item_texts[3], item_texts[7] = "", "  "
    zeros = np.zeros(60, np.int64)
    columns = {"item_id": items, "author_id": zeros, "domain": zeros, "duration_ms": zeros, "tag": [""] * 60}
    writer.add("items", pa.table({**columns, "text": item_texts}))
    of = rng.choice(items, 90)
    text_of = dict(zip(items.tolist(), item_texts, strict=True))
    # The text of a comment contains that of its video, so a query can be learned.
    texts = [f"{sentence(rng, 5)} {text_of[one]}" for one in of.tolist()]
    texts[5] = " ".join(WORDS * 12)
    zeros = np.zeros(90, np.int64)
    columns = {"comment_id": np.arange(90) * 7, "item_id": of, "user_id": zeros, "time_ms": zeros, "likes": zeros}
    writer.add("comments", pa.table({**columns, "text": texts}))
    rooms, segment = np.repeat(items[:3], 4), np.tile(np.arange(4), 3)
    columns = {"item_id": rooms, "segment": segment, "start_ms": segment * 30_000}
    writer.add("segments", pa.table({**columns, "text": [sentence(rng) for _ in rooms]}))
    writer.add("authors", pa.table({"author_id": np.arange(5), "text": [sentence(rng) for _ in range(5)]}))
    writer.finish()
    return path


@pytest.fixture(scope="module")
def model(dataset: Path) -> Path:
    path = dataset.parent / "model"
    settings = SmallConfig(vocabulary=300, hidden=DIM, layers=2, heads=2)
    write_small_model(path, (" ".join(WORDS) for _ in range(50)), settings, seed=3, length=256)
    # Attention is even then: what a learnt query finds, the model does not say by itself.
    weights = {name: value / 9 if value.ndim == 2 else value for name, value in load_file(path / WEIGHTS).items()}
    save_file(weights, path / WEIGHTS, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return make_adapter(BaseModelFiles.open(str(model)), model.parent / "adapter")


def make_adapter(base: BaseModelFiles, path: Path) -> Path:
    torch.manual_seed(1)
    adapted = add_adapter(base.load(bf16=False), LoraConfig(rank=4), str(base.directory))
    values = {name: torch.randn_like(value) / 10 for name, value in adapted.named_parameters() if value.requires_grad}
    save_adapter(adapted, values, path, {"base": base.fingerprint})
    return path


def settings(dataset: Path, model: Path, out: Path, **changed: Any) -> list[str]:
    keys = {
        "data.path": dataset,
        "model.path": model,
        "model.adapter": "",
        "embed.directory": out,
        "embed.template": TEMPLATE,
        "embed.device": "cpu",
        "embed.dtype": "float32",
        "embed.part": 16,
        "embed.tokens": 200,
        "embed.length": 64,
        **{name.replace("__", "."): value for name, value in changed.items()},
    }
    return [str(ROOT / "configs/embed.toml"), *(f"{name}={value}" for name, value in keys.items())]


def run(*arguments: str) -> None:
    with World.join("cpu") as world:
        embed(load_embedding(arguments[0], arguments[1:]), world)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def table_of(out: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    table = ContentVectors.open(out / kind)
    return np.array(table.ids), np.array(table.vectors)


def parts_of(out: Path) -> list[Path]:
    return list(out.glob(f"{PARTS}/*/part-*.npz"))


@pytest.fixture(scope="module")
def tables(dataset: Path, model: Path) -> Path:
    out = dataset.parent / "tables"
    run(*settings(dataset, model, out))
    return out


def test_every_kind_has_a_vector_for_every_text(dataset: Path, tables: Path) -> None:
    for kind, key in (("items", "item_id"), ("comments", "comment_id"), ("authors", "author_id")):
        lines = read_texts(dataset, kind, [key, "text"]).to_pylist()
        ids, vectors = table_of(tables, kind)
        assert ids.tolist() == sorted(line[key] for line in lines if line["text"].strip())
        assert vectors.shape == (len(ids), DIM) and np.isfinite(vectors).all()
    segments = read_texts(dataset, "segments")
    expected = segment_ids(segments.column("item_id").to_numpy(), segments.column("segment").to_numpy())
    assert table_of(tables, "segments")[0].tolist() == sorted(expected.tolist())
    assert not (tables / PARTS).exists()


def test_the_manifest_says_what_made_them(tables: Path, dataset: Path) -> None:
    origin = ContentVectors.open(tables / "items").origin
    assert (origin.model, origin.adapter, origin.pooling) == ("model", "", "last")
    assert origin.template == {"items": "Video title: {text}"}
    assert origin.counts == {"kept": 0, "embedded": 58, "refused": 0, "truncated": 0, "empty": 2}
    assert ContentVectors.open(tables / "comments").origin.counts["truncated"] == 1
    assert origin.hash != ContentVectors.open(tables / "comments").origin.hash
    page = make_report(tables)
    assert "Tables of vectors" in page and "mean cosine" in page and "empty texts" in page and origin.hash in page
    assert "has not finished" not in page and "no config.json" not in page


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
def test_a_vector_is_that_of_the_text_alone(
    dataset: Path, model: Path, adapter: Path, tmp_path: Path, pooling: str, adapted: bool
) -> None:
    """Compare with transformers' own forward pass, text by text without padding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes = {"embed.pooling": pooling, "data.kinds": '["comments"]', "model.adapter": adapter if adapted else ""}
    run(*settings(dataset, model, tmp_path, **changes))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapted:
        plain = PeftModel.from_pretrained(plain, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(model)
    vectors = dict(zip(*table_of(tmp_path, "comments"), strict=True))
    for line in read_texts(dataset, "comments", ["comment_id", "text"]).to_pylist():
        ids = tokenizer(f"Comment: {line['text']}", return_tensors="pt")["input_ids"][:, :64]
        with torch.no_grad():
            states = plain(ids, output_hidden_states=True).hidden_states[-1][0]
        expected = states[-1] if pooling == "last" else states.mean(dim=0)
        np.testing.assert_allclose(vectors[line["comment_id"]], expected.numpy(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changed", [{"embed.tokens": 1}, {"embed.part": 1000, "embed.tokens": 10**6}, {"embed.part": 7}]
)
def test_batches_change_nothing(
    dataset: Path, model: Path, tables: Path, tmp_path: Path, changed: dict[str, int]
) -> None:
    run(*settings(dataset, model, tmp_path, **changed))
    for kind in ("items", "comments", "segments", "authors"):
        (ids, vectors), (expected_ids, expected) = table_of(tmp_path, kind), table_of(tables, kind)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(vectors, expected, **TOLERANCE)


@pytest.mark.slow
def test_two_ranks_write_the_same_tables_as_one(dataset: Path, model: Path, tables: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "launch.cli.main", "embed", *settings(dataset, model, tmp_path), "--ranks", "2"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), timeout=TIMEOUTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "58 vectors of dimension 32 (58 embedded, 2 empty)" in done.stdout
    for kind in ("items", "comments", "segments", "authors"):
        assert ContentVectors.open(tmp_path / kind).hash == ContentVectors.open(tables / kind).hash


def test_an_interrupted_job_goes_on_with_the_missing_parts(
    dataset: Path, model: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings(dataset, model, tmp_path, **{"data.kinds": '["comments"]'})
    vectors, read = Encoder.vectors, []

    def until_the_third(self: Encoder, texts: list[str]) -> np.ndarray:
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(len(texts))
        return vectors(self, texts)

    monkeypatch.setattr(Encoder, "vectors", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert not (tmp_path / "comments").exists() and len(parts_of(tmp_path)) == 3

    def counted(self: Encoder, texts: list[str]) -> np.ndarray:
        read.append(len(texts))
        return vectors(self, texts)

    monkeypatch.setattr(Encoder, "vectors", counted)
    run(*arguments)
    assert sum(read) == 90 and len(read) == 6
    assert ContentVectors.open(tmp_path / "comments").hash == ContentVectors.open(tables / "comments").hash
    assert not (tmp_path / PARTS).exists()


@pytest.mark.slow
def test_a_killed_job_leaves_whole_parts_and_goes_on(dataset: Path, model: Path, tables: Path, tmp_path: Path) -> None:
    # With parts of one text the job is slow enough to be killed in the middle.
    arguments = settings(dataset, model, tmp_path, **{"data.kinds": '["comments"]', "embed.part": 1})
    killed = subprocess.Popen([sys.executable, "-m", "trainer.embed", *arguments], cwd=ROOT, env=environment())
    until = time.monotonic() + TIMEOUTS
    while not parts_of(tmp_path) and time.monotonic() < until and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    killed.wait(TIMEOUTS)
    assert not (tmp_path / "comments").exists() and 0 < len(parts_of(tmp_path)) < 90
    run(*arguments)
    (ids, again), (expected_ids, expected) = table_of(tmp_path, "comments"), table_of(tables, "comments")
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(again, expected, **TOLERANCE)


def test_a_table_of_segments_has_their_hash_and_is_refused_beside_other_rooms(
    dataset: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, rooms = tmp_path / "dataset", "texts/items.parquet"
    shutil.copytree(dataset, copy)
    arguments = settings(copy, model, tmp_path, **{"data.kinds": '["segments"]'})

    def table() -> ContentVectors:
        return ContentVectors.open(tmp_path / "segments")

    def segments() -> DatasetSegments:
        return DatasetSegments.read(str(copy), embedded=True)

    run(*arguments)
    assert table().segments == segments().hash(np.arange(12))
    segments().check_table(table())
    run(*arguments)
    assert "12 vectors, no text has changed" in capsys.readouterr().out

    manifest = json.loads((tmp_path / "segments" / MANIFEST).read_text())
    del manifest["segments"]
    (tmp_path / "segments" / MANIFEST).write_text(json.dumps(manifest))
    segments().check_table(table())
    run(*arguments)
    assert "12 vectors of dimension 32 (12 kept)" in capsys.readouterr().out
    assert table().segments == segments().hash(np.arange(12)) and table().hash == manifest["hash"]

    items = pq.read_table(copy / rooms)
    pq.write_table(items.set_column(1, "author_id", pa.array(np.ones(60, np.int64))), copy / rooms)
    with pytest.raises(UserError, match="made from other segments"):
        segments().check_table(table())
    run(*arguments)
    segments().check_table(table())

    (copy / rooms).unlink()
    run(*arguments)
    assert table().segments == "", "nobody knows the authors, and the vectors do not need them"


def test_only_new_and_changed_texts_are_read_again(
    dataset: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    mlflow_runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    store = {"run.mlflow": tmp_path / "store"}
    arguments = settings(copy, model, tmp_path / "out", **{"data.kinds": '["items"]'}, **store)
    run(*arguments)
    before = dict(zip(*table_of(tmp_path / "out", "items"), strict=True))
    run(*arguments)
    assert "58 vectors, no text has changed" in capsys.readouterr().out

    lines = read_texts(copy, "items").to_pylist()
    filled = [line for line in lines if line["text"].strip()]
    changed, gone, silent = filled[0], filled[1], filled[2]
    changed["text"], silent["text"] = "quick quick boat", ""
    new = {**filled[3], "item_id": 5000}
    pq.write_table(
        pa.Table.from_pylist([line for line in lines if line is not gone] + [new], SCHEMAS["items"]),
        copy / "texts/items.parquet",
    )
    run(*arguments)
    assert "57 vectors of dimension 32 (55 kept, 2 embedded, 3 empty)" in capsys.readouterr().out
    assert [dict(one[:2] for one in done.scalars)["items/vectors"] for done in mlflow_runs] == [58, 58, 57]
    assert {("items/kept", 55, 0), ("items/embedded", 2, 0)} <= set(mlflow_runs[2].scalars)
    assert [done.ends for done in mlflow_runs] == [[("finished", "")]] * 3
    after = dict(zip(*table_of(tmp_path / "out", "items"), strict=True))
    assert set(after) == set(before) - {gone["item_id"], silent["item_id"]} | {5000}
    for one, vector in after.items():
        if one == 5000:
            np.testing.assert_allclose(vector, before[filled[3]["item_id"]], **TOLERANCE)
        elif one == changed["item_id"]:
            assert not np.allclose(vector, before[one])
        else:
            np.testing.assert_array_equal(vector, before[one])
    run(*settings(copy, model, tmp_path / "fresh", **{"data.kinds": '["items"]'}))
    np.testing.assert_allclose(
        table_of(tmp_path / "fresh", "items")[1], np.stack([after[one] for one in sorted(after)]), **TOLERANCE
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"embed.pooling": "mean"},
        {"model.precision": "bfloat16"},
        {"embed.length": 9},
        {"embed.incremental": "false"},
        {"embed.dtype": "float16"},
    ],
)
def test_another_recipe_reads_everything_again(
    dataset: Path, model: Path, tmp_path: Path, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    authors = {"data.kinds": '["authors"]'}
    run(*settings(dataset, model, tmp_path, **authors))
    run(*settings(dataset, model, tmp_path, **authors, **changed))
    assert "5 embedded" in capsys.readouterr().out.splitlines()[-1]


def test_vectors_that_are_not_finite_are_left_out_and_counted(
    dataset: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = Encoder.vectors

    def spoilt(self: Encoder, texts: list[str]) -> np.ndarray:
        made = vectors(self, texts)
        made[["cat" in text for text in texts], 0] = np.nan
        made[["cat" not in text and "boat" in text for text in texts], 0] = 1e30
        return made

    monkeypatch.setattr(Encoder, "vectors", spoilt)
    run(*settings(dataset, model, tmp_path, **{"embed.dtype": "float16"}))
    lines = read_texts(dataset, "items", ["item_id", "text"]).to_pylist()
    good = sorted(
        line["item_id"] for line in lines if line["text"].strip() and not {"cat", "boat"} & set(line["text"].split())
    )
    assert table_of(tmp_path, "items")[0].tolist() == good
    assert f"{len(good)} embedded, {58 - len(good)} refused, 2 empty" in capsys.readouterr().out
    monkeypatch.setattr(Encoder, "vectors", lambda self, texts: np.full((len(texts), DIM), np.nan, np.float32))
    with pytest.raises(UserError, match="none of 58 vectors is finite in float32"):
        run(*settings(dataset, model, tmp_path / "none"))


def test_a_learnt_query_brings_comments_closer_to_their_video(dataset: Path, model: Path, tmp_path: Path) -> None:
    run(*settings(dataset, model, tmp_path, **{"embed.pooling": "query", "data.kinds": '["items", "comments"]'}))
    run(
        *settings(dataset, model, tmp_path / "mean", **{"embed.pooling": "mean", "data.kinds": '["items", "comments"]'})
    )
    item_of = {line["comment_id"]: line["item_id"] for line in read_texts(dataset, "comments").to_pylist()}

    def rank_of_own(out: Path) -> float:
        (items, videos), (comments, texts) = table_of(out, "items"), table_of(out, "comments")
        videos, texts = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (videos, texts))
        known = [row for row, one in enumerate(comments.tolist()) if item_of[one] in items]
        likeness = texts[known] @ videos.T
        own = np.searchsorted(items, [item_of[comments[row]] for row in known])
        return float((likeness > likeness[np.arange(len(known)), own][:, None]).mean())

    assert rank_of_own(tmp_path) < rank_of_own(tmp_path / "mean")
    stored = list(tmp_path.glob("query-*.npy"))
    assert len(stored) == 1 and np.load(stored[0]).shape == (DIM,)
    # The stored query is used again, so the origin of the vectors stays the same.
    hash_before = ContentVectors.open(tmp_path / "items").origin.hash
    run(*settings(dataset, model, tmp_path, **{"embed.pooling": "query", "data.kinds": '["items"]'}))
    assert ContentVectors.open(tmp_path / "items").origin.hash == hash_before


def test_a_query_needs_comments(dataset: Path, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    pq.write_table(read_texts(copy, "comments").slice(0, 0), copy / "texts/comments.parquet")
    base = BaseModelFiles.open(str(model))
    encoder = Encoder(base.load(bf16=False), base.tokenizer, torch.device("cpu"), length=9, tokens=99)
    template = Template.read(TEMPLATE, dict.fromkeys(("items", "comments", "segments", "authors"), frozenset({"text"})))
    with pytest.raises(UserError, match="needs at least two videos with a text and a comment"):
        fit_query(encoder, copy, template, seed=1)


def test_mistakes_are_told(dataset: Path, model: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_small_model(other, ["red boat"] * 9, SmallConfig(vocabulary=300, hidden=16, heads=2), seed=3, length=64)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    (tmp_path / "template.txt").write_text("[items]\n{title}\n")
    for changed, message in [
        ({"model.path": other, "model.adapter": adapter}, "an adapter for another base model"),
        ({"model.adapter": tmp_path}, "no adapter here"),
        ({"model.path": bare}, "no tokenizer here"),
        ({"model.path": tmp_path / "nowhere"}, "no such directory"),
        ({"embed.template": tmp_path / "template.txt"}, r"section \[items\]: unknown \{title\}; known are text"),
        ({"data.path": tmp_path}, "has no texts/items.parquet"),
        ({"data.kinds": '["videos"]'}, "'videos'"),
    ]:
        with pytest.raises(UserError, match=message):
            run(*settings(dataset, model, tmp_path / "out", **changed))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_what_fits(lengths: list[int], tokens: int) -> None:
    batches = batches_by_length(np.array(lengths, np.int64), tokens)
    assert sorted(np.concatenate([np.empty(0, np.int64), *batches]).tolist()) == list(range(len(lengths)))
    longest = [max(lengths[one] for one in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, width in zip(batches, longest, strict=True):
        assert len(batch) == 1 or width * len(batch) <= tokens
    for batch, following in zip(longest, batches[1:], strict=False):
        assert batch * (len(batches[longest.index(batch)]) + 1) > tokens or not len(following)
