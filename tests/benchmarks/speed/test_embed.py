"""The benchmark of embeddings runs, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import embed
from trainer.data.format.text_schema import read_texts
from trainer.data.format.verification import verify_dataset
from trainer.data.simulator.write_dataset import simulate

pytest.importorskip("transformers", reason="needs transformers: make setup EXTRAS=llm,dev,kafka")

SMALL = ["--users=40", "--texts=60", "--repeats=1"]


def test_a_small_run_without_renewals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "renewal", lambda *arguments: [])
    out = tmp_path / "results" / "embed.json"
    embed.main([*SMALL, f"--out={out}"])
    written = json.loads(out.read_text())
    assert [(row["tokens"], row["by_length"]) for row in written["speed"]] == [
        (tokens, by_length) for tokens in embed.BATCH_TOKENS for by_length in (True, False)
    ]
    for sorted_, unsorted in zip(written["speed"][::2], written["speed"][1::2], strict=True):
        assert (
            sorted_["runs"][0]["texts_per_s"] == sorted_["texts_per_s"] > 0
            and sorted_["padding"] <= unsorted["padding"]
        )
    assert [row["pooling"] for row in written["content"]] == ["last", "mean", "query"]
    assert written["moves"]["batch"] < 1e-4 and written["moves"]["float16"] < 1e-2
    assert written["model"] == "small, random weights" and written["parameters"] > 0
    assert "16,384 tokens, as they come" in capsys.readouterr().out


def test_a_dataset_with_changed_comments_is_whole(tmp_path: Path) -> None:
    simulate(tmp_path / "world", 20, 2, 1, 1, texts=True)
    before = read_texts(tmp_path / "world", "comments").column("text").to_pylist()
    changed = embed.change_comments(tmp_path / "world", 0.1)
    after = read_texts(tmp_path / "world", "comments").column("text").to_pylist()
    assert sum(one != two for one, two in zip(before, after, strict=True)) == changed > 0
    assert verify_dataset(str(tmp_path / "world"), lambda task, done, total: None).problems == ()


@pytest.mark.slow
def test_a_small_run_with_renewals(tmp_path: Path) -> None:
    out = tmp_path / "embed.json"
    embed.main([*SMALL, f"--out={out}"])
    renewal = json.loads(out.read_text())["renewal"]
    assert [row["changed"] for row in renewal] == [None, *embed.CHANGED]
    texts = renewal[0]["texts"]
    assert [row["embedded"] for row in renewal] == [texts, *(round(share * texts) for share in embed.CHANGED)]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 1e8 for row in renewal)


def test_a_ridge_regression_finds_what_is_linear() -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((300, 4))
    targets = vectors @ np.array([[1.0], [-2.0], [0.5], [0.0]]) + 3
    fitted = np.arange(300) < 200
    predicted = embed.ridge(vectors, targets, fitted)
    assert embed.r_squared(predicted[:, 0], targets[~fitted, 0]) > 0.999
    assert abs(embed.r_squared(np.full(100, targets[~fitted].mean()), targets[~fitted, 0])) < 1e-9
