"""Time of each kind of attention over one history, and the share of it that matrix products take.

A compiled loop has to compute the same products. So what it could gain at most is the time of all else, and of products
that are below the processor's rate. The kinds of ``model.attention_kind`` read the same entries and candidates:

* ``multi_head`` and ``twin``: ``modules/esu.py``, by PyTorch's operations; there is no other form;
* ``din operations`` and ``din loops``: ``modules/din.py`` in both of its forms.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modules.din import TargetAttention
from modules.esu import SequenceAttention

GROUPS = {
    "products": ("mm", "bmm", "addmm", "baddbmm", "mv"),
    "softmax": ("_softmax", "_softmax_backward_data", "softplus", "logsumexp", "exp", "expm1", "log", "amax", "sum"),
    "copies": ("cat", "copy_", "index", "index_select", "_index_put_impl_", "zero_", "fill_", "masked_fill_"),
}
"""Operations of each group. Time that is in none of them is "other", as is that of Python inside an operation."""

PASSES = ("forward", "backward")

_GROUP_OF = {f"aten::{operation}": group for group, operations in GROUPS.items() for operation in operations}


class AttentionCall(NamedTuple):
    """One kind of attention on given entries: what runs it, and what gets gradients."""

    run: Callable[[], Tensor]
    gradients_of: Sequence[Tensor]


class KindSizes(NamedTuple):
    """Sizes of candidates, entries and networks.

    Attributes:
        query: width of a candidate.
        parts: widths of the parts of an entry; the last one is a cross feature for ``twin``.
        longest: largest number of entries of a row.
        heads, head_dim: of ``multi_head`` and ``twin``.
        hidden: widths of the hidden layers of ``din``.
    """

    query: int
    parts: tuple[int, ...]
    longest: int
    heads: int
    head_dim: int
    hidden: tuple[int, ...]


def kinds_of_attention(sizes: KindSizes, lengths: Tensor, loops: bool) -> dict[str, AttentionCall]:
    """Return each kind on the same random entries, with random parameters.

    Args:
        sizes: widths.
        lengths: entries of each row, ``[rows]`` int64.
        loops: also ``din`` by its compiled loops.
    """
    query = torch.randn(len(lengths), sizes.query).requires_grad_()
    parts = [torch.randn(int(lengths.sum()), width).requires_grad_() for width in sizes.parts]
    calls = {}
    for name, cross in (("multi_head", 0), ("twin", 1)):
        attention = SequenceAttention(
            sizes.query, sizes.parts, [sizes.longest], sizes.heads, sizes.head_dim, cross_parts=cross
        )

        def heads(attention: SequenceAttention = attention) -> Tensor:
            out: Tensor = attention(query, [parts], [lengths])
            return out

        calls[name] = AttentionCall(heads, [query, *parts, *attention.parameters()])
    for name in ("din operations", *(["din loops"] if loops else [])):
        network = TargetAttention(sizes.query, sum(sizes.parts), sizes.hidden, name == "din loops")

        def din(network: TargetAttention = network) -> Tensor:
            out: Tensor = network(query, torch.cat(parts, 1), lengths, sizes.longest)
            return out

        calls[name] = AttentionCall(din, [query, *parts, *network.parameters()])
    return calls


def shares_of(call: AttentionCall, rounds: int) -> dict[str, dict[str, float]]:
    """Return pass -> group of operations -> its share of the time that PyTorch's profiler sees, over some rounds."""
    spent: dict[str, Counter[str]] = {name: Counter() for name in PASSES}
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as forward:
            result = call.run()
        slope = torch.ones_like(result)
        with profile(activities=[ProfilerActivity.CPU]) as backward:
            torch.autograd.grad(result, call.gradients_of, slope)
        for name, found in zip(PASSES, (forward, backward), strict=True):
            for event in found.key_averages():
                spent[name][_GROUP_OF.get(event.key, "other")] += event.self_cpu_time_total
    return {
        name: {group: of_pass[group] / of_pass.total() for group in (*GROUPS, "other")}
        for name, of_pass in spent.items()
    }


def operations_of(call: AttentionCall) -> dict[str, int]:
    """Return pass -> floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as forward:
        result = call.run()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(result, call.gradients_of, torch.ones_like(result))
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def parts_of_attention(
    sizes: KindSizes,
    lengths: Mapping[str, Tensor],
    loops: bool,
    seconds_of: Callable[[AttentionCall], tuple[float, float]],
    rounds: int,
) -> list[dict[str, Any]]:
    """Return times, shares and operations of every kind.

    Args:
        sizes: widths.
        lengths: name -> entries of each row.
        loops: also ``din`` by its compiled loops, which have no operations that could be told apart.
        seconds_of: runs both passes, and returns their processor seconds.
        rounds: runs of each kind, by turns.
    """
    rows = []
    for name, of_rows in lengths.items():
        calls = kinds_of_attention(sizes, of_rows, loops)
        for call in calls.values():
            seconds_of(call)
        times = [{kind: seconds_of(call) for kind, call in calls.items()} for _ in range(rounds)]
        for kind, call in calls.items():
            of_kind = dict(zip(PASSES, zip(*(found[kind] for found in times), strict=True), strict=True))
            rows.append(
                {
                    "lengths": name,
                    "kind": kind,
                    "entries": int(of_rows.sum()),
                    **{
                        f"{part}_seconds": {"median": statistics.median(found), "range": [min(found), max(found)]}
                        for part, found in of_kind.items()
                    },
                    "shares": None if kind == "din loops" else shares_of(call, rounds),
                    "operations": operations_of(calls["din operations"] if kind == "din loops" else call),
                }
            )
    return rows
