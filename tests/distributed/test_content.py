"""Models with pre-trained vectors and codes on one and two ranks, against one process with plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from modules.embeddings import initial_rows
from tests.data.code_files import write_codes_of
from tests.data.small_visits import build_dataset, make_visits
from tests.distributed.content_ranks import DENSE_RATE, STEPS, TABLE_RATE, WAYS, Setting, job
from tests.distributed.test_engine import relative_error
from trainer.data.features.missing_inputs import VECTOR
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.schema import DOMAINS
from trainer.runtime.checksums import CHECKSUMS

TOLERANCE, ADAM_TOLERANCE = 1e-5, 1e-3
"""Tolerances for float32, in units of the largest value. Adam divides gradients near zero by their size, which makes
rounding larger; a gradient that is left out in one step changes a parameter by a tenth."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small dataset that has segments, tables of vectors of about half of its ids, and codes."""
    folder = tmp_path_factory.mktemp("content")
    visits = make_visits(4, 500, 60_000_000)
    build_dataset(folder / "dataset", visits)
    rng, live = np.random.default_rng(2), np.flatnonzero(visits["domain"] == DOMAINS.index("live"))
    start = visits["request_ms"][live] - rng.integers(0, 40_000, len(live))
    segments = {"item_id": visits["item_id"][live], "start_ms": start, "known_ms": start + 30_000}
    pq.write_table(pa.table(segments), folder / "dataset" / "segments.parquet")
    # Each item has an author, whose rooms the segments are.
    items = pq.read_table(folder / "dataset" / "items.parquet")
    more = pa.table({"item_id": np.arange(9), "topic": pa.array([1] * 9, items.schema.field("topic").type)})
    more = more.append_column("price", pa.array([0.5] * 9, items.schema.field("price").type))
    items = more.append_column("author_id", pa.array([0, 1, 2, 3, 4, 0, 1, 2, -1]))
    pq.write_table(items, folder / "dataset" / "items.parquet")
    (folder / "dataset" / CHECKSUMS).unlink()
    for name, ids, width, dtype in (
        ("items", np.arange(0, 9, 2), 6, "float16"),
        ("authors", np.arange(1, 4), 4, "float32"),
        ("segments", np.arange(0, len(live), 2), 5, "float16"),
    ):
        vectors = 10 * rng.standard_normal((len(ids), width))
        ContentVectors.write(folder / "tables" / name, ids, vectors, dtype=dtype)
    write_codes_of(folder / "dataset", folder / "codes.parquet")
    return folder


class PlainTraining:
    """Training in one process: whole tables, an embedding of each id alone, and plain PyTorch optimizers."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tables = {
            table.name: initial_rows(table, 1, 0, table.rows).requires_grad_() for table in setting.features.tables
        }
        self.ranker = setting.ranker()
        self.projections = self.ranker.content
        # Without its own projections the network takes their results as lookups like all others.
        self.ranker.content = nn.ModuleDict()
        parameters = [*self.ranker.parameters(), *self.projections.parameters()]
        self.adam = torch.optim.AdamW(parameters, DENSE_RATE, (0.9, 0.999), weight_decay=0.0)

    def project(self, table: str, vector: Tensor | None) -> Tensor:
        """Return the projection of one vector, or the learnt vector in its place."""
        projection: Any = self.projections[table]
        if vector is None:
            return projection.missing
        x = vector.float() / vector.float().square().mean().sqrt()
        return projection.linear.weight @ x + projection.linear.bias

    def logits(self, rows: np.ndarray) -> tuple[Tensor, Any]:
        batch = self.setting.part(rows)
        lookups = {lookup.name: lookup for lookup in self.setting.features.lookups}
        embedded, lengths = {}, {}
        for keyed in batch.ids:
            for name, jagged in keyed.to_dict().items():
                embedded[name] = self.tables[lookups[name].table][jagged.values()]
                if lookups[name].length is None:
                    lengths[name] = jagged.lengths()
        for table, found in batch.content.items():
            dim = self.setting.config.features.content[table].dim
            for name, places in found.places.items():
                each = [self.project(table, found.vectors[at] if at >= 0 else None) for at in places.tolist()]
                embedded[name] = torch.stack(each) if each else torch.zeros(0, dim)
        return self.ranker(embedded, lengths, batch.dense), batch

    def step(self, rows: np.ndarray) -> float:
        logits, batch = self.logits(rows)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, batch.label, reduction="none")
        loss = (losses * batch.mask).sum() / batch.rows
        self.adam.zero_grad()
        gradients = torch.autograd.grad(loss, list(self.tables.values()), retain_graph=True)
        loss.backward()
        for parameter in self.adam.param_groups[0]["params"]:
            # An input that no row of the step has: its gradient is zero, and Adam goes on with its momentum.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self.adam.step()
        with torch.no_grad():
            for table, gradient in zip(self.tables.values(), gradients, strict=True):
                table -= TABLE_RATE * gradient
                table.grad = None
        return float(loss.detach())

    def parameters(self) -> dict[str, Tensor]:
        projected = {f"content.{name}": value for name, value in self.projections.named_parameters()}
        return {**self.tables, **dict(self.ranker.named_parameters()), **projected}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_train_as_one_process_that_embeds_each_id_alone(ranks: int, world: Path, run_ranks: Any) -> None:
    run_ranks("tests.distributed.content_ranks", world, world / "dataset", world / "tables", ranks=ranks)
    outcome, wrong = torch.load(world / f"{ranks}.pt", weights_only=False), {}
    for name, (model, _, _) in WAYS.items():
        setting = Setting(job(world / "dataset", world / "tables", model))
        plain, found = PlainTraining(setting), outcome[name]
        before = {key: value.detach().clone() for key, value in plain.parameters().items()}
        losses = [plain.step(rows) for rows in setting.steps()]
        expected = {key: value.detach() for key, value in plain.parameters().items()}
        assert found["parameters"].keys() == expected.keys()
        for table in ("title", "person", "air"):
            for part in ("linear.weight", "linear.bias", "missing"):
                key = f"content.{table}.{part}"
                assert relative_error(before[key], expected[key]) > 10 * ADAM_TOLERANCE, f"{name}: {key} is not trained"
        coded = [key for key in expected if key.startswith("codes-shown")]
        assert len(coded) == 5 and all(relative_error(before[key], expected[key]) > 10 * TOLERANCE for key in coded)
        errors = {key: relative_error(found["parameters"][key], value) for key, value in expected.items()}
        errors["loss"] = relative_error(torch.tensor(found["losses"]), torch.tensor(losses))
        first, batch = plain.logits(next(setting.steps()))
        errors["logits"] = relative_error(found["logits"], first.detach())
        dense = expected.keys() - plain.tables.keys()
        wrong |= {
            f"{name}: {key}": error
            for key, error in errors.items()
            if not error <= (ADAM_TOLERANCE if key in dense or key == "logits" else TOLERANCE)
        }
        (attention,) = found["attention"]
        for history, weights in attention.items():
            entries = int(batch.content["title"].places[f"{history}_title"].shape[0])
            assert len(weights) == entries > 20
        # The counts are those of all rows of the first step, however many ranks share them.
        assert found["missing"] == batch.missing
        for lookup, counts in batch.missing.items():
            assert (0 if lookup.startswith(VECTOR) else -1) < counts.candidates < counts.all_candidates, lookup
        assert len(losses) == STEPS
    assert not wrong
