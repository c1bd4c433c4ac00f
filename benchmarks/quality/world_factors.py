"""Stored factors of the visits of a simulated world, and their effects on behaviours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.truth_rows import FACTORS, read_truth_rows
from trainer.data.simulator.behaviours import CONTEXTS, behaviour_probabilities
from trainer.data.simulator.config import BEHAVIOURS
from trainer.data.simulator.user_days import allowed_interactions

STEP = 0.5
"""Change of log-odds in which slopes are measured, to both sides."""


@dataclass(frozen=True)
class WorldFactors:
    """Factors of ``n`` visits.

    Attributes:
        names: of the F factors.
        context: ``[n]`` int64, positions in ``behaviours.CONTEXTS``.
        values: ``[F, n]`` float32.
        weights: ``[contexts, behaviours, F]`` float32.
    """

    names: tuple[str, ...]
    context: np.ndarray
    values: np.ndarray
    weights: np.ndarray

    @staticmethod
    def read(path: str, user_id: np.ndarray, visit_id: np.ndarray, request_ms: np.ndarray) -> WorldFactors:
        """Read the factors of visits from a dataset; all arguments but the path are ``[n]`` int64.

        Raises:
            UserError: the dataset has no factors, is damaged, or has other visits.
        """
        spec = DatasetSpec.load(path)
        names = tuple(spec.extra.get("factors", ()))
        columns = ("request_ms", "context", *names)
        found = read_truth_rows(path, FACTORS, user_id, visit_id, columns) if names else None
        if found is None:
            raise UserError(f"{path}: has no factors; {_command(spec)}")
        if not np.array_equal(found["request_ms"], request_ms):
            raise UserError(f"{path}: its visits have other times than the rows of the run, so it is another world")
        table = read_table(DatasetFiles(path), "truth/factor_weights.parquet")
        place = {name: number for number, name in enumerate(names)}
        weights = np.zeros((len(CONTEXTS), len(BEHAVIOURS), len(names)), np.float32)
        for line in table.to_pylist():
            try:
                weights[line["context"], BEHAVIOURS.index(line["behaviour"]), place[line["factor"]]] = line["weight"]
            except (KeyError, ValueError, IndexError, TypeError):
                file = storage.join(path, "truth/factor_weights.parquet")
                raise UserError(f"{file}: not written by this version; a line of it is {line}") from None
        return WorldFactors(
            names, found["context"].astype(np.int64), np.stack([found[name] for name in names]), weights
        )

    def log_odds(self) -> np.ndarray:
        """Return the log-odds of all behaviours before the offsets of click and depth, ``[behaviours, n]`` float32."""
        found = np.zeros((len(BEHAVIOURS), len(self.context)), np.float32)
        for factor, values in enumerate(self.values):
            found += self.weights[self.context, :, factor].T * values
        return found

    def probabilities(self, log_odds: np.ndarray) -> np.ndarray:
        """Return the probabilities of the behaviours by their log-odds, both ``[behaviours, n]``."""
        following = self.values[self.names.index("following")] > 0
        return behaviour_probabilities(log_odds, allowed_interactions(self.context > 0, following)).marginal

    def effects(self, behaviours: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Return for each behaviour the effect of each group of factors on its log-odds, ``[n]`` float32 by group.

        A behaviour other than a click comes at the end of branches of the visit, so its probability is no function of
        one sum. The effect is the one of first order: the change of its log-odds with the log-odds of each behaviour
        of the visit, as a mean over all rows, times the factor's term in these. So it tells nothing of a row but the
        factor itself. Groups without an effect are left out.
        """
        slopes = self._slopes()
        found = []
        for behaviour in behaviours:
            weights = np.einsum("j,cjf->cf", slopes[BEHAVIOURS.index(behaviour)], self.weights)
            groups: dict[str, np.ndarray] = {}
            for factor, name in enumerate(self.names):
                effect = (weights[self.context, factor] * self.values[factor]).astype(np.float32)
                # Scenes and inclinations have a factor for each scene and behaviour.
                group = name.partition("_")[0]
                groups[group] = groups[group] + effect if group in groups else effect
            found.append({group: effect for group, effect in groups.items() if np.ptp(effect) > 0})
        return found

    def _slopes(self) -> np.ndarray:
        """Return the mean change of the log-odds of each behaviour (rows) with those of each one (columns)."""
        base = self.log_odds()
        slopes = np.zeros((len(BEHAVIOURS), len(BEHAVIOURS)), np.float32)
        for changed in range(len(BEHAVIOURS)):
            ends = []
            for step in (-STEP, STEP):
                moved = base.copy()
                moved[changed] += np.float32(step)
                ends.append(self.probabilities(moved).astype(np.float64))
            low, high = ends
            for behaviour in range(len(BEHAVIOURS)):
                # A user who follows an author cannot do it again: there are no log-odds.
                rows = low[behaviour] > 0
                odds = [np.log(end[behaviour, rows] / (1 - end[behaviour, rows])) for end in (low, high)]
                slopes[behaviour, changed] = np.mean(odds[1] - odds[0]) / (2 * STEP) if rows.any() else 0
        return slopes


def _command(spec: DatasetSpec) -> str:
    """Return how to make the same dataset with factors."""
    extra = spec.extra
    if spec.name != "simulated" or not {"users", "days", "seed"} <= extra.keys():
        return "only the everyday world of limelight data simulate OUT --factors can have them"
    words = f"--users {extra['users']} --days {extra['days']} --partitions {spec.partitions} --seed {extra['seed']}"
    words += " --lookahead" if extra.get("lookahead") else ""
    words += f" --newcomers {extra['newcomers']}" if extra.get("newcomers") else ""
    known = extra.get("interest_correlation") is not None
    words += f" --interest-correlation {extra['interest_correlation']}" if known else ""
    words += f" --conflict {extra['conflict']}" if extra.get("conflict") else ""
    return f"write them to another directory and name it with --data: limelight data simulate OUT {words} --factors"
