"""Checks of a dataset's description: it has what a job names, and it is of the kind that features were fitted on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from trainer.config.features import FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.dense_inputs import statistic_name
from trainer.data.features.fit import FittedFeatures, feature_layout
from trainer.data.format.schema import DatasetSpec


def check_names(spec: DatasetSpec, config: FeatureConfig, behaviours: Sequence[str]) -> None:
    """Check that the dataset has every feature and behaviour that a job names.

    Raises:
        UserError: it does not have one; the message gives the nearest name or the list of names.
    """
    required = {name: history.require for name, history in config.history.items()}
    for key, names in (
        ("data.behaviours", behaviours),
        ("features.rates", config.rates),
        *((f"features.history.{name}.require", names) for name, names in required.items()),
    ):
        for name in names:
            if name not in spec.behaviours:
                raise UserError(f"{key}: the dataset has no behaviour {name!r}; it has {', '.join(spec.behaviours)}")
    known = [
        "user_id",
        "domain",
        "stat:*",
        *(side.name for side in spec.side),
        *(dense.name for dense in spec.dense),
        *map(statistic_name, spec.statistics),
    ]
    for name in config.exclude:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"features.exclude: the dataset has no feature {name!r}; did you mean {nearest!r}?")
    if config.tags and (not spec.tag or spec.tag in config.exclude):
        why = f"{spec.tag!r} is in features.exclude" if spec.tag else "the dataset was built without `tag`"
        raise UserError(f"features.tags = true: histories have no tags, because {why}")
    for name, past in config.past.items():
        if past.same == "tag" and not spec.tag:
            raise UserError(
                f'features.past.{name}.same = "tag": histories have no tags, because the dataset was built without '
                '`tag`; "any", "author" and "item" need none'
            )
    of_authors = [side.name for side in spec.side if side.of == "author"]
    for name in config.author_side:
        if name not in of_authors:
            raise UserError(
                f"features.author_side: {name!r} is not a side feature of the dataset's authors; "
                f"they have {', '.join(of_authors) or 'none'}"
            )
        if name in config.exclude:
            raise UserError(
                f"features.author_side: {name!r} is also in features.exclude; remove it from one of the two"
            )


def check_layout(spec: DatasetSpec, fitted: FittedFeatures) -> None:
    """Check that the dataset has the names and sizes of the one on which the features were fitted."""
    ours = feature_layout(spec)
    for part, theirs in fitted.layout.items():
        if ours.get(part) != theirs:
            raise UserError(
                f"dataset {spec.name!r} does not fit the model's features: its {part} are {ours.get(part)}, the model "
                f"was trained with {theirs}"
            )
