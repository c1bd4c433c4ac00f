"""Forecasts as tables of vectors, one vector for each segment: the features of Foresight in the ranker.

A forecast is made of what was known when its segment became known. A ranker reads the latest forecast of the
candidate's author as of the request (``[features.content.NAME]``), so it is a constant there: no gradient reaches the
predictor, and the table is the log of what each request saw.

Forecasts are computed in blocks of a fixed number of rows, in the order in which the segments became known. The last
block is filled up with authors without any run. So on a CPU the bits of a forecast depend on its own context alone, not
on the segments that are computed with it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from modules.foresight import Forecast, ForesightPredictor, HistoryPooling
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.data.format.content_vectors import MANIFEST, Origin, VectorPart, write_parts
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import segments_hash
from trainer.runtime.distributed import World
from trainer.runtime.files import write_fully, write_whole
from trainer.runtime.host_copy import HostCopy, one_behind, to_device
from trainer.runtime.stored_files import read_json_object, stored_value
from trainer.semantic_ids.code_features import NO_CODE
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.foresight_rows import SegmentContexts

ENCODER, DECODER, EXPECTED = TABLES = Forecast._fields
"""Names of the tables."""

POOLING = "Foresight: "
"""Beginning of the method in the origin of a table of forecasts."""

ROWS_AT_ONCE = 32
"""Rows of a block."""

_DTYPE = np.dtype(np.float16)


@dataclass(frozen=True)
class ForecastSegments:
    """Segments of a code file in the order in which they became known, those of unknown authors left out.

    Attributes:
        ids: ``[n] int64``, ids of their vectors.
        contexts: their contexts.
        without_author: number of segments of unknown authors.
        codes: the code file.
    """

    ids: np.ndarray
    contexts: SegmentContexts
    without_author: int
    codes: CodeFile

    @staticmethod
    def of(codes: CodeFile) -> ForecastSegments:
        """Return the segments of a code file of one level.

        Raises:
            UserError: it has a segment twice.
        """
        contexts = SegmentContexts.of_all(codes.author_id, codes.segment, codes.known_ms, codes.codes[:, 0])
        ids = codes.segment[contexts.segment]
        distinct, count = np.unique(ids, return_counts=True)
        if len(distinct) < len(ids):
            raise UserError(
                f"{codes.path}: has segment {distinct[np.argmax(count > 1)]} twice; each segment has one forecast"
            )
        return ForecastSegments(ids, contexts, len(codes) - len(ids), codes)

    def __len__(self) -> int:
        return len(self.ids)

    def since(self, from_ms: int) -> int:
        """Return the first place of the segments that became known from a time on."""
        return int(np.searchsorted(self.contexts.as_of_ms, from_ms))

    def hash(self, ids: np.ndarray) -> str:
        """Return the hash of the segments of ``ids [m]`` for a table of vectors; empty if their starts are not known.

        A table of forecasts has it, so that a ranker refuses the table beside another dataset with the same ids.
        """
        codes = self.codes
        if codes.start_ms is None:
            return ""
        order = np.argsort(codes.segment)
        rows = order[np.searchsorted(codes.segment, np.sort(ids), sorter=order)]
        columns = (codes.segment, codes.item_id, codes.author_id, codes.start_ms, codes.known_ms)
        return segments_hash(*(column[rows] for column in columns))


class Forecaster:
    """Computes the forecasts of segments.

    Args:
        segments: the segments.
        predictor: the predictor, which may be trained between two calls.
        centroids: ``[codes, centroid_dim] float32``, the codebook's.
        pooling: pooling of the encoder's output.
        device: device of the predictor.
    """

    def __init__(
        self,
        segments: ForecastSegments,
        predictor: ForesightPredictor,
        centroids: Tensor,
        pooling: HistoryPooling,
        device: torch.device,
    ) -> None:
        self._segments, self._predictor, self._pooling, self._device = segments, predictor, pooling, device
        self._centroids = centroids.to(device)

    @torch.no_grad()
    def blocks(self, first: int, stop: int, world: World) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield this rank's share of the forecasts of ``[first, stop)``: the place of the first one, and the tables.

        The predictor computes without dropout, and is left as it was.
        """
        training = self._predictor.training
        self._predictor.eval()
        table = self._predictor.table()
        try:
            begins = range(first + world.rank * ROWS_AT_ONCE, stop, world.size * ROWS_AT_ONCE)
            found = ((at, self._block(np.arange(at, min(at + ROWS_AT_ONCE, stop)), table)) for at in begins)
            for begin, copies in one_behind((at, HostCopy(forecast)) for at, forecast in found):
                tables = Forecast(*copies)._asdict()
                yield begin, {name: values[: stop - begin].numpy() for name, values in tables.items()}
        finally:
            self._predictor.train(training)

    def _block(self, rows: np.ndarray, table: Tensor) -> Forecast:
        runs = self._predictor.size.runs
        found = self._segments.contexts.contexts(rows, runs)
        code = np.full((ROWS_AT_ONCE, runs), NO_CODE, np.int32)
        length = np.zeros((ROWS_AT_ONCE, runs), np.int32)
        code[: len(rows)], length[: len(rows)] = found
        codes, lengths = (to_device(torch.from_numpy(array), self._device) for array in (code, length))
        return self._predictor.forecast(codes, lengths, self._pooling, self._centroids, table)


class ForecastSpool:
    """Forecasts on disk in the order of time, before the tables are made: a file for each table, which all ranks write.

    A place that was not written holds no number, and no table is made with it.

    Args:
        directory: directory of the files, on a file system that all ranks share.
        widths: table -> number of elements of a vector.
        count: number of vectors.
    """

    CHUNK_ROWS = 1 << 14
    """Vectors of one copy."""

    def __init__(self, directory: Path, widths: Mapping[str, int], count: int) -> None:
        self._directory, self._widths, self._count = directory, dict(widths), count
        with ExitStack() as stack:
            self._files = {
                name: stack.enter_context(open(_spool_file(directory, name), "r+b", buffering=0)) for name in widths
            }
            self._open = stack.pop_all()

    @staticmethod
    def extend(directory: Path, widths: Mapping[str, int], count: int) -> None:
        """Make the files, or extend those that are there to ``count`` vectors. One rank calls it.

        Raises:
            OSError: a file cannot be written; the error has its name.
        """
        for name, width in widths.items():
            with open(_spool_file(directory, name), "ab", buffering=0) as file:
                row_bytes = width * _DTYPE.itemsize
                done = file.tell() // row_bytes
                file.truncate(done * row_bytes)
                for first in range(done, count, ForecastSpool.CHUNK_ROWS):
                    rows = min(ForecastSpool.CHUNK_ROWS, count - first)
                    _write(file, np.full((rows, width), np.nan, _DTYPE).tobytes())

    def write(self, first: int, forecast: Mapping[str, np.ndarray]) -> None:
        """Write vectors ``[n, width]`` of each table from a place on.

        Raises:
            OSError: a file cannot be written; the error has its name.
        """
        for name, values in forecast.items():
            file, width = self._files[name], self._widths[name]
            with np.errstate(over="ignore"):
                content = values.astype(_DTYPE)
            file.seek(first * width * _DTYPE.itemsize)
            _write(file, content.tobytes())

    def sync(self) -> None:
        """Flush what this rank has written to disk."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def read(self, name: str) -> np.ndarray:
        """Return the vectors of a table, ``[count, width] float16``, mapped."""
        shape = (self._count, self._widths[name])
        vectors: np.ndarray = np.memmap(_spool_file(self._directory, name), _DTYPE, "r", shape=shape)
        return vectors

    def write_tables(
        self, directory: Path, segments: ForecastSegments, places: slice, origins: Mapping[str, Origin]
    ) -> None:
        """Write the tables ``directory/NAME``; the vectors are those of the segments at ``places``, in their order.

        Raises:
            UserError: a vector is missing, or a table cannot be written.
        """
        ids = segments.ids[places]
        digest = segments.hash(ids)
        for name, width in self._widths.items():
            vectors = self.read(name)

            def parts(vectors: np.ndarray = vectors) -> Iterator[VectorPart]:
                for begin in range(0, len(ids), self.CHUNK_ROWS):
                    stop = begin + self.CHUNK_ROWS
                    yield ids[begin:stop], vectors[begin:stop]

            no_texts = np.zeros(len(ids), np.uint64)
            write_parts(directory / name, ids, no_texts, parts(), width, origin=origins[name], segments=digest)

    @staticmethod
    def is_there(directory: Path, names: Mapping[str, int]) -> bool:
        """True if the files of all tables are there."""
        return all(_spool_file(directory, name).is_file() for name in names)

    @staticmethod
    def remove(directory: Path, names: Mapping[str, int]) -> None:
        """Remove the files."""
        for name in names:
            _spool_file(directory, name).unlink(missing_ok=True)


def table_widths(predictor: ForesightPredictor, centroids: Tensor) -> dict[str, int]:
    """Return the number of elements of a vector of each table."""
    return {ENCODER: predictor.size.dim, DECODER: centroids.shape[1], EXPECTED: centroids.shape[1]}


def forecast_origins(version: CodebookVersion, model: str, digest: str, pooling: HistoryPooling) -> dict[str, Origin]:
    """Return the origin of each table of forecasts.

    Args:
        version: codebook version of the codes.
        model: name of the run of the predictor.
        digest: hash of all that makes the forecasts but the pooling.
        pooling: pooling of the encoder's output.
    """
    methods = {ENCODER: f"encoder, {pooling} of the runs", DECODER: "decoder", EXPECTED: "expected centroid"}
    return {
        name: Origin(
            model=model,
            # Readers of a table find the kind of its ids in the names of the templates.
            template=version.manifest.origin.template,
            pooling=POOLING + method,
            hash=hashlib.blake2b(f"{digest} {method}".encode(), digest_size=8).hexdigest(),
        )
        for name, method in methods.items()
    }


def check_out(out: Path) -> None:
    """Check that nothing but tables of forecasts is at the place where such tables are to be written.

    Raises:
        UserError: something else is there.
    """
    refusal = UserError(f"{out}: something else than tables of forecasts is here; choose another directory")
    if not out.exists():
        return
    if not out.is_dir():
        raise refusal
    for entry in out.iterdir():
        manifest = entry / MANIFEST
        if entry.name not in TABLES or not manifest.is_file():
            raise refusal
        pooling = stored_value(read_json_object(manifest), manifest, "origin", dict).get("pooling")
        if not str(pooling).startswith(POOLING):
            raise refusal


def write_forecasts(
    out: Path,
    segments: ForecastSegments,
    first: int,
    forecaster: Forecaster,
    widths: Mapping[str, int],
    origins: Mapping[str, Origin],
    world: World,
) -> None:
    """Write the tables ``out/NAME`` with the forecasts of the segments from place ``first`` on. Collective.

    Args:
        out: directory of the tables, which is replaced as a whole if it exists.
        segments: the segments.
        first: place of the first segment.
        forecaster: computes the forecasts.
        widths: of :func:`table_widths`.
        origins: of :func:`forecast_origins`.
        world: the ranks.

    Raises:
        UserError: a forecast is not finite in float16, or the tables cannot be written; then nothing of them is left.
    """
    count = len(segments) - first

    def make() -> Path:
        check_out(out)
        place = out.with_name(f".{out.name}.spool-{os.getpid()}")
        try:
            place.mkdir(parents=True)
            ForecastSpool.extend(place, widths, count)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
        return place

    place = world.on_first_rank(make)
    try:
        spool = ForecastSpool(place, widths, count)
        with Progress("forecast", -(-count // world.size), "segments", quiet=world.rank > 0) as progress:
            for begin, forecast in forecaster.blocks(first, len(segments), world):
                spool.write(begin - first, forecast)
                progress.advance(len(forecast[ENCODER]))
        spool.close()
        world.barrier()
        world.on_first_rank(
            lambda: write_whole(out, lambda target: spool.write_tables(target, segments, slice(first, None), origins))
        )
    finally:
        if world.rank == 0:
            shutil.rmtree(place, ignore_errors=True)


def _spool_file(directory: Path, name: str) -> Path:
    return directory / f".{name}.float16"


def _write(file: IO[bytes], content: bytes) -> None:
    """Write all bytes.

    Raises:
        OSError: some cannot be written; the error has the file's name, which errors of writes do not have.
    """
    try:
        write_fully(file, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from None
