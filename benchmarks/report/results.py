"""Measured results as the templates read them: every file of ``benchmarks/results`` by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RENAMED_KEYS = {"different_ids": "unique_ids", "disorder_ms": "max_out_of_orderness_ms"}
"""Keys of results that were written before a benchmark renamed them, and their names today."""

ENVIRONMENT_KEYS = ("started", "python", "packages", "platform", "cores", "ranks", "threads", "accelerator")

_KILLS = re.compile(
    r"^(?P<source>files|kafka): undisturbed, (?P<events>[\d,]+) events, (?P<steps>[\d,]+) steps.*?"
    r"^(?P<kills>\d+) kills: (?P<outcome>.*?)\n"
    r"2 ranks to 1 in the middle: (?P<rows>[\d,]+) rows of (?P<requests>[\d,]+) requests",
    re.DOTALL | re.MULTILINE,
)


def read_results(directory: Path) -> dict[str, Any]:
    """Return the content of every JSON file of a directory by file stem, and ``stream_kills.log`` as figures.

    A result that keeps its environment beside its figures gets it below ``environment``, as all others have it.
    """
    results: dict[str, Any] = {}
    for file in sorted(directory.glob("*.json")):
        document = json.loads(file.read_text(), object_hook=_with_today_s_keys)
        if "environment" not in document:
            document["environment"] = {key: document[key] for key in ENVIRONMENT_KEYS}
        results[file.stem] = document
    results["stream_kills"] = read_stream_kills((directory / "stream_kills.log").read_text())
    return results


def read_stream_kills(log: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a log of ``tests.faults.stream_kills`` by source, ``files`` and ``kafka``.

    Raises:
        ValueError: the log does not have both sources.
    """
    found = {}
    for match in _KILLS.finditer(log):
        numbers = {key: int(match[key].replace(",", "")) for key in ("events", "steps", "kills", "rows", "requests")}
        found[match["source"]] = {**numbers, "outcome": " ".join(match["outcome"].split())}
    if set(found) != {"files", "kafka"}:
        raise ValueError("stream_kills.log has no outcome of 'files' and 'kafka'")
    return found


def _with_today_s_keys(mapping: dict[str, Any]) -> dict[str, Any]:
    return {RENAMED_KEYS.get(key, key): value for key, value in mapping.items()}
