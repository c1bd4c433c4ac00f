"""Authors that are like an author as of a time: by the vectors of their segments, or by the codes that they share.

Everything is read from segments with ``known_ms <= as_of_ms`` only, and an author is compared by the latest of them:

* **By vector**: by the cosine. Each product is summed in float64 in one order, so the blocks do not matter.
* **By codes**: by the number of levels of the latest codes that are shared, from the first level to the first one that
  differs. Of authors with equal numbers, the one with the larger sum over the latest ``RECENT_RUNS`` runs of the asked
  author comes first: each of them adds the largest number of levels that it shares, counted in the same way, with one
  of the other author's latest runs. An author that shares nothing in both is left out.

* **By interactions**: by users who met both authors' rooms with the same behaviour under the same code
  (``co_interactions.py``), beside the ranks by codes and, of a given table, by vectors.

Equal authors are in the order of their ids.

A room is on air as of a time if one of its segments became known in the last ``ON_AIR_MS``. The end of a room, which
some datasets have, is known only after it, so it is not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trainer.config.iso_time import time_text
from trainer.config.load import parse_time
from trainer.console.errors import UserError
from trainer.console.text_table import age_text, text_table
from trainer.data.features.segment_index import SegmentIndex
from trainer.data.format.code_segments import check_segments, segments_of_codes
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import UNKNOWN_AUTHOR, DatasetSegments, has_text_ids
from trainer.data.format.text_schema import SEGMENT_MS
from trainer.semantic_ids.co_interactions import AuthorSimilarity, coded_interactions
from trainer.semantic_ids.code_files import CodesAsOf, read_codes
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.segment_labels import label_segments
from trainer.semantic_ids.segments import SegmentVectors
from trainer.stream.labels.event_log import EventLog

Comparison = Literal["vectors", "codes", "interactions"]

ON_AIR_MS = 2 * SEGMENT_MS
RECENT_RUNS = 10
BLOCK_VALUES = 1 << 22
"""Elements of the vectors that are compared at once."""

_TEXT_WIDTH = 60


@dataclass(frozen=True)
class AuthorRequest:
    """Question of a retrieval.

    Attributes:
        author: id of the asked author.
        as_of: ISO time in the dataset's time zone.
        by: comparison of the authors.
        vectors: table of segment vectors; empty for ``embeddings/segments`` of the dataset, and for none beside
            interactions.
        codes: code file; empty for none.
        level: number of levels of a code that interactions must share; None for 1.
        codebook: codebook version that the codes, and the vectors, must be of; empty for any.
        on_air: answer only authors with a room on air.
        count: largest number of authors in the answer.
    """

    author: int
    as_of: str
    by: Comparison = "vectors"
    vectors: str = ""
    codes: str = ""
    codebook: str = ""
    level: int | None = None
    on_air: bool = False
    count: int = 10


class CosineRanking(NamedTuple):
    """Ranked places ``[r]`` int64, their cosines ``[r]`` float64, and the number of vectors without a direction."""

    places: np.ndarray
    cosines: np.ndarray
    without_direction: int


class CodeRanking(NamedTuple):
    """Ranked places, shared levels of the latest codes, and shared levels over the recent runs, ``[r]`` int64 each."""

    places: np.ndarray
    levels: np.ndarray
    recent: np.ndarray


def rank_by_cosine(
    asked: np.ndarray, vectors: np.ndarray, rows: np.ndarray, authors: np.ndarray, count: int
) -> CosineRanking:
    """Rank authors by the cosine of a vector of theirs and a given vector; equal ones by id.

    Args:
        asked: ``[dim]``, finite and not zero.
        vectors: ``[n, dim]``, may be memory-mapped.
        rows: ``[m]`` int64, row of each author's vector.
        authors: ``[m]`` int64, distinct.
        count: largest number of ranked authors.
    """
    query = asked.astype(np.float64)
    length = np.sqrt((query * query).sum())
    in_order_of_rows = np.argsort(rows, kind="stable")
    places, cosines, ranked = np.empty(0, np.int64), np.empty(0), 0
    step = max(1, BLOCK_VALUES // len(query))
    for first in range(0, len(rows), step):
        block_places = in_order_of_rows[first : first + step]
        block = vectors[rows[block_places]].astype(np.float64)
        # Not a product of BLAS, whose order of summation depends on the number of rows.
        with np.errstate(all="ignore"):
            block_cosines = (block * query).sum(1) / (np.sqrt((block * block).sum(1)) * length)
        some = np.isfinite(block_cosines)
        ranked += int(some.sum())
        places = np.concatenate([places, block_places[some]])
        cosines = np.concatenate([cosines, block_cosines[some]])
        best = np.lexsort((authors[places], -cosines))[:count]
        places, cosines = places[best], cosines[best]
    return CosineRanking(places, np.clip(cosines, -1, 1), len(rows) - ranked)


def rank_by_codes(
    asked: np.ndarray,
    asked_runs: np.ndarray,
    latest: np.ndarray,
    runs: np.ndarray,
    counts: np.ndarray,
    authors: np.ndarray,
    count: int,
) -> CodeRanking:
    """Rank authors by the codes that they share with an author; the rule is at the top of this module.

    Args:
        asked: ``[levels]``, latest codes of the asked author.
        asked_runs: ``[r, levels]``, codes of its recent runs.
        latest: ``[m, levels]``, latest codes of each author.
        runs: ``[counts.sum(), levels]``, codes of the recent runs of each author, one author after another.
        counts: ``[m]`` int64, number of these runs, 1 or more.
        authors: ``[m]`` int64, distinct.
        count: largest number of ranked authors.
    """
    levels, recent = _shared_levels(asked, latest), np.zeros(len(authors), np.int64)
    if len(authors):
        starts = np.cumsum(counts) - counts
        for run in asked_runs:
            recent += np.maximum.reduceat(_shared_levels(run, runs), starts)
    some = np.flatnonzero((levels > 0) | (recent > 0))
    best = some[np.lexsort((authors[some], -recent[some], -levels[some]))[:count]]
    return CodeRanking(best, levels[best], recent[best])


def rooms_on_air(segments: DatasetSegments, as_of_ms: int) -> dict[int, int]:
    """Return author -> room for the authors with a room on air as of a time; of several rooms the latest."""
    known_ms, authors = segments.known_ms, segments.author_id
    near = (known_ms <= as_of_ms) & (known_ms >= as_of_ms - ON_AIR_MS) & (authors != UNKNOWN_AUTHOR)
    places = np.flatnonzero(near)
    places = places[np.argsort(known_ms[places], kind="stable")]
    # A later segment replaces an earlier one.
    return dict(zip(authors[places].tolist(), segments.item_id[places].tolist(), strict=True))


def retrieve_authors(dataset: str, request: AuthorRequest) -> dict[str, Any]:
    """Do the work of ``limelight retrieve authors``, and return its answer.

    Args:
        dataset: path or URL of the dataset.
        request: the question.

    Raises:
        UserError: files are missing, damaged or do not belong together; the time is not a time, or is before the first
            segment; or the author is not known at that time.
    """
    zone = DatasetSpec.load(dataset).timezone
    as_of_ms = parse_time(request.as_of, zone, "--as-of")
    _check_options(request)
    version = CodebookVersion.open(request.codebook) if request.codebook else None
    codes = _read_codes(Path(request.codes), version) if request.codes else None
    source: SegmentVectors | CodeFile
    if request.by != "vectors":
        assert codes is not None
        segments, embedded = segments_of_codes(dataset, codes)
        source, ids, place = codes, codes.segment, str(codes.path)
    else:
        source = SegmentVectors.open(dataset, request.vectors)
        ids, place = source.table.ids, str(source.table.path)
        if version is not None:
            version.check_vectors(place, source.table.dim, source.table.origin)
        embedded = has_text_ids(source.table.origin)
        segments = DatasetSegments.read(dataset, embedded)
        if codes is not None:
            check_segments(codes, segments)
    authors, places = _latest(source, as_of_ms)
    asked = _find_author(request, authors, source.author_id, source.known_ms, place, zone)
    rooms = rooms_on_air(segments, as_of_ms)
    others = np.flatnonzero(authors != request.author)
    if request.on_air:
        others = others[np.isin(authors[others], np.array(list(rooms), np.int64))]
    known_codes = None if codes is None else AuthorCodes(codes)
    scores: list[dict[str, Any]]
    left_out = 0
    if isinstance(source, CodeFile):
        assert known_codes is not None
        if request.by == "interactions":
            answered, scores = _by_interactions(
                dataset, request, source, segments, authors, asked, others, known_codes, as_of_ms
            )
        else:
            answered, scores = _by_codes(known_codes, authors[asked], authors[others], as_of_ms, request.count)
    else:
        ranking = rank_by_cosine(
            _direction(source, places[asked], request.author),
            source.table.vectors,
            places[others],
            authors[others],
            request.count,
        )
        answered, left_out = ranking.places, ranking.without_direction
        scores = [{"cosine": float(cosine)} for cosine in ranking.cosines]
    listed = np.concatenate([[asked], others[answered]])
    of_listed = places[listed]
    labels = label_segments(dataset, ids[of_listed], embedded, as_of_ms)
    latest_codes = None if known_codes is None else known_codes.latest(authors[listed], as_of_ms)
    entries = []
    for row, (author, of_author) in enumerate(zip(authors[listed].tolist(), of_listed.tolist(), strict=True)):
        entries.append(
            {
                "author": author,
                **(scores[row - 1] if row else {}),
                "codes": None if latest_codes is None else latest_codes[row],
                "room_on_air": rooms.get(author),
                "segment": int(ids[of_author]),
                "known_ms": int(source.known_ms[of_author]),
                "age_ms": as_of_ms - int(source.known_ms[of_author]),
                **labels[row],
            }
        )
    return {
        "as_of": request.as_of,
        "as_of_ms": as_of_ms,
        "timezone": zone,
        "by": request.by,
        "source": place,
        "codebook_version": None if codes is None else codes.version,
        "beside": ["codes", *["vectors"] * bool(request.vectors)] if request.by == "interactions" else [],
        "on_air_only": request.on_air,
        "compared": len(others) - left_out,
        "without_direction": left_out,
        "asked": entries[0],
        "authors": entries[1:],
    }


def retrieval_table(document: dict[str, Any]) -> str:
    """Format the answer of :func:`retrieve_authors` for a terminal."""
    by = document["by"]
    ways = {
        "codes": "shared levels of the latest codes",
        "vectors": "the cosine of the latest vectors",
        "interactions": "common users, behaviours and codes",
    }[by]
    which = " with a room on air" if document["on_air_only"] else ""
    others = "1 other author" if document["compared"] == 1 else f"{document['compared']:,} other authors"
    lines = [
        f"authors like {document['asked']['author']} by {ways}, as of {document['as_of']} ({document['timezone']}); "
        f"compared with {others}{which}"
    ]
    if document["without_direction"]:
        lines.append(f"left out, as their vector is zero or not finite: {document['without_direction']:,}")
    if by != "vectors" and document["compared"] and not document["authors"]:
        lines.append(f"none of them shares a {'code' if by == 'codes' else 'user, behaviour and code'} with it")
    entries = [document["asked"], *document["authors"]]
    with_codes = document["codebook_version"] is not None
    header = [
        "author",
        *_score_header(document),
        *["codes"] * with_codes,
        "room on air",
        "age",
    ]
    rows = []
    for place, entry in enumerate(entries):
        score = _score_cells(document, entry) if place else ["asked", *[""] * (len(_score_header(document)) - 1)]
        codes = [] if not with_codes else ["-" if entry["codes"] is None else "/".join(map(str, entry["codes"]))]
        room = "-" if entry["room_on_air"] is None else str(entry["room_on_air"])
        rows.append([str(entry["author"]), *score, *codes, room, age_text(entry["age_ms"])])
    table = text_table(header, rows, 0).splitlines()
    shown = ["segment", *(_label_text(entry) for entry in entries)]
    if any(shown[1:]):
        width = max(map(len, table))
        table = [f"{line.ljust(width)}  {text}".rstrip() for line, text in zip(table, shown, strict=True)]
    return "\n".join([*lines, *table])


class AuthorCodes:
    """Codes of a code file by author, read as of a time.

    Args:
        codes: the file.
    """

    def __init__(self, codes: CodeFile) -> None:
        number = np.zeros(len(codes), np.int64)
        for level, size in enumerate(codes.levels):
            # Distinct numbers after each level, so that their product with a size never overflows.
            number = np.unique(number * size + codes.codes[:, level], return_inverse=True)[1].reshape(-1)
        self._tuples = codes.codes[np.unique(number, return_index=True)[1]]
        self._runs = CodesAsOf(codes, number.astype(np.int32))

    def runs(self, authors: np.ndarray, as_of_ms: int, runs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of recent runs of each author, and the codes ``[counts.sum(), levels]`` of the runs."""
        found = self._runs.recent(authors, np.full(len(authors), as_of_ms), runs)
        return found.counts, self._tuples[found.code]

    def latest(self, authors: np.ndarray, as_of_ms: int) -> list[list[int] | None]:
        """Return the latest codes of each author; None for an author without a known code."""
        counts, codes = self.runs(authors, as_of_ms, 1)
        of_author = iter(codes.tolist())
        return [next(of_author) if count else None for count in counts.tolist()]


def _by_codes(
    codes: AuthorCodes, asked: int, authors: np.ndarray, as_of_ms: int, count: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the ranked places in ``authors``, all of which have codes, and the scores of each."""
    _, asked_runs = codes.runs(np.array([asked]), as_of_ms, RECENT_RUNS)
    counts, runs = codes.runs(authors, as_of_ms, RECENT_RUNS)
    # The oldest run of an author comes first, so the last one has the latest codes.
    latest = runs[np.cumsum(counts) - 1]
    ranking = rank_by_codes(asked_runs[-1], asked_runs, latest, runs, counts, authors, count)
    scores = [
        {"levels": int(levels), "recent": int(recent)}
        for levels, recent in zip(ranking.levels, ranking.recent, strict=True)
    ]
    return ranking.places, scores


def _by_interactions(
    dataset: str,
    request: AuthorRequest,
    codes: CodeFile,
    segments: DatasetSegments,
    authors: np.ndarray,
    asked: int,
    others: np.ndarray,
    known_codes: AuthorCodes,
    as_of_ms: int,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the ranked places in ``others``, and the scores of each with its ranks in the other comparisons."""
    similarity = AuthorSimilarity(asked, len(authors))
    start_ms = segments.start_ms[segments.rows_of(codes.segment)]
    for cells in coded_interactions(EventLog(dataset), codes, start_ms, authors, request.level or 1).cells(as_of_ms):
        similarity.add(cells)
    allowed = np.isin(np.arange(len(authors)), others)
    ranking = similarity.rank(authors, allowed, request.count)
    by_codes, _ = _by_codes(known_codes, authors[asked], authors[others], as_of_ms, len(others))
    ranks = {"codes": dict(zip(authors[others][by_codes].tolist(), range(1, len(others) + 1), strict=False))}
    if request.vectors:
        ranks["vectors"] = _vector_ranks(dataset, request, authors[asked], authors[others], as_of_ms)
    scores = [
        {
            "score": float(score),
            "users": int(users),
            "shared": int(shared),
            "ranks": {name: rank.get(int(authors[place])) for name, rank in ranks.items()},
        }
        for place, score, users, shared in zip(*ranking, strict=True)
    ]
    return np.searchsorted(others, ranking.places), scores


def _vector_ranks(
    dataset: str, request: AuthorRequest, asked: int, others: np.ndarray, as_of_ms: int
) -> dict[int, int]:
    """Return author -> rank by the cosine of the latest vectors of a table, among the others that have one."""
    source = SegmentVectors.open(dataset, request.vectors)
    authors, places = _latest(source, as_of_ms)
    at = _find_author(request, authors, source.author_id, source.known_ms, str(source.table.path), source.timezone)
    some = np.isin(authors, others)
    query = _direction(source, places[at], asked)
    ranking = rank_by_cosine(query, source.table.vectors, places[some], authors[some], len(others))
    return dict(zip(authors[some][ranking.places].tolist(), range(1, len(others) + 1), strict=False))


def _score_header(document: dict[str, Any]) -> list[str]:
    """Return the names of the columns of the scores."""
    if document["by"] == "interactions":
        return ["score", "users", *(f"by {name}" for name in document["beside"])]
    return ["levels", "recent"] if document["by"] == "codes" else ["cosine"]


def _score_cells(document: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Return the scores of an author, in the order of the columns."""
    if document["by"] == "interactions":
        ranks = (entry["ranks"][name] for name in document["beside"])
        return [
            f"{entry['score']:.4f}",
            f"{entry['users']:,}",
            *("-" if rank is None else f"{rank:,}" for rank in ranks),
        ]
    if document["by"] == "codes":
        return [str(entry["levels"]), str(entry["recent"])]
    return [f"{entry['cosine']:.4f}"]


def _shared_levels(asked: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the number of levels up to the first difference from ``asked [levels]``, ``[n, levels] -> [n]`` int64."""
    return np.cumprod(codes == asked, axis=1, dtype=np.int64).sum(1)


def _check_options(request: AuthorRequest) -> None:
    """Raise a UserError if an option has no effect, or one is missing."""
    if request.by != "vectors" and not request.codes:
        raise UserError(f"--by {request.by} needs --codes FILE, a code file; `limelight quantize assign` makes one")
    if request.by != "interactions" and request.level is not None:
        raise UserError("--level needs --by interactions, which compares codes of some levels")
    if request.by == "codes" and request.vectors:
        raise UserError("--vectors has no effect with --by codes; leave one of them out")
    if request.codebook and not request.codes:
        raise UserError("--codebook needs --codes FILE, whose version is compared with it")


def _read_codes(path: Path, version: CodebookVersion | None) -> CodeFile:
    return CodeFile.read(path) if version is None else read_codes(path, version)


def _latest(source: SegmentVectors | CodeFile, as_of_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the authors with a segment that is known, ascending, and the place of the latest one of each."""
    known_ms = source.known_ms
    authors = np.unique(source.author_id[(known_ms <= as_of_ms) & (source.author_id != UNKNOWN_AUTHOR)])
    index = SegmentIndex(source.author_id, source.item_id, known_ms - SEGMENT_MS, known_ms)
    return authors, index.latest(authors, np.full(len(authors), as_of_ms))


def _find_author(
    request: AuthorRequest, authors: np.ndarray, author_id: np.ndarray, known_ms: np.ndarray, place: str, zone: str
) -> int:
    """Return the place of the asked author in ``authors``.

    Raises:
        UserError: it is not there; the message says what is.
    """
    found = np.flatnonzero(authors == request.author)
    if len(found):
        return int(found[0])
    some = author_id != UNKNOWN_AUTHOR
    if not some.any():
        raise UserError(f"{place}: has no segment of a known author")
    if not len(authors):
        raise UserError(
            f"--as-of {request.as_of}: no segment of {place} is known then; the first is known from "
            f"{time_text(int(known_ms[some].min()), zone)} on"
        )
    of_author = author_id == request.author
    if request.author != UNKNOWN_AUTHOR and of_author.any():
        raise UserError(
            f"--author {request.author}: no segment of this author is known at --as-of {request.as_of}; the first is "
            f"known from {time_text(int(known_ms[of_author].min()), zone)} on"
        )
    raise UserError(
        f"--author {request.author}: {place} has no segment of this author; {len(authors):,} authors are known at "
        f"--as-of {request.as_of}, such as {', '.join(map(str, authors[:3]))}"
    )


def _direction(source: SegmentVectors, row: int, author: int) -> np.ndarray:
    """Return the vector of the asked author.

    Raises:
        UserError: it is zero or not finite.
    """
    vector = np.asarray(source.table.vectors[row])
    if not np.isfinite(vector).all() or not vector.any():
        raise UserError(
            f"--author {author}: the vector of segment {source.table.ids[row]} in {source.table.path} is zero or not "
            "finite, so no author is near it; make the vectors again"
        )
    return vector


def _label_text(entry: dict[str, Any]) -> str:
    """Return topic and text of a segment in one line."""
    text = " ".join((entry["text"] or "").split())
    text = text if len(text) <= _TEXT_WIDTH else f"{text[: _TEXT_WIDTH - 3]}..."
    return ": ".join(part for part in (entry["topic"], text) if part)
