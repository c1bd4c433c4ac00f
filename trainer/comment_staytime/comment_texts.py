"""Comments of the staytime model's visits, and the vectors of their texts."""

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
class TextVectors:
    """Vectors of texts by position, from a memory-mapped table.

    Attributes:
        vectors: ``[rows, width]``, vectors of the table.
        row: ``[positions]`` int64, row in ``vectors`` of each position; -1 if it has no vector.
    """

    vectors: np.ndarray
    row: np.ndarray

    def gather(self, position: np.ndarray) -> np.ndarray:
        """Look up vectors ``[..., width]`` float32 of positions ``[...]``; zeros for a missing vector or ``ABSENT``."""
        row = np.where(position >= 0, self.row[position], -1)
        found = self.vectors[np.maximum(row, 0)].astype(np.float32)
        found[row < 0] = 0
        return found


@dataclass(frozen=True)
class StaytimeComments:
    """Chosen comments of every visit, with their labels and vectors.

    Attributes:
        chosen: ``[n, k]`` int64, positions in the list of all comments, padded with ``ABSENT``.
        touched: ``[n, k]`` bool, True if the user touched the comment in the visit.
        popular: ``[comments]`` float32, popularity in the training range; the training label.
        popular_later: ``[comments]`` float32, popularity in the held-out range; the label of the evaluation.
        id_row: ``[comments]`` int64, row of the comment's id embedding; 0 for ids with too few training visits.
        id_rows: number of rows of that embedding table.
        share_touched: share of the comments touched in training visits that are among the chosen ones.
        item_text: text vectors of the videos by visit; None without a table.
        comment_text: text vectors of the comments by position; None without a table.
    """

    chosen: np.ndarray
    touched: np.ndarray
    popular: np.ndarray
    popular_later: np.ndarray
    id_row: np.ndarray
    id_rows: int
    share_touched: float
    item_text: TextVectors | None
    comment_text: TextVectors | None


def load_comments(
    path: str,
    visits: pa.Table,
    training: np.ndarray,
    held_out: np.ndarray,
    min_count: int,
    lcu: LcuConfig,
    seed: int,
) -> StaytimeComments:
    """Choose the comments of every visit, and find the vectors of their texts.

    Args:
        path: path of the dataset.
        visits: table of visits (``text_schema.VISITS``) in order of time.
        training: positions of the training visits.
        held_out: positions of the held-out visits.
        min_count: comments chosen in fewer training visits share row 0 of the id embeddings.
        lcu: number of comments, rule of selection, and paths of the vector tables.
        seed: seed of the order of a visit's comments.

    Raises:
        UserError: the dataset has no comments, a comment's id is not unique, a visit names an unknown comment or has
            another number of likes than of comments, or a vector table has none of the dataset's ids.
    """
    table = read_texts(path, "comments", ["comment_id"]) if has_texts(path, "comments") else None
    if table is None or not table.num_rows:
        raise UserError(f"{path}: has no comments, which LCU needs; lcu.enabled=false trains the base model alone")
    ids = np.sort(table.column("comment_id").to_numpy())
    check_unique(path, "comments", "comment_id", ids)
    _check_likes(path, visits)
    comment_visits = CommentVisits(
        user_id=visits.column("user_id").to_numpy(),
        item_id=visits.column("item_id").to_numpy(),
        request_ms=visits.column("request_ms").to_numpy(),
        left_ms=visits.column("request_ms").to_numpy() + visits.column("staytime_ms").to_numpy(),
        shown=_positions(path, visits, "shown", ids),
        likes=_padded(visits.column("shown_likes"), _longest(visits.column("shown"))),
        touched=_positions(path, visits, "interacted", ids),
        comments=len(ids),
    )

    chosen = choose_comments(comment_visits, lcu.comments, seed, lcu.candidates)
    touched = touched_among(chosen, comment_visits)
    padded = float((chosen[held_out] == ABSENT).any(1).mean())
    if padded:
        logger.info(f"{padded:.0%} of the held-out visits have fewer than {lcu.comments} comments; the rest is masked")
    counts = np.bincount(chosen[training][chosen[training] >= 0], minlength=len(ids))
    # Count training visits only: an id that is frequent later must not get a row of its own.
    known = counts >= min_count
    in_training, in_held_out = (np.zeros(len(chosen), bool) for _ in range(2))
    in_training[training], in_held_out[held_out] = True, True
    return StaytimeComments(
        chosen=chosen,
        touched=touched,
        popular=popularity(comment_visits, in_training),
        popular_later=popularity(comment_visits, in_held_out),
        id_row=np.where(known, np.cumsum(known), 0),
        id_rows=int(known.sum()) + 1,
        share_touched=float(touched[training].sum() / max(1, (comment_visits.touched[training] >= 0).sum())),
        item_text=_open_vectors("lcu.item_embeddings", lcu.item_embeddings, visits.column("item_id").to_numpy()),
        comment_text=_open_vectors("lcu.comment_embeddings", lcu.comment_embeddings, ids),
    )


def _open_vectors(key: str, path: str, ids: np.ndarray) -> TextVectors | None:
    if not path:
        return None
    table = ContentVectors.open(path)
    row = table.lookup(ids)
    missing = float((row < 0).mean()) if len(row) else 0.0
    if missing == 1:
        raise UserError(f"{key} = {path!r}: has none of the dataset's ids; use a table made from this dataset's texts")
    if missing:
        logger.info(f"{key}: {missing:.1%} of the ids have no vector; zeros are used for them")
    return TextVectors(table.vectors, row)


def _longest(column: pa.ChunkedArray) -> int:
    return max(1, int(np.diff(flat_lists(column)[1]).max(initial=0)))


def _padded(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return pad_lists(column, width, ABSENT)


def _positions(path: str, visits: pa.Table, name: str, ids: np.ndarray) -> np.ndarray:
    """Convert a column of id lists into positions in the ascending ``ids``, padded with ``ABSENT``."""
    padded = _padded(visits.column(name), _longest(visits.column(name)))
    # An id above all others is inserted at the end, which is no valid position.
    at = np.minimum(np.searchsorted(ids, padded), len(ids) - 1)
    unknown = (padded >= 0) & (ids[at] != padded)
    if unknown.any():
        row, place = (int(part[0]) for part in np.nonzero(unknown))
        visit = visits.column("visit_id")[row].as_py()
        raise UserError(
            f"{path}: texts/visits: visit {visit} names comment {padded[row, place]} in {name}, which texts/comments "
            "does not have"
        )
    return np.where(padded >= 0, at, ABSENT)


def _check_likes(path: str, visits: pa.Table) -> None:
    shown, likes = (np.diff(flat_lists(visits.column(name))[1]) for name in ("shown", "shown_likes"))
    wrong = np.flatnonzero((likes != 0) & (likes != shown))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{path}: texts/visits: visit {visits.column('visit_id')[row].as_py()} has {likes[row]} shown_likes for "
            f"{shown[row]} comments shown; it must have one for each, or none if they are unknown"
        )


def check_unique(path: str, table: str, column: str, ids: np.ndarray) -> None:
    """Check that every id of a text table is unique.

    Raises:
        UserError: an id is not unique.
    """
    ordered = np.sort(ids)
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        raise UserError(
            f"{path}: texts/{table}: {column} {ordered[repeated[0]]} comes twice; every {column} must be unique"
        )
