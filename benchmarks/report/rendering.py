"""Jinja2 templates with the filters that turn a measured number into text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a template of ``benchmarks/report/templates`` filled with values.

    Raises:
        jinja2.UndefinedError: the template names a figure that no result has.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "num": number,
        "signed": signed,
        "percent": percent,
        "interval": interval,
        "span": span,
        "pluck": pluck,
        "pick": pick,
        "scaled": scaled,
        "with_spread": with_spread,
        "date": date,
    }
    return environment.get_template(template).render(**values)


def number(value: float, digits: int = 0) -> str:
    """Return ``12,345.68`` for two digits."""
    return f"{value:,.{digits}f}"


def signed(value: float, digits: int = 0) -> str:
    """Return a difference with its sign."""
    return f"{value:+,.{digits}f}"


def percent(share: float, digits: int = 0) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def interval(value: Mapping[str, Any] | Sequence[float | None], digits: int, sign: str = "") -> str:
    """Return a mean and half of its 95 % interval as ``0.651 ±0.008``.

    Args:
        value: ``mean`` and ``half_width_95``, or a pair; a mean of None reads ``-``, a single seed has no interval.
        digits: after the point, of both.
        sign: ``+`` for differences.
    """
    mean, half = (value["mean"], value["half_width_95"]) if isinstance(value, Mapping) else value
    if mean is None:
        return "-"
    return f"{mean:{sign},.{digits}f}" + ("" if half is None else f" ±{half:.{digits}f}")


def span(values: Iterable[float], digits: int = 0, style: str = "num") -> str:
    """Return the least and the largest value as ``2.7 to 3.9``, or one number where both read the same.

    Args:
        values: at least one.
        digits: after the point.
        style: ``num``, ``signed`` or ``percent``.
    """
    kept = list(values)
    text = {"num": number, "signed": signed, "percent": percent}[style]
    low, high = text(min(kept), digits), text(max(kept), digits)
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def pluck(values: Iterable[Any], *path: Any) -> list[Any]:
    """Return what lies at a path of keys and indices in each value."""
    found = []
    for value in values:
        for key in path:
            value = value[key]
        found.append(value)
    return found


def pick(mapping: Mapping[str, Any], names: Iterable[str], suffix: str = "") -> list[Any]:
    """Return the values of some keys; each key is a name and the suffix."""
    return [mapping[name + suffix] for name in names]


def scaled(values: Iterable[float], factor: float) -> list[float]:
    """Return every value times a factor."""
    return [value * factor for value in values]


def with_spread(result: Mapping[str, Any], digits: int, *path: Any, scale: float = 1.0) -> str:
    """Return a figure of a result as ``2.1 (1.9 to 2.4)``, with the least and the largest of its ``runs``, if several.

    Args:
        result: medians, and below ``runs`` the same figures of each run.
        digits: after the point.
        *path: keys of the figure.
        scale: factor of all numbers.
    """
    (median,) = pluck([result], *path)
    text = number(scale * median, digits)
    runs = scaled(pluck(result.get("runs", ()), *path), scale)
    return f"{text} ({span(runs, digits)})" if len(runs) > 1 else text


def date(started: str) -> str:
    """Return the day of an environment's ``started`` as ``21 November 2026``."""
    day = datetime.fromisoformat(started)
    return f"{day.day} {day:%B %Y}"
