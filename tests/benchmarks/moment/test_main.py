"""The benchmark of the report policies trains, plays and reports."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.moment.world import BEHAVIOURS, WorldSize

main = importlib.import_module("benchmarks.moment.__main__")
SMALL = WorldSize(rooms=3, users=80, warm_up_s=600, stream_s=1500)


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "SIZE", SMALL)
    monkeypatch.setattr(main, "JUDGED_FROM_S", 300.0)


def test_two_policies_are_trained_once_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work = tmp_path / "results" / "moment.json", tmp_path / "work"
    common = ["--seeds=1", "--variants", "main", "--policies", "full", "realtime", f"--work={work}", f"--out={out}"]
    main.main(["train", *common, "--at-most=1"])
    assert [file.stem for file in work.glob("*.npz")] == ["main-full-1"]
    main.main(["train", "report", *common])
    printed = capsys.readouterr().out
    assert printed.count("main-full-1:") == 1 and "main-realtime-1:" in printed
    written = json.loads(out.read_text())
    assert set(written["result"]["main"]) == {"full", "realtime"} and written["world"]["rooms"] == 3
    for found in written["result"]["main"].values():
        assert found["seeds"] == 1 and set(found["behaviours"]) == set(BEHAVIOURS)
        assert found["reaction"]["rises"]["jumps"]["mean"] > 0 and found["rows"]["mean"] > 1000
    assert set(written["event_to_row_seconds"]) == set(main.POLICIES)
    truth = written["reaction_of_the_true_probabilities"]["rises"]
    assert truth["seconds"]["mean"] < 30 and truth["reached"]["mean"] == 1
    for name in ("moment_reaction.png", "moment_room.png"):
        assert (out.parent / name).stat().st_size > 1000


def test_an_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["trian", f"--work={tmp_path}"])
    assert "no stage 'trian'; stages are tune, train, live, report" in capsys.readouterr().err
