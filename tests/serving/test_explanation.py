"""Explanations as text, JSON and plot, and the search for the author of a candidate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.console.errors import UserError
from trainer.console.text_table import age_text
from trainer.data.format.history import HistorySlice
from trainer.ranking.history_attention import Explanation, HistoryAttention, explanation_document
from trainer.serving.explanation import find_author, format_explanation
from trainer.serving.explanation_plot import write_picture

AT = 1_709_956_800_000
HOUR = 3_600_000


def history(items: list[int], attention: list[list[float]], domain: int = 0) -> HistoryAttention:
    """Return a history with an entry every hour, the oldest first.

    The author of item i is i // 10, and its behaviours are the lowest two bits of i.
    """
    n = len(items)
    entries = HistorySlice(
        lengths=np.array([n]),
        item_id=np.array(items, np.int64),
        author_id=np.array(items, np.int64) // 10,
        request_ms=AT - HOUR * np.arange(n, 0, -1),
        play_ms=np.zeros(n, np.int64),
        bits=np.array(items, np.int32) % 4,
        tag=np.zeros(n, np.int32),
        domain=np.full(n, domain, np.uint8),
    )
    return HistoryAttention(entries, np.array(attention, np.float32).reshape(n, len(attention[0]) if attention else 2))


def explanation() -> Explanation:
    histories = {
        "short": history([31, 42, 53, 64], [[0.1, 0.3], [0.2, 0.6], [0.6, 0.0], [0.1, 0.1]]),
        "author": history([], []),
        "live": history([77], [[1.0, 1.0]], domain=1),
    }
    return Explanation(5, 49, 4, AT, {"click": 0.25, "gift": 0.0125}, histories)


def test_text_lists_the_entries_with_the_most_attention() -> None:
    text = format_explanation(explanation(), ("click", "gift"), "Asia/Shanghai", shown=2)
    assert text.splitlines() == [
        "user 5, candidate 49 of author 4, as of 2024-03-09T12:00:00+08:00",
        "click 0.2500, gift 0.0125",
        "",
        "short: found 4; the 2 with the most attention, 70% of it:",
        "attention  domain  item  author  ago    did",
        "40.0%      video   42    4 *     3.0 h  gift",
        "30.0%      video   53    5       2.0 h  click",
        "",
        "author: found nothing",
        "",
        "live: found 1:",
        "attention  domain  item  author  ago    did",
        "100.0%     live    77    7       1.0 h  click",
        "",
        "* the candidate's author",
    ]


def test_a_document_has_the_same_entries_in_the_same_order() -> None:
    document = explanation_document(explanation(), ("click", "gift"), shown=2)
    assert document["probabilities"] == {"click": 0.25, "gift": 0.0125} and document["at_ms"] == AT
    assert [history["found"] for history in document["histories"].values()] == [4, 0, 1]
    first, second = document["histories"]["short"]["entries"]
    assert first == {
        "attention": 0.4,
        "domain": "video",
        "item_id": 42,
        "author_id": 4,
        "request_ms": AT - 3 * HOUR,
        "behaviours": ["gift"],
        "as_the_candidate": [],
    }
    assert second["item_id"] == 53
    assert json.loads(json.dumps(document)) == document


def test_text_names_the_features_that_an_entry_shares_with_the_candidate() -> None:
    plain = history([42, 53, 64], [[0.5], [0.3], [0.2]])
    same_value = {"topic": np.array([True, True, False]), "style": np.array([False, True, False])}
    one = Explanation(1, 2, 9, AT, {}, {"short": HistoryAttention(plain.entries, plain.weights, same_value)})
    assert format_explanation(one, ("click", "gift"), "UTC").splitlines()[-4:] == [
        "attention  domain  item  author  ago    did    as the candidate",
        "50.0%      video   42    4       3.0 h  gift   topic",
        "30.0%      video   53    5       2.0 h  click  topic style",
        "20.0%      video   64    6       1.0 h",
    ]


def test_among_entries_of_equal_attention_the_latest_comes_first() -> None:
    one = Explanation(1, 2, 9, AT, {}, {"short": history([11, 22, 33], [[0.25], [0.5], [0.25]])})
    lines = format_explanation(one, ("click", "gift"), "UTC").splitlines()
    assert [line.split()[2] for line in lines[-3:]] == ["22", "33", "11"]


@pytest.mark.parametrize(
    ("age_ms", "expected"),
    [(-5, "now"), (999, "now"), (1_500, "1.5 s"), (90_000, "1.5 min"), (9 * HOUR, "9.0 h"), (36 * HOUR, "1.5 d")],
)
def test_ages_in_the_largest_unit(age_ms: int, expected: str) -> None:
    assert age_text(age_ms) == expected


def test_a_picture_is_a_png_also_of_empty_histories(tmp_path: Path) -> None:
    write_picture(tmp_path / "full.png", explanation())
    write_picture(tmp_path / "none.png", Explanation(1, 2, 3, AT, {}, {}))
    plain = history([42, 53], [[0.5], [0.5]])
    same_value = {"topic": np.array([True, False]), "style": np.array([False, False])}
    write_picture(
        tmp_path / "same-value.png",
        Explanation(1, 2, 3, AT, {}, {"a": HistoryAttention(plain.entries, plain.weights, same_value)}),
    )
    for name in ("full", "none", "same-value"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"none/a.png: cannot be written \(No such file"):
        write_picture(tmp_path / "none" / "a.png", explanation())


def test_the_author_of_a_candidate(tmp_path: Path) -> None:
    columns = {"item_id": np.array([50, 60]), "author_id": np.array([5, 6])}
    data: Any = SimpleNamespace(
        spec=SimpleNamespace(candidates=("live",)), histories=SimpleNamespace(column=columns.__getitem__)
    )
    assert find_author(data, str(tmp_path), 60) == 6
    with pytest.raises(UserError, match="--candidate 70: the dataset has no such item"):
        find_author(data, str(tmp_path), 70)
    items = {"item_id": [60, 70, 80], "author_id": [7, 8, 9], "domain": pa.array([1, 1, 0], pa.int8())}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    assert [find_author(data, str(tmp_path), item) for item in (50, 60, 70)] == [5, 7, 8]
    with pytest.raises(UserError, match="--candidate 80: this is a video item; the dataset's candidates are live"):
        find_author(data, str(tmp_path), 80)
    pq.write_table(pa.table({"item_id": [50], "duration": [3]}), tmp_path / "items.parquet")
    assert find_author(data, str(tmp_path), 50) == 5
