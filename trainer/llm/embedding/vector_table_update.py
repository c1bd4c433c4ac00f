"""Embeds the new and changed texts of a dataset in parts, and replaces the table of vectors as a whole."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from trainer.config.embed import EmbeddingJob, Kind
from trainer.console.errors import UserError, one_line
from trainer.console.outputs import local_path
from trainer.console.progress import Progress
from trainer.data.format.content_vectors import MANIFEST, ContentVectors, Origin, VectorPart, finite_rows, write_parts
from trainer.data.format.segments import DatasetSegments
from trainer.llm.embedding.dataset_texts import KindTexts
from trainer.llm.embedding.learned_query import fit_query
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.models.adapter import load_adapter
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.distributed import World
from trainer.runtime.stored_files import load_array, load_arrays, open_regular

logger = logging.getLogger(__name__)

PARTS = ".parts"
"""Folder beside the tables, for the parts of tables that are not complete yet."""


@dataclass(frozen=True)
class EncoderSetup:
    """An encoder with all settings that its vectors depend on.

    Attributes:
        encoder: encoder that holds the model.
        names: names of model and adapter.
        identity: hash of model, adapter, tokenizer, precision, length and pooling.
        template: prompt template of the texts.
        pooling: pooling of the token states.
    """

    encoder: Encoder
    names: tuple[str, str]
    identity: str
    template: Template
    pooling: str

    def origin(self, kind: Kind) -> Origin:
        """Return the origin of the vectors of a kind, which the table stores."""
        section = self.template.sections[kind]
        return Origin(*self.names, {kind: section}, self.pooling, hash_of(self.identity, section))


def open_encoder(config: EmbeddingJob, base: BaseModelFiles, template: Template, world: World) -> EncoderSetup:
    """Load the model with its adapter onto this rank's device, and set the pooling. Collective.

    Raises:
        UserError: the weights cannot be read, the adapter is for another model, or there are no pairs to learn a query
            on.
    """
    settings, adapter = config.embed, config.model.adapter
    precision = config.model.precision
    bf16 = world.device.type == "cuda" if precision == "auto" else precision == "bfloat16"
    model = base.load(bf16=bf16, attention=config.model.attention)
    # Everything that changes a vector is part of the hash, so that only comparable vectors are kept in a table.
    parts = [base.fingerprint, hash_of(base.tokenizer.backend_tokenizer.to_str()), str(bf16), str(settings.length)]
    # Tables from before this part existed have other vectors for texts that spell a control token.
    parts.append("texts without control tokens")
    if adapter:
        if base.takes_pictures:
            raise UserError(f"model.adapter = {adapter!r}: a model of the Qwen2-VL family takes none; leave it empty")
        model = load_adapter(base, model, Path(adapter))
        files = ("adapter_config.json", "adapter_model.safetensors")
        parts += [_hash_file(Path(adapter) / name) for name in files]
    model.to(world.device)
    encoder = Encoder(model, base.tokenizer, world.device, length=settings.length, tokens=settings.tokens)
    if settings.pooling == "query":
        name = hash_of(*parts, *(template.sections[kind] for kind in ("items", "comments")), str(settings.seed))
        query = world.agree(stored_query(config, encoder, template, name) if world.rank == 0 else None)
        assert query is not None
        encoder.pool_with("query", torch.from_numpy(query))
        parts.append(hash_of(query.tobytes()))
    else:
        encoder.pool_with(settings.pooling)
    names = (Path(config.model.path).name, Path(adapter).name)
    return EncoderSetup(encoder, names, hash_of(*parts, settings.pooling), template, settings.pooling)


def stored_query(config: EmbeddingJob, encoder: Encoder, template: Template, name: str) -> np.ndarray:
    """Return the learned query ``[dim]``.

    It is learned once per model and stored beside the tables, so that vectors added later are comparable.
    """
    file = local_path(config.embed.directory) / f"query-{name}.npy"
    if not file.exists():
        logger.info("fitting the query vector")
        query = fit_query(encoder, config.data.path, template, config.embed.seed)
        _write(file, lambda stream: np.save(stream, query))
    return load_array(file, 1)


@dataclass(frozen=True)
class TableUpdate:
    """Planned update of the table of one kind of texts.

    Attributes:
        kind: kind of texts.
        table: directory of the table.
        folder: directory of the parts.
        old: the existing table, if its vectors may be kept.
        kept: ``[m] int64``, rows of the existing table that are kept.
        texts: all texts of the kind.
        new: ``[n] int64``, positions of the texts to encode, the longest first.
        part: number of texts in a part.
        origin: origin of the vectors: model, adapter, template, pooling.
        dtype: type of the stored vectors.
    """

    kind: Kind
    table: Path
    folder: Path
    old: ContentVectors | None
    kept: np.ndarray
    texts: KindTexts
    new: np.ndarray
    part: int
    origin: Origin
    dtype: str

    @property
    def files(self) -> list[Path]:
        """Files of the parts, in order."""
        return [self.folder / f"part-{number:06d}.npz" for number in range(-(-len(self.new) // self.part))]


def plan_update(config: EmbeddingJob, kind: Kind, texts: KindTexts, origin: Origin) -> TableUpdate:
    """Compare the texts with the existing table; the result is the same on all ranks."""
    settings, directory = config.embed, local_path(config.embed.directory)
    table = directory / kind
    old = ContentVectors.open(table) if settings.incremental and (table / MANIFEST).exists() else None
    if old is not None and (old.origin.hash != origin.hash or old.vectors.dtype != settings.dtype):
        # Vectors of another origin or type cannot be mixed with the new ones.
        old = None
    same = np.zeros(len(texts.ids), bool)
    kept = np.empty(0, np.int64)
    if old is not None and len(old):
        rows = old.lookup(texts.ids)
        same = (rows >= 0) & (old.texts[rows] == texts.hashes)
        kept = np.sort(rows[same])
    new = np.flatnonzero(~same)
    # The folder's name identifies the content of its parts, so an interrupted job only resumes from matching parts.
    name = hash_of(
        origin.hash, settings.dtype, str(settings.part), texts.ids[new].tobytes(), texts.hashes[new].tobytes()
    )
    folder = directory / PARTS / f"{kind}-{name}"
    return TableUpdate(kind, table, folder, old, kept, texts, new, settings.part, origin, settings.dtype)


def write_missing_parts(update: TableUpdate, template: Template, encoder: Encoder, world: World) -> None:
    """Encode and write this rank's share of the missing parts; each file is written atomically."""
    # Texts are sorted by length, so dealing out the parts in turn gives the ranks about equal work.
    rank_parts = list(enumerate(update.files))[world.rank :: world.size]
    total = sum(len(update.new[number * update.part : (number + 1) * update.part]) for number, _ in rank_parts)
    with Progress(f"embedding {update.kind}", total, "texts", quiet=world.rank > 0) as progress:
        for number, file in rank_parts:
            rows = update.new[number * update.part : (number + 1) * update.part]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                before = encoder.counts.truncated
                vectors = encoder.vectors(
                    [template.fill(update.kind, text=text) for text in update.texts.texts_at(rows)]
                )
                # A vector may be finite in float32 and overflow in the stored type.
                good = finite_rows(vectors, update.dtype)
                columns = {
                    "ids": update.texts.ids[rows[good]],
                    "texts": update.texts.hashes[rows[good]],
                    "vectors": vectors[good].astype(update.dtype),
                    "truncated": np.array(encoder.counts.truncated - before),
                }
                _write(file, partial(np.savez, **columns))
            progress.advance(len(rows))


def merge_parts(update: TableUpdate, dim: int, segments: DatasetSegments | None = None) -> dict[str, int]:
    """Replace the table by the kept vectors and those of the parts, and remove the parts. Returns its counts.

    Args:
        update: the update, all of whose parts are written.
        dim: number of elements of a vector.
        segments: segments of the texts, whose hash the table gets; None for other texts, or if they are not known.

    Raises:
        UserError: no vector is finite.
    """
    folder = update.folder.parent
    unchanged = update.old is not None and not len(update.new) and len(update.kept) == len(update.old)
    if unchanged and update.old is not None and update.old.segments == _hash_segments(segments, update.old.ids):
        logger.info(f"{update.table}: {len(update.old):,} vectors, no text has changed")
        shutil.rmtree(folder, ignore_errors=True)
        return {"vectors": len(update.old), "kept": len(update.kept)}
    old_ids = np.empty(0, np.int64) if update.old is None else update.old.ids[update.kept]
    old_texts = np.empty(0, np.uint64) if update.old is None else update.old.texts[update.kept]
    ids, texts, truncated = [old_ids], [old_texts], 0
    for file in update.files:
        part = load_arrays(file)
        ids.append(part["ids"])
        texts.append(part["texts"])
        truncated += int(part["truncated"])
    made = sum(map(len, ids[1:]))
    refused = len(update.new) - made
    if refused and not made and not len(update.kept):
        raise UserError(
            f"{update.table}: none of {refused:,} vectors is finite in {update.dtype}; try another model.precision or "
            "embed.dtype"
        )
    counts = {
        "kept": len(update.kept),
        "embedded": made,
        "refused": refused,
        "truncated": truncated,
        "empty": update.texts.empty,
    }
    table_ids = np.concatenate(ids)
    table = write_parts(
        update.table,
        table_ids,
        np.concatenate(texts),
        _all_parts(update),
        dim,
        origin=replace(update.origin, counts=counts),
        dtype=update.dtype,
        segments=_hash_segments(segments, np.sort(table_ids)),
    )
    shutil.rmtree(folder, ignore_errors=True)
    summary = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    logger.info(f"{update.table}: {len(table):,} vectors of dimension {table.dim} ({summary})")
    return {"vectors": len(table), **counts}


def _hash_segments(segments: DatasetSegments | None, ids: np.ndarray) -> str:
    """Return the hash of the segments of sorted ids; empty if they are not known."""
    return "" if segments is None else segments.hash(segments.rows_of(ids))


def _all_parts(update: TableUpdate) -> Iterator[VectorPart]:
    if update.old is not None:
        yield from update.old.parts(update.kept)
    for file in update.files:
        part = load_arrays(file)
        yield part["ids"], part["vectors"]


def _write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: under a temporary name, synced, then renamed."""
    tmp_path = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with open(tmp_path, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(tmp_path, file)
    except OSError as error:
        tmp_path.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written ({one_line(error)})") from None


def _hash_file(file: Path) -> str:
    """Return the hash of a file's content as :func:`hash_of` does, without reading it whole."""
    digest = hashlib.blake2b(digest_size=8)
    with open_regular(file) as opened:
        digest.update(os.fstat(opened.fileno()).st_size.to_bytes(8, "little"))
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(*parts: str | bytes) -> str:
    """Return one hash of several texts or bytes, each with its length."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part if isinstance(part, bytes) else part.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
