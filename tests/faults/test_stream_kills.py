"""A few kills of ranks that train on a stream; ``python -m tests.faults.stream_kills`` does more of them."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from tests.faults.stream_kills import compare

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("source", ["files", "kafka"])
def test_kills_leave_no_trace(source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if source == "kafka" and importlib.util.find_spec("confluent_kafka") is None:
        pytest.skip("needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    options = argparse.Namespace(source=source, kills=2, users=150, days=2, seed=3)
    assert compare(options, tmp_path) == 0, capfd.readouterr().out
