"""Progress lines where there is no terminal."""

from __future__ import annotations

import pytest

from trainer.console.progress import Progress


def test_progress_elsewhere_than_on_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.console.progress.time.monotonic", lambda: now[0])
    with Progress("train", 1000, "rows") as progress:
        for _ in range(10):
            now[0] += 2.0
            progress.advance(50, "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    # There is at most one line every five seconds, and one at the end.
    assert lines[0] == "train: 150/1,000 rows (15 %), 25 rows/s, 0:06 so far, ETA 0:34, loss 0.5"
    assert len(lines) == 4
    assert lines[-1].startswith("train: 500/1,000 rows (50 %), 25 rows/s, 0:20 so far, ETA 0:20")
    with Progress("train", 10, "rows", quiet=True) as progress:
        now[0] += 100
        progress.advance(10)
    assert capsys.readouterr().out == ""


def test_progress_continues_where_an_earlier_process_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.console.progress.time.monotonic", lambda: now[0])
    with Progress("train", 1000, "rows", done=400) as progress:
        now[0] += 10
        progress.advance(100)
    assert capsys.readouterr().out.startswith("train: 500/1,000 rows (50 %), 10 rows/s, 0:10 so far, ETA 0:50\n")
