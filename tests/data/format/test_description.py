"""The figures of a dataset against a count by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from launch.cli.main import main
from trainer.console.errors import UserError
from trainer.data.format.description import describe, format_description
from trainer.data.format.schema import DatasetSpec, partition_of, visit_schema
from trainer.data.writing.builder import DatasetBuilder

NOON = 1_651_291_200_000  # 30 April 2022, 12:00 in Shanghai

SPEC = DatasetSpec(
    name="tiny",
    source="made by hand",
    licence="none",
    partitions=2,
    timezone="Asia/Shanghai",
    behaviours=("click", "gift"),
    applies={"click": ("video", "live"), "gift": ("live",)},
    candidates=("video", "live"),
)

# user, item, domain, hours after noon, play, delay of click, delay of gift
VISITS = [
    (1, 10, 0, 0, 500, 0, -1),
    (1, 11, 1, 1, 900, 0, 300),
    (1, 10, 0, 2, 0, -1, -1),
    (2, 10, 0, 3, 0, -1, -1),
    (3, 12, 1, 36, 100, -1, -1),
]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    user, item, domain, hours, play, click, gift = (np.array(column) for column in zip(*VISITS, strict=True))
    request = NOON + hours * 3_600_000
    columns = {
        "visit_id": np.arange(len(user)),
        "user_id": user,
        "author_id": item * 100,
        "item_id": item,
        "domain": domain,
        "request_ms": request,
        "exit_ms": request + play,
        "play_ms": play,
        "delay_click": click,
        "delay_gift": gift,
        "value_gift": np.maximum(gift, 0),
    }
    schema = visit_schema(SPEC)
    out = tmp_path / "tiny"
    with DatasetBuilder(out, SPEC) as builder:
        builder.visits(pa.table({name: pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names}))
        builder.finish()
    return out


def test_figures(dataset: Path) -> None:
    found = describe(dataset)
    assert found["counts"] == {
        "exposures": 5,
        "events": 5 + 3 + 2 + 1 + 5,
        "rows": 5,
        "users_with_rows": 3,
        "video_rows": 3,
        "live_rows": 2,
    }
    assert found["span"]["from"] == "2022-04-30T12:00:00.000+08:00"
    assert found["span"]["until"] == "2022-05-02T00:00:00.000+08:00"
    assert found["span"]["days"] == 1.5
    assert found["behaviours"] == {
        "click": {"positives": 2, "rows": 5, "rate": 0.4},
        "gift": {"positives": 1, "rows": 2, "rate": 0.5},
    }
    # User 2 watched nothing: its history is empty, and counts.
    assert found["histories"]["all"]["users"] == 3
    assert list(found["histories"]["all"]["quantiles"].values()) == [0, 0, 1, 2, 2, 2, 2]
    assert [found["histories"][name]["visits"] for name in ("all", "video", "live")] == [3, 1, 2]
    assert found["ids"]["item"] == {"count": 3, "max": 12}
    assert found["ids"]["author"] == {"count": 3, "max": 1200}
    owner = partition_of(np.array([row[0] for row in VISITS]), 2)
    assert found["partitions"]["rows"] == np.bincount(owner, minlength=2).tolist()
    assert found["partitions"]["users"] == np.bincount(partition_of(np.array([1, 2, 3]), 2), minlength=2).tolist()
    assert found["partitions"]["balance"] == max(found["partitions"]["rows"]) / 2.5


def test_command_prints_a_table_or_json(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "describe", str(dataset), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(describe(dataset)))
    assert main(["data", "describe", str(dataset)]) == 0
    text = capsys.readouterr().out
    assert text == format_description(describe(dataset)) + "\n"
    assert "2022-04-30T12:00:00.000+08:00 to 2022-05-02T00:00:00.000+08:00 (1.5 days, Asia/Shanghai)" in text
    assert ["gift", "1", "2", "50.000%"] in [line.split() for line in text.splitlines()]


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset here"):
        describe(tmp_path)
