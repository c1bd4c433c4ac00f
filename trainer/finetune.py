"""Fine-tune a language model with LoRA under DeepSpeed. One process of it runs on every rank.

limelight finetune configs/finetune_small.toml --ranks 2
torchrun --nproc-per-node 2 -m trainer.finetune configs/finetune_small.toml train.epochs=2

The same command again goes on where the last one stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.manifest import DatasetEntry, file_entry
from trainer.checkpoint.run_directory import make_directory, write_json
from trainer.config.deepspeed import LANGUAGE_MODEL, complete_settings
from trainer.config.finetune import FinetuneConfig, load_finetune
from trainer.config.ranker import load_deepspeed
from trainer.console.errors import UserError
from trainer.console.job_arguments import add_train_arguments, rank_parser
from trainer.console.run_log import open_log, say, set_step
from trainer.llm.finetuning.adapter_engine import AdapterEngine, in_shares
from trainer.llm.finetuning.checkpoints import AdapterCheckpoints, Identity
from trainer.llm.finetuning.option_evaluation import Options, evaluate, report_table
from trainer.llm.finetuning.packing import Schedule
from trainer.llm.finetuning.samples import ReadCounts, Sample, read_samples
from trainer.llm.finetuning.token_files import Tokens, write_tokens
from trainer.llm.finetuning.train_loop import train
from trainer.llm.finetuning.training_state import TrainingState
from trainer.llm.models.adapter import save_adapter
from trainer.llm.models.base_model import Base, add_adapter
from trainer.llm.models.small_model import write_small_model
from trainer.llm.run import base_path, begin_run, choose_directory
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.preemption import Preemption, until_preempted
from trainer.runtime.rng_state import start_random_states
from trainer.runtime.run_lock import locked

_WORDS_FROM = 100_000
"""Samples that the small model's tokenizer is trained on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.finetune``."""
    parser = rank_parser("trainer.finetune", "Fine-tune a language model; one process per rank.")
    add_train_arguments(parser)
    given = parser.parse_args(arguments)

    def job() -> None:
        config = load_finetune(given.config, given.overrides)
        with World.join(config.train.device) as world:
            run_job(config, world, Preemption())

    return run_rank(lambda: until_preempted(job))


def run_job(config: FinetuneConfig, world: World, preemption: Preemption) -> dict[str, Any]:
    """Train an adapter, evaluate it, and write the run. Returns the content of ``metrics.json``."""
    directory = Path(world.agree(str(choose_directory(config))))
    settings = deepspeed_settings(config, world)
    held_out = list(read_samples(config.data.evaluate, ReadCounts()))
    if world.rank == 0:
        make_directory(directory)
    world.barrier()
    with locked(directory) if world.rank == 0 else nullcontext():
        if world.rank == 0:
            begin_run(directory, config, world.size)
        world.barrier()
        open_log(directory / "logs", world.rank)
        base = prepare_base(config, directory, world)
        options = Options.of(held_out, base.tokenizer, config.data.length) if held_out else None
        tokens, samples = prepare_tokens(config, base, directory, world)

        start_random_states(config.run.seed, 0, 0)
        model = add_adapter(load_base(config, base, settings), config.lora, base_path(config, directory))
        engine = AdapterEngine(
            model,
            config.optimizer,
            settings,
            device=world.device,
            checkpointing=config.model.gradient_checkpointing,
        )
        schedule = Schedule.of(
            tokens.lengths,
            config.data.length,
            seed=config.run.seed,
            epochs=config.train.epochs,
            batch_size=config.train.batch_size,
            packing=config.data.packing,
        )
        state = TrainingState(schedule.steps, sum(map(len, schedule.epochs)))
        identity = Identity(config, base.fingerprint, samples)
        checkpoints = AdapterCheckpoints(directory / "checkpoints", identity, world)
        checkpoints.restore(engine, state)
        set_step(state.step)
        if not state.finished:
            train(engine, tokens, schedule, state, checkpoints, config=config, world=world, preemption=preemption)

        report: dict[str, Any] = {}
        if options is not None:
            rows = settings["train_micro_batch_size_per_gpu"]
            report = evaluate(
                engine,
                model,
                options,
                tokens.counts.answers,
                length=config.data.length,
                rows=rows,
                world=world,
            )
            say(report_table(report))
        values = engine.adapter()
        document = metrics_document(config, base, engine, tokens, state, report, checkpoints.stalls)
        if world.rank == 0:
            record = {key: document[key] for key in ("base", "length", "tasks")}
            save_adapter(model, values, directory / "adapter", record)
            # Last: what has a metrics.json is not done again.
            write_json(directory / "metrics.json", document)
        checkpoints.close()
        engine.close()
    say(f"\nrun: {directory}")
    return document


def deepspeed_settings(config: FinetuneConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's settings, checked, with the batch sizes filled in.

    Raises:
        UserError: the batch cannot be divided by ranks and micro-batches, or a setting that is not supported.
    """
    rows, rest = divmod(config.train.batch_size, world.size)
    if rest:
        raise UserError(f"train.batch_size = {config.train.batch_size} is not a multiple of the {world.size} ranks")
    given = load_deepspeed(config.train.deepspeed)
    return complete_settings({"zero_optimization": {"stage": 2}, **given}, rows, world.size, LANGUAGE_MODEL)


def prepare_base(config: FinetuneConfig, directory: Path, world: World) -> Base:
    """The model that is adapted; the small one is made by the first rank, once in a run."""
    if not config.model.path and world.rank == 0:
        samples = itertools.islice(read_samples(config.data.train, ReadCounts()), _WORDS_FROM)
        texts = (sample.prompt + sample.answer for sample in samples)
        write_small_model(directory / "base", texts, config.small, seed=config.run.seed, length=config.data.length)
    elif world.rank == 0:
        # One rank downloads what is not here yet.
        Base.open(config.model.path, config.model.tokenizer)
    world.barrier()
    base = Base.open(base_path(config, directory), config.model.tokenizer)
    if config.data.length > base.config.max_position_embeddings:
        raise UserError(
            f"data.length = {config.data.length}: the model takes {base.config.max_position_embeddings} tokens at most"
        )
    return base


def prepare_tokens(config: FinetuneConfig, base: Base, directory: Path, world: World) -> tuple[Tokens, DatasetEntry]:
    """The samples as tokens, and what they are known by; the first rank makes them, once in a run."""
    home = directory / "tokens"
    if world.rank == 0 and not home.exists():
        aside = home.with_name(".tokens.partial")
        shutil.rmtree(aside, ignore_errors=True)
        read = ReadCounts()
        counts = write_tokens(all_samples(config, read), base.tokenizer, config.data.length, aside)
        write_json(aside / "sources.json", sources(config))
        aside.rename(home)
        say(
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

    The manifest of ``limelight instructions`` has the templates and the edges of the staytime ranges.
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


def load_base(config: FinetuneConfig, base: Base, settings: dict[str, Any]) -> Any:
    """The model with its weights, in the precision of DeepSpeed's settings."""
    with in_shares(settings):
        return base.load(bf16=settings.get("bf16", {}).get("enabled", False), attention=config.model.attention)


def metrics_document(
    config: FinetuneConfig,
    base: Base,
    engine: AdapterEngine,
    tokens: Tokens,
    state: TrainingState,
    report: dict[str, Any],
    stalls: Sequence[float],
) -> dict[str, Any]:
    """The content of ``metrics.json``; ``stalls`` are of the last start of the job."""
    counts, (kind, optimizer) = tokens.counts, engine.names
    seconds = sum(entry["seconds"] for entry in state.trace)
    total = sum(entry["tokens"] for entry in state.trace)
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
            "loss": [entry["loss"] for entry in state.trace],
            "tokens_per_second": total / seconds,
            "padding_share": 1 - total / sum(entry["tokens"] / (1 - entry["padding_share"]) for entry in state.trace),
            "checkpoint_stalls_seconds": list(stalls),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
