"""Tables and picture of ``benchmarks/quality/larm.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from benchmarks.quality.paired_users import (
    Metric,
    PairedDifference,
    UserMetric,
    on_all_users,
    paired_difference,
    user_rate,
)
from trainer.config.load import parse_time
from trainer.config.ranker import JobConfig
from trainer.console.text_table import text_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.ranking.evaluation import Predictions

FUSED, NO_LOGQ, FEATURES, CONTENT = "fused", "fused, no logQ", "ids and features", "content"
TOWERS: dict[str, list[str]] = {
    FEATURES: ['towers.author="features"'],
    CONTENT: ['towers.author="content"'],
    FUSED: [],
    NO_LOGQ: ["towers.log_q=false"],
}
"""Variant of the two towers -> its settings."""

IDS, RAW, ALIGNED = "ids only", "raw vectors", "aligned vectors"
RAW_CODES, CODES, ONE_LEVEL, CANDIDATE = (
    "codes of raw vectors",
    "codes of aligned vectors",
    "aligned, one level",
    "aligned, candidate only",
)
ALIGNED_NO_LOGQ = "aligned vectors, no logQ"


def _content(table: str) -> list[str]:
    return [
        f"features.content.live.table=vectors:{table}",
        'features.content.live.of="segment"',
        "features.content.live.histories=true",
    ]


RANKERS: dict[str, list[str]] = {
    IDS: [],
    RAW: _content("raw"),
    ALIGNED: _content(FUSED),
    ALIGNED_NO_LOGQ: _content(NO_LOGQ),
    RAW_CODES: ["features.codes.live.file=codes:raw"],
    CODES: [f"features.codes.live.file=codes:{FUSED}"],
    ONE_LEVEL: [f"features.codes.live.file=codes:{FUSED}", "features.codes.live.levels=1"],
    CANDIDATE: [f"features.codes.live.file=codes:{FUSED}", 'features.codes.live.history="none"'],
}
"""Variant of the ranker -> its settings; ``vectors:NAME`` and ``codes:NAME`` stand for files of the benchmark."""

PAIRS = ((ALIGNED, RAW), (ALIGNED, ALIGNED_NO_LOGQ), (CODES, RAW_CODES), (CODES, ONE_LEVEL), (CODES, CANDIDATE))
"""Further comparisons: a variant, and the one that it is compared with."""

ALL, NEW = "all", "new"
QUARTERS = ("rarest quarter", "second quarter", "third quarter", "most frequent quarter")
GROUPS = (ALL, NEW, *QUARTERS)
RECALLS = (1, 10, 50, 100)


@dataclass(frozen=True)
class Scores:
    """Predictions of a ranker on the held-out rows.

    Attributes:
        behaviours: K names.
        user_id, visit_id: ``[n]`` int64.
        probability, label, mask: ``[n, K]`` float32.
        seconds: processor time of training and prediction.
    """

    behaviours: tuple[str, ...]
    user_id: np.ndarray
    visit_id: np.ndarray
    probability: np.ndarray
    label: np.ndarray
    mask: np.ndarray
    seconds: float

    @staticmethod
    def of(found: Predictions, behaviours: Sequence[str], seconds: float) -> Scores:
        """Return the scores of predictions."""
        names = ("user_id", "visit_id", "probability", "label", "mask")
        return Scores(tuple(behaviours), **{name: getattr(found, name).numpy() for name in names}, seconds=seconds)

    def write(self, file: Path) -> None:
        """Write the scores to a file, whole or not at all."""
        partial = file.with_name(f".{file.name}")
        with open(partial, "wb") as stream:
            np.savez(stream, **{**asdict(self), "behaviours": np.array(self.behaviours)})
        partial.rename(file)

    @staticmethod
    def read(file: Path) -> Scores:
        """Read a file of :meth:`write`."""
        with np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
        return Scores(
            **{**columns, "behaviours": tuple(columns["behaviours"].tolist()), "seconds": float(columns["seconds"])}
        )


@dataclass(frozen=True)
class AuthorGroups:
    """Authors by their number of training rows.

    Attributes:
        author: ``[a]`` int64, authors with training rows, ascending.
        quarter: ``[a]`` int64, 0 for the quarter of these authors with the fewest rows, to 3.
    """

    author: np.ndarray
    quarter: np.ndarray

    def of(self, authors: np.ndarray) -> np.ndarray:
        """Return the group of each author ``[n]``: a place in ``GROUPS``."""
        at = np.minimum(np.searchsorted(self.author, authors), len(self.author) - 1)
        known = self.author[at] == authors
        return np.where(known, GROUPS.index(QUARTERS[0]) + self.quarter[at], GROUPS.index(NEW))


def author_groups(world: Path, config: JobConfig) -> AuthorGroups:
    """Count the training rows of the authors, and cut the authors into quarters; equal counts go by the id."""
    spec = DatasetSpec.load(world)
    until = parse_time(config.data.eval_from, spec.timezone, "data.eval_from")
    rows = read_rows(world, spec, columns=["author_id"], emit_until=until)
    author, count = np.unique(rows["author_id"], return_counts=True)
    place = np.empty(len(author), np.int64)
    place[np.argsort(count, kind="stable")] = np.arange(len(author))
    return AuthorGroups(author, place * len(QUARTERS) // len(author))


def author_of_visits(world: Path, visits: np.ndarray) -> np.ndarray:
    """Return the author of each visit ``[n]``."""
    rows = read_rows(world, DatasetSpec.load(world), columns=["visit_id", "author_id"])
    order = np.argsort(rows["visit_id"])
    return rows["author_id"][order[np.searchsorted(rows["visit_id"], visits, sorter=order)]]


def ranking_result(scores: Mapping[str, Sequence[Scores]], groups: AuthorGroups, world: Path) -> dict[str, Any]:
    """Return by behaviour and group: the ranker with ids only, and the differences of the others to it."""
    base = scores[IDS]
    for of_variant in scores.values():
        assert all((one.visit_id == base[0].visit_id).all() for one in of_variant), "all rankers predict the same rows"
    group = groups.of(author_of_visits(world, base[0].visit_id))
    _, user = np.unique(base[0].user_id, return_inverse=True)
    users = int(user.max()) + 1
    result: dict[str, Any] = {}
    for k, behaviour in enumerate(base[0].behaviours):
        for name in GROUPS:
            rows = base[0].mask[:, k] > 0
            if name != ALL:
                rows &= group == GROUPS.index(name)
            metrics = {
                variant: [UserMetric(user[rows], one.probability[rows, k], one.label[rows, k]) for one in of_variant]
                for variant, of_variant in scores.items()
            }
            found = {
                "rows": int(rows.sum()),
                "positives": int(base[0].label[rows, k].sum()),
                **{metric: _compare(metrics, users, metric) for metric in ("auc", "gauc")},
            }
            result.setdefault(behaviour, {})[name] = found
    return result


def _compare(metrics: Mapping[str, Sequence[UserMetric]], users: int, metric: Literal["auc", "gauc"]) -> dict[str, Any]:
    """Return the value with ids only in points, and the differences of the other variants and of the further pairs."""
    values: dict[str, list[Metric]] = {
        variant: [getattr(one, metric) for one in of_variant] for variant, of_variant in metrics.items()
    }
    pairs = [(variant, IDS) for variant in values if variant != IDS]
    pairs += [pair for pair in PAIRS if set(pair) <= set(values)]
    return {
        IDS: float(np.mean([100 * on_all_users(value, users) for value in values[IDS]])),
        "differences": [
            {"variant": variant, "to": to, **asdict(paired_difference(values[to], values[variant], users))}
            for variant, to in pairs
        ],
    }


def retrieval_result(runs: Mapping[str, Sequence[Path]], groups: AuthorGroups) -> dict[str, Any]:
    """Return by group and K: Recall@K of the towers with ids and features, and the differences of the others to it.

    Args:
        runs: variant -> finished runs, one for each seed.
        groups: of the authors.
    """
    tables = {
        variant: [pq.read_table(run / "held_out.parquet") for run in of_variant] for variant, of_variant in runs.items()
    }
    first = tables[FEATURES][0]
    for of_variant in tables.values():
        assert all(one["visit_id"].equals(first["visit_id"]) for one in of_variant), "all towers are asked for the same"
    group = groups.of(first["author_id"].to_numpy())
    _, user = np.unique(first["user_id"].to_numpy(), return_inverse=True)
    users = int(user.max()) + 1
    result: dict[str, Any] = {}
    for name in GROUPS:
        rows = np.ones(len(group), bool) if name == ALL else group == GROUPS.index(name)
        on_air = first["on_air"].to_numpy()[rows]
        result[name] = {"pairs": int(rows.sum()), "on_air": float(on_air.mean()) if len(on_air) else None}
        for k in RECALLS:
            metrics = {
                variant: [user_rate(user[rows], _hits(one, k)[rows]) for one in of_variant]
                for variant, of_variant in tables.items()
            }
            result[name][f"recall@{k}"] = {
                FEATURES: float(np.mean([100 * on_all_users(rate, users) for rate in metrics[FEATURES]])),
                "differences": [
                    {"variant": variant, "to": FEATURES, **asdict(paired_difference(metrics[FEATURES], rates, users))}
                    for variant, rates in metrics.items()
                    if variant != FEATURES
                ],
            }
    return result


def _hits(outcomes: pa.Table, k: int) -> np.ndarray:
    """Return the share of each author among the first k, ``[n]``; authors with equal scores share their places."""
    return np.clip((k - outcomes["larger"].to_numpy()) / outcomes["equal"].to_numpy(), 0, 1)


def cell(difference: Mapping[str, Any] | PairedDifference) -> str:
    """Return a difference and its interval as text."""
    found = difference if isinstance(difference, Mapping) else asdict(difference)
    if found["mean"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def tables(result: Mapping[str, Any]) -> str:
    """Return all tables as text."""
    blocks = []
    retrieval = result["retrieval"]
    for k in RECALLS:
        of_k = {name: retrieval[name][f"recall@{k}"] for name in GROUPS}
        lines = [["pairs", *(f"{retrieval[name]['pairs']:,}" for name in GROUPS)]]
        lines.append([FEATURES, *(f"{of_k[name][FEATURES]:.2f}" for name in GROUPS)])
        lines += _difference_lines([of_k[name]["differences"] for name in GROUPS])
        blocks.append(text_table([f"Recall@{k}, %", *GROUPS], lines))
    for behaviour, of_group in result.get("ranking", {}).items():
        for metric, title in (("auc", "AUC"), ("gauc", "GAUC")):
            lines = [["positives", *(f"{of_group[name]['positives']:,}" for name in GROUPS)]]
            lines.append([IDS, *(f"{of_group[name][metric][IDS]:.2f}" for name in GROUPS)])
            lines += _difference_lines([of_group[name][metric]["differences"] for name in GROUPS])
            blocks.append(text_table([f"{behaviour}, {title}", *GROUPS], lines))
    return "\n\n".join(blocks)


def _difference_lines(of_groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return one line for each comparison, with a cell for each group."""
    return [
        [
            same[0]["variant"] if same[0]["to"] in (IDS, FEATURES) else f"{same[0]['variant']} - {same[0]['to']}",
            *map(cell, same),
        ]
        for same in zip(*of_groups, strict=True)
    ]


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw the differences of click AUC by group, where rankers were trained, and of Recall@10."""
    panels = []
    for behaviour, ranking in list(result.get("ranking", {}).items())[:1]:
        of_groups = [ranking[name]["auc"]["differences"] for name in GROUPS]
        panels.append((f"AUC of {behaviour}, difference to {IDS}, points", IDS, of_groups))
    of_groups = [result["retrieval"][name]["recall@10"]["differences"] for name in GROUPS]
    panels.append((f"Recall@10, difference to {FEATURES}, points", FEATURES, of_groups))
    figure = Figure(figsize=(11, 3.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for panel, (title, to, of_groups) in zip(axes, panels, strict=True):
        variants = [found["variant"] for found in of_groups[0] if found["to"] == to]
        width = 0.8 / len(variants)
        for number, variant in enumerate(variants):
            found = [next(one for one in group if one["variant"] == variant and one["to"] == to) for group in of_groups]
            places = [
                (place, one) for place, one in enumerate(found) if one["mean"] is not None and one["low"] is not None
            ]
            x = [place + (number - len(variants) / 2 + 0.5) * width for place, _ in places]
            mean = np.array([one["mean"] for _, one in places])
            errors = [
                mean - np.array([one["low"] for _, one in places]),
                np.array([one["high"] for _, one in places]) - mean,
            ]
            panel.bar(x, mean, width, label=variant)
            panel.errorbar(x, mean, np.maximum(errors, 0), fmt="none", ecolor="black", elinewidth=0.8)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(GROUPS)), GROUPS)
        panel.set_title(title)
        panel.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=110)
