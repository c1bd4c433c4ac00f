"""Attention of a trained ranker to the entries of a user's histories, for one candidate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import torch

from trainer.console.errors import UserError
from trainer.console.text_table import age_text, text_table
from trainer.data.features.id_map import beyond_message
from trainer.data.features.missing_inputs import MissingTally
from trainer.data.format.dataset import Dataset
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DOMAINS
from trainer.data.loading.batch import unpack
from trainer.ranking.history_attention import SHOWN, Explanation, HistoryAttention, by_attention, same_values
from trainer.serving.scoring import candidate_rows
from trainer.serving.trained_run import TrainedModel

logger = logging.getLogger(__name__)


def explain(model: TrainedModel, user_id: int, item_id: int, at_ms: int) -> Explanation:
    """Score a candidate and return the attention to the user's histories. Runs on a single rank.

    Raises:
        UserError: the dataset has no entries of the user before the time, or no such candidate.
    """
    data, features = model.data, model.features
    first, stop = data.histories.runs(np.array([user_id]), np.array([at_ms]))
    if not (stop > first).any():
        ever = (stop - first).any() or user_id in data.histories.lengths()[0]
        reason = "has no history before --at; use a later time" if ever else "is not in the histories of the dataset"
        raise UserError(f"--user {user_id}: {reason} ({model.config.data.path})")
    author_id = find_author(data, model.config.data.path, item_id)
    candidate = {"user_id": user_id, "item_id": item_id, "author_id": author_id, "request_ms": at_ms}
    columns = {name: np.array([value]) for name, value in candidate.items()}
    # The request is hypothetical: its own features are unknown (0).
    columns |= {side.name: np.zeros(1, np.int32) for side in data.spec.side if side.of == "context"}
    columns |= {dense.name: np.zeros(1, np.float32) for dense in data.spec.dense if dense.of == "context"}
    rows = candidate_rows(model, model.config.data.path, columns)
    space = None if model.space is None else model.space.at(model.space.newest)
    packed = features.pack(rows, data.histories, rows["request_ms"], space)
    if packed.beyond:
        logger.info(beyond_message(packed.beyond))
    for message in MissingTally(packed.missing).messages():
        logger.info(message)
    entries = features.read_histories(rows, data.histories, rows["request_ms"], space)
    (logits,) = model.logits([packed])
    ((_, shares),) = model.engine.attention(iter([unpack(packed, features.layout, {})]))
    return Explanation(
        user_id,
        item_id,
        author_id,
        at_ms,
        dict(zip(features.behaviours, torch.sigmoid(logits[0]).tolist(), strict=True)),
        {
            name: HistoryAttention(history, shares[name].cpu().numpy(), same_values(features, rows, history))
            for name, history in entries.items()
        },
    )


def find_author(data: Dataset, path: str, item_id: int) -> int:
    """Return the author of a candidate from the dataset's table of items, or else from any user's history.

    Raises:
        UserError: neither has the item, or its domain has no candidates.
    """
    try:
        items = read_table(DatasetFiles(path), "items.parquet")
    except FileNotFoundError:
        items = pa.table({"item_id": np.empty(0, np.int64)})
    place = np.flatnonzero(items["item_id"].to_numpy() == item_id)
    if len(place) and "author_id" in items.column_names:
        item = {name: items[name][int(place[0])].as_py() for name in items.column_names}
        domain = DOMAINS[item["domain"]] if "domain" in item else data.spec.candidates[0]
        if domain not in data.spec.candidates:
            expected = " or ".join(data.spec.candidates)
            raise UserError(f"--candidate {item_id}: this is a {domain} item; the dataset's candidates are {expected}")
        return int(item["author_id"])
    place = np.flatnonzero(data.histories.column("item_id") == item_id)
    if not len(place):
        raise UserError(f"--candidate {item_id}: the dataset has no such item ({path})")
    return int(data.histories.column("author_id")[place[0]])


def format_explanation(explanation: Explanation, behaviours: Sequence[str], timezone: str, shown: int = SHOWN) -> str:
    """Return an explanation as text for the terminal.

    Args:
        explanation: the explanation to format.
        behaviours: behaviours of the dataset, in the order of the bits.
        timezone: time zone of the printed times.
        shown: maximum number of entries of a history.
    """
    at = (
        datetime.fromtimestamp(explanation.at_ms / 1000, UTC)
        .astimezone(ZoneInfo(timezone))
        .isoformat(timespec="seconds")
    )
    lines = [
        f"user {explanation.user_id}, candidate {explanation.item_id} of author {explanation.author_id}, as of {at}"
    ]
    lines.append(", ".join(f"{behaviour} {p:.4f}" for behaviour, p in explanation.probabilities.items()))
    for name, history in explanation.histories.items():
        n, attention = len(history.attention), history.attention
        if not n:
            lines += ["", f"{name}: found nothing"]
            continue
        order = by_attention(attention, shown)
        selection = (
            f"; the {len(order)} with the most attention, {attention[order].sum():.0%} of it" if n > shown else ""
        )
        lines += ["", f"{name}: found {n}{selection}:"]
        entries = history.entries
        cells = [
            [
                f"{attention[place]:.1%}",
                DOMAINS[entries.domain[place]],
                str(entries.item_id[place]),
                str(entries.author_id[place]) + (" *" if entries.author_id[place] == explanation.author_id else ""),
                age_text(explanation.at_ms - int(entries.request_ms[place])),
                " ".join(b for bit, b in enumerate(behaviours) if entries.bits[place] >> bit & 1),
                *(
                    [" ".join(feature for feature, same in history.same_value.items() if same[place])]
                    if history.same_value
                    else []
                ),
            ]
            for place in order
        ]
        titles = [
            "attention",
            "domain",
            "item",
            "author",
            "ago",
            "did",
            *(["as the candidate"] if history.same_value else []),
        ]
        lines.append(text_table(titles, cells, texts=len(titles)))
    if any((history.entries.author_id == explanation.author_id).any() for history in explanation.histories.values()):
        lines += ["", "* the candidate's author"]
    return "\n".join(lines)
