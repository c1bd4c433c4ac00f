"""Facts about a run that stand around its sections: title, figures at the top, and where it ran."""

from __future__ import annotations

from trainer.console.text_table import duration_text, size_text
from trainer.report.metric_history import training_seconds
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, whole


def run_title(run: StoredRun) -> str:
    """Return the name of a run and of its model."""
    name = run.config.get("run", {}).get("name") if isinstance(run.config.get("run"), dict) else None
    name, model = name or run.directory.resolve().name, run.models[0].name
    # A job is called after its kind by default.
    return str(name) if name == model else f"{name}: {model}"


def run_tiles(run: StoredRun) -> list[tuple[str, str]]:
    """Return the figures at the top: name and value."""
    training = mapping(run.models[0].document.get("training"))
    summary = run.summary
    rows = number(training.get("rows"))
    # A run that has not ended has the rows of its records only.
    if rows is None:
        rows = sum(number(entry.get("rows")) or 0 for entry in run.models[0].history) or None
    tiles = [("rows trained on", f"{rows:,.0f}" if rows is not None else ""), ("steps", whole(summary.steps))]
    rate = summary.rows_per_second
    tiles.append(("rows per second", f"{rate:,.0f}" if rate is not None else ""))
    if seconds := training_seconds(run.models[0].history):
        tiles.append(("time of training", duration_text(seconds)))
    held = next((values.get("rows") for values in run.models[0].behaviours.values()), None)
    tiles.append(("held-out rows", whole(held)))
    if run.starts:
        tiles.append(("ranks", whole(run.starts[-1].get("ranks"))))
    if run.status is not None and run.status.peak_memory_bytes:
        tiles.append(("peak memory of the first rank", size_text(run.status.peak_memory_bytes)))
    return tiles


def environment_rows(run: StoredRun) -> list[tuple[str, str]]:
    """Return versions and machine of the last start, and the command: name and value."""
    if not run.starts:
        return []
    last = run.starts[-1]
    command = last.get("command")
    dataset = mapping(last.get("dataset"))
    packages = mapping(last.get("packages"))
    entries = [
        ("starts", f"{len(run.starts):,}"),
        ("first start", str(run.starts[0].get("started", ""))),
        ("command", " ".join(map(str, command)) if isinstance(command, list) else ""),
        ("host", str(last.get("host", ""))),
        ("platform", str(last.get("platform", ""))),
        ("accelerator", str(last.get("accelerator", ""))),
        ("attention to histories", str(last.get("attention", ""))),
        ("experts and towers", str(last.get("experts", ""))),
        ("threads of a rank", whole(last.get("threads"))),
        ("dataset", str(dataset.get("path", ""))),
        ("dataset fingerprint", str(dataset.get("fingerprint", ""))),
        ("versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
    ]
    return [(name, value) for name, value in entries if value]
