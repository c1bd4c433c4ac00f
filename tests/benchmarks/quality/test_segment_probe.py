"""The benchmark of segment vectors: nothing of a test is seen before, and what its table says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import kept_finetuning, segment_probe
from benchmarks.quality.segment_probe import (
    READINGS,
    TARGETS,
    TESTS,
    ProbeSegments,
    ProbeSize,
    check_apart,
    day_text,
    is_held_out,
    prepare,
    probe,
    probe_sets,
    summarise,
    table,
    tuned_rooms,
    word_counts,
)
from trainer.data.simulator.config import DAY_MS, START_MS

SIZE = ProbeSize(users=10, days=4, samples=60, segments=150)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return prepare(tmp_path_factory.mktemp("probe"), SIZE, 5)


@pytest.fixture(scope="module")
def sets(prepared: tuple[Path, Path]) -> dict[str, ProbeSegments]:
    return probe_sets(*prepared, SIZE)


def test_no_room_and_no_later_day_of_a_test_is_seen_before(
    prepared: tuple[Path, Path], sets: dict[str, ProbeSegments]
) -> None:
    tuned = tuned_rooms(prepared[1])
    assert sets["fit"].rooms <= tuned["train"] and len(sets["fit"].ids) == SIZE.segments
    for name in TESTS:
        assert not sets[name].rooms & (tuned["train"] | tuned["evaluate"] | sets["fit"].rooms)
    assert is_held_out(np.array(sorted(sets["held_out_rooms"].rooms))).all()
    assert not is_held_out(np.array(sorted(tuned["train"]))).any()
    assert sets["fit"].days | sets["held_out_rooms"].days <= {-1, 0, 1} and min(sets["later_day"].days) == SIZE.days - 1
    assert (day_text(0), day_text(3)) == ("2024-03-04", "2024-03-07")


def test_a_leak_stops_the_benchmark(sets: dict[str, ProbeSegments]) -> None:
    tuned = set(sets["fit"].rooms)
    check_apart(sets, tuned, SIZE.days - 1)
    one = next(iter(sets["later_day"].rooms))
    with pytest.raises(ValueError, match=r"(^| )1 rooms of later_day are in the tuning"):
        check_apart(sets, {one}, SIZE.days - 1)
    leaked = replace(sets["fit"], ids=np.append(sets["fit"].ids, sets["held_out_rooms"].ids[0]))
    with pytest.raises(ValueError, match=r"(^| )1 rooms of held_out_rooms are in the fit of the probes"):
        check_apart({**sets, "fit": leaked}, tuned, SIZE.days - 1)
    late = replace(sets["fit"], start_ms=np.append(sets["fit"].start_ms, START_MS + 3 * DAY_MS))
    early = replace(sets["later_day"], start_ms=np.append(sets["later_day"].start_ms, START_MS + 3 * DAY_MS - 1))
    for change in ({"fit": late}, {"later_day": early}):
        with pytest.raises(ValueError, match="a day of later_day is in the fit"):
            check_apart({**sets, **change}, tuned, SIZE.days - 1)
    with pytest.raises(ValueError, match="held_out_rooms has no segments"):
        check_apart({**sets, "held_out_rooms": replace(sets["fit"], ids=np.empty(0, np.int64))}, tuned, 3)


def test_a_probe_finds_what_is_there_and_nothing_in_noise(sets: dict[str, ProbeSegments]) -> None:
    words = probe(word_counts(sets), sets)
    for name in TESTS:
        assert words[name]["topic"] > 0.7 and words[name]["intensity"] > 0.6
        assert set(words[name]) == set(TARGETS) and words[name]["topic_of_few"] < words[name]["topic"]
    rng = np.random.default_rng(0)
    noise = probe({name: rng.standard_normal((len(one.ids), 4)) for name, one in sets.items()}, sets)
    for name in TESTS:
        assert noise[name]["intensity"] < 0.2 and noise[name]["topic"] < 0.6


def test_gains_are_those_of_each_seed() -> None:
    def run(untuned: float, tuned: float) -> dict[str, Any]:
        results = {
            when: {test: dict.fromkeys(TARGETS, value) for test in TESTS}
            for when, value in (("untuned", untuned), ("tuned", tuned))
        }
        return dict.fromkeys(READINGS, results)

    summary = summarise([run(0.5, 0.6), run(0.7, 0.9)])
    row = summary["last"]["later_day"]["topic"]
    assert row["untuned"][0] == pytest.approx(0.6) and row["tuned"][0] == pytest.approx(0.75)
    # Student's t with one degree of freedom: 12.706 times the standard error.
    assert row["gain"] == pytest.approx([0.15, 12.706 * 0.05], rel=1e-3)
    shown = table(summary, {test: dict.fromkeys(TARGETS, 0.8) for test in TESTS})
    assert "0.150 ± 0.635" in shown and "0.800" in shown and len(shown.splitlines()) >= 24


@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "segment_probe.json"
    sizes = ["--users=10", "--days=4", "--samples=40", "--segments=60", "--seeds=1"]
    small = ["train.epochs=1", "small.hidden=16", "small.layers=1", "small.heads=2", "small.vocabulary=600"]
    command = [f"--work={tmp_path / 'work'}", f"--out={out}", *sizes, *small]
    segment_probe.main(command)
    written = json.loads(out.read_text())
    assert set(written["probes"]) == set(READINGS) and written["seeds"] == 1
    for test in TESTS:
        row = written["probes"]["mean"][test]["topic"]
        assert 0 <= row["tuned"][0] <= 1 and row["gain"][0] == pytest.approx(row["tuned"][0] - row["untuned"][0])
        assert 0 < written["majority"][test] < 1 and written["sets"][test]["rooms"] > 0
    assert written["runs"][0]["mean"]["untuned"] != written["runs"][0]["mean"]["tuned"]
    assert 0 <= written["job"]["segment_description"]["model"][0] <= 1

    def refuse(*arguments: object) -> None:
        raise AssertionError("a run that is there is not repeated")

    monkeypatch.setattr(kept_finetuning, "run_job", refuse)
    segment_probe.main(command)
    assert "gain" in capsys.readouterr().out
