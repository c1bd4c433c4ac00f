"""Sizes of a job's features by its settings and its dataset's description, without a row of the dataset.

A plan needs the tables, lookups and inputs of a model and no value that is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainer.config.features import FeatureConfig
from trainer.data.features.content_tables import TableFacts, open_tables
from trainer.data.features.dataset_checks import check_names
from trainer.data.features.dense_inputs import DenseInputs
from trainer.data.features.fit import ID_TABLES, FittedFeatures, feature_layout
from trainer.data.features.fitted_codes import FittedCodes, read_code_files
from trainer.data.features.id_map import table_rows
from trainer.data.format.schema import DatasetSpec


def declared_features(
    spec: DatasetSpec, config: FeatureConfig, rows: Mapping[str, int] | None = None
) -> FittedFeatures:
    """Return features of the sizes that a fit would have; values that a fit would learn are neutral.

    A table with ``ids = "lookup"`` counts all ids of the dataset, the most that its training range can have.

    Args:
        spec: description of the dataset.
        config: the ``[features]`` section of the job.
        rows: table -> other number of rows, for ``user``, ``author`` and ``item``.

    Raises:
        UserError: the dataset does not have a feature that the job names, ids do not fit into their table, or a code
            file or a table of vectors cannot be read.
    """
    check_names(spec, config, ())
    sizes = {
        name: (rows or {}).get(name) or table_rows(name, getattr(config, name), spec, spec.ids[name].count)
        for name in ID_TABLES
    }
    inputs = len(DenseInputs(spec, config).names)
    return FittedFeatures(
        layout=feature_layout(spec),
        table_rows=sizes,
        prior=np.full(len(spec.behaviours), 0.5),
        mean=np.zeros(inputs),
        deviation=np.ones(inputs),
        codes={name: FittedCodes.of(file) for name, file in read_code_files(config.codes).items()},
        content={name: TableFacts.of(table) for name, table in open_tables(config).items()},
    )
