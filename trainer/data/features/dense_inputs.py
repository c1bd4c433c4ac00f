"""Dense inputs before standardisation: float columns of the rows, and rates from statistics and past visits."""

from __future__ import annotations

import numpy as np

from trainer.config.features import FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.past_counts import PastCounts
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.statistics import smoothed_rates


def statistic_name(key: tuple[str, ...]) -> str:
    """Return the name of a key of the statistics, such as ``stat:user*author``."""
    return "stat:" + "*".join(key)


def smoothing_strength(prior: np.ndarray, smoothing: float) -> np.ndarray:
    """Return the weight of each behaviour's overall rate as a number of rows, ``[behaviours]``.

    The weight is ``smoothing / (2 sqrt(p0 (1 - p0)))``. One row says little about a rare behaviour, so the rates of
    rare behaviours are drawn more strongly towards the overall rate. If half of the rows have the behaviour, the weight
    is ``smoothing`` rows.

    Args:
        prior: overall rates p0, ``[behaviours]``, strictly between 0 and 1.
        smoothing: above 0.
    """
    return smoothing / (2 * np.sqrt(prior * (1 - prior)))


class DenseInputs:
    """Computes the raw values of a model's dense inputs.

    Args:
        spec: description of the dataset.
        config: the ``[features]`` section, which excludes inputs and sets the smoothing of rates.

    Attributes:
        names: names of the columns: the dense features, then ``stat:KEY:BEHAVIOUR`` (a logit) by key and behaviour,
            then ``past:NAME:BEHAVIOUR`` of the counts of past visits, then ``stat:KEY:rows`` and ``past:NAME:rows``
            (logarithms) by key.
    """

    def __init__(self, spec: DatasetSpec, config: FeatureConfig) -> None:
        exclude = config.exclude
        self._features = [k for k, feature in enumerate(spec.dense) if feature.name not in exclude]
        self._keys = [
            k for k, key in enumerate(spec.statistics) if statistic_name(key) not in exclude and "stat:*" not in exclude
        ]
        rates = config.rates or spec.behaviours
        self._rates = [spec.behaviours.index(behaviour) for behaviour in rates]
        self._spec, self._smoothing = spec, config.smoothing
        self._past = PastCounts(spec, config)
        keys = [*(statistic_name(spec.statistics[k]) for k in self._keys), *self._past.keys]
        self.names: tuple[str, ...] = (
            *(spec.dense[k].name for k in self._features),
            *(f"{key}:{behaviour}" for key in keys for behaviour in rates),
            *(f"{key}:rows" for key in keys),
        )

    def prepare(self, histories: Histories) -> None:
        """Compile the counting of past visits, so that worker processes need not do it each."""
        self._past.prepare(histories)

    def raw(
        self, rows: Rows, prior: np.ndarray, histories: Histories | None = None, as_of_ms: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the values of the inputs, ``[n, len(names)]`` float32.

        Args:
            rows: rows with ``dense``, ``stat``, what counts of past visits compare with and, for messages,
                ``visit_id`` and ``request_ms``.
            prior: overall rate of each behaviour, ``[behaviours]``.
            histories: of the dataset; only counts of past visits need them.
            as_of_ms: ``[n]`` int64, time as of which past visits are counted; None: the requests.

        Raises:
            UserError: a value is NaN or infinite.
        """
        n = len(rows["visit_id"])
        out = np.empty((n, len(self.names)), np.float32)
        features = len(self._features)
        out[:, :features] = rows["dense"][:, self._features]
        if (self._keys or self._past.keys) and n:
            width = 1 + len(self._spec.behaviours)
            counts = rows["stat"].reshape(n, len(self._spec.statistics), width)[:, self._keys]
            if self._past.keys:
                assert histories is not None, "counts of past visits need histories"
                past = self._past.read(rows, histories, rows["request_ms"] if as_of_ms is None else as_of_ms)
                counts = np.concatenate([counts, past.reshape(n, -1, width)], axis=1)
            # Column 0 of a key is its number of rows, which every rate needs as the denominator.
            chosen = counts[:, :, [0, *(1 + k for k in self._rates)]]
            rates = prior[self._rates]
            strength = smoothing_strength(rates, self._smoothing)
            out[:, features:] = smoothed_rates(chosen.reshape(n, -1), rates, strength)
        # A single NaN would spread to all parameters in one step, so it is refused here, where the row is known.
        if not np.isfinite(out).all():
            self._refuse(out, rows)
        return out

    def _refuse(self, values: np.ndarray, rows: Rows) -> None:
        """Raise an error that names the first value which is not finite."""
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise UserError(
            f"dense feature {self.names[column]!r} is {values[row, column]} in visit {rows['visit_id'][row]} "
            f"(request_ms {rows['request_ms'][row]}); features must be finite, write 0 where a value is missing"
        )
