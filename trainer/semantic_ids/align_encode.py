"""Fused author vectors of a trained alignment: one for each segment, as of the time when the segment became known.

The latest vector is that of the segment, the mean is that of all segments of the author known then, and the statistics
of the author count rows that were emitted before. Nothing that became known later is read, so a table can be made again
with later segments, and its earlier vectors stay the same.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.console.errors import UserError, failure_reason
from trainer.data.format.content_vectors import MANIFEST, Origin, VectorPart, write_parts
from trainer.engine.build_engine import rows_per_rank
from trainer.runtime.distributed import World
from trainer.runtime.stored_files import load_array, read_json_object, stored_value
from trainer.semantic_ids.align_content import AuthorContent
from trainer.semantic_ids.align_evaluation import encode_authors
from trainer.semantic_ids.align_features import AuthorRequests
from trainer.semantic_ids.align_model import TrainedAlignment

POOLING = "fused author vectors"

FUSED_DTYPE = "float16"
"""Type of the stored vectors; their codes are those of the stored values."""

logger = logging.getLogger(__name__)


class FusedTableSummary(NamedTuple):
    """Summary of a table of fused vectors.

    Attributes:
        segments: number of vectors.
        dim: number of elements of a vector.
        without_author: segments without a vector, because the dataset does not have their room.
        unseen: segments of authors without a trained id of their own.
        gate: mean share of the content.
        reads: what these authors read.
    """

    segments: int
    dim: int
    without_author: int
    unseen: int
    gate: float
    reads: str

    def __str__(self) -> str:
        return (
            f"{self.segments:,} segments with fused author vectors of {self.dim} elements, mean gate {self.gate:.3f}; "
            f"{self.unseen:,} of authors without a trained id ({self.reads}), {self.without_author:,} left out "
            "without an author"
        )


def fused_origin(model: TrainedAlignment, vectors: Origin) -> Origin:
    """Return the origin of the fused vectors of a model. Their ids are those of the segment vectors that it reads."""
    return Origin(
        model=model.directory.resolve().name,
        # Readers of a table find the kind of its ids in the names of the templates.
        template=vectors.template,
        pooling=POOLING,
        hash=model.version,
    )


def encode_segments(model: TrainedAlignment, out: Path, world: World) -> FusedTableSummary:
    """Write the fused author vector of each segment to a table. Collective.

    Args:
        model: the model, over the dataset whose segments are encoded.
        out: directory of the table; an existing table of fused vectors is replaced as a whole.
        world: the ranks.

    Raises:
        UserError: no segment has an author, ``out`` has other vectors, or the table cannot be written; then nothing of
            it is left.
    """
    content = model.features.content
    assert isinstance(content, AuthorContent), "the content is that of a dataset's segments"
    segments = content.segments
    rows = np.flatnonzero(segments.author_id >= 0)
    if not len(rows):
        raise UserError(f"{segments.table.path}: no segment has an author in {model.data.store.path}")
    made = world.on_first_rank(lambda: _make(out))
    bounds = np.linspace(0, len(rows), world.size + 1).astype(np.int64)
    own = rows[bounds[world.rank] : bounds[world.rank + 1]]
    tmp_path = out / f".rank-{world.rank:05d}.npy"
    gates, dim = np.zeros(1), model.config.towers.dim
    try:
        blocks = encode_authors(
            model.engine,
            AuthorRequests(model.data, model.features),
            segments.author_id[own],
            segments.known_ms[own],
            rows_per_rank(model.config, world.size),
            world,
            "segments",
            latest=own,
        )
        # Written and not mapped: on a full disk a write fails with a reason, and a mapping ends the process.
        with open(tmp_path, "wb") as file:
            header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (len(own), dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block[:, :-1]).data)
                gates += block[:, -1].sum(dtype=np.float64)
        world.barrier()
        shares = world.agree(world.gather(float(gates[0]))) or []

        def write() -> None:
            parts = _parts(out, segments.table.ids[rows], bounds)
            no_texts = np.zeros(len(rows), np.uint64)
            origin = fused_origin(model, segments.table.origin)
            ids, digest = segments.table.ids[rows], segments.hash(rows)
            write_parts(out, ids, no_texts, parts, dim, origin=origin, dtype=FUSED_DTYPE, segments=digest)

        world.on_first_rank(write)
    except BaseException as error:
        if world.rank == 0 and made:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written ({failure_reason(error)})") from None
        raise
    finally:
        tmp_path.unlink(missing_ok=True)
    unseen = int((~model.features.known(segments.author_id[rows])).sum())
    reads = "content alone" if model.features.id_dropout is None else "the unknown id"
    return FusedTableSummary(len(rows), dim, len(segments) - len(rows), unseen, sum(shares) / len(rows), reads)


def _make(out: Path) -> bool:
    """Make the directory of a table; returns True if it did not exist.

    Raises:
        UserError: something else is there, such as a table of other vectors, or it cannot be made.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not (out / MANIFEST).exists():
                raise UserError(f"{out}: something else than a table of vectors is here; choose another directory")
            # The manifest alone, since a table with damaged vectors can be made again.
            manifest = out / MANIFEST
            pooling = stored_value(read_json_object(manifest), manifest, "origin", dict).get("pooling")
            if pooling != POOLING:
                raise UserError(
                    f"{out}: has other vectors ({pooling or 'unknown'}), and only a table of {POOLING} is replaced; "
                    "choose another directory"
                )
            return False
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return made


def _parts(out: Path, ids: np.ndarray, bounds: np.ndarray) -> Iterator[VectorPart]:
    """Yield ids and vectors of each rank's file."""
    for rank, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if stop > start:
            yield ids[start:stop], load_array(out / f".rank-{rank:05d}.npy", 2)
