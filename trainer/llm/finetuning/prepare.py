"""What a fine-tuning job needs before its first step: settings, base model, tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.manifest import DatasetEntry, file_entry
from trainer.checkpoint.run_directory import base_path
from trainer.config.deepspeed import LANGUAGE_MODEL, complete_settings
from trainer.config.finetune import FinetuneConfig
from trainer.config.load import load_deepspeed
from trainer.console.errors import UserError
from trainer.llm.finetuning.adapter_engine import AdapterEngine, partitioned_loading
from trainer.llm.finetuning.samples import ReadCounts, Sample, read_samples
from trainer.llm.finetuning.token_files import Tokens, write_tokens
from trainer.llm.finetuning.training_state import FinetuneState
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.small_model import write_small_model
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json

logger = logging.getLogger(__name__)

_WORDS_FROM = 100_000
"""Samples that the small model's tokenizer is trained on."""


def deepspeed_settings(config: FinetuneConfig, ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings, checked, with the batch sizes filled in.

    Raises:
        UserError: the batch cannot be divided by ranks and micro-batches, or a setting that is not supported.
    """
    rows, rest = divmod(config.train.batch_size, ranks)
    if rest:
        raise UserError(f"train.batch_size = {config.train.batch_size} is not a multiple of the {ranks} ranks")
    given = load_deepspeed(config.train.deepspeed)
    return complete_settings({"zero_optimization": {"stage": 2}, **given}, rows, ranks, LANGUAGE_MODEL)


def prepare_base(config: FinetuneConfig, directory: Path, world: World) -> BaseModelFiles:
    """The model that is adapted; the small one is made by the first rank, once in a run."""
    if not config.model.path and world.rank == 0:
        samples = itertools.islice(read_samples(config.data.train, ReadCounts()), _WORDS_FROM)
        texts = (sample.prompt + sample.answer for sample in samples)
        write_small_model(directory / "base", texts, config.small, seed=config.run.seed, length=config.data.length)
    elif world.rank == 0:
        # One rank downloads what is not here yet.
        BaseModelFiles.open(config.model.path, config.model.tokenizer)
    world.barrier()
    base = BaseModelFiles.open(base_path(config, directory), config.model.tokenizer)
    check_length(config, base)
    return base


def check_length(config: FinetuneConfig, base: BaseModelFiles) -> None:
    """Check that the model takes sequences of the job's length.

    Raises:
        UserError: it takes fewer tokens.
    """
    if config.data.length > base.config.max_position_embeddings:
        raise UserError(
            f"data.length = {config.data.length}: the model takes {base.config.max_position_embeddings} tokens at most"
        )


def prepare_tokens(
    config: FinetuneConfig, base: BaseModelFiles, directory: Path, world: World
) -> tuple[Tokens, DatasetEntry]:
    """The samples as tokens, and what they are known by; the first rank makes them, once in a run."""
    home = directory / "tokens"
    if world.rank == 0 and not home.exists():
        aside = home.with_name(".tokens.partial")
        shutil.rmtree(aside, ignore_errors=True)
        read = ReadCounts()
        counts = write_tokens(all_samples(config, read), base.tokenizer, config.data.length, aside)
        write_json(aside / "sources.json", sources(config))
        aside.rename(home)
        logger.info(
            f"samples: {counts.samples:,} with {counts.tokens:,} tokens, {counts.answer_tokens:,} of them answers; "
            f"{counts.truncated:,} lost the beginning of their prompt, {counts.left_out:,} left out without room for "
            f"one, {read.empty:,} left out without text"
        )
    world.barrier()
    digest = hashlib.sha256()
    for name in ("ids.int32", "starts.npy", "answers.npy"):
        digest.update(str(file_entry(home / name)).encode())
    return Tokens.open(home), DatasetEntry(path=", ".join(config.data.train), fingerprint=digest.hexdigest()[:16])


def sources(config: FinetuneConfig) -> dict[str, Any]:
    """What is known of where the samples come from: size and checksum of each file, and the manifest beside it.

    The manifest of ``limelight data instructions`` has the templates and the edges of the staytime ranges.
    """
    known = {}
    for path in map(Path, (*config.data.train, *config.data.general, *config.data.evaluate)):
        manifest = path.with_name("manifest.json")
        entry = file_entry(path).model_dump()
        known[str(path)] = {**entry, "manifest": json.loads(manifest.read_text()) if manifest.is_file() else None}
    return known


def all_samples(config: FinetuneConfig, counts: ReadCounts) -> Iterator[Sample]:
    """The samples to train on, and behind them so many general ones as the job asks for, as far as there are."""
    yield from read_samples(config.data.train, counts)
    share = config.data.general_share
    wanted = round(counts.samples * share / (1 - share))
    yield from draw(read_samples(config.data.general, ReadCounts()), wanted, config.run.seed)


def draw(samples: Iterable[Sample], number: int, seed: int) -> list[Sample]:
    """``number`` of the samples, all equally likely, without holding more in memory (reservoir sampling)."""
    generator = np.random.default_rng(seed)
    drawn: list[Sample] = []
    for seen, sample in enumerate(samples):
        if seen < number:
            drawn.append(sample)
        elif (place := int(generator.integers(seen + 1))) < number:
            drawn[place] = sample
    return drawn


def load_base(config: FinetuneConfig, base: BaseModelFiles, settings: dict[str, Any]) -> Any:
    """The model with its weights, in the precision of DeepSpeed's settings."""
    with partitioned_loading(settings):
        return base.load(bf16=settings.get("bf16", {}).get("enabled", False), attention=config.model.attention)


def metrics_document(
    config: FinetuneConfig,
    base: BaseModelFiles,
    engine: AdapterEngine,
    tokens: Tokens,
    state: FinetuneState,
    report: dict[str, Any],
    stalls: Sequence[float],
) -> dict[str, Any]:
    """The content of ``metrics.json``; ``stalls`` are of the last start of the job."""
    counts, (kind, optimizer) = tokens.counts, engine.names
    seconds = sum(entry["seconds"] for entry in state.metric_history)
    total = sum(entry["tokens"] for entry in state.metric_history)
    return {
        "tasks": counts.tasks,
        "evaluation": report,
        "base": base.fingerprint,
        "length": config.data.length,
        "engine": {"class": kind, "optimizer": optimizer, "zero_stage": engine.zero_stage},
        "samples": {
            "trained_on": counts.samples,
            "tokens": counts.tokens,
            "answer_tokens": counts.answer_tokens,
            "truncated": counts.truncated,
            "left_out": counts.left_out,
        },
        "training": {
            "steps": state.step,
            "loss": [entry["loss"] for entry in state.metric_history],
            "tokens_per_second": total / seconds,
            "padding_share": 1
            - total / sum(entry["tokens"] / (1 - entry["padding_share"]) for entry in state.metric_history),
            "checkpoint_stalls_seconds": list(stalls),
        },
    }
