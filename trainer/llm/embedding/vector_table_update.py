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
from trainer.console.progress import Progress
from trainer.data.format.content_vectors import MANIFEST, ContentVectors, Origin, VectorPart, finite_rows, write_parts
from trainer.llm.embedding.dataset_texts import KindTexts
from trainer.llm.embedding.learned_query import fit_query
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.models.adapter import load_adapter
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

PARTS = ".parts"
"""Folder of the parts of a table that is not whole yet, beside the tables."""


@dataclass(frozen=True)
class Reader:
    """What reads the texts.

    Attributes:
        encoder: the model.
        names: of model and adapter.
        identity: a hash of both and of how they are used.
        template: of the texts.
        pooling: of the tokens' states.
    """

    encoder: Encoder
    names: tuple[str, str]
    identity: str
    template: Template
    pooling: str

    def origin(self, kind: Kind) -> Origin:
        """What makes the vectors of a kind."""
        section = self.template.sections[kind]
        return Origin(*self.names, {kind: section}, self.pooling, _hash(self.identity, section))


def open_reader(config: EmbeddingJob, base: BaseModelFiles, template: Template, world: World) -> Reader:
    """Load the model with its adapter onto this rank's device. Collective.

    Raises:
        UserError: the weights cannot be read, or the adapter is for another model.
    """
    settings, adapter = config.embed, config.model.adapter
    precision = config.model.precision
    bf16 = world.device.type == "cuda" if precision == "auto" else precision == "bfloat16"
    model = base.load(bf16=bf16, attention=config.model.attention)
    parts = [base.fingerprint, _hash(base.tokenizer.backend_tokenizer.to_str()), str(bf16), str(settings.length)]
    if adapter:
        model = load_adapter(base, model, Path(adapter))
        files = ("adapter_config.json", "adapter_model.safetensors")
        parts += [_hash((Path(adapter) / name).read_bytes()) for name in files]
    model.to(world.device)
    encoder = Encoder(model, base.tokenizer, world.device, length=settings.length, tokens=settings.tokens)
    if settings.pooling == "query":
        name = _hash(*parts, *(template.sections[kind] for kind in ("items", "comments")), str(settings.seed))
        query = world.agree(stored_query(config, encoder, template, name) if world.rank == 0 else None)
        assert query is not None
        encoder.pool_with("query", torch.from_numpy(query))
        parts.append(_hash(query.tobytes()))
    else:
        encoder.pool_with(settings.pooling)
    names = (Path(config.model.path).name, Path(adapter).name)
    return Reader(encoder, names, _hash(*parts, settings.pooling), template, settings.pooling)


def stored_query(config: EmbeddingJob, encoder: Encoder, template: Template, name: str) -> np.ndarray:
    """The learnt query ``[dim]``: learnt once for a model and kept beside the tables, so that they can grow."""
    file = Path(config.embed.directory) / f"query-{name}.npy"
    if not file.exists():
        logger.info("learning the query")
        query = fit_query(encoder, config.data.path, template, config.embed.seed)
        _write(file, lambda stream: np.save(stream, query))
    stored: np.ndarray = np.load(file, allow_pickle=False)
    return stored


@dataclass(frozen=True)
class Plan:
    """What is to be done for a kind of texts.

    Attributes:
        kind: of texts.
        table: directory of the table.
        folder: of the parts.
        old: the table that is there, if its vectors may be kept.
        kept: ``[m] int64``, its rows that stay.
        texts: all of them.
        new: ``[n] int64``, positions of the texts that get vectors now, the longest first.
        part: so many of them are written together.
        origin: what makes the vectors.
        dtype: in which they are stored.
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
        """One a part."""
        return [self.folder / f"part-{number:06d}.npz" for number in range(-(-len(self.new) // self.part))]


def make_plan(config: EmbeddingJob, kind: Kind, texts: KindTexts, origin: Origin) -> Plan:
    """Compare the texts with the table that is there; on all ranks alike."""
    settings, directory = config.embed, Path(config.embed.directory)
    table = directory / kind
    old = ContentVectors.open(table) if settings.incremental and (table / MANIFEST).exists() else None
    if old is not None and (old.origin.hash != origin.hash or old.vectors.dtype != settings.dtype):
        old = None
    same = np.zeros(len(texts.ids), bool)
    kept = np.empty(0, np.int64)
    if old is not None and len(old):
        rows = old.lookup(texts.ids)
        same = (rows >= 0) & (old.texts[rows] == texts.hashes)
        kept = np.sort(rows[same])
    new = np.flatnonzero(~same)
    name = _hash(origin.hash, settings.dtype, str(settings.part), texts.ids[new].tobytes(), texts.hashes[new].tobytes())
    folder = directory / PARTS / f"{kind}-{name}"
    return Plan(kind, table, folder, old, kept, texts, new, settings.part, origin, settings.dtype)


def write_missing_parts(plan: Plan, template: Template, encoder: Encoder, world: World) -> None:
    """Write this rank's share of the parts that are not there yet; each is whole or not there."""
    mine = list(enumerate(plan.files))[world.rank :: world.size]
    total = sum(len(plan.new[number * plan.part : (number + 1) * plan.part]) for number, _ in mine)
    with Progress(f"embedding {plan.kind}", total, "texts", quiet=world.rank > 0) as progress:
        for number, file in mine:
            rows = plan.new[number * plan.part : (number + 1) * plan.part]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                before = encoder.counts.truncated
                vectors = encoder.vectors([template.fill(plan.kind, text=text) for text in plan.texts.of(rows)])
                good = finite_rows(vectors, plan.dtype)
                columns = {
                    "ids": plan.texts.ids[rows[good]],
                    "texts": plan.texts.hashes[rows[good]],
                    "vectors": vectors[good].astype(plan.dtype),
                    "truncated": np.array(encoder.counts.truncated - before),
                }
                _write(file, partial(np.savez, **columns))
            progress.advance(len(rows))


def merge(plan: Plan, dim: int) -> None:
    """Replace the table by the vectors that stay and those of the parts, and remove the parts.

    Raises:
        UserError: there is not one finite vector.
    """
    folder = plan.folder.parent
    if plan.old is not None and not len(plan.new) and len(plan.kept) == len(plan.old):
        logger.info(f"{plan.table}: {len(plan.old):,} vectors, nothing has changed")
        shutil.rmtree(folder, ignore_errors=True)
        return
    old_ids = np.empty(0, np.int64) if plan.old is None else plan.old.ids[plan.kept]
    old_texts = np.empty(0, np.uint64) if plan.old is None else plan.old.texts[plan.kept]
    ids, texts, truncated = [old_ids], [old_texts], 0
    for file in plan.files:
        with np.load(file) as part:
            ids.append(part["ids"])
            texts.append(part["texts"])
            truncated += int(part["truncated"])
    made = sum(map(len, ids[1:]))
    refused = len(plan.new) - made
    if refused and not made and not len(plan.kept):
        raise UserError(
            f"{plan.table}: none of {refused:,} vectors is finite in {plan.dtype}; try another model.precision or "
            "embed.dtype"
        )
    counts = {
        "kept": len(plan.kept),
        "embedded": made,
        "refused": refused,
        "truncated": truncated,
        "empty": plan.texts.empty,
    }
    table = write_parts(
        plan.table,
        np.concatenate(ids),
        np.concatenate(texts),
        _all_parts(plan),
        dim,
        origin=replace(plan.origin, counts=counts),
        dtype=plan.dtype,
    )
    shutil.rmtree(folder, ignore_errors=True)
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    logger.info(f"{plan.table}: {len(table):,} vectors of {table.dim} ({told})")


def _all_parts(plan: Plan) -> Iterator[VectorPart]:
    if plan.old is not None:
        yield from plan.old.parts(plan.kept)
    for file in plan.files:
        with np.load(file) as part:
            yield part["ids"], part["vectors"]


def _write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside and rename it, so that it is whole or not there."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written ({one_line(error)})") from None


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part if isinstance(part, bytes) else part.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
