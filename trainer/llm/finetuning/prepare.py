"""Preparation of a fine-tuning job: DeepSpeed settings, base model, tokens; and the document of its results."""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.manifest import DatasetEntry, file_entry
from trainer.checkpoint.run_directory import base_path
from trainer.checkpoint.step_checkpoints import StepState
from trainer.config.deepspeed import LANGUAGE_MODEL, complete_settings
from trainer.config.finetune import FinetuneConfig
from trainer.config.load import load_deepspeed
from trainer.console.errors import UserError
from trainer.llm.finetuning.adapter_engine import AdapterEngine, partitioned_loading
from trainer.llm.finetuning.packed_attention import IMPLEMENTATIONS
from trainer.llm.finetuning.packing import Schedule
from trainer.llm.finetuning.samples import ReadCounts, Sample, read_samples
from trainer.llm.finetuning.token_files import Tokens, write_tokens
from trainer.llm.finetuning.training_state import LossWindow
from trainer.llm.models.base_model import BaseModelFiles, add_adapter
from trainer.llm.models.small_model import write_small_model
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.rng_state import start_random_states
from trainer.runtime.stored_files import read_json_object

logger = logging.getLogger(__name__)

_TOKENIZER_SAMPLES = 100_000
"""Number of samples that the small model's tokenizer is trained on."""


def deepspeed_settings(config: FinetuneConfig, ranks: int) -> dict[str, Any]:
    """Read and check the DeepSpeed settings of a job, and fill in the batch sizes.

    Raises:
        UserError: the batch size is not divisible by ranks and micro-batches, or a setting is not supported.
    """
    rows, rest = divmod(config.train.batch_size, ranks)
    if rest:
        raise UserError(f"train.batch_size = {config.train.batch_size} is not a multiple of the {ranks} ranks")
    file = config.train.deepspeed
    settings = {"zero_optimization": {"stage": 2}, **load_deepspeed(file)}
    return complete_settings(settings, rows, ranks, LANGUAGE_MODEL, file)


def prepare_base(config: FinetuneConfig, directory: Path, world: World) -> BaseModelFiles:
    """Find the base model and check that it fits the job; the first rank creates the small model, once per run."""
    if not config.model.path and world.rank == 0:
        samples = itertools.islice(read_samples(config.data.train, ReadCounts()), _TOKENIZER_SAMPLES)
        texts = (sample.prompt + sample.answer for sample in samples)
        write_small_model(directory / "base", texts, config.small, seed=config.run.seed, length=config.data.length)
    elif world.rank == 0:
        # One rank downloads the model, the others find it in the local cache after the barrier.
        BaseModelFiles.open(config.model.path, config.model.tokenizer)
    world.barrier()
    base = BaseModelFiles.open(base_path(config, directory), config.model.tokenizer)
    check_length(config, base)
    return base


def check_length(config: FinetuneConfig, base: BaseModelFiles) -> None:
    """Check that the model supports sequences of the job's length.

    Raises:
        UserError: the model supports fewer tokens.
    """
    if config.data.length > base.config.max_position_embeddings:
        raise UserError(
            f"data.length = {config.data.length}: the model takes {base.config.max_position_embeddings} tokens at most"
        )


def prepare_tokens(
    config: FinetuneConfig, base: BaseModelFiles, directory: Path, world: World
) -> tuple[Tokens, DatasetEntry]:
    """Return the tokenised samples with their paths and fingerprint; the first rank writes them, once per run."""
    token_dir = directory / "tokens"
    if world.rank == 0 and not token_dir.exists():
        tmp_path = token_dir.with_name(".tokens.partial")
        shutil.rmtree(tmp_path, ignore_errors=True)
        read = ReadCounts()
        counts = write_tokens(all_samples(config, read), base.tokenizer, config.data.length, tmp_path)
        write_json(tmp_path / "sources.json", sources(config))
        tmp_path.rename(token_dir)
        logger.info(
            f"samples: {counts.samples:,} with {counts.tokens:,} tokens, {counts.answer_tokens:,} of them in answers; "
            f"{counts.truncated:,} lost the beginning of their prompt; left out: {counts.left_out:,} without room for "
            f"a prompt, {read.empty:,} with a blank prompt or answer"
        )
    world.barrier()
    digest = hashlib.sha256()
    for name in ("ids.int32", "starts.npy", "answers.npy"):
        digest.update(str(file_entry(token_dir / name)).encode())
    return Tokens.open(token_dir), DatasetEntry(path=", ".join(config.data.train), fingerprint=digest.hexdigest()[:16])


def sources(config: FinetuneConfig) -> dict[str, Any]:
    """Return the provenance of the sample files: size and checksum of each file, and the manifest in its directory.

    The manifest of ``limelight data instructions`` has the templates and the edges of the staytime ranges.
    """
    known = {}
    for path in map(Path, (*config.data.train, *config.data.general, *config.data.tune, *config.data.evaluate)):
        manifest = path.with_name("manifest.json")
        entry = file_entry(path).model_dump()
        known[str(path)] = {**entry, "manifest": read_json_object(manifest) if manifest.is_file() else None}
    return known


def all_samples(config: FinetuneConfig, counts: ReadCounts) -> Iterator[Sample]:
    """Yield the training samples, then general samples up to the share that the job asks for."""
    yield from read_samples(config.data.train, counts)
    share = config.data.general_share
    # A share s of all samples is s / (1 - s) times the number of training samples.
    wanted = round(counts.samples * share / (1 - share))
    yield from draw(read_samples(config.data.general, ReadCounts()), wanted, config.run.seed)


def draw(samples: Iterable[Sample], number: int, seed: int) -> list[Sample]:
    """Draw ``number`` samples uniformly, with at most that many in memory (reservoir sampling)."""
    generator = np.random.default_rng(seed)
    drawn: list[Sample] = []
    for seen, sample in enumerate(samples):
        if seen < number:
            drawn.append(sample)
        elif (place := int(generator.integers(seen + 1))) < number:
            drawn[place] = sample
    return drawn


def start_engine(
    config: FinetuneConfig, base: BaseModelFiles, settings: dict[str, Any], directory: Path, device: torch.device
) -> tuple[Any, AdapterEngine]:
    """Load the base model, add a new adapter, and start the DeepSpeed engine. Collective.

    Args:
        config: the job.
        base: files of the base model.
        settings: DeepSpeed settings from :func:`deepspeed_settings`; they decide the precision of the base model.
        directory: directory of the run.
        device: device of this rank.

    Returns:
        peft's wrapper of the model, and the engine that trains it.

    Raises:
        UserError: the weights cannot be read, or the model does not fit the adapter or the settings.
    """
    # The same seed on every rank, because the adapter's initial values must be the same on all of them.
    start_random_states(config.run.seed, 0, 0)
    attention = IMPLEMENTATIONS[config.model.attention]
    with partitioned_loading(settings):
        model = base.load(bf16=settings.get("bf16", {}).get("enabled", False), attention=attention)
    adapted = add_adapter(model, config.lora, base_path(config, directory))
    engine = AdapterEngine(
        adapted,
        config.optimizer,
        settings,
        device=device,
        checkpointing=config.model.gradient_checkpointing,
        origin=config.train.deepspeed,
    )
    return adapted, engine


def make_schedule(config: FinetuneConfig, tokens: Tokens) -> Schedule:
    """Assign the samples to sequences and steps, for all epochs."""
    return Schedule.of(
        tokens.lengths,
        config.data.length,
        seed=config.run.seed,
        epochs=config.train.epochs,
        batch_size=config.train.batch_size,
        packing=config.data.packing,
    )


def metrics_document(
    config: FinetuneConfig,
    base: BaseModelFiles,
    engine: AdapterEngine,
    tokens: Tokens,
    state: StepState[LossWindow],
    report: dict[str, Any],
    stalls: Sequence[float],
) -> dict[str, Any]:
    """Return the content of ``metrics.json``; ``stalls`` are the seconds of each save since the job's last start."""
    counts, (kind, optimizer) = tokens.counts, engine.names
    seconds = sum(entry["seconds"] for entry in state.metric_history)
    total = sum(entry["tokens"] for entry in state.metric_history)
    return {
        "tasks": counts.tasks,
        "evaluation": report,
        "base": base.fingerprint,
        "length": config.data.length,
        "engine": {"class": kind, "optimizer": optimizer, "zero_stage": engine.zero_stage},
        "parameters": engine.parameters,
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
