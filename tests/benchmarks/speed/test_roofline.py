"""The roofline has a time and a floor for every part, and its work is that of the shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import limelight_training, roofline
from benchmarks.speed.throughput import FLOP_PER_ROW


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"product_gflops": 100.0, "bf16_product_gflops": 400.0, "copy_gb_per_second": 20.0}
    monkeypatch.setattr(roofline, "machine_rates", lambda threads: rates)
    monkeypatch.setattr(roofline, "PRECISIONS", ("fp32",))
    out = tmp_path / "roofline.json"
    roofline.main(["--scale=256", "--steps=3", "--threads=1", f"--out={out}"])
    (result,) = json.loads(out.read_text())["results"]
    assert result["steps"] == 3 and result["rates"] == rates
    parts = {part["part"]: part for part in result["parts"]}
    assert tuple(parts) == roofline.PARTS
    assert all(part["seconds"]["median"] > 0 for part in parts.values())
    din = parts["DIN"]
    assert din["floor_seconds"] == pytest.approx(max(din["operations"] / 1e11, din["bytes"] / 2e10))
    assert din["share_of_floor"] == pytest.approx(din["floor_seconds"] / din["seconds"]["median"])
    assert parts["rest"]["share_of_floor"] is None
    assert "of floor" in capsys.readouterr().out


def test_every_precision_has_the_rate_of_its_own_products() -> None:
    # The rate of a precision other than fp32 is that of bf16 products.
    assert set(roofline.PRECISIONS) == {"fp32", "bf16"} <= set(limelight_training.DEEPSPEED)


def test_the_work_of_a_row_is_what_the_throughput_counts() -> None:
    operations = sum(of_part for of_part, _ in roofline.work(1, 0).values())
    assert operations == pytest.approx(FLOP_PER_ROW, rel=0.1)
    assert roofline.work(2, 10)["tables"][1] == 2 * roofline.work(1, 0)["tables"][1]
    assert roofline.work(2, 10)["optimizer"] == (0.0, 280.0)
