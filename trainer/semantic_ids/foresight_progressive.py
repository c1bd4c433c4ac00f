"""Progressive quality of a predictor that follows codes: each row is foreseen before the step that trains on it.

The predictor of before the step foresees the targets of the step, without dropout and hidden runs. Two rules foresee
the same rows, from what was known then:

* ``last``: the code of the row's segment;
* ``most frequent``: the code that is most often among the runs that the predictor reads; of equally frequent ones the
  one that was more often a target so far, then the smaller one.

The probability of a rule is ``(n(c) + w q(c)) / (n + w)`` with its counts ``n(c)``, their sum ``n``, and the frequency
``q`` of ``c`` among the targets so far, with one more that is spread evenly over the codes. The weight ``w`` is the one
of ``foresight_baselines.WEIGHTS`` with the best likelihood of the earlier steps; ``FIRST_WEIGHT`` in the first step. So
the rules learn in the order of time, too, and nothing is known to them that the predictor could not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.console.text_table import text_table
from trainer.runtime.distributed import World
from trainer.semantic_ids.foresight_baselines import FREQUENT, LAST, WEIGHTS
from trainer.semantic_ids.foresight_engine import PredictorEngine
from trainer.semantic_ids.foresight_follow_data import FollowData
from trainer.semantic_ids.foresight_report import MODEL, measure
from trainer.semantic_ids.foresight_training import ForesightState, ForesightWindow

FIRST_WEIGHT = 1.0
RULES = (LAST, FREQUENT)
NAMES = (MODEL, *RULES)


class FollowWindow(ForesightWindow):
    """Sums over the steps since the last record, and over all steps, of how well their rows were foreseen.

    Attributes:
        rows: rows of all steps; of a run that began with an earlier version those since it was continued.
        sums: ``[names, 2] float64``, of all steps: rows whose target is the most probable code, and the sum of
            ``-log p(target)``, by the predictor and by each rule.
        by_weight: ``[rules, weights] float64``, sum of ``-log p(target)`` of all steps with each weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.sums = 0, np.zeros((len(NAMES), 2))
        self.by_weight = np.zeros((len(RULES), len(WEIGHTS)))
        self._earlier_rows, self._earlier_sums = 0, np.zeros_like(self.sums)

    def foresee(self, rows: int, sums: np.ndarray, by_weight: np.ndarray) -> None:
        """Add the sums of a step."""
        self.rows += rows
        self.sums = self.sums + sums
        self.by_weight = self.by_weight + by_weight

    @property
    def weights(self) -> list[float]:
        """Best weight of each rule so far."""
        if not self.rows:
            return [FIRST_WEIGHT] * len(RULES)
        return [WEIGHTS[best] for best in self.by_weight.argmin(1)]

    def entry(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Return a record of the metric history, with the quality of the rows since the last one."""
        found = super().entry(step, learning_rate)
        found["progressive"] = _quality(self.rows - self._earlier_rows, self.sums - self._earlier_sums)
        return found

    def following(self) -> FollowWindow:
        """Return an empty window that goes on with the sums of all steps."""
        window = FollowWindow()
        window.foresee(self.rows, self.sums, self.by_weight)
        window._earlier_rows, window._earlier_sums = self.rows, self.sums
        return window

    def summary(self) -> dict[str, Any]:
        """Return the number of rows, and their quality by the predictor and by each rule."""
        return {"rows": self.rows, "quality": _quality(self.rows, self.sums)}

    def state_dict(self) -> dict[str, Any]:
        """Return all sums."""
        progressive = {
            "rows": self.rows,
            "sums": self.sums.tolist(),
            "by_weight": self.by_weight.tolist(),
            "earlier_rows": self._earlier_rows,
            "earlier_sums": self._earlier_sums.tolist(),
        }
        return {**super().state_dict(), "progressive": progressive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all sums from :meth:`state_dict`; checkpoints of earlier versions have none of the quality."""
        super().load_state_dict(state)
        if (found := state.get("progressive")) is not None:
            self.rows, self._earlier_rows = found["rows"], found["earlier_rows"]
            self.sums, self._earlier_sums = np.array(found["sums"]), np.array(found["earlier_sums"])
            self.by_weight = np.array(found["by_weight"])


class ProgressiveQuality:
    """Measures how well the rows of each step are foreseen before it.

    Args:
        engine: engine of the predictor.
        data: the segments and rows.
        state: progress, with a :class:`FollowWindow`; the sums are added to it.
        runs: runs of a context.
        world: ranks of the job. Each measures a share of the rows.
    """

    def __init__(
        self, engine: PredictorEngine, data: FollowData, state: ForesightState, runs: int, world: World
    ) -> None:
        self._engine, self._data, self._state, self._runs, self._world = engine, data, state, runs, world
        self._targets = np.bincount(data.rows.target[data.schedule.targets_before(state.step)], minlength=data.codes)

    @property
    def window(self) -> FollowWindow:
        """Sums so far."""
        assert isinstance(self._state.window, FollowWindow)
        return self._state.window

    def measure(self, step: int) -> Sequence[float]:
        """Return this rank's sums of a step, which is yet to be made."""
        part = np.array_split(self._data.schedule.step(step), self._world.size)[self._world.rank]
        model = measure(self._engine.predictor, self._data, part, self._runs, self._world.device)
        rules, by_weight = self._measure_rules(part)
        return [model.first, model.loss, *rules.ravel().tolist(), *by_weight.ravel().tolist()]

    def add(self, step: int, sums: Sequence[float]) -> None:
        """Add the sums of a step, over all ranks; its targets are known from now on."""
        part = self._data.schedule.step(step)
        border = 2 * len(NAMES)
        self.window.foresee(
            len(part),
            np.reshape(sums[:border], (len(NAMES), 2)),
            np.reshape(sums[border:], (len(RULES), len(WEIGHTS))),
        )
        self._targets += np.bincount(self._data.rows.target[part], minlength=self._data.codes)

    def _measure_rules(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of the rules ``[rules, 2]``, and of their losses with each weight ``[rules, weights]``."""
        rows, frequency = self._data.rows, (self._targets + 1 / self._data.codes) / (self._targets.sum() + 1)
        code, target = rows.code[part], rows.target[part]
        context = rows.contexts(part, self._runs).code
        place, run = np.nonzero(context >= 0)
        pairs, count = np.unique(place * self._data.codes + context[place, run], return_counts=True)
        place, known = np.divmod(pairs, self._data.codes)
        # In each row the most frequent code first: a frequency below 1 decides between equal counts only.
        order = np.lexsort((known, -frequency[known], -count, place))
        first = order[np.searchsorted(place[order], np.arange(len(part)))]
        guesses = (code, known[first])
        counts = (code == target, (context == target[:, None]).sum(1))
        totals = (np.ones(len(part)), (context >= 0).sum(1))
        by_weight = np.zeros((len(RULES), len(WEIGHTS)))
        sums = np.zeros((len(RULES), 2))
        for rule, weight in enumerate(self.window.weights):
            own = counts[rule][:, None] + np.array(WEIGHTS) * frequency[target][:, None]
            losses = -np.log(own / (totals[rule][:, None] + np.array(WEIGHTS))).sum(0)
            by_weight[rule] = losses
            sums[rule] = (guesses[rule] == target).sum(), losses[WEIGHTS.index(weight)]
        return sums, by_weight


def progressive_table(summary: dict[str, Any]) -> str:
    """Format the quality of all steps as a table."""
    lines = [
        [name, f"{found['top_1']:.4f}", f"{found['nll']:.4f}"] for name, found in summary["quality"].items() if found
    ]
    return f"foreseen before they were trained on: {summary['rows']:,} rows\n" + text_table(["", "top 1", "NLL"], lines)


def _quality(rows: int, sums: np.ndarray) -> dict[str, dict[str, float]]:
    """Return by name the share of rows that were foreseen, and the mean loss in nats; nothing without rows."""
    if not rows:
        return {}
    return {
        name: {"top_1": float(first / rows), "nll": float(loss / rows)}
        for name, (first, loss) in zip(NAMES, sums, strict=True)
    }
