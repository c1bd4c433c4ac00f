"""Exports: no table is in memory as a whole, and facts of tables of vectors are those of the export's dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.stored_checkpoint import write_checkpoint
from trainer.checkpoint.diff import diff_checkpoints
from trainer.console.errors import UserError
from trainer.data.features.content_tables import TableFacts
from trainer.data.features.fit import FittedFeatures
from trainer.data.format.content_vectors import ContentVectors
from trainer.serving.export import export_checkpoint

MB = 1 << 20


def memory(key: str) -> int:
    """Return this process's memory in bytes: ``VmRSS`` now, ``VmHWM`` the peak since :func:`reset_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Reset the peak, and return the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Run with a table of 192 MB, cut into pieces of less than 5 MB, by rows and by columns."""
    directory = tmp_path / "run"
    weight = torch.arange(3 * (1 << 20) * 16, dtype=torch.float32).view(-1, 16)
    cuts = {"tables.collections.0.embeddings.user.weight": [list(range(0, len(weight), 100_000)), [0, 12]]}
    write_checkpoint(directory, {"user": weight}, {}, {"w": torch.ones(2)}, cuts=cuts)
    (directory / "features").mkdir()
    (directory / "deepspeed.json").write_text("{}")
    return directory


def test_exporting_takes_the_memory_of_a_piece(run: Path, tmp_path: Path) -> None:
    before = reset_peak()
    export_checkpoint(run, tmp_path / "out")
    assert memory("VmHWM") - before < 96 * MB
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        found = opened.get_slice("tables.user")
        assert found.get_shape() == [3 * (1 << 20), 16]
        for row in (0, 99_999, 100_000, 3 * (1 << 20) - 1):
            expected = torch.arange(row * 16, (row + 1) * 16, dtype=torch.float32)
            assert torch.equal(found[row : row + 1][0], expected)


def test_an_export_without_its_dataset_has_no_guide_and_says_so(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        export_checkpoint(run, tmp_path / "out")
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'out'}: no README.md and no score_one.py (")
    assert not {"README.md", "score_one.py", "inputs.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_comparing_takes_the_memory_of_a_block(run: Path) -> None:
    before = reset_peak()
    assert diff_checkpoints(run, run, block_bytes=8 * MB)["equal"]
    # The limit is the size of one of the two tables: the allocator keeps some of the memory of pieces and blocks.
    assert memory("VmHWM") - before < 192 * MB


def test_an_export_with_another_dataset_knows_its_tables_of_vectors(tmp_path: Path) -> None:
    """Otherwise the export is made without a word, and no score can be made with it: the table has changed."""
    tables = {
        name: ContentVectors.write(tmp_path / name / "embeddings" / "items", np.arange(4), np.full((4, width), value))
        for name, width, value in (("one", 3, 1.0), ("two", 3, 2.0), ("wide", 5, 2.0))
    }
    facts = {name: TableFacts.of(table) for name, table in tables.items()}
    content = {"title": {"table": str(tmp_path / "one" / "embeddings" / "items"), "of": "item"}}
    config = {"data": {"path": str(tmp_path / "one")}, "features": {"content": content}}
    write_checkpoint(tmp_path / "run", {}, {}, {"w": torch.ones(2)}, config=config)
    (tmp_path / "run" / "features").mkdir()
    (tmp_path / "run" / "deepspeed.json").write_text("{}")
    none = np.zeros(0)
    fitted = FittedFeatures({}, {}, none, none, none, content={"title": facts["one"]})
    fitted.save(tmp_path / "run" / "features")

    export_checkpoint(tmp_path / "run", tmp_path / "moved", str(tmp_path / "two"))
    assert FittedFeatures.load(tmp_path / "moved" / "features").content == {"title": facts["two"]}
    export_checkpoint(tmp_path / "run", tmp_path / "plain")
    assert FittedFeatures.load(tmp_path / "plain" / "features").content == {"title": facts["one"]}
    with pytest.raises(UserError, match="the vectors are of another kind"):
        export_checkpoint(tmp_path / "run", tmp_path / "refused", str(tmp_path / "wide"))
    assert not list(tmp_path.glob("*refused*"))
