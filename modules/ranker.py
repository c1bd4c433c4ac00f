"""Dense part of the ranking model: from looked-up embeddings to one logit for each behaviour."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from modules.content import BatchVectors, VectorProjections
from modules.din import TargetAttention
from modules.embeddings import Lookup
from modules.esu import Parts, SequenceAttention
from modules.multitask import BatchedMLP, NetworkKind, Towers, build_network
from modules.pooling import mean_by_row, sum_by_row

RankerKind = NetworkKind | Literal["logistic"]

AttentionKind = Literal["din", "multi_head", "twin"]
"""Attention over histories: ``modules/din.py``, ``modules/esu.py``, or the latter with TWIN's split."""


class History(Protocol):
    """Lookups that together form a sequence of visits.

    Attributes:
        name: name of the history.
        keys: lookups of an entry. Each has ``Lookup.ids_per_entry`` ids for each entry; the first lookup has 1. Lookups
            with more than one hold the context of user and entry, which are TWIN's cross features; they come last.
        query: lookups of the candidate that are compared with the entries.
        max_length: largest number of entries of a row.
        alike: further pairs of the same feature of candidate and entry, beside ids that both read from one table, as
            (lookup of the candidate, index of its id, lookup of an entry, index of its id). All histories have the same
            pairs, with other names.
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
    """Multi-task network over embeddings, histories read by target attention, and dense features.

    Inputs are concatenated: first the lookups that no history reads, in their order, then the histories, then the dense
    features. With ``kind="logistic"`` the network is a single linear layer and histories are averaged instead.

    Args:
        behaviours: K, number of logits.
        lookups: lookups of the tables, those of histories included.
        dims: table name -> embedding dimension.
        n_dense: number of dense features.
        sequences: the histories.
        kind: kind of the network.
        task_experts: experts of each behaviour in a layer (PLE, CGC; MMoE has the same total number as CGC).
        shared_experts: shared experts in a layer.
        expert_layers: widths of the experts of each layer; only PLE uses more than the first layer.
        dcn_layers: number of DCN's cross layers.
        dcn_rank: rank of DCN's matrices; 0 for full matrices.
        tower: hidden widths of a behaviour's tower.
        attention_kind: kind of the attention over histories.
        attention: hidden widths of the network of ``din``.
        compiled_attention: compute ``din`` by compiled loops on CPUs that have the instructions.
        compiled_experts: compute the layers of experts and towers by compiled loops on such CPUs, in float32.
        heads: number of heads of the other kinds.
        head_dim: width of each head of the other kinds.
        query_ids: lookup of fixed length -> indices of its ids that describe the candidate and not the user or the
            request; for ``multi_head`` and ``twin`` they are part of the query, beside the histories' own lookups.
        query_dense: columns of the dense features that describe the candidate; used in the same way.
        dropout: dropout in experts and towers.
        content: table of pre-trained vectors -> width of its vectors; a lookup of such a table reads the vectors'
            projection, whose width is in ``dims``.

    Raises:
        ValueError: a history reads an unknown lookup, a lookup reads an unknown table, or a lookup of variable length
            has no pooling and no history that reads it.
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
        dcn_layers: int = 3,
        dcn_rank: int = 0,
        tower: Sequence[int] = (64,),
        attention_kind: AttentionKind = "din",
        attention: Sequence[int] = (64, 16),
        compiled_attention: bool = True,
        compiled_experts: bool = True,
        heads: int = 4,
        head_dim: int = 16,
        query_ids: Mapping[str, Sequence[int]] | None = None,
        query_dense: Sequence[int] = (),
        dropout: float = 0.0,
        content: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.content = VectorProjections({name: (width, dims[name]) for name, width in (content or {}).items()})
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
        self._query_index: Tensor | None = None
        read_widths = list(key_dims.values())
        if kind != "logistic" and attention_kind == "din":
            self.attention = nn.ModuleList(
                TargetAttention(
                    sum(row_widths[name] for name in history.query),
                    key_dims[history.name],
                    attention,
                    compiled_attention,
                )
                for history in self.sequences
            )
        elif kind != "logistic" and self.sequences:
            query_lookups = [name for history in self.sequences for name in history.query]
            self.query_columns = columns_of(row_widths, declared, dims, query_lookups, query_ids or {}, query_dense)
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
            dcn_layers=dcn_layers,
            dcn_rank=dcn_rank,
            dropout=dropout,
        )
        self.network = nn.Sequential(network, Towers(network.out_features, behaviours, tower, dropout))
        for module in self.network.modules():
            if isinstance(module, BatchedMLP):
                module.compiled = compiled_experts

    @torch.no_grad()
    def init_output_bias(self, base_rates: Tensor) -> None:
        """Set the last bias to the logits of ``base_rates [behaviours]``, in (0, 1).

        The first predictions are then close to these rates. Otherwise a rare behaviour needs its first hundred steps
        to learn its rate.
        """
        last = self.network[-1] if isinstance(self.network, nn.Sequential) else self.network
        assert isinstance(last, nn.Linear | Towers)
        last.bias.copy_(torch.logit(base_rates).view_as(last.bias))

    def forward(
        self,
        embedded: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        dense: Tensor,
        content: Mapping[str, BatchVectors] | None = None,
    ) -> Tensor:
        """Score a batch; it may be empty, and then every parameter gets a gradient of zeros.

        Args:
            embedded: lookup name -> values ``[ids, dim]`` of all rows, one row after another.
            lengths: lookup name -> number of ids of each row, ``[batch]`` int64, for lookups of variable length.
            dense: ``[batch, n_dense]``.
            content: table of pre-trained vectors -> its vectors; a model without such tables needs none.

        Returns:
            Logits ``[batch, behaviours]``, always float32.
        """
        embedded = self._with_content(embedded, content)
        rows, dense = self._rows(embedded, lengths, dense)
        return self.network(_join([*rows.values(), *self._read(embedded, lengths, rows, dense), dense])).float()

    @torch.no_grad()
    def attention_weights(
        self,
        embedded: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        dense: Tensor,
        content: Mapping[str, BatchVectors] | None = None,
    ) -> dict[str, Tensor]:
        """Return the attention weights of each history's entries, ``[entries, heads]`` float32.

        The weights of a row sum to 1 for each head. Where histories are averaged, all entries of a row have the same
        weight. This is slow and meant for few rows; the arguments are those of :meth:`forward`.
        """
        embedded = self._with_content(embedded, content)
        rows, dense = self._rows(embedded, lengths, dense)
        counts = [lengths[history.keys[0]] for history in self.sequences]
        entries = [self._entries(history, embedded) for history in self.sequences]
        if isinstance(self.attention, SequenceAttention):
            weights = self.attention.attention_weights(self._query(rows, dense), entries, counts)
        elif self.attention is None:
            weights = [(1 / count.repeat_interleave(count))[:, None] for count in counts]
        else:
            weights = []
            for index, history in enumerate(self.sequences):
                attention = self.attention[index]
                assert isinstance(attention, TargetAttention)
                query = _join([rows[name] for name in history.query])
                weights.append(attention.attention_weights(query, _join(entries[index]).to(dense.dtype), counts[index]))
        return {history.name: of_history.float() for history, of_history in zip(self.sequences, weights, strict=True)}

    def _with_content(
        self, embedded: Mapping[str, Tensor], content: Mapping[str, BatchVectors] | None
    ) -> Mapping[str, Tensor]:
        """Return the values of all lookups: of tables, and of the projected pre-trained vectors."""
        if not self.content:
            return embedded
        assert content is not None, "the model has tables of pre-trained vectors, and the batch has no vectors"
        projected: dict[str, Tensor] = {}
        for name, projection in self.content.items():
            projected |= projection(content[name])
        return {**embedded, **projected}

    def _rows(
        self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], dense: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs that no history reads, lookup name -> ``[batch, width]``, and ``dense``.

        Both are cast to the type of the parameters, which a mixed-precision engine may have changed.
        """
        dtype = next(self.network.parameters()).dtype
        rows = {
            lookup.name: _by_row(lookup, embedded[lookup.name].to(dtype), lengths, len(dense))
            for lookup in self.candidate
        }
        return rows, dense.to(dtype)

    def _query(self, rows: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Return all features of the candidate, ``[batch, width]``."""
        inputs = _join([*rows.values(), dense])
        # A list as an index would be copied to the device in every step, and the host would wait for it. A buffer would
        # be one more tensor of the checkpoints.
        if self._query_index is None or self._query_index.device != inputs.device:
            self._query_index = torch.tensor(self.query_columns, dtype=torch.int64, device=inputs.device)
        return inputs[:, self._query_index]

    def _read(
        self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], rows: Mapping[str, Tensor], dense: Tensor
    ) -> list[Tensor]:
        """Return the pooled entries of each history, ``[batch, width]``, or of all histories in one tensor."""
        counts = [lengths[history.keys[0]] for history in self.sequences]
        if isinstance(self.attention, SequenceAttention):
            entries = [self._entries(history, embedded) for history in self.sequences]
            return [self.attention(self._query(rows, dense), entries, counts)]
        pooled = []
        for index, (history, count) in enumerate(zip(self.sequences, counts, strict=True)):
            keys = _join([part.to(dense.dtype) for part in self._entries(history, embedded)])
            if self.attention is None:
                pooled.append(mean_by_row(keys, count))
            else:
                query = _join([rows[name] for name in history.query])
                pooled.append(self.attention[index](query, keys, count, history.max_length))
        return pooled

    def _entries(self, history: History, embedded: Mapping[str, Tensor]) -> Parts:
        """Return the parts of a history's entries, ``[entries, width of the part]`` each."""
        entries = len(embedded[history.keys[0]])
        return [embedded[name].view(entries, self.key_widths[name]) for name in history.keys]

    def _alike(
        self,
        row_widths: Mapping[str, int],
        lookups: Mapping[str, Lookup],
        dims: Mapping[str, int],
        left_out: Sequence[str],
    ) -> list[tuple[int, int]]:
        """Return pairs of a column of the query and a column of an entry that hold the same feature."""
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
        """Return the widths of the parts of an entry, which must be the same in all histories."""
        first, *others = ([self.key_widths[name] for name in history.keys] for history in self.sequences)
        for widths in others:
            if widths != first:
                raise ValueError(
                    f"histories that are read together must have entries of the same widths, not {first} and {widths}"
                )
        return first


def columns_of(
    row_widths: Mapping[str, int],
    lookups: Mapping[str, Lookup],
    dims: Mapping[str, int],
    whole: Sequence[str],
    ids: Mapping[str, Sequence[int]],
    dense: Sequence[int],
) -> list[int]:
    """Return the columns, within a row's inputs, of some lookups and dense features.

    Args:
        row_widths: lookup name -> width of its part of the inputs; the dense features follow the lookups.
        lookups: lookup name -> lookup.
        dims: table name -> embedding dimension.
        whole: lookups of which all columns are returned.
        ids: other lookups -> indices of the ids whose columns are returned.
        dense: dense features that are returned.
    """
    columns, first = [], 0
    for name, width in row_widths.items():
        dim = dims[lookups[name].table]
        chosen = range(width // dim) if name in whole else ids.get(name, ())
        columns += [first + dim * place + at for place in chosen for at in range(dim)]
        first += width
    return [*columns, *(first + column for column in dense)]


def _check(lookups: Mapping[str, Lookup], dims: Mapping[str, int], sequences: Sequence[History]) -> None:
    """Raise a ValueError if lookups, tables and histories do not fit together."""
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
    """Concatenate columns, without a copy if there is only one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _by_row(lookup: Lookup, values: Tensor, lengths: Mapping[str, Tensor], batch: int) -> Tensor:
    """Turn values ``[ids, dim]`` into ``[batch, width]`` by the lookup's pooling."""
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
