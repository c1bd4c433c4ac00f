"""Settings, tables and picture of ``benchmarks/quality/foresight.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import mean_and_half_width
from benchmarks.quality.foresight_world import CEILINGS, FORECAST, LAST
from benchmarks.quality.larm_report import Scores, cell
from benchmarks.quality.paired_users import UserMetric, on_all_users, paired_difference
from trainer.console.text_table import text_table
from trainer.semantic_ids.foresight_baselines import BAYES
from trainer.semantic_ids.foresight_report import MODEL

ALL, SEEN, UNSEEN = "all", "seen authors", "unseen authors"
GROUPS = (ALL, SEEN, UNSEEN)
METRICS = ("top_1", "top_10", "nll")

TOPICS = "true topics"

NO_CONTENT, ENCODER, DECODER, BOTH, VECTOR = "no content", "+ I", "+ D", "+ I and D", "last segment's vector"
RANKERS: dict[str, tuple[str, ...]] = {
    NO_CONTENT: (),
    ENCODER: ("encoder",),
    DECODER: ("decoder",),
    BOTH: ("encoder", "decoder"),
    VECTOR: (VECTOR,),
    **{name: (name,) for name in CEILINGS},
}
"""Variant of the ranker -> its tables of segment vectors: those of the forecasts, the world's own, and ceilings."""

PAIRS = ((BOTH, ENCODER), (BOTH, VECTOR), (BOTH, LAST), (FORECAST, LAST))
"""Further comparisons: a variant, and the one that it is compared with."""


@dataclass(frozen=True)
class Setting:
    """A predictor to train.

    Attributes:
        codes: size of the codebook; 0 for the true topics as codes.
        noise: length of the noise of the segment vectors.
        target: code to foresee, ``next`` or ``change``.
        every_day: train on all days before the border, not on the last ones alone.
        overrides: further settings of the job.
    """

    codes: int
    noise: float
    target: str = "next"
    every_day: bool = False
    overrides: tuple[str, ...] = ()


def make_settings(codes: Sequence[int], noises: Sequence[float], noise: float) -> dict[str, Setting]:
    """Return name -> setting, the usual one first.

    Args:
        codes: sizes of the codebooks; the second one is the usual one, and the third one takes a sampled softmax.
        noises: further noises of the vectors.
        noise: the usual one.
    """
    few, usual, many = codes
    base = f"{usual:,} codes"
    return {
        base: Setting(usual, noise),
        f"{few:,} codes": Setting(few, noise),
        f"{many:,} codes": Setting(many, noise, overrides=("train.sampled_codes=4096",)),
        **{f"{base}, noise {other}": Setting(usual, other) for other in noises},
        TOPICS: Setting(
            0,
            noise,
            every_day=True,
            overrides=("model.dim=32", "data.runs=16", "model.encoded_runs=0", "train.epochs=2"),
        ),
        f"{base}, learnt table": Setting(usual, noise, overrides=('model.table="learnt"',)),
        f"{base}, random table": Setting(usual, noise, overrides=('model.table="random"',)),
        f"{base}, next change": Setting(usual, noise, "change"),
        f"{base}, without copies": Setting(usual, noise, overrides=("model.copy_runs=false",)),
        f"{base}, all days": Setting(usual, noise, every_day=True),
    }


def predictor_result(
    settings: Mapping[str, Setting], rules: Mapping[str, Mapping[str, Any] | None], runs: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Return by setting: the rows, and by group the quality of the predictor, with intervals, and of each rule.

    Args:
        settings: by name.
        rules: by setting, of ``ForesightWork.rules``; settings without them, or without runs, are left out.
        runs: by setting, of ``ForesightWork.predictor``, one for each seed.
    """
    result = {}
    for name, setting in settings.items():
        of_rules = rules[name]
        if not runs[name] or of_rules is None:
            continue
        rows = of_rules["rows"]
        share = rows[SEEN] / rows[ALL]
        of_runs = [_with_all(run["quality"], share) for run in runs[name]]
        quality: dict[str, dict[str, Any]] = {}
        for group in GROUPS:
            quality[group] = {
                MODEL: {
                    metric: mean_and_half_width([of_run[group][metric] for of_run in of_runs]) for metric in METRICS
                }
            }
        for rule in of_rules["quality"][SEEN]:
            one = _with_all({group: of_rules["quality"][group][rule] for group in (SEEN, UNSEEN)}, share)
            for group in GROUPS:
                quality[group][rule] = one[group]
        result[name] = {
            **asdict(setting),
            "rows": rows,
            "training_rows": of_rules["training"],
            "persistence": of_rules["persistence"],
            "reference": of_rules.get("reference"),
            "seeds": len(of_runs),
            "seconds": float(np.mean([run["seconds"] for run in runs[name]])),
            "quality": quality,
            "targets": _targets(quality[ALL], of_rules.get("reference")),
        }
    return result


def _with_all(of_group: Mapping[str, Mapping[str, float | None]], share: float) -> dict[str, Any]:
    """Add the quality on all rows, of which ``share`` are of seen authors."""
    seen, unseen = of_group[SEEN], of_group[UNSEEN]
    mixed = {metric: _mix(seen[metric], unseen[metric], share) for metric in METRICS}
    return {**of_group, ALL: mixed}


def _mix(seen: float | None, unseen: float | None, share: float) -> float | None:
    if share == 1 or unseen is None:
        return seen
    return unseen if share == 0 or seen is None else share * seen + (1 - share) * unseen


def _targets(quality: Mapping[str, Mapping[str, Any]], reference: Mapping[str, float] | None) -> dict[str, Any]:
    """Return the ratios of the predictor's quality on all rows to that of the best rule and to the truth."""
    honest = {rule: value for rule, value in quality.items() if rule not in (MODEL, BAYES)}
    best = max(honest, key=lambda rule: honest[rule]["top_1"])
    top_1, nll = quality[MODEL]["top_1"][0], quality[MODEL]["nll"][0]
    found: dict[str, Any] = {
        "best_rule": best,
        "best_rule_top_1": honest[best]["top_1"],
        "best_rule_nll": min(value["nll"] for value in honest.values()),
        "to_best_rule": top_1 / honest[best]["top_1"] if honest[best]["top_1"] else None,
    }
    if reference is not None:
        found["to_reference"] = top_1 / reference["accuracy"] if reference["accuracy"] else None
    if BAYES in quality:
        found["nll_to_bayes"] = nll / quality[BAYES]["nll"] if quality[BAYES]["nll"] else None
    return found


def ranker_result(scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Return by behaviour and metric: the ranker without content, and the differences of the others, in points."""
    base = scores[NO_CONTENT]
    for of_variant in scores.values():
        assert all((one.visit_id == base[0].visit_id).all() for one in of_variant), "all rankers predict the same rows"
    _, user = np.unique(base[0].user_id, return_inverse=True)
    users = int(user.max()) + 1
    pairs = [(variant, NO_CONTENT) for variant in scores if variant != NO_CONTENT]
    pairs += [pair for pair in PAIRS if set(pair) <= set(scores)]
    result: dict[str, Any] = {}
    for k, behaviour in enumerate(base[0].behaviours):
        rows = base[0].mask[:, k] > 0
        measured = {
            variant: [UserMetric(user[rows], one.probability[rows, k], one.label[rows, k]) for one in of_variant]
            for variant, of_variant in scores.items()
        }
        found: dict[str, Any] = {"rows": int(rows.sum()), "positives": int(base[0].label[rows, k].sum())}
        names: tuple[Literal["auc", "gauc"], ...] = ("auc", "gauc")
        for metric in names:
            values = {variant: [getattr(one, metric) for one in ones] for variant, ones in measured.items()}
            found[metric] = {
                NO_CONTENT: float(np.mean([100 * on_all_users(value, users) for value in values[NO_CONTENT]])),
                "differences": [
                    {"variant": variant, "to": to, **asdict(paired_difference(values[to], values[variant], users))}
                    for variant, to in pairs
                ],
            }
        result[behaviour] = found
    return result


def tables(result: Mapping[str, Any]) -> str:
    """Return all tables as text."""
    blocks = []
    for name, found in result["predictor"].items():
        header = [name, *(f"{metric}, {group}" for group in GROUPS for metric in METRICS)]
        lines = [
            [rule, *(_number(found["quality"][group][rule][metric]) for group in GROUPS for metric in METRICS)]
            for rule in found["quality"][ALL]
        ]
        if found["reference"]:
            lines.append(["knows style and topic", f"{found['reference']['accuracy']:.4f}", *[""] * 8])
        ratios = ", ".join(f"{key} {_number(value)}" for key, value in found["targets"].items())
        blocks.append(f"{text_table(header, lines)}\n{ratios}; {found['seconds']:.0f} s")
    for behaviour, found in result.get("ranker", {}).items():
        lines = [[NO_CONTENT, *(f"{found[metric][NO_CONTENT]:.2f}" for metric in ("auc", "gauc"))]]
        for auc, gauc in zip(found["auc"]["differences"], found["gauc"]["differences"], strict=True):
            title = auc["variant"] if auc["to"] == NO_CONTENT else f"{auc['variant']} - {auc['to']}"
            lines.append([title, cell(auc), cell(gauc)])
        blocks.append(text_table([f"{behaviour}, {found['positives']:,} positives", "AUC", "GAUC"], lines))
    return "\n\n".join(blocks)


def _number(value: Any) -> str:
    """Return a figure, or a mean with half the width of its interval."""
    if isinstance(value, list):
        mean, half = value
        return "-" if mean is None else f"{mean:.4f}" + ("" if half is None else f" ±{half:.4f}")
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw top 1 of the predictors, the best rules and the truth, and the differences of click AUC and GAUC."""
    figure = Figure(figsize=(11, 8 if "ranker" in result else 4.5), layout="constrained")
    if "ranker" in result:
        upper, lower = figure.subplots(2, 1)
        _draw_rankers(lower, result["ranker"])
    else:
        upper = figure.subplots()
    _draw_predictors(upper, result["predictor"])
    figure.savefig(file, dpi=110)


def _draw_predictors(panel: Axes, predictors: Mapping[str, Any]) -> None:
    shown = {name: found for name, found in predictors.items() if found["reference"]}
    place = np.arange(len(shown))
    bars: list[tuple[str, list[float], list[float] | None]] = [
        (
            "best rule",
            [found["quality"][ALL][found["targets"]["best_rule"]]["top_1"] for found in shown.values()],
            None,
        ),
        (
            "predictor",
            [found["quality"][ALL][MODEL]["top_1"][0] for found in shown.values()],
            [found["quality"][ALL][MODEL]["top_1"][1] or 0.0 for found in shown.values()],
        ),
        ("knows style and topic", [found["reference"]["accuracy"] for found in shown.values()], None),
    ]
    for number, (label, values, errors) in enumerate(bars):
        panel.bar(place + 0.27 * (number - 1), values, 0.27, yerr=errors, label=label)
    panel.set_xticks(place, [name.replace(", ", "\n") for name in shown], fontsize="small")
    panel.set_title("Share of the rows whose next code is foreseen (top 1)")
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _draw_rankers(panel: Axes, ranker: Mapping[str, Any]) -> None:
    first = next(iter(ranker.values()))["auc"]["differences"]
    variants = [one["variant"] for one in first if one["to"] == NO_CONTENT]
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        ones = [
            next(one for one in found["auc"]["differences"] if (one["variant"], one["to"]) == (variant, NO_CONTENT))
            for found in ranker.values()
        ]
        known = [(place, one) for place, one in enumerate(ones) if one["mean"] is not None and one["low"] is not None]
        x = [place + (number - len(variants) / 2 + 0.5) * width for place, _ in known]
        mean = np.array([one["mean"] for _, one in known])
        errors = [
            mean - np.array([one["low"] for _, one in known]),
            np.array([one["high"] for _, one in known]) - mean,
        ]
        panel.bar(x, mean, width, label=variant)
        panel.errorbar(x, mean, np.maximum(errors, 0), fmt="none", ecolor="black", elinewidth=0.8)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(ranker)), list(ranker))
    panel.set_title(f"AUC of the ranker, difference to {NO_CONTENT}, points")
    # Beside the bars: they leave no corner free.
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
