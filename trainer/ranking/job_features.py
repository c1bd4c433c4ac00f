"""Features of a ranker's job: fitted once in a run, with the codes and pre-trained vectors that they read."""

from __future__ import annotations

from pathlib import Path

from trainer.config.ranker import JobConfig
from trainer.data.features.code_inputs import OpenStore, open_codes
from trainer.data.features.content_inputs import open_reader
from trainer.data.features.content_tables import open_segments, open_tables
from trainer.data.features.feature_map import FeatureMap
from trainer.data.format.dataset import Dataset
from trainer.ranking.setup import Split, fit_once
from trainer.runtime.distributed import World


def open_features(
    config: JobConfig, data: Dataset, split: Split, directory: Path, world: World, open_store: OpenStore
) -> FeatureMap:
    """Return the features of a job, ready to make batches. Collective.

    Args:
        config: the job.
        data: its dataset.
        split: its training range, on which the features are fitted.
        directory: of the fitted features; written at the first start of a run, and read at the later ones.
        world: the ranks.
        open_store: function that opens stores of recent codes.

    Raises:
        UserError: a table, a code file or a store cannot be read, or has changed since the first start; the features
            cannot be fitted, or are not those of the dataset.
    """
    tables = open_tables(config.features)
    segments = open_segments(config.features, config.data.path, tables)
    fitted = fit_once(config, data, split, directory, world, tables, segments)
    codes = open_codes(config.features, fitted.codes, open_store, unchanged=not config.resume.allow_new_data)
    accepted = config.features.content if config.resume.allow_new_data else ()
    content = open_reader(config.features, config.data.path, fitted.content, tables, segments, accepted=accepted)
    return FeatureMap(data.spec, config.features, fitted, config.data.behaviours, codes, content)
