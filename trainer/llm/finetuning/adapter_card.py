"""Sections of an adapter's model card about its data, its training and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.finetune import FinetuneConfig
from trainer.llm.finetuning.option_evaluation import report_table


def training_sections(config: FinetuneConfig, metrics: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, str]:
    """Return heading -> Markdown text, for the card that ``save_adapter`` writes.

    Args:
        config: the job.
        metrics: content of ``metrics.json``.
        sources: content of ``tokens/sources.json``: size and checksum of each file of samples.
    """
    samples, training, engine = metrics["samples"], metrics["training"], metrics["engine"]
    files = "\n".join(
        f"| `{path}` | {_role(config, path)} | {entry['bytes']:,} | {entry['crc32']:08x} |"
        for path, entry in sources.items()
    )
    tasks = ", ".join(f"{task} ({count:,})" for task, count in metrics["tasks"].items())
    data = (
        f"{samples['trained_on']:,} samples of a prompt and an answer with {samples['tokens']:,} tokens, "
        f"{samples['answer_tokens']:,} of them in answers. Samples by task: {tasks}. {samples['truncated']:,} samples "
        f"lost the beginning of their prompt, and {samples['left_out']:,} were left out because the answer left no "
        f"room for a prompt.\n\n| file | use | bytes | CRC-32 |\n|---|---|---:|---|\n{files}"
    )
    optimizer, losses = config.optimizer, training["loss"]
    small = (
        ""
        if config.model.path
        else (" The base model is the small one of `[small]`, with random weights: it knows only what it saw here.")
    )
    trained = (
        f"Only the answers have a loss. {training['steps']:,} optimizer steps of {config.train.batch_size} sequences "
        f"of at most {config.data.length} tokens ({'several samples' if config.data.packing else 'one sample'} in a "
        f"sequence), passes over the samples: {config.train.epochs}, with AdamW under DeepSpeed's ZeRO stage "
        f"{engine['zero_stage']}: learning rate {optimizer.learning_rate:g} ({optimizer.decay}, warm-up over "
        f"{optimizer.warmup:.0%} of the steps), weight decay {optimizer.weight_decay:g}, betas {optimizer.betas[0]:g} "
        f"and {optimizer.betas[1]:g}, answers weighted by `{config.train.answer_weight}`, seed {config.run.seed}."
        f"{f' The loss went from {losses[0]:.4f} to {losses[-1]:.4f}.' if losses else ''}{small}"
    )
    sections = {"Data": data, "Training": trained}
    if metrics["evaluation"]:
        calibrated = "; calibrated: the tuned model's scores, corrected on days before" if config.data.tune else ""
        sections["Evaluation"] = (
            "On samples with options of later days: the tuned model, the model without the adapter, and two "
            f"baselines{calibrated}.\n\n```\n{report_table(metrics['evaluation'])}\n```"
        )
    return sections


def _role(config: FinetuneConfig, path: str) -> str:
    """Return what a file of samples was used for."""
    uses = {
        "training": config.data.train,
        "general samples, mixed in": config.data.general,
        "calibration": config.data.tune,
    }
    return next((use for use, files in uses.items() if Path(path) in map(Path, files)), "evaluation")
