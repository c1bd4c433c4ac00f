"""A small world of jumping rooms: its log agrees with its true probabilities, and jumps are found where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.moment.freshness import label_delays
from benchmarks.moment.metrics import BEFORE_S
from benchmarks.moment.reactions import AGES_S, by_age, response, room_jumps, times
from benchmarks.moment.run import POLICIES, stream_job
from benchmarks.moment.world import BEHAVIOURS, NO_EXIT_SHARE, SPEC, WorldSize, levels, read_exposures, write_world
from trainer.stream.labels.assembled_rows import EXIT
from trainer.stream.labels.event_log import EventLog

SIZE = WorldSize(rooms=6, users=150, warm_up_s=600, stream_s=3000)
SEED = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moment") / "world"
    write_world(path, SIZE, SEED)
    return path


def test_every_place_has_one_level_at_a_time() -> None:
    segments = levels(SIZE, SEED)
    for place in range(SIZE.rooms):
        of_place = segments.place == place
        start, stop = segments.start_s[of_place], segments.stop_s[of_place]
        assert start[0] <= -SIZE.warm_up_s and stop[-1] >= SIZE.stream_s
        np.testing.assert_array_equal(start[1:], stop[:-1])
        inside_room = ~segments.opens[of_place][1:]
        assert (np.diff(segments.offset[of_place])[inside_room] != 0).all()


def test_the_log_is_what_the_probabilities_say(world: Path) -> None:
    exposures = read_exposures(world, SIZE, SEED)
    assert (np.diff(exposures.at_s) >= 0).all()
    label = exposures.label
    for high in (False, True):
        which = (exposures.truth[:, 0] > 0.3) == high
        expected = exposures.truth[which].mean(axis=0)
        error = np.sqrt((exposures.truth * (1 - exposures.truth))[which].mean(axis=0) / which.sum())
        assert (np.abs(label[which].mean(axis=0) - expected) < 4 * error).all()


def test_some_exits_are_missing_and_most_negatives_are_known_late(world: Path) -> None:
    log = EventLog(world)
    exits = sum(int((log.read(partition)["event"] == EXIT).sum()) for partition in range(SPEC.partitions))
    visits = len(read_exposures(world, SIZE, SEED).user_id)
    assert 1 - exits / visits == pytest.approx(NO_EXIT_SHARE, abs=0.01)


def test_jumps_are_where_the_level_changes_and_the_truth_reacts_at_once(world: Path) -> None:
    exposures, segments = read_exposures(world, SIZE, SEED), levels(SIZE, SEED)
    jumps = room_jumps(segments, exposures, 0.0, float(SIZE.stream_s))
    assert {jump.rises for jump in jumps} == {False, True}
    for each in jumps:
        place = exposures.place[each.exposures]
        assert (place == place[0]).all()
        assert each.jump.at_s in segments.start_s[(segments.place == place[0]) & ~segments.opens]
        assert each.jump.until_s - each.jump.at_s >= BEFORE_S
    truth = exposures.truth[:, 0]
    assert np.median(times(jumps, exposures, truth)) <= 10
    covered = response(jumps, exposures, truth)
    assert np.abs(covered[:4]).max() < 0.2 and np.abs(covered[8:30] - 1).max() < 0.2
    assert by_age(segments, exposures, 2 * truth, exposures.at_s > 0) == pytest.approx([2] * (len(AGES_S) - 1))


def test_delays_of_labels_are_those_of_the_policies(world: Path) -> None:
    found = {policy: label_delays(stream_job(world, SIZE, policy, 1, ())) for policy in POLICIES}
    for name in BEHAVIOURS:
        assert found["realtime"][name]["yes"]["p10"] >= 0 and found["realtime"][name]["yes"]["p99"] <= 30
        assert found["fast_slow"][name]["no"]["p10"] == found["fast_slow"][name]["no"]["p99"] == 300
        assert found["realtime"][name]["no"] == found["full"][name]["no"]
        assert all(found[policy][name]["untold"] < 0.01 for policy in ("full", "realtime", "realtime_naive"))
    assert found["fast_slow"]["click"]["yes"]["p50"] == pytest.approx(297, abs=1)
    assert found["fast_slow"]["gift"]["yes"]["p99"] > 600
    assert found["full"]["rows"] < found["realtime"]["rows"] < found["realtime_naive"]["rows"]
