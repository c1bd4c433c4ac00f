"""The whole chain from a world's texts to the jobs that read their vectors, with the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tests.distributed.launches import LIMELIGHT, SETTINGS, end, start
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.text_schema import read_texts

SMALL_STAYTIME = (
    "train.epochs=1",
    "train.batch_size=512",
    "input.dim=8",
    "base.widths=[8]",
    "lcu.heads=2",
    "lcu.hidden=8",
)


def limelight(*arguments: object) -> str:
    """Run a command and return its output."""
    return end([start(*LIMELIGHT, *map(str, arguments))])[0]


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.slow
def test_texts_become_vectors_that_both_jobs_learn_from(tmp_path: Path) -> None:
    world, samples, run, merged = (tmp_path / name for name in ("world", "samples", "run", "merged"))
    limelight("data", "simulate", world, "--users", 150, "--days", 3, "--partitions", 4, "--seed", 5, "--texts")
    sizes = ("--samples", 40, "--evaluate-samples", 5)
    limelight("data", "instructions", world, samples, "--evaluate-from", "2024-03-06", *sizes)

    files = [f'data.{name}=["{samples / f"{name}.jsonl"}"]' for name in ("train", "evaluate", "general")]
    printed = limelight(
        *("finetune", "configs/finetune_small.toml", "--ranks", 1, *files, f"run.directory={run}"),
        *("small.hidden=32", "train.epochs=1", "train.device=cpu"),
    )
    assert all(task in printed for task in ("staytime", "top_comment", "user_comment", "untuned", "popularity"))
    assert "adapter of a language model" in limelight("checkpoint", "show", run)
    limelight("export", run, merged)
    assert AutoModelForCausalLM.from_pretrained(merged).config.hidden_size == 32

    tables = {}
    for name, model in (("adapter", run / "base"), ("merged", merged), ("untuned", run / "base")):
        tables[name] = tmp_path / f"vectors-{name}"
        adapter = run / "adapter" if name == "adapter" else ""
        limelight(
            *("embed", "configs/embed.toml", "--ranks", 1, f"data.path={world}", 'data.kinds=["items","comments"]'),
            *(f"model.path={model}", f"model.adapter={adapter}", f"embed.directory={tables[name]}", "embed.device=cpu"),
        )
    of_comments = {name: ContentVectors.open(path / "comments") for name, path in tables.items()}
    ids = read_texts(world, "comments", ["comment_id"]).column("comment_id").to_numpy()
    vectors = {name: np.asarray(table.vectors[table.lookup(ids)], np.float32) for name, table in of_comments.items()}
    np.testing.assert_allclose(vectors["adapter"], vectors["merged"], atol=0.02)
    assert np.abs(vectors["adapter"] - vectors["untuned"]).max() > 0.1

    staytime = tmp_path / "staytime"
    limelight(
        *("staytime", "configs/staytime.toml", f"data.path={world}", "data.eval_from=2024-03-06", *SMALL_STAYTIME),
        *(f"lcu.item_embeddings={tables['adapter'] / 'items'}", f"run.directory={staytime}"),
        f"lcu.comment_embeddings={tables['adapter'] / 'comments'}",
    )
    assert np.isfinite(read(staytime / "metrics.json")["all"]["rmse"])

    ranker = tmp_path / "ranker"
    limelight(
        *("train", *SETTINGS, "--ranks", 1, f"data.path={world}", f"run.directory={ranker}"),
        *('features.history.alike={domain="video", search="top", length=5}', 'features.search.tables=["item"]'),
        *(f"features.search.embedding={tables['adapter'] / 'items'}", "features.search.refresh_steps=0"),
    )
    assert read(ranker / "metrics.json")
