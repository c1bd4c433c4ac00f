"""Settings of the histories that a job declares, in the codes and bits of its dataset."""

from __future__ import annotations

from typing import NamedTuple

from trainer.config.features import FeatureConfig
from trainer.data.format.schema import DOMAINS, DatasetSpec


class HistoryRead(NamedTuple):
    """Settings of one history.

    Attributes:
        search: ``latest``, ``top`` or ``author``.
        domain: code of the domain; None for both.
        length: largest number of entries.
        require: bits of the behaviours of which an entry must have one; 0 accepts all entries.
    """

    search: str
    domain: int | None
    length: int
    require: int


def history_reads(spec: DatasetSpec, config: FeatureConfig) -> dict[str, HistoryRead]:
    """Return the settings of each history of a job, by its name.

    Args:
        spec: description of the dataset.
        config: the ``[features]`` section of the job.
    """
    return {
        name: HistoryRead(
            history.search,
            None if history.domain == "both" else DOMAINS.index(history.domain),
            history.length,
            sum(1 << spec.behaviours.index(behaviour) for behaviour in history.require),
        )
        for name, history in config.history.items()
    }
