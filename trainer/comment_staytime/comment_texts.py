"""The comments of the staytime model's visits, and where the embeddings of texts are found."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.comment_staytime.comment_selection import (
    ABSENT,
    CommentVisits,
    choose_comments,
    popularity,
    touched_among,
)
from trainer.config.staytime import LcuConfig
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.text_schema import flat_lists, has_texts, pad_lists, read_texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """Embeddings of texts by position, from a table that is mapped from disk.

    Attributes:
        vectors: ``[rows, width]``.
        row: ``[positions]`` int64, -1 where there is no vector.
    """

    vectors: np.ndarray
    row: np.ndarray

    def gather(self, position: np.ndarray) -> np.ndarray:
        """Vectors ``[..., width]`` float32 of positions ``[...]``; zeros for those without, and for ``ABSENT``."""
        row = np.where(position >= 0, self.row[position], -1)
        found = self.vectors[np.maximum(row, 0)].astype(np.float32)
        found[row < 0] = 0
        return found


@dataclass(frozen=True)
class StaytimeComments:
    """The comments of every visit.

    Attributes:
        chosen: ``[n, k]`` int64, positions among all comments, padded with ``ABSENT``.
        touched: ``[n, k]`` bool, which of them the user touched in the visit.
        popular: ``[comments]`` float32, popularity in the training range: the label of training rows.
        popular_later: ``[comments]`` float32, in the held-out range: what its ranking is measured with.
        id_row: ``[comments]`` int64, row of its id's embedding; 0 for ids that training hardly has.
        id_rows: rows of that table.
        share_touched: of what users touched in training visits, the share that is among the chosen ones.
        item_text: embeddings of the videos' texts by visit; None without.
        comment_text: those of the comments by position; None without.
    """

    chosen: np.ndarray
    touched: np.ndarray
    popular: np.ndarray
    popular_later: np.ndarray
    id_row: np.ndarray
    id_rows: int
    share_touched: float
    item_text: Texts | None
    comment_text: Texts | None


def load_comments(
    path: str,
    visits: pa.Table,
    training: np.ndarray,
    held_out: np.ndarray,
    min_count: int,
    lcu: LcuConfig,
    seed: int,
) -> StaytimeComments:
    """Choose the comments of every visit, and find the embeddings of their texts.

    Args:
        path: of the dataset.
        visits: ``text_schema.VISITS`` in order of time.
        training: positions of the training visits.
        held_out: positions of the held-out visits.
        min_count: comments chosen in fewer training visits share row 0 of the ids.
        lcu: how many, by which rule, and where the embeddings are.
        seed: of the order of a visit's comments.

    Raises:
        UserError: no comments, a comment's id comes twice, a visit names one that is not there or has not as many likes
            as comments, or an embedding table has nothing of the dataset.
    """
    table = read_texts(path, "comments", ["comment_id"]) if has_texts(path, "comments") else None
    if table is None or not table.num_rows:
        raise UserError(f"{path}: has no comments, which LCU reads; lcu.enabled=false trains the base alone")
    ids = np.sort(table.column("comment_id").to_numpy())
    check_unique(path, "comments", "comment_id", ids)
    _check_likes(path, visits)
    met = CommentVisits(
        user_id=visits.column("user_id").to_numpy(),
        item_id=visits.column("item_id").to_numpy(),
        request_ms=visits.column("request_ms").to_numpy(),
        left_ms=visits.column("request_ms").to_numpy() + visits.column("staytime_ms").to_numpy(),
        shown=_positions(path, visits, "shown", ids),
        likes=_padded(visits.column("shown_likes"), _longest(visits.column("shown"))),
        touched=_positions(path, visits, "interacted", ids),
        comments=len(ids),
    )

    chosen = choose_comments(met, lcu.comments, seed, lcu.candidates)
    touched = touched_among(chosen, met)
    few = float((chosen[held_out] == ABSENT).any(1).mean())
    if few:
        logger.info(f"{few:.0%} of the held-out visits have fewer than {lcu.comments} comments; the rest is masked")
    counts = np.bincount(chosen[training][chosen[training] >= 0], minlength=len(ids))
    known = counts >= min_count
    of_training, of_held_out = (np.zeros(len(chosen), bool) for _ in range(2))
    of_training[training], of_held_out[held_out] = True, True
    return StaytimeComments(
        chosen=chosen,
        touched=touched,
        popular=popularity(met, of_training),
        popular_later=popularity(met, of_held_out),
        id_row=np.where(known, np.cumsum(known), 0),
        id_rows=int(known.sum()) + 1,
        share_touched=float(touched[training].sum() / max(1, (met.touched[training] >= 0).sum())),
        item_text=_texts("lcu.item_embeddings", lcu.item_embeddings, visits.column("item_id").to_numpy()),
        comment_text=_texts("lcu.comment_embeddings", lcu.comment_embeddings, ids),
    )


def _texts(key: str, path: str, ids: np.ndarray) -> Texts | None:
    if not path:
        return None
    table = ContentVectors.open(path)
    row = table.lookup(ids)
    missing = float((row < 0).mean()) if len(row) else 0.0
    if missing == 1:
        raise UserError(f"{key} = {path!r}: has none of the ids that the dataset has; is it a table of other things?")
    if missing:
        logger.info(f"{key}: {missing:.1%} of the ids have no embedding; they are zeros")
    return Texts(table.vectors, row)


def _longest(column: pa.ChunkedArray) -> int:
    return max(1, int(np.diff(flat_lists(column)[1]).max(initial=0)))


def _padded(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return pad_lists(column, width, ABSENT)


def _positions(path: str, visits: pa.Table, name: str, ids: np.ndarray) -> np.ndarray:
    """The lists of a column as positions in the ascending ``ids``, padded with ``ABSENT``."""
    padded = _padded(visits.column(name), _longest(visits.column(name)))
    at = np.minimum(np.searchsorted(ids, padded), len(ids) - 1)
    strange = (padded >= 0) & (ids[at] != padded)
    if strange.any():
        row, place = (int(part[0]) for part in np.nonzero(strange))
        visit = visits.column("visit_id")[row].as_py()
        raise UserError(
            f"{path}: texts/visits: visit {visit} names comment {padded[row, place]} in {name}, which texts/comments "
            "does not have"
        )
    return np.where(padded >= 0, at, ABSENT)


def _check_likes(path: str, visits: pa.Table) -> None:
    shown, likes = (np.diff(flat_lists(visits.column(name))[1]) for name in ("shown", "shown_likes"))
    strange = np.flatnonzero((likes != 0) & (likes != shown))
    if len(strange):
        row = int(strange[0])
        raise UserError(
            f"{path}: texts/visits: visit {visits.column('visit_id')[row].as_py()} has {likes[row]} shown_likes for "
            f"{shown[row]} comments shown; it must be one for each, or none where they are not known"
        )


def check_unique(path: str, table: str, column: str, ids: np.ndarray) -> None:
    """Every id of a text table comes once.

    Raises:
        UserError: one does not.
    """
    ordered = np.sort(ids)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise UserError(f"{path}: texts/{table}: {column} {ordered[twice[0]]} comes twice; every {column} comes once")
