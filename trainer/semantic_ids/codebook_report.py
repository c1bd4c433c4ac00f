"""Quality of a codebook on segments that it was not fitted on: numbers, a table, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from modules.codebook import Codebook, squared_distances
from trainer.console.text_table import text_table
from trainer.runtime.files import whole_file
from trainer.runtime.host_copy import HostCopy, one_behind, to_device
from trainer.semantic_ids.segments import SegmentVectors, TimeRange
from trainer.semantic_ids.vector_source import hash_rows

TOP_SHARE = 0.01
"""Share of the codes of which the report says how many segments they hold."""

CURVE_POINTS = 101
"""Points of the curve of use: 0 %, 1 %, ... of the codes, the most frequent ones first."""

Report = dict[str, Any]


class EncodedSegments(NamedTuple):
    """Codes of n segments, and sums over their vectors.

    Attributes:
        codes: ``[n, levels] int32``.
        hashes: ``[n] uint64``, equal for equal vectors.
        errors: ``[levels] float64``, sum of the squared errors after each level.
        total: ``[dim] float64``, sum of the vectors.
        squares: sum of their squared norms.
    """

    codes: np.ndarray
    hashes: np.ndarray
    errors: np.ndarray
    total: np.ndarray
    squares: float

    @staticmethod
    def join(parts: Sequence[EncodedSegments]) -> EncodedSegments:
        """Return the segments of several parts, one after the other."""
        codes, hashes, errors, totals, squares = zip(*parts, strict=True)
        return EncodedSegments(
            np.concatenate(codes), np.concatenate(hashes), np.sum(errors, 0), np.sum(totals, 0), math.fsum(squares)
        )


def encode_segments(
    codebook: Codebook, segments: SegmentVectors, rows: np.ndarray, device: torch.device | str = "cpu"
) -> EncodedSegments:
    """Encode the vectors of some rows, which ascend, block by block."""
    codebook = codebook.to(device)
    # With fewer levels, the error of the residuals' sum after each level.
    prefixes = [
        Codebook(codebook.levels[:place], codebook.normalize, codebook.scales[:place])
        for place in range(1, len(codebook.levels) + 1)
    ]
    levels = len(codebook.levels)
    codes, hashes = np.empty((len(rows), levels), np.int32), np.empty(len(rows), np.uint64)
    errors, total, squares = np.zeros(levels), np.zeros(codebook.dim), 0.0

    def copies() -> Iterator[tuple[Any, HostCopy]]:
        for at, block in segments.blocks(rows):
            vectors = to_device(torch.from_numpy(block), torch.device(device)).float()
            found, _ = codebook.encode(vectors)
            of_levels = []
            for place, prefix in enumerate(prefixes):
                decoded = prefix.decode(found[:, : place + 1])
                own = torch.arange(len(vectors), device=device)
                of_levels.append(squared_distances(vectors, decoded, own).double().sum())
            hashes[at] = hash_rows(block)
            doubles = vectors.double()
            yield at, HostCopy((found, torch.stack(of_levels), doubles.sum(0), (doubles**2).sum()))

    for at, (found, of_levels, of_columns, of_squares) in one_behind(copies()):
        codes[at] = found.numpy()
        errors += of_levels.numpy()
        total += of_columns.numpy()
        squares += float(of_squares)
    return EncodedSegments(codes, hashes, errors, total, squares)


def measure(encoded: EncodedSegments, segments: SegmentVectors, rows: np.ndarray, sizes: Sequence[int]) -> Report:
    """Return the report of a codebook on the segments of some rows.

    Args:
        encoded: their codes.
        segments: the dataset's segments.
        rows: ``[n] int64``, ascending, n above 0.
        sizes: number of codes of each level.
    """
    n = len(rows)
    variance = encoded.squares / n - float(((encoded.total / n) ** 2).sum())
    earlier, later = segments.neighbours(rows)
    equal = encoded.codes[earlier] == encoded.codes[later]
    levels = []
    for place, size in enumerate(sizes):
        distortion = float(encoded.errors[place]) / n
        levels.append(
            {
                "codes": size,
                "distortion": distortion,
                "of_variance": distortion / variance if variance > 0 else 0.0,
                **_use(np.bincount(encoded.codes[:, place], minlength=size)),
                "persistence": float(equal[:, place].mean()) if len(equal) else None,
            }
        )
    tuples = _tuple_numbers(encoded.codes, sizes)
    _, first = np.unique(encoded.hashes, return_index=True)
    in_tuple = np.bincount(tuples[first])
    return {
        "segments": n,
        "distinct_vectors": len(first),
        "neighbours": len(equal),
        "variance": variance,
        "levels": levels,
        "tuples": {
            "possible": math.prod(sizes),
            "used": int(tuples.max()) + 1,
            "alone": float((in_tuple == 1).sum() / len(first)),
            "largest": int(in_tuple.max()),
            "persistence": float(equal.all(axis=1).mean()) if len(equal) else None,
        },
    }


def range_document(times: TimeRange) -> dict[str, int]:
    """Return a range of time as it stands in a report."""
    return {"from_ms": times.from_ms, "until_ms": times.until_ms}


HEADER = (
    *("version", "level", "codes", "distortion", "of variance", "unused", "perplexity", "Gini", "top 1 %"),
    *("persistence", "alone"),
)


def report_table(reports: Mapping[str, Report]) -> str:
    """Return a table of reports by version: a line for each level, and one for the tuples of several levels."""
    lines = []
    for version, report in reports.items():
        for number, level in enumerate(report["levels"], 1):
            lines.append(
                [
                    *(version, str(number), f"{level['codes']:,}", f"{level['distortion']:.4g}"),
                    *(_percent(level["of_variance"]), _percent(level["unused"]), f"{level['perplexity']:,.0f}"),
                    *(f"{level['gini']:.2f}", _percent(level["top"]), _percent(level["persistence"])),
                    _percent(report["tuples"]["alone"]) if len(report["levels"]) == 1 else "",
                ]
            )
        if len(report["levels"]) > 1:
            tuples = report["tuples"]
            used = f"{tuples['used']:,} used"
            ends = [_percent(tuples["persistence"]), _percent(tuples["alone"])]
            lines.append([version, "tuple", used, *[""] * 6, *ends])
    return text_table(HEADER, lines, texts=2)


def refresh_text(refresh: Mapping[str, Any]) -> str:
    """Return the shares of segments that keep their code over a refresh, as a table."""
    kept = refresh["kept"]
    levels = len(next(iter(kept.values()))["levels"])
    header = ("start", "numbers", *(f"level {number + 1}" for number in range(levels)), "all levels")
    lines = [
        [*name.rsplit(", ", 1), *(f"{share:.2%}" for share in (*shares["levels"], shares["tuple"]))]
        for name, shares in kept.items()
    ]
    title = f"segments that keep their code, of {refresh['segments']:,} (old version {refresh['from']}):"
    return f"{title}\n{text_table(header, lines, texts=2)}"


def draw_reports(reports: Mapping[str, Report], path: Path) -> None:
    """Draw reports into a PNG file: distortion, use of the codes, unused codes, and persistence.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((distortion, use), (unused, steady)) = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    labels, shares, tuples = [], [], []
    for version, report in reports.items():
        sizes = [level["codes"] for level in report["levels"]]
        bits = np.cumsum(np.log2(sizes))
        of_variance = [100 * level["of_variance"] for level in report["levels"]]
        distortion.plot(bits, of_variance, marker="o", label=version)
        for number, level in enumerate(report["levels"], 1):
            name = f"{version}, level {number}" if len(sizes) > 1 else version
            use.plot(np.linspace(0, 100, CURVE_POINTS), 100 * np.array(level["curve"]), label=name)
            labels.append(f"{version}\nlevel {number}, N = {level['codes']:,}")
            persistence = level["persistence"] or 0.0
            shares.append((level["unused"], level["top"], level["perplexity"] / level["codes"], persistence))
        if len(sizes) > 1:
            tuples.append((f"{version}\nall levels", report["tuples"]["persistence"] or 0.0))
    distortion.set(xlabel="bits of the codes so far, log2(N) summed over levels", ylim=(0, None))
    distortion.set(ylabel="distortion, % of the vectors' variance", title="Held-out distortion after each level")
    distortion.legend(fontsize=8)
    use.plot([0, 100], [0, 100], color="grey", linestyle=":", label="all codes equally frequent")
    use.set(xlabel="codes, %, the most frequent ones first", ylabel="segments, %", title="Use of the codes")
    use.legend(fontsize=8)
    values = 100 * np.array(shares)
    place = np.arange(len(labels))
    for number, name in enumerate(("unused codes", "segments in the top 1 % of codes", "perplexity / N")):
        bars = unused.barh(place + 0.26 * (number - 1), values[:, number], 0.26, label=name)
        unused.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    unused.set(xlabel="%", title="Spread over the codes")
    unused.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)
    unused.set_yticks(place, labels, fontsize=8)
    names = [*labels, *(name for name, _ in tuples)]
    persistence = [*values[:, 3], *(100 * share for _, share in tuples)]
    bars = steady.barh(np.arange(len(names)), persistence, 0.5, color="tab:purple")
    steady.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    steady.set(xlabel="pairs with one code, % of neighbouring segments of a room", title="Persistence")
    steady.set_yticks(np.arange(len(names)), names, fontsize=8)
    for axes in (unused, steady):
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
    for axes in (distortion, use, unused, steady):
        axes.grid(alpha=0.3)
    with whole_file(path) as tmp_path:
        figure.savefig(tmp_path, format="png", dpi=110)
    pyplot.close(figure)


def _use(counts: np.ndarray) -> dict[str, Any]:
    """Return how evenly ``counts [N]`` segments are spread over codes."""
    shares = np.sort(counts)[::-1] / max(1, counts.sum())
    some = shares[shares > 0]
    cumulated = np.concatenate([[0.0], np.cumsum(shares)])
    at = np.linspace(0, len(counts), CURVE_POINTS)
    # Mean of the curve above the diagonal, scaled so that one code with everything has 1 - 1 / N.
    gini = 2 * float(cumulated[1:].mean()) - 1 - 1 / len(counts)
    return {
        "unused": float((counts == 0).mean()),
        "perplexity": float(np.exp(-(some * np.log(some)).sum())),
        "gini": gini,
        "top": float(shares[: max(1, round(TOP_SHARE * len(counts)))].sum()),
        "curve": np.interp(at, np.arange(len(counts) + 1), cumulated).tolist(),
    }


def _tuple_numbers(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return a number for each tuple that occurs, from 0 on without gaps, ``[n] int64``."""
    number = np.zeros(len(codes), np.int64)
    for place, size in enumerate(sizes):
        number = np.unique(number * size + codes[:, place], return_inverse=True)[1]
    return number


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
