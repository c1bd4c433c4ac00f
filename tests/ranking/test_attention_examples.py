"""Examples of attention that an evaluation keeps: the chosen rows, on any number of ranks, and what they say."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import DOMAINS
from trainer.data.format.shards import read_rows
from trainer.data.format.time_selection import Selection
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking.attention_examples import ENTRIES, EXAMPLES, HeldOutInputs, write_attention_examples
from trainer.ranking.evaluation import Predictions

LENGTH = 6


@dataclass
class Ranks:
    """Collectives of ranks that are threads of this process."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.barrier.wait()
        self.values[rank] = value
        self.barrier.wait()
        return [self.values[number] for number in range(self.size)]

    def world(self, rank: int) -> Any:
        return SimpleNamespace(
            rank=rank,
            size=self.size,
            gather=lambda value: found if (found := self.exchange(rank, value)) and rank == 0 else None,
            agree=lambda value: self.exchange(rank, value)[0],
        )


class Inputs(HeldOutInputs):
    """Inputs with one history, the last live visits; the shares of its entries grow with their places."""

    def histories(self, row: Any) -> Any:
        live = DOMAINS.index("live")
        found = self.data.histories.latest(row["user_id"], row["request_ms"], domain=live, length=LENGTH)
        return {"live": found}

    def attention(self, engine: Any, rows: Sequence[Any]) -> Any:
        counts = [int(self.histories(row)["live"].lengths[0]) for row in rows]
        return [{"live": np.arange(1, n + 1)[:, None] * 2 / (n * (n + 1))} for n in counts]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("examples") / "world"
    simulate(path, users=30, days=1, partitions=2, seed=1)
    return Dataset.open(str(path), "error")


def examples(data: Dataset, file: Path, ranks: int) -> list[dict[str, Any]]:
    rows = read_rows(data.store.path, data.spec)
    features: Any = SimpleNamespace(
        spec=data.spec,
        fitted=SimpleNamespace(author_side=None),
        author_side=(),
        codes=SimpleNamespace(same_code=lambda row, entries: {}),
    )
    inputs, shared, failed = Inputs(data, Selection(), features), Ranks(ranks), list[BaseException]()

    def work(rank: int) -> None:
        own = rows["partition"] % ranks == rank
        columns = {name: torch.from_numpy(rows[name][own]) for name in ("user_id", "visit_id", "request_ms")}
        flags = {name: torch.from_numpy(rows[name][own]).float() for name in ("label", "mask")}
        probability = torch.full_like(flags["label"], 0.25)
        held_out = Predictions(**columns, **flags, probability=probability)
        engine: Any = None
        try:
            write_attention_examples(file, engine, held_out, data.spec.behaviours, inputs, shared.world(rank))
        except BaseException as error:
            shared.barrier.abort()
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    document = json.loads(file.read_text())
    assert document["timezone"] == data.spec.timezone
    found: list[dict[str, Any]] = document["examples"]
    return found


def test_examples_do_not_depend_on_the_ranks_and_say_what_came_before(data: Dataset, tmp_path: Path) -> None:
    found = examples(data, tmp_path / "one.json", 1)
    assert found == examples(data, tmp_path / "two.json", 2) and len(found) == EXAMPLES
    rows = read_rows(data.store.path, data.spec)
    visits = {visit: place for place, visit in enumerate(rows["visit_id"].tolist())}
    assert len({example["user_id"] for example in found}) > 1, "examples of several users"
    for example in found:
        place = visits[example["visit_id"]]
        assert [example[name] for name in ("user_id", "item_id", "author_id")] == [
            int(rows[name][place]) for name in ("user_id", "item_id", "author_id")
        ]
        label = (rows["label"] & rows["mask"])[place]
        assert example["did"] == [name for name, did in zip(data.spec.behaviours, label, strict=True) if did]
        assert example["did"], "visits with a behaviour come first"
        assert example["probabilities"] == dict.fromkeys(data.spec.behaviours, 0.25)
        first, stop = data.histories.runs(np.array([example["user_id"]]), np.array([example["at_ms"]]))
        authors = [data.histories.column("author_id")[a:b] for a, b in zip(first[0], stop[0], strict=True)]
        earlier = np.count_nonzero(np.concatenate(authors) == example["author_id"])
        assert example["earlier_visits_of_author"] == earlier
        live = example["histories"]["live"]
        n = live["found"]
        assert 0 < n <= LENGTH and len(live["entries"]) == min(n, ENTRIES)
        shares = [round(2 * (n - k) / (n * (n + 1)), 6) for k in range(len(live["entries"]))]
        assert [entry["attention"] for entry in live["entries"]] == pytest.approx(shares)
        times = [entry["request_ms"] for entry in live["entries"]]
        assert times == sorted(times, reverse=True) and times[0] < example["at_ms"]


def test_without_an_entry_in_any_history_there_is_no_example(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Inputs,
        "histories",
        lambda self, row: {"live": data.histories.latest(row["user_id"], np.zeros(1, np.int64), domain=0, length=1)},
    )
    assert examples(data, tmp_path / "none.json", 2) == []
