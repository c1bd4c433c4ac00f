"""The dataset of a trained model: where it is, and the part of it that scoring reads, which an export can carry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from trainer.console.errors import UserError, one_line
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles, record_checksums
from trainer.data.format.feature_join import TABLE_OF
from trainer.data.format.history import FOLDER as HISTORIES
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import FOLDER as ROWS

_TABLES = tuple(f"{name}.parquet" for name in TABLE_OF.values())

SCORING_FILES = f"dataset.json, {', '.join(_TABLES)}, {HISTORIES}/ and {ROWS}/"
"""Files of a dataset that scoring reads: features, histories and statistics as of each request."""


def dataset_of(model: str | Path, stored: str, given: str | None = None, otherwise: str = "") -> str:
    """Return the path of a trained model's dataset.

    Args:
        model: run or exported model, for the message.
        stored: path that the model stores. An earlier version stored it as it was typed; a relative one is then as seen
            from the working directory.
        given: path of ``--data``, which replaces the stored one.
        otherwise: further advice for the message.

    Raises:
        UserError: there is no dataset at the stored path.
    """
    if given is not None or storage.is_remote(stored) or (Path(stored) / "dataset.json").exists():
        return given or stored
    relative = "" if os.path.isabs(stored) else "; an earlier version stored this relative path as it was typed"
    raise UserError(
        f"{stored}: no dataset here, and {model} was trained on it{relative}; name its present place with --data "
        f"PATH{otherwise}"
    )


def carry_dataset(source: str, target: Path, more: Collection[str] = ()) -> None:
    """Copy the part of a dataset that scoring reads; ``target`` is then a dataset without events and most texts.

    Args:
        source: dataset, a local path or an fsspec URL.
        target: directory to make.
        more: further files of the dataset that the model reads.

    Raises:
        UserError: there is no dataset at ``source``, or a file is damaged or cannot be copied.
    """
    DatasetSpec.load(source)
    files = DatasetFiles(source)
    kept = ("dataset.json", *_TABLES, *more)
    names = [name for name in sorted(files.names()) if name in kept or name.startswith((f"{HISTORIES}/", f"{ROWS}/"))]
    filesystem, inside = storage.open_url(source) if storage.is_remote(source) else (None, source)
    for name in names:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            if filesystem is None:
                shutil.copyfile(files.locate(name), copy)
            else:
                filesystem.get_file(f"{inside}/{name}", str(copy))
        except OSError as error:
            raise UserError(f"{storage.join(source, name)}: cannot be copied ({one_line(error)})") from None
        files.verify(name, copy)
    record_checksums(target, lambda done, total: None)
