"""Measure how alike the neighbours of an author are, by the world's truth.

    python -m benchmarks.quality.neighbours --work runs/neighbours --out benchmarks/results/neighbours.json

The world is simulated with segment vectors, and ``--taste`` of the variance of the authors' styles follows what viewers
like. At the end of the log, each author gets ``--neighbours`` nearest authors in several ways: by common users,
behaviours and codes (``limelight retrieve authors --by interactions``), the same without codes, by the codes that they
share, by raw vectors, by the vectors of the two towers of LARM, and at random.

Agreement is the mean cosine of the true vectors of an author and of its neighbours, less that of all pairs of authors.
Two truths are looked at: the style of what authors show, and the traits that decide who likes them; vectors are centred
over the authors. Both are known for the simulated world only, and no method reads them. Intervals are over authors
(bootstrap): an author with all of its neighbours is drawn.

Every finished part is kept under ``--work``, so the same command continues a benchmark that was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, run_limelight, write_result
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.data.format.content_vectors import SEGMENT_VECTORS, ContentVectors
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import DatasetSegments
from trainer.data.simulator.config import DAY_MS, START_MS, WorldConfig
from trainer.data.simulator.population import make_authors, make_genres
from trainer.data.simulator.segment_vectors import DEFAULT_NOISE, author_traits
from trainer.data.simulator.write_dataset import simulate
from trainer.metrics.user_bootstrap import interval
from trainer.semantic_ids.co_interactions import AuthorSimilarity, coded_interactions
from trainer.semantic_ids.retrieval import RECENT_RUNS, AuthorCodes, rank_by_codes, rank_by_cosine
from trainer.stream.labels.event_log import EventLog

USERS, DAYS, PARTITIONS, WORLD_SEED = 3000, 7, 4, 1
DRAWS = 1000
ALIGN_JOB, QUANTIZE_JOB = "configs/align.toml", "configs/quantize.toml"

INTERACTIONS, WITHOUT_CODES, CODES = "interactions", "interactions without codes", "shared codes"
RAW, TOWERS, RANDOM = "raw vectors", "two towers", "random"
METHODS = (INTERACTIONS, WITHOUT_CODES, CODES, RAW, TOWERS, RANDOM)
TRUTHS = ("style", "traits")

Neighbours = list[np.ndarray]
"""Places of the neighbours of each author, at most as many as asked."""


def latest_rows(segments: DatasetSegments, rows: np.ndarray, authors: np.ndarray) -> np.ndarray:
    """Return the place in ``rows`` of the latest segment of each author; ``rows [n]`` are rows of ``segments``."""
    order = np.lexsort((segments.known_ms[rows], segments.author_id[rows]))
    last = np.searchsorted(segments.author_id[rows][order], authors, side="right") - 1
    return order[last]


def by_vectors(table: ContentVectors, segments: DatasetSegments, authors: np.ndarray, count: int) -> Neighbours:
    """Return the neighbours by the cosine of the latest vectors."""
    rows = latest_rows(segments, segments.rows_of(table.ids), authors)
    vectors, places = np.asarray(table.vectors[rows], np.float64), np.arange(len(authors))
    found = []
    for place in range(len(authors)):
        others = places[places != place]
        ranking = rank_by_cosine(vectors[place], vectors, others, authors[others], count)
        found.append(others[ranking.places])
    return found


def by_codes(codes: CodeFile, authors: np.ndarray, as_of_ms: int, count: int) -> Neighbours:
    """Return the neighbours by the codes that authors share."""
    known = AuthorCodes(codes)
    counts, runs = known.runs(authors, as_of_ms, RECENT_RUNS)
    stops = np.cumsum(counts)
    latest = runs[stops - 1]
    found = []
    for place in range(len(authors)):
        own = runs[stops[place] - counts[place] : stops[place]]
        # The author itself comes first, and is left out.
        ranking = rank_by_codes(own[-1], own, latest, runs, counts, authors, count + len(authors))
        found.append(ranking.places[ranking.places != place][:count])
    return found


def by_interactions(
    log: EventLog, codes: CodeFile, start_ms: np.ndarray, authors: np.ndarray, as_of_ms: int, level: int, count: int
) -> Neighbours:
    """Return the neighbours by common users, behaviours and codes; with ``level`` 0 all codes are the same."""
    if not level:
        codes = CodeFile(**{**vars(codes), "codes": np.zeros_like(codes.codes)})
    parts = list(coded_interactions(log, codes, start_ms, authors, max(1, level)).cells(as_of_ms))
    everyone, found = np.ones(len(authors), bool), []
    for place in range(len(authors)):
        similarity = AuthorSimilarity(place, len(authors))
        for cells in parts:
            similarity.add(cells)
        found.append(similarity.rank(authors, everyone, count).places)
    return found


def true_vectors(world: Path, config: WorldConfig, authors: np.ndarray) -> dict[str, np.ndarray]:
    """Return truth -> vector of each author, ``[authors, dim]``, centred and of length 1."""
    table = read_table(DatasetFiles(world), "truth/segment_vectors.parquet")
    part, ids, time_ms = (np.array(table[name].to_pylist()) for name in ("part", "id", "time_ms"))
    # The style and its drift on the last day.
    own = np.flatnonzero((part == "author") & (time_ms == START_MS + config.days * DAY_MS))
    own = own[np.argsort(ids[own])]
    styles = np.array(table["vector"].take(own).to_pylist())[np.searchsorted(ids[own], authors)]
    traits = author_traits(make_authors(config, make_genres(config)))[authors]
    found = {}
    for name, vectors in zip(TRUTHS, (styles, traits), strict=True):
        centred = vectors - vectors.mean(0)
        found[name] = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return found


def agreement(neighbours: Neighbours, truth: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return the mean cosine of authors and their neighbours, less that of all pairs, with an interval over authors.

    Authors without a neighbour count in ``without`` only.
    """
    cosines = truth @ truth.T
    others = (cosines.sum(1) - 1) / max(1, len(truth) - 1)
    gains = np.array(
        [cosines[place, near].mean() - others[place] for place, near in enumerate(neighbours) if len(near)]
    )
    if not len(gains):
        return {"mean": None, "low": None, "high": None, "without": len(neighbours)}
    rng = np.random.default_rng(seed)
    draws = np.array([gains[rng.integers(0, len(gains), len(gains))].mean() for _ in range(DRAWS)])
    low, high = interval(draws)
    return {"mean": float(gains.mean()), "low": low, "high": high, "without": len(neighbours) - len(gains)}


def overlap(first: Neighbours, second: Neighbours) -> float | None:
    """Return the mean share of the first neighbours that are among the second; None without any."""
    shares = [float(np.isin(one, two).mean()) for one, two in zip(first, second, strict=True) if len(one)]
    return float(np.mean(shares)) if shares else None


def table_of(result: Mapping[str, Any]) -> str:
    """Format the agreement by method."""
    lines = []
    for method, found in result.items():
        cells = [
            "-" if found[truth]["mean"] is None else "{mean:.3f} ({low:.3f}, {high:.3f})".format(**found[truth])
            for truth in TRUTHS
        ]
        shared = "-" if found["overlap"] is None else f"{found['overlap']:.0%}"
        lines.append([method, *cells, shared, str(found["style"]["without"])])
    return text_table(["neighbours by", "style", "traits", "also by interactions", "without"], lines)


def measure(work: Path, options: Any) -> dict[str, Any]:
    """Make the world and what the methods need, where it is not there, and return the result of each method."""
    world, towers, codebook = work / "world", work / "towers", work / "codebook"
    codes_file = work / "codes.parquet"
    config = WorldConfig(options.users, options.days, WORLD_SEED)
    if not world.exists():
        work.mkdir(parents=True, exist_ok=True)
        size = (options.users, options.days, PARTITIONS, WORLD_SEED)
        simulate(world, *size, segment_noise=DEFAULT_NOISE, segment_taste=options.taste)
    if not (towers / "metrics.json").exists():
        day = f"2024-03-{3 + options.days:02d}"
        paths = [f"data.path={world}", f"run.directory={towers}", f"data.eval_from={day}"]
        run_limelight("align", ALIGN_JOB, *paths, *options.overrides)
    if not codes_file.exists():
        levels = [f"codebook.levels=[{options.codes}]", "codebook.iterations=10", 'data.fit_until=""']
        run_limelight("quantize", QUANTIZE_JOB, f"data.path={world}", f"codebook.directory={codebook}", *levels)
        run_limelight("quantize", "assign", codebook, world, codes_file)
    segments, codes = DatasetSegments.read(str(world), False), CodeFile.read(codes_file)
    log, authors = EventLog(world), np.unique(codes.author_id)
    as_of_ms = int(codes.known_ms.max())
    start_ms, count = segments.start_ms[segments.rows_of(codes.segment)], options.neighbours
    rng = np.random.default_rng(options.users)
    found: dict[str, Neighbours] = {
        INTERACTIONS: by_interactions(log, codes, start_ms, authors, as_of_ms, 1, count),
        WITHOUT_CODES: by_interactions(log, codes, start_ms, authors, as_of_ms, 0, count),
        CODES: by_codes(codes, authors, as_of_ms, count),
        RAW: by_vectors(ContentVectors.open(world / SEGMENT_VECTORS), segments, authors, count),
        TOWERS: by_vectors(ContentVectors.open(towers / "authors"), segments, authors, count),
        RANDOM: [
            rng.choice(np.delete(np.arange(len(authors)), place), min(count, len(authors) - 1), replace=False)
            for place in range(len(authors))
        ],
    }
    truth = true_vectors(world, config, authors)
    return {
        "authors": len(authors),
        "methods": {
            method: {name: agreement(near, vectors) for name, vectors in truth.items()}
            | {"overlap": overlap(near, found[INTERACTIONS])}
            for method, near in found.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.neighbours", __doc__)
    parser.add_argument("--work", type=local_argument, default=Path("runs/neighbours"), help="keeps all parts")
    parser.add_argument("--users", type=int, default=USERS, help="users of the world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=DAYS, help="days of the world (default: %(default)s)")
    parser.add_argument("--taste", type=float, default=0.5, help="share of the styles that follows what viewers like")
    parser.add_argument("--codes", type=int, default=32, help="codes of the codebook (default: %(default)s)")
    parser.add_argument("--neighbours", type=int, default=10, help="of each author (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the two towers")
    options = parser.parse_args(argv)
    jobs = {job: job for job in (ALIGN_JOB, QUANTIZE_JOB)}
    begin_work("quality.neighbours", options, free=("neighbours",), contents=jobs)
    torch.set_num_threads(1)
    result = measure(options.work, options)
    print(table_of(result["methods"]))
    facts = {
        "question": "likeness of an author's neighbours by the truth of a simulated world",
        "world": {name: getattr(options, name) for name in ("users", "days", "taste")},
        "codes": options.codes,
        "neighbours": options.neighbours,
        "draws": DRAWS,
        "overrides": options.overrides,
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
