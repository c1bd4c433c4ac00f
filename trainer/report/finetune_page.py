"""The page about a fine-tuning run: choices among options beside the baselines, loss, tokens, trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.report.charts import Point, Series, dot_chart, precise
from trainer.report.history_charts import history_chart, loss_chart, stalls_text
from trainer.report.page_parts import JobPage, ReportSection, ReportTable, drawn, values_table
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, share_of, whole

MODELS = {
    "model": "tuned",
    "calibrated": "tuned, calibrated",
    "untuned": "untuned",
    "majority": "majority",
    "popularity": "popularity",
}
"""Key of ``metrics.json`` -> name in the page."""

LOST = 0.05
"""Share of the samples that are truncated or left out above which there is a warning."""

_Z = 1.96


def finetune_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about a fine-tuning run."""
    document = run.models[0].document
    samples, training = mapping(document.get("samples")), mapping(document.get("training"))
    parameters = mapping(document.get("parameters"))
    share = share_of(parameters.get("trainable"), parameters.get("all"))
    padding = number(training.get("padding_share"))
    tiles = [
        ("tokens per second", precise(rate) if (rate := number(training.get("tokens_per_second"))) else ""),
        ("samples", whole(samples.get("trained_on"))),
        ("tokens of samples", whole(samples.get("tokens"))),
        ("tokens of answers", whole(samples.get("answer_tokens"))),
        ("trainable parameters", whole(parameters.get("trainable"))),
        ("of all parameters", "" if share is None else f"{100 * share:.2f} %"),
        ("padding", "" if padding is None else f"{100 * padding:.1f} %"),
        ("ZeRO stage", whole(mapping(document.get("engine")).get("zero_stage"))),
    ]
    charts = [
        *loss_chart(run, "Loss of an answer token, in nats"),
        *history_chart(run, "Tokens per second", "tokens per second", {"tokens_per_second": "tokens/s"}, zero=True),
        *history_chart(run, "Learning rate", "learning rate", {"learning_rate": "learning rate"}, zero=True),
    ]
    text = stalls_text(run)
    return JobPage(
        tiles, list(_warnings(run)), [_evaluation(run), ReportSection("Training", text, [], charts), _samples(run)]
    )


def _evaluation(run: StoredRun) -> ReportSection:
    """Return accuracy, loss and AUC of the choices, by task."""
    tasks = {
        name: mapping(values)
        for name, values in mapping(run.models[0].document.get("evaluation")).items()
        if isinstance(values, dict)
    }
    rows = []
    for task, values in tasks.items():
        for key, name in MODELS.items():
            found = mapping(values.get(key))
            if not found:
                continue
            point = accuracy(found.get("accuracy"), values.get("samples"))
            cells = [precise(number(found.get(metric))) for metric in ("log_loss", "auc")]
            rows.append([task, name, _interval(point), *cells, whole(values.get("samples"))])
    series = [
        Series(
            name,
            range(len(tasks)),
            [accuracy(mapping(values.get(key)).get("accuracy"), values.get("samples")) for values in tasks.values()],
        )
        for key, name in MODELS.items()
        if any(mapping(values.get(key)) for values in tasks.values())
    ]
    losses = [
        Series.of(
            name, range(len(tasks)), [number(mapping(values.get(key)).get("log_loss")) for values in tasks.values()]
        )
        for key, name in MODELS.items()
        if any("log_loss" in mapping(values.get(key)) for values in tasks.values())
    ]
    header = ["task", "model", "accuracy", "log loss", "AUC", "samples"]
    return ReportSection(
        "Held-out choices",
        "The model chooses among the options of each held-out sample. Brackets are 95 % intervals over samples "
        "(Wilson). The log loss is in nats.",
        [ReportTable("", header, rows, 2)] if rows else [],
        drawn(
            dot_chart("Accuracy of the choices", "accuracy", list(tasks), series),
            dot_chart("Log loss of the choices", "nats", list(tasks), losses),
        ),
    )


def accuracy(value: object, samples: object) -> Point | None:
    """Return a share of right choices with its interval (Wilson, 95 %)."""
    share, n = number(value), number(samples)
    if share is None:
        return None
    if not n:
        return Point(share)
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(max(share * (1 - share), 0.0) / n + _Z**2 / (4 * n**2))
    return Point(share, max(middle - half, 0.0), min(middle + half, 1.0))


def _interval(point: Point | None) -> str:
    if point is None:
        return "–"
    return f"{point.value:.4f}" + ("" if point.low is None else f" ({point.low:.4f}, {point.high:.4f})")


def _samples(run: StoredRun) -> ReportSection:
    """Return the samples by task, and those that were cut or left out."""
    document = run.models[0].document
    tasks = [[name, precise(number(count))] for name, count in mapping(document.get("tasks")).items()]
    lost = {
        name: {"samples": mapping(document.get("samples")).get(key)}
        for name, key in (("prompt lost its beginning", "truncated"), ("left out, the answer is too long", "left_out"))
    }
    return ReportSection(
        "Samples",
        "",
        [
            *([ReportTable("Trained on", ["task", "samples"], tasks)] if tasks else []),
            *values_table("Too long for a sequence", "", lost, {"samples": "samples"}),
        ],
    )


def _warnings(run: StoredRun) -> Iterator[str]:
    document = run.models[0].document
    samples = mapping(document.get("samples"))
    trained = number(samples.get("trained_on")) or 0.0
    left_out = number(samples.get("left_out")) or 0.0
    for count, total, what in (
        (number(samples.get("truncated")) or 0.0, trained, "lost the beginning of their prompt"),
        (left_out, trained + left_out, "were left out, because the answer left no room for a prompt"),
    ):
        if count > LOST * total:
            yield f"{count:,.0f} of {total:,.0f} samples {what}: data.length is too short for them."
    for task, values in mapping(document.get("evaluation")).items():
        own = accuracy(mapping(mapping(values).get("model")).get("accuracy"), mapping(values).get("samples"))
        for key in ("untuned", "majority", "popularity"):
            other = number(mapping(mapping(values).get(key)).get("accuracy"))
            if own is not None and own.low is not None and other is not None and own.low <= other:
                yield f"{task}: the tuned model is not clearly better than {MODELS[key]}: {own.value:.4f}, {other:.4f}."
