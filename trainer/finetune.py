"""Fine-tune a language model with LoRA under DeepSpeed. One process runs on every rank.

limelight finetune configs/finetune_small.toml --ranks 2
torchrun --nproc-per-node 2 -m trainer.finetune configs/finetune_small.toml train.epochs=2

The same command again resumes where the last one stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_directory import begin_run, choose_directory, run_directory
from trainer.checkpoint.step_checkpoints import StepState
from trainer.checkpoint.tracked_metrics import mlflow_target, write_metrics
from trainer.config.finetune import FinetuneConfig, load_finetune
from trainer.config.paths import absolute_paths
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.run_log import open_log, set_step
from trainer.llm.finetuning.adapter_card import training_sections
from trainer.llm.finetuning.attention_choice import settled_attention
from trainer.llm.finetuning.checkpoints import AdapterCheckpoints
from trainer.llm.finetuning.option_evaluation import CalibrationOptions, Options, evaluate, report_table
from trainer.llm.finetuning.packed_attention import describe_attention
from trainer.llm.finetuning.prepare import (
    deepspeed_settings,
    make_schedule,
    metrics_document,
    prepare_base,
    prepare_tokens,
    start_engine,
)
from trainer.llm.finetuning.samples import ReadCounts, read_samples
from trainer.llm.finetuning.train_loop import train
from trainer.llm.finetuning.training_state import LossWindow
from trainer.llm.models.adapter import save_adapter
from trainer.runtime.determinism import use_deterministic_kernels
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.preemption import Preemption, until_preempted
from trainer.runtime.stored_files import read_json_object

logger = logging.getLogger("trainer.finetune")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.finetune``."""
    options = parse_rank_arguments(
        "trainer.finetune", "Fine-tune a language model; one process per rank.", TRAIN_ARGUMENTS, arguments
    )

    def job() -> None:
        config = load_finetune(options.config, options.overrides)
        if config.train.deterministic:
            use_deterministic_kernels()
        with World.join(config.train.device, bind_cores=config.train.bind_cores) as world:
            run_job(config, world, Preemption())

    return run_rank(lambda: until_preempted(job))


def run_job(config: FinetuneConfig, world: World, preemption: Preemption) -> dict[str, Any]:
    """Train an adapter, evaluate it, and write the run. Returns the content of ``metrics.json``."""
    directory = Path(world.agree(str(choose_directory(config))))
    # The run, its checkpoints and its adapter mean the same in every directory; messages up to here are as typed.
    config = settled_attention(absolute_paths(config), directory, world)
    settings = deepspeed_settings(config, world.size)
    held_out, tuning = (list(read_samples(files, ReadCounts())) for files in (config.data.evaluate, config.data.tune))
    with run_directory(directory, world, job="finetune", mlflow=mlflow_target(config, directory)):
        if world.rank == 0:
            begin_run(directory, config, world.size)
        world.barrier()
        open_log(directory / "logs", world.rank)
        base = prepare_base(config, directory, world)
        length = config.data.length
        options = Options.of(held_out, base.tokenizer, length) if held_out else None
        calibration = CalibrationOptions.of(tuning, held_out, base.tokenizer, length) if tuning else None
        tokens, samples = prepare_tokens(config, base, directory, world)
        model, engine = start_engine(config, base, settings, directory, world.device)
        schedule = make_schedule(config, tokens)
        logger.info(describe_attention(config.model.attention, schedule.epochs[0], tokens.lengths))
        state = StepState(schedule.steps, sum(map(len, schedule.epochs)), LossWindow())
        checkpoints = AdapterCheckpoints(directory / "checkpoints", config, base.fingerprint, samples, world)
        checkpoints.restore(engine, state)
        set_step(state.step)
        if not state.finished:
            train(engine, tokens, schedule, state, checkpoints, config=config, world=world, preemption=preemption)

        report: dict[str, Any] = {}
        if options is not None:
            report = evaluate(
                engine,
                model,
                options,
                tokens.counts.answers,
                length=length,
                rows=settings["train_micro_batch_size_per_gpu"],
                world=world,
                calibration=calibration,
            )
            logger.info(report_table(report))
        # Collective under ZeRO 3, hence before the branch on the rank.
        values = engine.adapter()
        document = metrics_document(config, base, engine, tokens, state, report, checkpoints.stalls)
        if world.rank == 0:
            record = {key: document[key] for key in ("base", "length", "tasks")}
            sections = training_sections(config, document, read_json_object(directory / "tokens" / "sources.json"))
            save_adapter(model, values, directory / "adapter", record, sections)
            write_metrics(directory, document, state.step)
        checkpoints.close()
        engine.close()
    logger.info(f"\nrun: {directory}")
    return document


if __name__ == "__main__":
    sys.exit(main())
