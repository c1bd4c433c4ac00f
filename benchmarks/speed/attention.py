"""Measure what ragged attention saves against padded attention, and what compiled loops save.

    python -m benchmarks.speed.attention --out benchmarks/results/attention.json

Rows of a batch have five sequences of at most 100 entries: all full, of random lengths, or of random lengths with every
other row empty. Three ways are compared, forward and backward by turns on the same data; the fastest round of each
counts:

* ``ours``: ``modules/esu.py``, one call for all sequences;
* ``padded``: the same attention with the same weights, as the paper writes it down, sequence by sequence on padded
  entries; results and gradients must be the same;
* ``din``: the Deep Interest Network's attention of ``modules/din.py``, which is another function of the same entries.

A second comparison is of the Deep Interest Network's attention alone, over one history of the throughput benchmark:
the compiled loops of ``modules/din_loops.py`` against PyTorch's operations, by turns on the same data, with the median
and the range of all rounds.

A third one is of all kinds of attention over one history: how much of their time are matrix products, which is what a
compiled loop cannot save (``benchmarks/speed/attention_parts.py``).

One thread, float32 unless stated. Times are processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measure import make_parser, write_result
from benchmarks.speed.attention_parts import AttentionCall, KindSizes, parts_of_attention
from modules.din import TargetAttention
from modules.esu import SequenceAttention
from modules.vector_code import instructions_for
from trainer.console.text_table import text_table

SHORT = ("--rounds", "3")

SEQUENCES, LONGEST = 5, 100
PARTS, QUERY_DIM, HEADS, HEAD_DIM = (16, 16, 32), 64, 4, 16
LENGTHS = ("full", "random", "half empty")
TOLERANCE = 1e-4
"""Largest difference between the first two ways, as a share of the largest value."""

HISTORY_LENGTH, HISTORY_DIM, HIDDEN = 50, 16, (64, 16)
"""A history of the throughput benchmark, and its network."""

Way = Callable[[], Tensor]


class RaggedBatch(NamedTuple):
    """Candidates, one a row, and the parts and lengths of each sequence."""

    query: Tensor
    sequences: list[list[Tensor]]
    lengths: list[Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        """Tensors that get gradients."""
        return [self.query, *(part for sequence in self.sequences for part in sequence)]


def make_batch(rows: int, kind: str) -> RaggedBatch:
    """Return random entries in sequences whose lengths are one of :data:`LENGTHS`."""
    lengths = []
    for _ in range(SEQUENCES):
        length = torch.full((rows,), LONGEST) if kind == "full" else torch.randint(LONGEST + 1, (rows,))
        lengths.append(length * (torch.arange(rows) % 2) if kind == "half empty" else length)
    sequences = [[torch.randn(int(each.sum()), dim).requires_grad_() for dim in PARTS] for each in lengths]
    return RaggedBatch(torch.randn(rows, QUERY_DIM).requires_grad_(), sequences, lengths)


def padded(attention: SequenceAttention, batch: RaggedBatch) -> Tensor:
    """Return equation 7 of Moment&Cross on padded entries ``[rows, 100, dim]``, as `SequenceAttention.forward` does."""
    found = []
    for index, (parts, lengths) in enumerate(zip(batch.sequences, batch.lengths, strict=True)):
        rows = len(lengths)
        # The newest entries stand at the end.
        inside = torch.arange(LONGEST) >= LONGEST - lengths[:, None]
        entries = batch.query.new_zeros(rows, LONGEST, sum(PARTS))
        entries[inside] = torch.cat(list(parts), 1)
        query = (batch.query @ attention.query[index]).view(rows, HEADS, 1, HEAD_DIM) / HEAD_DIM**0.5
        keys = torch.einsum("bld,hed->bhle", entries, attention.key[index])
        values = torch.einsum("bld,hde->bhle", entries, attention.value[index])
        scores = torch.matmul(query, keys.transpose(2, 3)) + attention.place[index][:, None]
        outside = ~inside[:, None, None]
        scores = scores.masked_fill(outside, torch.finfo(scores.dtype).min)
        shares = scores.softmax(3).masked_fill(outside, 0)
        mass = functional.softplus(scores.logsumexp(3, keepdim=True))
        found.append(torch.cat([torch.matmul(shares, values), mass], 3).flatten(1))
    return torch.cat(found, 1)


def deep_interest(networks: nn.ModuleList, batch: RaggedBatch) -> Tensor:
    """Return the Deep Interest Network's attention, sequence by sequence."""
    return torch.cat(
        [
            network(batch.query, torch.cat(list(parts), 1), lengths, LONGEST)
            for network, parts, lengths in zip(networks, batch.sequences, batch.lengths, strict=True)
        ],
        1,
    )


def difference(one: Way, other: Way, gradients_of: Sequence[Tensor]) -> float:
    """Return the largest difference of results and gradients, as a share of the largest value."""
    both = []
    for way in (one, other):
        result = way()
        both.append([result.detach(), *torch.autograd.grad(result.square().sum(), gradients_of)])
    return max(float((first - second).abs().max() / second.abs().max()) for first, second in zip(*both, strict=True))


def time_of(way: Way, gradients_of: Sequence[Tensor]) -> tuple[float, float]:
    """Return the processor seconds of the forward and of the backward pass."""
    begin = time.process_time()
    result = way()
    between = time.process_time()
    torch.autograd.grad(result, gradients_of, torch.ones_like(result))
    return between - begin, time.process_time() - between


def times_by_turns(ways: Mapping[str, Way], gradients_of: Sequence[Tensor], rounds: int) -> dict[str, dict[str, Any]]:
    """Return ``forward_seconds`` and ``backward_seconds`` of each way, median and range; the ways run by turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(time_of(way, gradients_of))
    return {
        name: {
            f"{part}_seconds": {"median": statistics.median(found), "range": [min(found), max(found)]}
            for part, found in zip(("forward", "backward"), zip(*of_way, strict=True), strict=True)
        }
        for name, of_way in times.items()
    }


def compare(rows: int, kind: str, rounds: int) -> list[dict[str, Any]]:
    """Return the times of all ways for sequences whose lengths are one of :data:`LENGTHS`.

    Raises:
        SystemExit: the first two ways do not agree.
    """
    batch = make_batch(rows, kind)
    attention = SequenceAttention(QUERY_DIM, PARTS, [LONGEST] * SEQUENCES, HEADS, HEAD_DIM)
    nn.init.normal_(attention.place)
    networks = nn.ModuleList(TargetAttention(QUERY_DIM, sum(PARTS), (64, 16)) for _ in range(SEQUENCES))
    ways: dict[str, tuple[Way, list[Tensor]]] = {
        "ours": (
            lambda: attention(batch.query, batch.sequences, batch.lengths),
            [*batch.inputs, *attention.parameters()],
        ),
        "padded": (lambda: padded(attention, batch), [*batch.inputs, *attention.parameters()]),
        "din": (lambda: deep_interest(networks, batch), [*batch.inputs, *networks.parameters()]),
    }
    apart = difference(ways["ours"][0], ways["padded"][0], ways["ours"][1])
    if apart > TOLERANCE:
        raise SystemExit(f"{kind}: ours and padded differ by {apart:.1e} of the largest value")
    fastest = dict.fromkeys(ways, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, (way, gradients_of) in ways.items():
            forward, backward = time_of(way, gradients_of)
            fastest[name] = (min(fastest[name][0], forward), min(fastest[name][1], backward))
    entries = sum(int(each.sum()) for each in batch.lengths)
    return [
        {
            "lengths": kind,
            "entries": entries,
            "way": name,
            "forward_seconds": forward,
            "backward_seconds": backward,
            "times_ours": (forward + backward) / sum(fastest["ours"]),
            "difference": apart if name == "padded" else None,
        }
        for name, (forward, backward) in fastest.items()
    ]


def compare_loops(rows: int, kind: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Return the times of the Deep Interest Network's attention over one history, by loops and by PyTorch's operations.

    Args:
        rows: of the batch, each with a history.
        kind: ``full`` or ``random`` lengths.
        dtype: of entries and parameters.
        rounds: runs of both, by turns.

    Raises:
        SystemExit: the results or the gradients in float32 do not agree.
    """
    lengths = torch.full((rows,), HISTORY_LENGTH) if kind == "full" else torch.randint(HISTORY_LENGTH + 1, (rows,))
    inputs = [torch.randn(rows, HISTORY_DIM), torch.randn(int(lengths.sum()), HISTORY_DIM)]
    leaves = [value.to(dtype).requires_grad_() for value in inputs]
    network = TargetAttention(HISTORY_DIM, HISTORY_DIM, HIDDEN).to(dtype)
    gradients_of = [*leaves, *network.parameters()]

    def by(compiled: bool) -> Way:
        def way() -> Tensor:
            network.compiled = compiled
            out: Tensor = network(*leaves, lengths, HISTORY_LENGTH)
            return out

        return way

    ways = {"loops": by(compiled=True), "operations": by(compiled=False)}
    apart = difference(ways["loops"], ways["operations"], gradients_of)
    if dtype == torch.float32 and apart > TOLERANCE:
        raise SystemExit(f"one history, {kind}: loops and operations differ by {apart:.1e} of the largest value")
    return [
        {
            "lengths": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "entries": len(inputs[1]),
            "way": name,
            **seconds,
            "difference": apart,
        }
        for name, seconds in times_by_turns(ways, gradients_of, rounds).items()
    ]


def report_loops(rows: list[dict[str, Any]]) -> str:
    """Return the times of loops and operations as a table, in milliseconds."""
    lines = [
        [row["lengths"], row["dtype"], row["way"], f"{row['entries']:,}"]
        + [f"{1000 * row[f'{part}_seconds']['median']:.1f}" for part in ("forward", "backward")]
        for row in rows
    ]
    return text_table(["one history", "type", "way", "entries", "forward ms", "backward ms"], lines, texts=3)


def profile_kinds(rows: int, rounds: int) -> list[dict[str, Any]]:
    """Return the parts of the time of every kind of attention, over one history with full and with random lengths."""
    sizes = KindSizes(QUERY_DIM, PARTS, HISTORY_LENGTH, HEADS, HEAD_DIM, HIDDEN)
    lengths = {
        "full": torch.full((rows,), HISTORY_LENGTH),
        "random": torch.randint(HISTORY_LENGTH + 1, (rows,)),
    }

    def seconds_of(call: AttentionCall) -> tuple[float, float]:
        return time_of(call.run, call.gradients_of)

    return parts_of_attention(sizes, lengths, instructions_for(torch.device("cpu")) is not None, seconds_of, rounds)


def report_kinds(rows: list[dict[str, Any]]) -> str:
    """Return times and shares of the kinds of attention as a table."""
    lines = []
    for row in rows:
        cells = [row["lengths"], row["kind"]]
        for part in ("forward", "backward"):
            share = f"{row['shares'][part]['products']:.0%}" if row["shares"] else ""
            cells += [f"{1000 * row[f'{part}_seconds']['median']:.1f}", share]
        lines.append(cells)
    header = ["lengths", "kind", "forward ms", "products", "backward ms", "products"]
    return text_table(header, lines, texts=2)


def report(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table."""
    lines = [
        [
            row["lengths"],
            row["way"],
            f"{row['entries']:,}",
            f"{row['forward_seconds']:.3f}",
            f"{row['backward_seconds']:.3f}",
            f"{row['times_ours']:.2f}",
        ]
        for row in rows
    ]
    return text_table(["lengths", "way", "entries", "forward s", "backward s", "times ours"], lines, texts=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.attention", __doc__)
    parser.add_argument("--rows", type=int, default=1024, help="rows of a batch (default: %(default)s)")
    parser.add_argument(
        "--history-rows", type=int, default=2048, help="rows with one history each (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each way (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    rows = [row for kind in LENGTHS for row in compare(options.rows, kind, options.rounds)]
    print(report(rows))
    one_history = []
    if instructions_for(torch.device("cpu")):
        one_history = [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for kind in LENGTHS[:2]
            for row in compare_loops(options.history_rows, kind, dtype, options.rounds)
        ]
        print(report_loops(one_history))
    parts = profile_kinds(options.history_rows, options.rounds)
    print(report_kinds(parts))
    settings = {
        "rows": options.rows,
        "sequences": SEQUENCES,
        "longest": LONGEST,
        "entry_dims": PARTS,
        "query_dim": QUERY_DIM,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "history": {"rows": options.history_rows, "longest": HISTORY_LENGTH, "dim": HISTORY_DIM, "hidden": HIDDEN},
        "instructions": instructions_for(torch.device("cpu")),
    }
    document = {"attention": rows, "one_history": one_history, "parts": parts, "settings": settings}
    write_result(options.out, {**document, "load_average": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
