"""Tables of pre-trained vectors of a model: opened, checked, and compared with those of its training.

A model keeps the facts of its tables. A table that has changed since is refused, and so are vectors of another kind.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.features import FeatureConfig
from trainer.config.paths import absolute
from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.content_vectors import MANIFEST, ContentVectors, read_manifest
from trainer.data.format.segments import SEGMENTS, TEXT_ITEMS, TEXT_SEGMENTS, DatasetSegments


@dataclass(frozen=True)
class TableFacts:
    """Properties of a table of vectors that a model keeps of the table that it was trained with.

    Attributes:
        hash: hash of ids and vectors.
        width: number of elements of a vector.
        dtype: type in which the vectors are stored.
        count: number of vectors.
        model: name of the language model's directory; if no language model made the vectors, a text that says what did.
        origin: hash of the contents of model, adapter, templates and pooling.
        until_ms: of a table of segments: largest ``known_ms``; -1 if the segments were not kept.
        segments: of a table of segments: hash of ids, rooms, authors and times of the segments with ``known_ms`` up to
            this time.
        known: of a table of segments: hash of the vectors of these segments.
    """

    hash: str
    width: int
    dtype: str
    count: int
    model: str
    origin: str
    until_ms: int = -1
    segments: str = ""
    known: str = ""

    @staticmethod
    def of(table: ContentVectors, segments: DatasetSegments | None = None) -> TableFacts:
        """Return the facts of an opened table; the vectors of a table of segments are read once.

        Args:
            table: vectors by id.
            segments: segments of the dataset, at least those of the table; None for a table of items or authors.
        """
        origin = table.origin
        made_by = origin.model or origin.pooling
        facts = TableFacts(table.hash, table.dim, table.vectors.dtype.name, len(table), made_by, origin.hash)
        if segments is None:
            return facts
        until_ms = int(segments.known_ms[segments.rows_of(table.ids)].max(initial=-1))
        rows = _known_rows(table, segments, until_ms)
        return replace(
            facts,
            until_ms=until_ms,
            segments=segments.hash(segments.rows_of(table.ids[rows])),
            known=_hash_vectors(table, rows),
        )

    @property
    def kind(self) -> dict[str, Any]:
        """Facts that must be the same in tables that one model reads."""
        return {"width": self.width, "dtype": self.dtype, "vectors of": f"{self.model} {self.origin}".strip()}

    def has_changed(self, table: ContentVectors, segments: DatasetSegments | None = None) -> bool:
        """True if a table is not the one of the training; a table of segments may have got later ones.

        Args:
            table: the table now.
            segments: segments of the dataset now; None for a table of items or authors.
        """
        if segments is None or not self.segments:
            return self.hash != table.hash
        rows = _known_rows(table, segments, self.until_ms)
        if segments.hash(segments.rows_of(table.ids[rows])) != self.segments:
            return True
        # The vectors are read again only where the table is another one.
        return self.hash != table.hash and _hash_vectors(table, rows) != self.known


def check_places(config: FeatureConfig) -> None:
    """Check that the tables of ``features.content`` are there, without reading them.

    Raises:
        UserError: a table is remote or is not there.
    """
    for name, content in config.content.items():
        key = f"features.content.{name}.table"
        if storage.is_remote(content.table):
            raise UserError(f"{key} = {content.table}: vectors are memory-mapped; copy the table to a local path")
        try:
            read_manifest(Path(content.table))
        except UserError as error:
            raise UserError(f"{key} = {error}") from None


def open_tables(config: FeatureConfig) -> dict[str, ContentVectors]:
    """Open the tables of ``features.content``, by name; each one is read once to compare its hash.

    Raises:
        UserError: a table is remote, is not there, is damaged or has no vectors.
    """
    check_places(config)
    tables = {}
    for name, content in config.content.items():
        key = f"features.content.{name}.table"
        try:
            tables[name] = ContentVectors.open(content.table)
        except UserError as error:
            raise UserError(f"{key} = {error}") from None
        if not len(tables[name]):
            raise UserError(f"{key} = {content.table}: has no vectors; at least one is needed")
    return tables


def open_segments(
    config: FeatureConfig, dataset: str, tables: Mapping[str, ContentVectors]
) -> dict[str, DatasetSegments]:
    """Return table of segment vectors -> segments of the dataset, which are those of the table and maybe others.

    Raises:
        UserError: the dataset has no segments, or they are not those of the table.
    """
    found = {}
    for name, content in config.content.items():
        if content.of != "segment":
            continue
        key = f"features.content.{name}.table = {content.table}"
        try:
            found[name] = DatasetSegments.read(dataset, embedded="segments" in tables[name].origin.template)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        unknown = np.flatnonzero(found[name].rows_of(tables[name].ids) < 0)
        if len(unknown):
            raise UserError(
                f"{key}: has a vector of segment {tables[name].ids[unknown[0]]}, which {found[name].source} does not "
                "have; it may be of another dataset"
            )
        try:
            found[name].check_table(tables[name])
        except UserError as error:
            raise UserError(f"features.content.{name}.table: {error}") from None
    return found


def check_tables(
    config: FeatureConfig,
    fitted: Mapping[str, TableFacts],
    tables: Mapping[str, ContentVectors],
    accepted: Collection[str],
    segments: Mapping[str, DatasetSegments],
) -> None:
    """Compare the tables of a job with those that its model was trained with.

    Args:
        config: the ``[features]`` section of the job.
        fitted: facts of the tables at the start of training.
        tables: the tables now.
        accepted: names of tables that may have changed.
        segments: segments of the dataset now, for each table of segments.

    Raises:
        UserError: a table has vectors of another width, type or model, or it has changed and is not accepted.
    """
    for name, content in config.content.items():
        then, now = fitted.get(name), TableFacts.of(tables[name])
        key = f"features.content.{name}.table = {content.table}"
        if then is None:
            raise UserError(f"{key}: the features of the run were fitted without it; train a new run")
        before, after = (
            f"{facts.width} x {facts.dtype}, {facts.model or 'unknown origin'} {facts.origin[:12]}".strip()
            for facts in (then, now)
        )
        if then.kind != now.kind:
            raise UserError(
                f"{key}: the vectors are of another kind ({before} in training, {after} now); they must not be mixed"
            )
        if name in accepted or not then.has_changed(tables[name], segments.get(name)):
            continue
        advice = "the command of the run with resume.allow_new_data=true accepts it"
        if name in segments:
            advice = f"later segments may be added, and {advice}"
        if then.hash == now.hash:
            raise UserError(
                f"{key}: its segments have other rooms, authors or times in {segments[name].source} than in training; "
                f"the dataset may be another one; {advice}"
            )
        raise UserError(
            f"{key}: the table has changed since training ({then.count:,} vectors with hash {then.hash[:12]} then, "
            f"{now.count:,} with {now.hash[:12]} now); {advice}"
        )


def _known_rows(table: ContentVectors, segments: DatasetSegments, until_ms: int) -> np.ndarray:
    """Return the rows of a table whose segments have ``known_ms`` up to a time, in the order of their ids."""
    return np.flatnonzero(segments.known_ms[segments.rows_of(table.ids)] <= until_ms)


def _hash_vectors(table: ContentVectors, rows: np.ndarray) -> str:
    """Return a hash of the vectors of some rows of a table."""
    digest = hashlib.blake2b(digest_size=16)
    for _, vectors in table.parts(rows):
        digest.update(np.ascontiguousarray(vectors).tobytes())
    return digest.hexdigest()


def inside_dataset(config: FeatureConfig, stored: str, path: str) -> tuple[FeatureConfig, frozenset[str]]:
    """Replace tables and code files inside of a model's dataset by those at the same place of another dataset.

    Args:
        config: the ``[features]`` section of the model's job.
        stored: path of the dataset that the model stores.
        path: path of the dataset to read.

    Returns:
        The section, and the names of the tables that were replaced; none if both datasets are the same.
    """
    # A relative path may name the same dataset, whose tables must not have changed.
    if absolute(stored) == absolute(path):
        return config, frozenset()

    def there(place: str) -> str:
        return storage.join(path, str(Path(place).relative_to(stored))) if _is_inside(place, stored) else place

    content = {name: own.model_copy(update={"table": there(own.table)}) for name, own in config.content.items()}
    codes = {name: own.model_copy(update={"file": there(own.file)}) for name, own in config.codes.items()}
    moved = frozenset(name for name, own in config.content.items() if _is_inside(own.table, stored))
    return config.model_copy(update={"content": content, "codes": codes}), moved


def _is_inside(place: str, dataset: str) -> bool:
    return Path(place).is_relative_to(dataset)


def facts_now(
    config: FeatureConfig,
    dataset: str,
    fitted: Mapping[str, TableFacts],
    names: Collection[str],
    accepted: Collection[str],
) -> dict[str, TableFacts]:
    """Return the facts of a model's tables, of some of them as they are now.

    Args:
        config: the ``[features]`` section.
        dataset: path of the dataset that is read.
        fitted: facts of the tables at the start of training.
        names: names of the tables that are read.
        accepted: names of tables that may have changed since.

    Raises:
        UserError: a table cannot be opened, or it is not the one that the model was trained with.
    """
    read = config.model_copy(
        update={"content": {name: config.content[name] for name in config.content if name in names}}
    )
    tables = open_tables(read)
    segments = open_segments(read, dataset, tables)
    check_tables(read, fitted, tables, accepted, segments)
    return {**fitted, **{name: TableFacts.of(table, segments.get(name)) for name, table in tables.items()}}


def carry_tables(config: FeatureConfig, target: Path) -> None:
    """Copy the tables of ``features.content`` into a directory, each in a folder of its name.

    Raises:
        UserError: a table is not there or is damaged.
        OSError: a file cannot be copied.
    """
    for name, table in open_tables(config).items():
        folder = target / name
        folder.mkdir(parents=True)
        shutil.copyfile(table.path / MANIFEST, folder / MANIFEST)
        for file in read_manifest(table.path)["files"].values():
            shutil.copyfile(table.path / file, folder / file)


def carried_tables(config: FeatureConfig, source: Path) -> FeatureConfig:
    """Return the section with the copies that ``carry_tables`` made in place of the original tables."""
    content = {
        name: own.model_copy(update={"table": str(source / name)}) if (source / name).is_dir() else own
        for name, own in config.content.items()
    }
    return config.model_copy(update={"content": content})


def segment_files(config: FeatureConfig) -> frozenset[str]:
    """Return the files of a dataset that tell the rooms and times of segments with vectors.

    Raises:
        UserError: a table is not there.
    """
    files: set[str] = set()
    for content in config.content.values():
        if content.of == "segment":
            embedded = "segments" in read_manifest(Path(content.table))["origin"]["template"]
            files |= {TEXT_SEGMENTS, TEXT_ITEMS} if embedded else {SEGMENTS, TEXT_ITEMS}
    return frozenset(files)
