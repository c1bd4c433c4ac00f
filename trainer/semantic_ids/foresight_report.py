"""Evaluation of Foresight's predictor beside the rules, on the same held-out rows; the document of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from modules.foresight import ForesightPredictor
from trainer.config.foresight import ForesightConfig
from trainer.console.text_table import text_table
from trainer.data.simulator.segment_truth import nearest_centroid, read_next_topics, reference_accuracy
from trainer.runtime.distributed import World
from trainer.runtime.host_copy import HostCopy, one_behind
from trainer.semantic_ids.foresight_baselines import Baselines, Quality
from trainer.semantic_ids.foresight_data import CodedRows, ForesightBatch, ForesightData
from trainer.semantic_ids.foresight_training import ForesightState

MODEL = "model"

ALL, UNSEEN = "all", "unseen authors"
"""Groups of held-out rows: all, and those of authors without any row of training."""

ROWS_AT_ONCE = 256
"""Rows of which the predictor's probabilities are in memory at a time."""

REFERENCE_DRAWS = 256

Evaluation = dict[str, Any]


def evaluate(predictor: ForesightPredictor, data: ForesightData, config: ForesightConfig, world: World) -> Evaluation:
    """Return the quality of the predictor and of the rules on the held-out rows, each rank measuring a share.

    Returns:
        ``rows`` by group, ``quality`` by group and rule, ``weights`` of the rules, and the ``reference`` of a simulated
        world; nothing without held-out rows. The same on all ranks. Collective.
    """
    if not len(data.held_out):
        return {}
    share = np.array_split(data.held_out, world.size)[world.rank]
    unseen = data.of_unseen_authors(share)
    baselines = Baselines(data.rows, data.training, data.codes, data.truth)
    own = {}
    for group, part in ((ALL, share[~unseen]), (UNSEEN, share[unseen])):
        model = measure(predictor, data, part, config.data.runs, world.device)
        own[group] = {MODEL: model, **baselines.measure(part)}
    # The rows of unseen authors are among all of them.
    for name, quality in own[UNSEEN].items():
        own[ALL][name] += quality
    total = world.agree(_sum(world.gather(own)))
    assert total is not None
    found: Evaluation = {
        "rows": {group: qualities[MODEL].rows for group, qualities in total.items()},
        "quality": {
            group: {name: quality.document() for name, quality in qualities.items()}
            for group, qualities in total.items()
        },
        "weights": {name: list(weights) for name, weights in baselines.weights.items()},
    }
    if config.evaluate.reference_targets and data.truth is None and read_next_topics(config.data.path) is not None:
        found["reference"] = world.on_first_rank(lambda: _reference(data, config))
    return found


@torch.no_grad()
def measure(
    predictor: ForesightPredictor, data: CodedRows, part: np.ndarray, runs: int, device: torch.device
) -> Quality:
    """Return the quality of a predictor on some rows."""
    quality, training = Quality(), predictor.training
    predictor.eval()
    table = predictor.table()

    def copies() -> Iterator[tuple[None, HostCopy]]:
        for begin in range(0, len(part), ROWS_AT_ONCE):
            batch = ForesightBatch.of(data.rows, part[begin : begin + ROWS_AT_ONCE], runs, device)
            log_p = predictor.log_p(batch.code, predictor(batch.code, batch.length, table), table)
            yield None, HostCopy((log_p, batch.target))

    for _, (log_p, target) in one_behind(copies()):
        quality.add(log_p.numpy(), target.numpy())
    predictor.train(training)
    return quality


def report_table(found: Evaluation) -> str:
    """Format an evaluation as tables, one for each group of rows that has any."""
    tables = []
    for group, qualities in found["quality"].items():
        if not found["rows"][group]:
            continue
        lines = [
            [name, f"{quality['top_1']:.4f}", f"{quality['top_10']:.4f}", f"{quality['nll']:.4f}"]
            for name, quality in qualities.items()
        ]
        if group == ALL and "reference" in found:
            lines.append(["knows style and topic", f"{found['reference']['accuracy']:.4f}", "", ""])
        tables.append(f"{group}: {found['rows'][group]:,} rows\n" + text_table(["", "top 1", "top 10", "NLL"], lines))
    return "\n\n".join(tables)


def metrics_document(
    config: ForesightConfig,
    data: ForesightData,
    state: ForesightState,
    evaluation: Evaluation,
    stalls: Sequence[float],
) -> dict[str, Any]:
    """Return the content of ``metrics.json``; ``stalls`` are the seconds of each save since the job's last start."""
    seconds = sum(entry["seconds"] for entry in state.metric_history)
    rows = sum(entry["rows"] for entry in state.metric_history)
    return {
        "codebook": data.version.name,
        "codes": data.codes,
        "target": config.data.target,
        "rows": {
            "training": len(data.training),
            "held_out": len(data.held_out),
            "segments_without_author": data.rows.without_author,
            "short_contexts": {
                "training": data.short_contexts(data.training, config.data.runs),
                "held_out": data.short_contexts(data.held_out, config.data.runs),
            },
        },
        "training": {
            "steps": state.step,
            "loss": [entry["loss"] for entry in state.metric_history],
            "rows_per_second": rows / seconds if seconds else None,
            "checkpoint_stalls_seconds": list(stalls),
        },
        "evaluation": evaluation,
    }


def _sum(parts: Sequence[Mapping[str, Mapping[str, Quality]]] | None) -> dict[str, dict[str, Quality]] | None:
    """Return the sums over the ranks, on the first one."""
    if parts is None:
        return None
    total: dict[str, dict[str, Quality]] = {}
    for part in parts:
        for group, qualities in part.items():
            for name, quality in qualities.items():
                sums = total.setdefault(group, {}).setdefault(name, Quality())
                sums += quality
    return total


def _reference(data: ForesightData, config: ForesightConfig) -> dict[str, Any]:
    times = data.held_out_times
    assert times is not None
    found = reference_accuracy(
        config.data.path,
        nearest_centroid(data.centroids.numpy()),
        from_ms=times.from_ms,
        until_ms=times.until_ms,
        targets=config.evaluate.reference_targets,
        draws=REFERENCE_DRAWS,
        seed=config.run.seed,
    )
    return asdict(found)
