"""Progressive quality of followed codes: the rules against loops, and the sums. test_foresight_follow.py has runs."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.semantic_ids.foresight_baselines import FREQUENT, LAST, WEIGHTS
from trainer.semantic_ids.foresight_progressive import FIRST_WEIGHT, FollowWindow, ProgressiveQuality
from trainer.semantic_ids.foresight_rows import ForesightRows
from trainer.semantic_ids.foresight_training import ForesightWindow

CODES, RUNS = 4, 3


class PlainRules:
    """Both rules by loops over rows and codes."""

    def __init__(self, rows: ForesightRows) -> None:
        self.rows = rows
        self.targets = Counter[int]()
        self.losses = {rule: [0.0] * len(WEIGHTS) for rule in (LAST, FREQUENT)}
        self.began = False

    def step(self, part: list[int]) -> dict[str, tuple[int, float]]:
        """Return rows that were foreseen and the loss of each rule, and learn the targets."""
        found = {}
        for rule in (LAST, FREQUENT):
            best = WEIGHTS.index(FIRST_WEIGHT)
            if self.began:
                best = min(range(len(WEIGHTS)), key=lambda place: self.losses[rule][place])
            first, losses = 0, [0.0] * len(WEIGHTS)
            for row in part:
                target = int(self.rows.target[row])
                runs = self.rows.contexts(np.array([row]), RUNS).code[0]
                counts = Counter(
                    [int(self.rows.code[row])] if rule == LAST else [int(code) for code in runs if code >= 0]
                )
                guess = min(counts, key=lambda code: (-counts[code], -self.targets[code], code))
                first += guess == target
                q = (self.targets[target] + 1 / CODES) / (self.targets.total() + 1)
                for place, weight in enumerate(WEIGHTS):
                    losses[place] -= math.log((counts[target] + weight * q) / (counts.total() + weight))
            found[rule] = (first, losses[best])
            self.losses[rule] = [a + b for a, b in zip(self.losses[rule], losses, strict=True)]
        self.targets.update(int(self.rows.target[row]) for row in part)
        self.began = True
        return found


@given(st.data())
def test_the_rules_are_those_of_loops_over_rows_and_codes(data: st.DataObject) -> None:
    count = data.draw(st.integers(6, 30))
    item = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)), np.int64)
    code = np.array(data.draw(st.lists(st.integers(0, CODES - 1), min_size=count, max_size=count)))
    segment = np.arange(count)
    rows = ForesightRows.make(item // 2, item, segment, 1000 * segment, code)
    parts = np.array_split(np.arange(len(rows)), 3)
    schedule = SimpleNamespace(step=lambda step: parts[step], targets_before=lambda step: np.empty(0, np.int64))
    state = SimpleNamespace(step=0, window=FollowWindow())
    fake: Any = SimpleNamespace(rows=rows, codes=CODES, schedule=schedule)
    quality = ProgressiveQuality(None, fake, state, RUNS, None)  # type: ignore[arg-type]
    plain = PlainRules(rows)
    for step, part in enumerate(parts):
        sums, by_weight = quality._measure_rules(part)
        for rule, (first, loss) in enumerate(plain.step(part.tolist()).values()):
            assert sums[rule, 0] == first and sums[rule, 1] == pytest.approx(loss)
        quality.add(step, [0.0, 0.0, *sums.ravel().tolist(), *by_weight.ravel().tolist()])
        np.testing.assert_allclose(state.window.by_weight, list(plain.losses.values()))


def test_a_checkpoint_of_an_earlier_version_has_no_sums_of_the_quality() -> None:
    earlier, window = ForesightWindow(), FollowWindow()
    earlier.add(3.0, 2)
    window.load_state_dict(earlier.state_dict())
    assert window.summary() == {"rows": 0, "quality": {}}
    assert window.entry(1, 0.1)["loss"] == 1.5 and window.entry(1, 0.1)["progressive"] == {}
