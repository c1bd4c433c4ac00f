"""Figures that describe a dataset, as JSON values and as text."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from trainer.console.text_table import text_table
from trainer.data.format.dataset import Dataset
from trainer.data.format.history import Histories
from trainer.data.format.schema import DOMAINS, SCHEMA_VERSION, DatasetSpec

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def describe(path: str | Path) -> dict[str, Any]:
    """Return figures of the dataset at ``path`` (a directory or an fsspec URL) as values for JSON.

    The function reads the labels of all rows, one record at a time. The keys are:

    - ``path``, ``name``, ``source``, ``licence``, ``schema_version``, ``counts``, ``ids``, ``side``, ``dense``,
      ``statistics`` and ``extra``;
    - ``span``: ISO times in the time zone of the dataset;
    - ``behaviours``: of the rows in whose domain each behaviour can happen, the positives, the rows and their ratio,
      which is None if there are no rows;
    - ``histories``: quantiles of the length over all users that have rows or a history;
    - ``partitions``: rows and users of each partition; ``balance`` is the largest number of rows over the mean.

    Raises:
        UserError: there is no dataset, or a shard cannot be read.
    """
    data = Dataset.open(str(path))
    data.verify()
    spec, store = data.spec, data.store
    positives, unmasked = np.zeros((2, len(spec.behaviours)), np.int64)
    domain_rows = np.zeros(len(DOMAINS), np.int64)
    rows, users = [], []
    for partition in range(spec.partitions):
        index = store.records(partition)
        rows.append(int(index.rows.sum()))
        seen = np.zeros(0, np.int64)
        for record in range(len(index.rows)):
            columns = store.read(partition, record, ("user_id", "domain", "label", "mask"))
            assert columns is not None, "a store that does not skip corrupt records raises an error instead"
            positives += (columns["label"] * columns["mask"]).sum(0, dtype=np.int64)
            unmasked += columns["mask"].sum(0, dtype=np.int64)
            domain_rows += np.bincount(columns["domain"], minlength=len(DOMAINS))
            seen = np.union1d(seen, columns["user_id"])
        users.append(seen)
    return {
        "path": str(path),
        "name": spec.name,
        "source": spec.source,
        "licence": spec.licence,
        "schema_version": SCHEMA_VERSION,
        "counts": {
            "exposures": spec.exposures,
            "events": spec.events,
            "rows": spec.rows,
            "users_with_rows": sum(len(seen) for seen in users),
            **{f"{domain}_rows": int(count) for domain, count in zip(DOMAINS, domain_rows, strict=True)},
        },
        "span": _span(spec),
        "behaviours": {
            behaviour: {"positives": int(hits), "rows": int(all_), "rate": hits / all_ if all_ else None}
            for behaviour, hits, all_ in zip(spec.behaviours, positives.tolist(), unmasked.tolist(), strict=True)
        },
        "histories": _histories(data.histories, np.concatenate(users)),
        "ids": {name: {"count": space.count, "max": space.max} for name, space in spec.ids.items()},
        "side": {side.name: {"of": side.of, "values": side.rows} for side in spec.side},
        "dense": {dense.name: {"of": dense.of} for dense in spec.dense},
        "statistics": [list(key) for key in spec.statistics],
        "partitions": {
            "count": spec.partitions,
            "rows": rows,
            "users": [len(seen) for seen in users],
            "balance": max(rows) / np.mean(rows) if sum(rows) else None,
        },
        "extra": spec.extra,
    }


def format_description(description: dict[str, Any]) -> str:
    """Return the figures as text for the terminal, without features and ``extra``."""
    counts, span, partitions = description["counts"], description["span"], description["partitions"]
    days = f"{span['days']:.1f} days, {span['timezone']}"
    by_domain = ", ".join(f"{counts[f'{domain}_rows']:,} {domain}" for domain in DOMAINS)
    facts = [
        ("dataset", f"{description['path']} ({description['name']}, schema version {description['schema_version']})"),
        ("source", description["source"]),
        ("licence", description["licence"]),
        ("requests", f"{span['from']} to {span['until']} ({days})"),
        ("exposures", f"{counts['exposures']:,}"),
        ("events", f"{counts['events']:,}"),
        ("training rows", f"{counts['rows']:,} ({by_domain})"),
        ("users with rows", f"{counts['users_with_rows']:,}"),
        *((f"{name} ids", f"{ids['count']:,}, largest {ids['max']:,}") for name, ids in description["ids"].items()),
        ("features", f"{len(description['side'])} categorical, {len(description['dense'])} dense"),
        ("", f"{len(description['statistics'])} statistics"),
        ("partitions", _partitions(partitions)),
    ]
    blocks = ["\n".join(f"{name:<17}{value}" for name, value in facts)]
    blocks.append(
        text_table(
            ["behaviour", "positives", "of rows", "rate"],
            [
                [
                    name,
                    f"{b['positives']:,}",
                    f"{b['rows']:,}",
                    "undefined" if b["rate"] is None else f"{b['rate']:.3%}",
                ]
                for name, b in description["behaviours"].items()
            ],
        )
    )
    blocks.append(
        text_table(
            ["history length", *(f"{quantile:.0%}" for quantile in QUANTILES), "mean"],
            [
                [domain, *(f"{value:,.0f}" for value in lengths["quantiles"].values()), f"{lengths['mean']:,.1f}"]
                for domain, lengths in description["histories"].items()
                if lengths["users"]
            ],
        )
    )
    return "\n\n".join(blocks)


def _span(spec: DatasetSpec) -> dict[str, Any]:
    """Return the first and last request time, and the days between them."""
    first, last = spec.span_ms
    zone = ZoneInfo(spec.timezone)
    times = [datetime.fromtimestamp(moment / 1000, zone).isoformat(timespec="milliseconds") for moment in (first, last)]
    return {
        "timezone": spec.timezone,
        "from": times[0],
        "until": times[1],
        "days": (last - first) / 86_400_000,
        "from_ms": first,
        "until_ms": last,
    }


def _histories(histories: Histories, users: np.ndarray) -> dict[str, Any]:
    """Return statistics of the history lengths, by domain and over all; users without a history have length 0."""
    known, by_domain = histories.lengths()
    without = np.setdiff1d(users, known)
    by_domain = np.concatenate([by_domain, np.zeros((len(without), len(DOMAINS)), np.int64)])
    lengths = {"all": by_domain.sum(1)} | {domain: by_domain[:, place] for place, domain in enumerate(DOMAINS)}
    return {
        name: {
            "users": len(values),
            "visits": int(values.sum()),
            "mean": float(values.mean()) if len(values) else None,
            "quantiles": {
                f"{quantile:g}": int(np.quantile(values, quantile, method="nearest")) if len(values) else None
                for quantile in QUANTILES
            },
        }
        for name, values in lengths.items()
    }


def _partitions(partitions: dict[str, Any]) -> str:
    """Return number, sizes and balance of the partitions as text."""
    rows, balance = partitions["rows"], partitions["balance"]
    largest = "" if balance is None else f", the largest {balance:.2f} times the mean"
    return f"{partitions['count']} of {min(rows):,} to {max(rows):,} rows{largest}"
