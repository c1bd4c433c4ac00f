"""The dense part of the ranking model: from looked-up embeddings to one logit a behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from modules.embeddings import Lookup
from modules.esu import TargetAttention
from modules.multitask import NetworkKind, Towers, build_network

RankerKind = NetworkKind | Literal["logistic"]


class History(Protocol):
    """Lookups that together are a sequence of visits.

    Attributes:
        name: of the history.
        keys: lookups of an entry; each has ``Lookup.ids_per_entry`` ids an entry, the first of them 1.
        query: lookups of the candidate that are compared with the entries.
        max_length: most entries of a row.
    """

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def query(self) -> Sequence[str]: ...
    @property
    def max_length(self) -> int: ...


class Ranker(nn.Module):
    """Embeddings, histories read by target attention, and dense features, into a multi-task network.

    Inputs are concatenated in the order of the lookups (those that no history reads), then the histories, then the
    dense features. With ``kind="logistic"`` the network is a single linear layer and histories are averaged instead.

    Args:
        behaviours: K, number of logits.
        lookups: of the tables, histories' included.
        dims: table name -> embedding dimension.
        n_dense: number of dense features.
        sequences: the histories.
        kind: of the network.
        task_experts: experts of each behaviour in a layer (PLE, CGC; MMoE has as many in all as CGC).
        shared_experts: shared experts in a layer.
        expert_layers: widths of the experts, for each layer; only PLE has more than the first.
        tower: hidden widths of a behaviour's tower.
        attention: hidden widths of target attention.
        dropout: in experts and towers.

    Raises:
        ValueError: a history of unknown lookups, a lookup of unknown table, or one of variable length that neither a
            history reads nor a pooling joins.
    """

    def __init__(
        self,
        behaviours: int,
        lookups: Sequence[Lookup],
        dims: Mapping[str, int],
        n_dense: int,
        sequences: Sequence[History],
        kind: RankerKind = "ple",
        task_experts: int = 2,
        shared_experts: int = 2,
        expert_layers: Sequence[Sequence[int]] = ((256, 128), (128, 64)),
        tower: Sequence[int] = (64,),
        attention: Sequence[int] = (64, 16),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        declared = {lookup.name: lookup for lookup in lookups}
        _check(declared, dims, sequences)
        self.sequences = tuple(sequences)
        self.key_widths = {
            name: declared[name].ids_per_entry * dims[declared[name].table]
            for history in self.sequences
            for name in history.keys
        }
        self.candidate = tuple(lookup for lookup in lookups if lookup.name not in self.key_widths)
        row_widths = {
            lookup.name: dims[lookup.table] * (lookup.length or 1 if lookup.pooling == "none" else 1)
            for lookup in self.candidate
        }
        key_dims = {history.name: sum(self.key_widths[name] for name in history.keys) for history in self.sequences}
        in_features = sum(row_widths.values()) + sum(key_dims.values()) + n_dense
        self.attention: nn.ModuleList | None = None
        self.network: nn.Module
        if kind == "logistic":
            self.network = nn.Linear(in_features, behaviours)
            return
        self.attention = nn.ModuleList(
            TargetAttention(sum(row_widths[name] for name in history.query), key_dims[history.name], attention)
            for history in self.sequences
        )
        network = build_network(
            kind,
            in_features,
            behaviours,
            task_experts=task_experts,
            shared_experts=shared_experts,
            layers=expert_layers,
            dropout=dropout,
        )
        self.network = nn.Sequential(network, Towers(network.out_features, behaviours, tower, dropout))

    @torch.no_grad()
    def start_at(self, base_rates: Tensor) -> None:
        """Let the first predictions be about these rates ``[behaviours]``, in (0, 1): the last bias is their logit.

        Otherwise rare behaviours spend their first hundred steps on learning how rare they are.
        """
        last = self.network[-1] if isinstance(self.network, nn.Sequential) else self.network
        assert isinstance(last, nn.Linear | Towers)
        last.bias.copy_(torch.logit(base_rates).view_as(last.bias))

    def forward(self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Score a batch; a batch of no rows is scored too, and gives every parameter a gradient of zeros.

        Args:
            embedded: lookup name -> values ``[ids, dim]`` of all rows, one row after another.
            lengths: lookup name -> ids of each row, ``[batch]`` int64, for lookups of variable length.
            dense: ``[batch, n_dense]``.

        Returns:
            Logits ``[batch, behaviours]``, float32 whatever the type of the parameters.
        """
        # The inputs follow the parameters, which a mixed-precision engine may have cast.
        dtype = next(self.network.parameters()).dtype
        rows = {
            lookup.name: _by_row(lookup, embedded[lookup.name].to(dtype), lengths, len(dense))
            for lookup in self.candidate
        }
        parts = list(rows.values())
        for index, history in enumerate(self.sequences):
            count = lengths[history.keys[0]]
            entries = len(embedded[history.keys[0]])
            keys = _join([embedded[name].to(dtype).view(entries, self.key_widths[name]) for name in history.keys])
            if self.attention is None:
                parts.append(_mean_by_row(keys, count))
            else:
                query = _join([rows[name] for name in history.query])
                parts.append(self.attention[index](query, keys, count, history.max_length))
        return self.network(_join([*parts, dense.to(dtype)])).float()


def _check(lookups: Mapping[str, Lookup], dims: Mapping[str, int], sequences: Sequence[History]) -> None:
    read = {name for history in sequences for name in history.keys}
    for history in sequences:
        for name in (*history.keys, *history.query):
            if name not in lookups:
                raise ValueError(f"history {history.name!r} reads {name!r}, which is not a lookup")
        for name in history.keys:
            if lookups[name].length is not None or lookups[name].pooling != "none":
                raise ValueError(f"history {history.name!r} reads {name!r}, which is not a sequence")
        if lookups[history.keys[0]].ids_per_entry != 1:
            raise ValueError(f"history {history.name!r}: its first key {history.keys[0]!r} must have one id an entry")
        for name in history.query:
            if name in read:
                raise ValueError(f"history {history.name!r}: its query {name!r} is itself an entry of a history")
    for lookup in lookups.values():
        if lookup.table not in dims:
            raise ValueError(f"lookup {lookup.name!r} reads table {lookup.table!r}, whose dimension is not given")
        if lookup.length is None and lookup.pooling == "none" and lookup.name not in read:
            raise ValueError(f"lookup {lookup.name!r} varies in length: a history must read it or a pooling join it")


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate columns; one part needs no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _by_row(lookup: Lookup, values: Tensor, lengths: Mapping[str, Tensor], batch: int) -> Tensor:
    """``[ids, dim]`` -> ``[batch, width]``, joined as the lookup says."""
    if lookup.length is None:
        count = lengths[lookup.name]
        return _mean_by_row(values, count) if lookup.pooling == "mean" else _sum_by_row(values, count)
    by_id = values.view(batch, lookup.length, values.shape[1])
    match lookup.pooling:
        case "none":
            return by_id.flatten(1)
        case "sum":
            return by_id.sum(1)
        case "mean":
            return by_id.mean(1)


def _sum_by_row(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of ``values [sum of lengths, dim]`` over each row, ``[batch, dim]``."""
    row = torch.repeat_interleave(lengths, output_size=len(values))
    return values.new_zeros(len(lengths), values.shape[1]).index_add(0, row, values)


def _mean_by_row(values: Tensor, lengths: Tensor) -> Tensor:
    """Means of ``values [sum of lengths, dim]`` over each row, ``[batch, dim]``; zeros for rows without values."""
    return _sum_by_row(values, lengths) / lengths.clamp(min=1)[:, None].to(values.dtype)
