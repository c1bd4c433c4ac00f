"""Charts of the metric history of a job that is no ranker: loss, and rates against the steps."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.report.charts import Chart, Series, line_chart
from trainer.report.page_parts import drawn
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, numbers


def loss_chart(run: StoredRun, title: str) -> list[Chart]:
    """Draw the loss of the metric history, or of ``metrics.json`` where the checkpoints are gone."""
    model = run.models[0]
    if model.history:
        return history_chart(run, title, "loss", {"loss": "loss"})
    training = mapping(model.document.get("training"))
    losses, steps = numbers(training.get("loss")), number(training.get("steps"))
    # The last record is shorter than the others.
    every = number(mapping(run.config.get("train")).get("log_every")) or 1
    places = [min(every * (place + 1), steps or float("inf")) for place in range(len(losses))]
    return drawn(line_chart(title, "step", "loss", [Series.of("loss", places, losses)]))


def history_chart(run: StoredRun, title: str, label: str, keys: dict[str, str], *, zero: bool = False) -> list[Chart]:
    """Draw values of the metric history against the steps.

    Args:
        run: the run.
        title: caption.
        label: words at the y axis.
        keys: key of an entry -> name of its line.
        zero: the y axis begins at 0.
    """
    history = run.models[0].history
    steps = [float(entry["step"]) for entry in history]
    series = [Series.of(name, steps, [number(entry.get(key)) for entry in history]) for key, name in keys.items()]
    return drawn(line_chart(title, "step", label, series, zero=zero))


def stalls_text(run: StoredRun) -> str:
    """Return a sentence about the saves of checkpoints; an empty text if their times are not stored."""
    stalls = numbers(mapping(run.models[0].document.get("training")).get("checkpoint_stalls_seconds"))
    known: Sequence[float] = [stall for stall in stalls if stall is not None]
    if not known:
        return ""
    saves = "1 save of a checkpoint" if len(known) == 1 else f"{len(known)} saves of checkpoints"
    return f"{saves} stopped the training for {sum(known):.2f} s in all."
