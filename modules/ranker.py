"""The dense part of the ranking model: from looked-up embeddings to one logit a behaviour."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from modules.din import TargetAttention
from modules.embeddings import Lookup
from modules.esu import Parts, SequenceAttention
from modules.multitask import NetworkKind, Towers, build_network
from modules.pooling import mean_by_row, sum_by_row

RankerKind = NetworkKind | Literal["logistic"]

AttentionKind = Literal["din", "multi_head", "twin"]
"""How histories are read: ``modules/din.py``, ``modules/esu.py``, or the latter with TWIN's split."""


class History(Protocol):
    """Lookups that together are a sequence of visits.

    Attributes:
        name: of the history.
        keys: lookups of an entry; each has ``Lookup.ids_per_entry`` ids an entry, the first of them 1. Those with more
            than one are the context of user and entry, which are TWIN's cross features; they come last.
        query: lookups of the candidate that are compared with the entries.
        max_length: most entries of a row.
        alike: features that both have, beside the ids of tables that both read: (lookup of the candidate, which of its
            ids, lookup of an entry, which of its ids). The same in all histories, but for the names.
    """

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def query(self) -> Sequence[str]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def alike(self) -> Sequence[tuple[str, int, str, int]]: ...


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
        attention_kind: how histories are read.
        attention: hidden widths of the network of ``din``.
        heads: of the other kinds, and ``head_dim`` the width of each.
        query_ids: lookup of fixed length -> which of its ids describe the candidate and not the user or the request;
            for ``multi_head`` and ``twin`` they are part of the query, beside the histories' own.
        query_dense: columns of the dense features of which the same is true.
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
        attention_kind: AttentionKind = "din",
        attention: Sequence[int] = (64, 16),
        heads: int = 4,
        head_dim: int = 16,
        query_ids: Mapping[str, Sequence[int]] | None = None,
        query_dense: Sequence[int] = (),
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
        self.attention: nn.ModuleList | SequenceAttention | None = None
        read_widths = list(key_dims.values())
        if kind != "logistic" and attention_kind == "din":
            self.attention = nn.ModuleList(
                TargetAttention(sum(row_widths[name] for name in history.query), key_dims[history.name], attention)
                for history in self.sequences
            )
        elif kind != "logistic" and self.sequences:
            asked = [name for history in self.sequences for name in history.query]
            self.query_columns = _columns(row_widths, declared, dims, asked, query_ids or {}, query_dense)
            cross = [name for name in self.sequences[0].keys if declared[name].ids_per_entry > 1]
            self.attention = SequenceAttention(
                len(self.query_columns),
                self._one_layout(),
                [history.max_length for history in self.sequences],
                heads,
                head_dim,
                len(cross) if attention_kind == "twin" else 0,
                self._alike(row_widths, declared, dims, cross if attention_kind == "twin" else ()),
            )
            read_widths = [self.attention.out_features] * len(self.sequences)
        in_features = sum(row_widths.values()) + sum(read_widths) + n_dense
        self.network: nn.Module
        if kind == "logistic":
            self.network = nn.Linear(in_features, behaviours)
            return
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
    def init_output_bias(self, base_rates: Tensor) -> None:
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
        rows, dense = self._rows(embedded, lengths, dense)
        return self.network(_join([*rows.values(), *self._read(embedded, lengths, rows, dense), dense])).float()

    @torch.no_grad()
    def attention_weights(
        self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], dense: Tensor
    ) -> dict[str, Tensor]:
        """How much attention each entry of each history gets, ``[entries, heads]`` float32: 1 in all for row and head.

        For looking at few rows; arguments as of :meth:`forward`. Where histories are averaged, all entries of a row get
        the same.
        """
        rows, dense = self._rows(embedded, lengths, dense)
        counts = [lengths[history.keys[0]] for history in self.sequences]
        entries = [self._entries(history, embedded) for history in self.sequences]
        if isinstance(self.attention, SequenceAttention):
            found = self.attention.attention_weights(self._query(rows, dense), entries, counts)
        elif self.attention is None:
            found = [(1 / count.repeat_interleave(count))[:, None] for count in counts]
        else:
            found = []
            for index, history in enumerate(self.sequences):
                attention = self.attention[index]
                assert isinstance(attention, TargetAttention)
                query = _join([rows[name] for name in history.query])
                found.append(attention.attention_weights(query, _join(entries[index]).to(dense.dtype), counts[index]))
        return {history.name: share.float() for history, share in zip(self.sequences, found, strict=True)}

    def _rows(
        self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], dense: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs that no history reads: lookup name -> ``[batch, width]``, and ``dense``, of the parameters' type."""
        # The inputs follow the parameters, which a mixed-precision engine may have cast.
        dtype = next(self.network.parameters()).dtype
        rows = {
            lookup.name: _by_row(lookup, embedded[lookup.name].to(dtype), lengths, len(dense))
            for lookup in self.candidate
        }
        return rows, dense.to(dtype)

    def _query(self, rows: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """All that describes the candidate, ``[batch, width]``."""
        return _join([*rows.values(), dense])[:, self.query_columns]

    def _read(
        self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], rows: Mapping[str, Tensor], dense: Tensor
    ) -> list[Tensor]:
        """What is read from the histories, ``[batch, width]`` each, or all of them together."""
        counts = [lengths[history.keys[0]] for history in self.sequences]
        if isinstance(self.attention, SequenceAttention):
            entries = [self._entries(history, embedded) for history in self.sequences]
            return [self.attention(self._query(rows, dense), entries, counts)]
        found = []
        for index, (history, count) in enumerate(zip(self.sequences, counts, strict=True)):
            keys = _join([part.to(dense.dtype) for part in self._entries(history, embedded)])
            if self.attention is None:
                found.append(mean_by_row(keys, count))
            else:
                query = _join([rows[name] for name in history.query])
                found.append(self.attention[index](query, keys, count, history.max_length))
        return found

    def _entries(self, history: History, embedded: Mapping[str, Tensor]) -> Parts:
        entries = len(embedded[history.keys[0]])
        return [embedded[name].view(entries, self.key_widths[name]) for name in history.keys]

    def _alike(
        self,
        row_widths: Mapping[str, int],
        lookups: Mapping[str, Lookup],
        dims: Mapping[str, int],
        left_out: Sequence[str],
    ) -> list[tuple[int, int]]:
        """Columns of the query and of an entry that are read from the same table and mean the same."""
        history = self.sequences[0]
        pairs = [
            (name, 0, key, 0)
            for key in history.keys
            for name in history.query
            if lookups[key].ids_per_entry == 1
            and lookups[name].length == 1
            and lookups[key].table == lookups[name].table
        ]
        place_in_query = {column: place for place, column in enumerate(self.query_columns)}
        rows, entries = (
            dict(zip(widths, itertools.accumulate(widths.values(), initial=0), strict=False))
            for widths in (row_widths, {key: self.key_widths[key] for key in history.keys})
        )
        return [
            (place_in_query[rows[name] + dim * own + column], entries[key] + dim * other + column)
            for name, own, key, other in (*pairs, *history.alike)
            if key not in left_out
            for dim in (dims[lookups[key].table],)
            for column in range(dim)
        ]

    def _one_layout(self) -> list[int]:
        """Widths of the parts of an entry, of all histories."""
        first, *others = ([self.key_widths[name] for name in history.keys] for history in self.sequences)
        for widths in others:
            if widths != first:
                raise ValueError(
                    f"histories are read together only if their entries are alike, not {first} and {widths}"
                )
        return first


def _columns(
    row_widths: Mapping[str, int],
    lookups: Mapping[str, Lookup],
    dims: Mapping[str, int],
    whole: Sequence[str],
    ids: Mapping[str, Sequence[int]],
    dense: Sequence[int],
) -> list[int]:
    """Which columns of the rows' inputs, the dense features last, are those of some lookups, of some ids of others and
    of some dense features."""
    columns, first = [], 0
    for name, width in row_widths.items():
        dim = dims[lookups[name].table]
        chosen = range(width // dim) if name in whole else ids.get(name, ())
        columns += [first + dim * place + at for place in chosen for at in range(dim)]
        first += width
    return [*columns, *(first + column for column in dense)]


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
        return mean_by_row(values, count) if lookup.pooling == "mean" else sum_by_row(values, count)
    by_id = values.view(batch, lookup.length, values.shape[1])
    match lookup.pooling:
        case "none":
            return by_id.flatten(1)
        case "sum":
            return by_id.sum(1)
        case "mean":
            return by_id.mean(1)
