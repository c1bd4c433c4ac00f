"""Pictures of :mod:`benchmarks.moment`: one room under every policy, and the reactions to jumps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.moment.metrics import running_mean
from benchmarks.moment.reactions import RESPONSE_S

COLOURS = {"full": "tab:gray", "fast_slow": "tab:blue", "realtime": "tab:red", "realtime_naive": "tab:olive"}
_SMOOTH_S = 30.0


def plot_room(file: Path, at_s: np.ndarray, truth: np.ndarray, predicted: Mapping[str, np.ndarray]) -> None:
    """Draw the true click probability of a room's exposures and the predictions under each policy.

    Args:
        file: to write, a PNG.
        at_s: ``[n]``, ascending times of the requests.
        truth: ``[n]``.
        predicted: policy -> ``[n]``.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    moments = np.arange(at_s[0], at_s[-1], 5.0)
    axes.plot(moments / 60, running_mean(at_s, truth, moments, _SMOOTH_S), color="black", lw=2.5, label="true")
    for policy, values in predicted.items():
        mean = running_mean(at_s, values, moments, _SMOOTH_S)
        axes.plot(moments / 60, mean, color=COLOURS[policy], lw=1.4, label=policy)
    axes.set(xlabel="minutes of the stream", ylabel="mean click probability, 30 s", ylim=(0, None))
    axes.set_title("Exposures of one author's rooms: true click probability, and predicted as they were requested")
    figure.legend(ncols=5, loc="outside lower center")
    figure.savefig(file, dpi=110)


def plot_reactions(file: Path, result: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the share of rises and falls that is covered over time, and the times to react.

    Args:
        file: to write, a PNG.
        result: policy -> result of ``summarise`` of ``benchmarks/moment/__main__.py``.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    rises, falls, bars = figure.subplots(1, 3)
    for axes, kind in ((rises, "rises"), (falls, "falls")):
        for policy, found in result.items():
            axes.plot(RESPONSE_S, found["response"][kind], color=COLOURS[policy], label=policy)
        axes.axhline(0.5, color="black", lw=0.6, ls=":")
        axes.axhline(1.0, color="black", lw=0.6)
        axes.axvline(0.0, color="black", lw=0.6)
        axes.set(xlabel="seconds since the jump", ylabel="share of the jump covered", ylim=(-0.25, 1.1))
        axes.set_title(f"The click probability {kind}")
    rises.legend(loc="upper left")
    width = 0.8 / len(result)
    for place, (policy, found) in enumerate(result.items()):
        cells = [found["reaction"][kind]["seconds"] for kind in ("rises", "falls")]
        x = np.arange(2) + (place - (len(result) - 1) / 2) * width
        bars.bar(
            x,
            [cell["mean"] for cell in cells],
            width,
            yerr=[cell["half_width_95"] or 0 for cell in cells],
            color=COLOURS[policy],
            capsize=3,
        )
    bars.set_xticks(np.arange(2), ["rises", "falls"])
    bars.set(ylabel="seconds")
    bars.set_title("Time to react, at most until the next jump")
    figure.savefig(file, dpi=110)
