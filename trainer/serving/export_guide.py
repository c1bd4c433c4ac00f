"""The guide of an exported model: what a serving system of another program needs to compute the same probabilities.

::

    README.md            each tensor, the inputs in their order, and the steps from a row to a probability
    inputs.json          the same rules for programs: rows of ids, ranges of side features, numbers, histories
    inputs.safetensors   known ids of tables with a vocabulary, features of authors; only if the model has some
    row.json             a row to begin with: every feature unknown, no history
    score_one.py         scores a row in plain PyTorch, for this model alone

All of it is made from the export's own files and from ``dataset.json``, which says of which side a feature is. The
templates are ``README.md.jinja`` and ``score_one.py.jinja``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from safetensors.numpy import save_file

from modules.content import EPSILON
from modules.embeddings import Lookup
from modules.ranker import columns_of
from trainer.config.ranker import JobConfig
from trainer.data.features.code_sets import CODE_TABLE, CodeSet, code_set_of
from trainer.data.features.dense_inputs import smoothing_strength
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import ID_TABLES, FittedFeatures, feature_layout
from trainer.data.features.id_map import hash_salt
from trainer.data.features.packed_side import (
    ACTION_BITS,
    ACTIONS_RANGE,
    AGE_RANGE,
    DOMAIN_RANGE,
    PAST_DOMAIN_RANGE,
    side_ranges,
)
from trainer.data.features.past_counts import past_name
from trainer.data.format.safetensors_header import read_header
from trainer.data.format.schema import DOMAINS, DatasetSpec
from trainer.engine.build_ranker import candidate_dense, candidate_ids
from trainer.runtime.files import write_json

README, INPUTS, INPUT_TENSORS, ROW, SCRIPT = (
    "README.md",
    "inputs.json",
    "inputs.safetensors",
    "row.json",
    "score_one.py",
)


def write_guide(directory: Path, config: JobConfig, origin: Mapping[str, Any], weights: str, features: str) -> None:
    """Write the guide's files into an export.

    Args:
        directory: the export, with weights and fitted features.
        config: settings of the job that trained the model.
        origin: content of the export's ``export.json``.
        weights: name of the safetensors file with tables and network.
        features: name of the folder with the fitted features.

    Raises:
        UserError: the dataset of the job is not there, or the fitted features are damaged or of another dataset.
        OSError: a file cannot be written.
    """
    spec = DatasetSpec.load(config.data.path)
    fitted = FittedFeatures.load(directory / features)
    mapped = FeatureMap(spec, config.features, fitted, config.data.behaviours)
    tensors = _input_tensors(mapped)
    if tensors:
        save_file(tensors, directory / INPUT_TENSORS)
    rules = input_rules(config, mapped, str(origin["precision"]))
    write_json(directory / INPUTS, rules)
    write_json(directory / ROW, empty_row(mapped, rules))
    shapes = {
        name: (tensor.dtype, list(tensor.shape))
        for file in (weights, *([INPUT_TENSORS] if tensors else []))
        for name, tensor in read_header(directory / file).items()
    }
    details = {
        **_details(config, mapped, origin),
        "files": [weights, *([INPUT_TENSORS] if tensors else [])],
        "origin": origin,
        "rules": rules,
        "tensors": {
            name: {"dtype": dtype, "shape": shape, "meaning": _meaning(name)} for name, (dtype, shape) in shapes.items()
        },
        "row": json.dumps(empty_row(mapped, rules), indent=1),
        "visit": json.dumps(_example_visit(mapped, bool(config.features.tags))),
        "features": [column["name"] for column in rules["dense"] if column["kind"] == "feature"],
        "statistics": list(dict.fromkeys(column["key"] for column in rules["dense"] if column["kind"] != "feature")),
    }
    for name in (README, SCRIPT):
        (directory / name).write_text(_render(name, details), encoding="utf-8")


def input_rules(config: JobConfig, features: FeatureMap, precision: str) -> dict[str, Any]:
    """Return the content of ``inputs.json``: everything that turns ids and values of a row into the model's inputs."""
    spec, own = features.spec, config.features
    ranges = side_ranges(feature_layout(spec), own)
    lookups, dims = _inputs(features)
    return {
        "precision": precision,
        "behaviours": list(features.behaviours),
        "exponents": [config.score.exponents.get(behaviour, 1.0) for behaviour in features.behaviours],
        "domains": list(DOMAINS),
        "tables": {
            table.name: {
                "rows": table.rows,
                "dim": table.dim,
                **({"ids": getattr(own, table.name).ids} if table.name in ID_TABLES else {}),
                **({"ids": "codes"} if table.name in features.codes.lookups else {}),
                **(
                    {"salt": int(hash_salt(table.name))}
                    if table.name in ID_TABLES and getattr(own, table.name).ids == "hash"
                    else {}
                ),
            }
            for table in features.tables
        },
        "side": {name: [rows.start, len(rows)] for name, rows in ranges.items()},
        "ids": [name for name in ID_TABLES if name in lookups],
        "codes": {
            code_set.name: {
                "version": features.fitted.codes[code_set.name].version,
                "levels": list(code_set.levels),
                "history": code_set.config.history,
            }
            for code_set in features.codes.sets
        },
        "code_tables": [table for code_set in features.codes.sets for table in _code_tables(code_set)],
        "row_side": [side.name for side in spec.side if side.name not in own.exclude],
        "actions": list(spec.behaviours[:ACTION_BITS]),
        "dense": _dense_columns(config, features),
        "clip": own.clip,
        "histories": [
            {
                "name": sequence.name,
                **own.history[sequence.name].model_dump(mode="json"),
                "width": sum(dims[lookups[key].table] * lookups[key].ids_per_entry for key in sequence.keys),
            }
            for sequence in features.sequences
        ],
        "query_columns": _query_columns(config, features),
        "content": _content(config, features),
    }


def _inputs(features: FeatureMap) -> tuple[dict[str, Lookup], dict[str, int]]:
    """Return the lookups of the network by name, and the width of what each table gives."""
    lookups = {lookup.name: lookup for lookup in (*features.lookups, *features.content_lookups)}
    dims = {table.name: table.dim for table in features.tables}
    return lookups, dims | {table.name: table.dim for table in features.layout.content}


def _content(config: JobConfig, features: FeatureMap) -> list[dict[str, Any]]:
    """Return name, width and meaning of each table of pre-trained vectors, in the order of the network's inputs."""
    found = []
    for table in features.layout.content:
        own, facts = config.features.content[table.name], features.fitted.content[table.name]
        entries = _AT_ENTRY[own.on_air] if own.of == "segment" else f"that of its {own.of}"
        found.append(
            {
                "name": table.name,
                "width": table.width,
                "histories": own.histories,
                "candidate": _VECTORS[own.reading] if own.of == "segment" else _VECTORS[own.of],
                "entry": entries if own.histories else "",
                "made_by": facts.model or "unknown",
            }
        )
    return found


def empty_row(features: FeatureMap, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of unknown ids and values without histories, in the form that ``score_one.py`` reads."""
    dense = [column for column in rules["dense"] if column["kind"] == "feature"]
    keys = dict.fromkeys(column["key"] for column in rules["dense"] if column["kind"] != "feature")
    behaviours = [column["behaviour"] for column in rules["dense"] if column["kind"] == "rate"]
    return {
        **{f"{name}_id": 0 for name in ID_TABLES},
        "request_ms": 1_700_000_000_000,
        "domain": features.spec.candidates[0],
        "side": dict.fromkeys(rules["row_side"], 0),
        "dense": {column["name"]: 0.0 for column in dense},
        "statistics": {key: {"rows": 0, **dict.fromkeys(behaviours, 0)} for key in keys},
        "histories": {history["name"]: [] for history in rules["histories"]},
        **({"codes": {name: [] for name in rules["codes"]}} if rules["codes"] else {}),
        **({"content": {table["name"]: None for table in rules["content"]}} if rules["content"] else {}),
    }


def _code_tables(code_set: CodeSet) -> list[dict[str, Any]]:
    """Return the rules that turn a code of a set into rows of its tables.

    The number of a code or a tuple is the sum of the codes times ``factors``; a table with a ``salt`` hashes it.
    """
    return [
        {
            "name": table.name,
            "codes": code_set.name,
            "of_visits": code_set.in_histories,
            "factors": [
                math.prod(code_set.levels[level + 1 : table.depth])
                if level + 1 == table.depth or table.kind == "prefix"
                else 0
                for level in range(table.depth)
            ],
            "rows": table.rows,
            **({"salt": int(hash_salt(table.name))} if table.hashed else {}),
        }
        for table in code_set.tables
    ]


def _example_visit(features: FeatureMap, tags: bool) -> dict[str, Any]:
    """Return a visit of a history, in the form that ``score_one.py`` reads."""
    codes = {code_set.name: code_set.levels for code_set in features.codes.sets if code_set.in_histories}
    vectors = [table for table in features.layout.content if table.entries]
    return {
        **{"item_id": 7, "author_id": 3, "request_ms": 1_699_999_990_000, "domain": features.spec.candidates[0]},
        "behaviours": list(features.spec.behaviours[:1]),
        **({"tag": 1} if tags else {}),
        **({"codes": {name: [0] * len(levels) for name, levels in codes.items()}} if codes else {}),
        **({"content": {table.name: [0.0] * table.width for table in vectors}} if vectors else {}),
    }


def _dense_columns(config: JobConfig, features: FeatureMap) -> list[dict[str, Any]]:
    """Return name, computation and scale of each number, in the order of the network's inputs."""
    spec, prior = features.spec, features.fitted.prior
    strength = smoothing_strength(prior, config.features.smoothing)
    values = {dense.name for dense in spec.dense}
    columns: list[dict[str, Any]] = []
    for name, mean, deviation in zip(
        features.dense_names, features.fitted.mean, features.fitted.deviation, strict=True
    ):
        scale = {"name": name, "mean": float(mean), "deviation": float(deviation)}
        if name in values:
            columns.append({**scale, "kind": "feature"})
            continue
        key, _, last = name.rpartition(":")
        if last == "rows":
            columns.append({**scale, "kind": "rows", "key": key, "behaviour": ""})
            continue
        place = spec.behaviours.index(last)
        # float32, as the features are computed.
        rate, rows = np.float32(prior[place]), np.float32(strength[place])
        added = {"for": float(rows * rate), "against": float(rows * (np.float32(1) - rate))}
        columns.append({**scale, "kind": "rate", "key": key, "behaviour": last, **added})
    return columns


def _query_columns(config: JobConfig, features: FeatureMap) -> list[int]:
    """Return the columns of a row's inputs that the queries of ``multi_head`` and ``twin`` consist of; else none."""
    if config.model.kind == "logistic" or config.model.attention_kind == "din" or not features.sequences:
        return []
    lookups, dims = _inputs(features)
    widths = {name: dims[lookup.table] * lookup.length for name, lookup in lookups.items() if lookup.length is not None}
    whole = [name for sequence in features.sequences for name in sequence.query]
    return columns_of(widths, lookups, dims, whole, candidate_ids(config, features), candidate_dense(features))


def _input_tensors(features: FeatureMap) -> dict[str, np.ndarray]:
    """Return the arrays of the fitted features that a row's inputs need: vocabularies, and features of authors."""
    tensors = {f"vocabulary.{name}": ids for name, ids in features.fitted.vocabularies.items()}
    if features.author_side and features.fitted.author_side is not None:
        tensors["authors.id"] = features.fitted.author_side.author_id
        tensors["authors.values"] = features.fitted.author_side.values
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _details(config: JobConfig, features: FeatureMap, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about the model on which the templates depend."""
    model, kind = config.model, str(origin["kind"])
    ranges = side_ranges(feature_layout(features.spec), config.features)
    tables = {table.name: table.dim for table in features.tables}
    own = config.features
    context = tables.get("side", 0) * max([lookup.ids_per_entry for lookup in features.lookups])
    query = tables["item"] + tables["author"] + sum(tables[name] for name in features.codes.of_entries)
    query += sum(table.dim for table in features.layout.content if table.entries)
    key = query + context
    hashed_codes = [table.name for code_set in features.codes.sets for table in code_set.tables if table.hashed]
    salts = {name: hash_salt(name) for name in ID_TABLES if name in tables and getattr(own, name).ids == "hash"}
    salts |= {name: hash_salt(name) for name in hashed_codes}
    experts = 0 if kind == "mmoe" else model.task_experts
    attention = "mean" if kind == "logistic" else "din" if model.attention_kind == "din" else "multi_head"
    return {
        "content": [table.name for table in features.layout.content],
        "content_histories": [table.name for table in features.layout.content if table.entries],
        "precision": origin["precision"],
        "network": kind,
        "mappings": sorted({getattr(own, name).ids for name in ID_TABLES if name in tables}),
        "codes": bool(features.codes.sets),
        "code_histories": bool(features.codes.of_entries),
        "code_texts": _CODES,
        "epsilon": EPSILON,
        "hashed_codes": bool(hashed_codes),
        "hashes": bool(salts),
        "salts": {name: int(salt) for name, salt in salts.items()},
        "histories": bool(features.sequences),
        "past_counts": [{"key": past_name(name), **past.model_dump()} for name, past in own.past.items()],
        "past_texts": _PAST,
        "past_domain": PAST_DOMAIN_RANGE in ranges,
        "domain": DOMAIN_RANGE in ranges,
        "tag": features.spec.tag if own.tags else "",
        "author_side": list(features.author_side),
        "row_side": [side.name for side in features.spec.side if side.name not in own.exclude],
        "searched": own.needs_space,
        "search_tables": list(own.search.tables),
        "mapping_texts": _MAPPINGS,
        "search_texts": _SEARCHES,
        "context": _context(own.tags * [features.spec.tag], features.author_side, PAST_DOMAIN_RANGE in ranges),
        "attention": attention,
        "attention_text": _ATTENTIONS[attention],
        "network_text": _NETWORKS["experts" if kind in ("ple", "cgc", "mmoe") else kind],
        "projected": query != key,
        "din_layers": ["first", *(f"rest.{depth}" for depth in range(len(model.attention) - 1))],
        "cross": model.attention_kind == "twin",
        "depth": len(model.expert_layers) if kind == "ple" else 1,
        "dcn_layers": model.dcn_layers,
        "dcn_rank": model.dcn_rank,
        "task_experts": experts,
        "shared_experts": model.shared_experts
        + (len(features.behaviours) * model.task_experts if kind == "mmoe" else 0),
    }


_NETWORK = {
    ".linear.weight": "projection of a pre-trained vector [out, in]",
    ".linear.bias": "bias of the projection of a pre-trained vector",
    ".missing": "input in place of the projection where there is no vector",
    "attention.place": "number added to a score for the place of the entry, counted from the end of its history",
    "attention.query": "projection of the candidate's features to the heads, for each history",
    "attention.key": "projection of a head to the columns of an entry, for each history and head",
    "attention.value": "projection of the weighted sum of entries, for each history and head",
    "attention.cross": "weights of an entry's context in its score, for each history and head",
    "attention.alike": "weights of equal columns of candidate and entry in the score, for each history and head",
    ".project.weight": "projection of the query to the width of an entry",
    ".score": "weights of the last hidden layer in the score of an entry",
    ".experts.weights": "experts: weights [experts, in, out] of a layer, the behaviours' own first, then the shared",
    ".experts.biases": "experts: biases of a layer",
    ".task_gates": "gates of the behaviours [behaviours, in, experts]: each sees its own experts, then the shared ones",
    ".shared_gate": "gate of the shared experts of the next layer; it sees all experts",
    "network.0.cross_layers.reductions": "cross layers: V [in, rank] of a layer",
    "network.0.cross_layers.weights": "cross layers: transposed matrix [in, out] of a layer, or U [rank, out]",
    "network.0.cross_layers.biases": "cross layers: biases of a layer",
    "network.0.deep.weights": "shared network: weights of a layer",
    "network.0.deep.biases": "shared network: biases of a layer",
    "network.0.bottom.weights": "shared network: weights of a layer",
    "network.0.bottom.biases": "shared network: biases of a layer",
    "network.1.hidden.weights": "towers: weights [behaviours, in, out] of a hidden layer",
    "network.1.hidden.biases": "towers: biases of a hidden layer",
    "network.1.weight": "towers: weights of the logits",
    "network.1.bias": "towers: biases of the logits",
    "network.weight": "logistic regression: weights of the logits",
    "network.bias": "logistic regression: biases of the logits",
}
"""Part of a parameter's name -> meaning; the first that fits counts."""


def _meaning(name: str) -> str:
    """Return the meaning of a tensor of the export, by its name."""
    kind, _, rest = name.partition(".")
    table = rest.partition(".")[0]
    if kind == "tables":
        if table.startswith(CODE_TABLE):
            return f"embedding table of the codes `{code_set_of(table)}`, one row for each code or tuple of codes"
        return f"embedding table of {'side features' if table == 'side' else f'{table} ids'}, one row for each id"
    if kind == "ids":
        return f"of each row of tables.{table}: " + ("its id" if rest.endswith(".id") else "0 if the row has no id")
    if kind == "vocabulary":
        return f"ids that tables.{table} knows, ascending; the id at place k (from 0 on) has row k + 1"
    if kind == "authors":
        return "ids of the authors whose features are known" if rest == "id" else "features of these authors"
    if kind == "buffers":
        if rest.startswith("attention.of_"):
            return f"columns of the {'candidate' if rest.endswith('query') else 'entry'} that attention.alike compares"
        return "constant of the network that follows from its shapes; not needed for scoring"
    for part, meaning in _NETWORK.items():
        if part in name:
            return meaning
    layer = "first layer" if ".first." in name else "further layer"
    return f"attention network of a history: {'weights' if name.endswith('weight') else 'biases'} of its {layer}"


_MAPPINGS = {
    "direct": "id + 1; 0 for an id beyond the table",
    "hash": "a hash of the id, see below",
    "lookup": "1 + the place of the id in `vocabulary.NAME`; 0 if it is not there",
    "dynamic": "the place of the id in `ids.NAME.id` where `ids.NAME.seen` is above 0; 0 if it is not there",
    "side": "a value of a side feature, see below",
    "codes": "a code or a tuple of codes, see below",
}
"""Mapping of ids -> row of an id."""

_CODES = {
    "none": "none",
    "entry": "of the segment on air when the user entered the room, if it was known at the request",
    "longest": "of the segment that the user watched longest, of those known at the request",
}
"""Codes of histories -> description."""

_VECTORS = {
    "item": "that of the item",
    "author": "that of the author",
    "latest": "that of the latest 30-second segment of the author's rooms that was known at the request",
    "mean": "the mean over all segments of the author's rooms that were known at the request",
}
"""Owner or reading of vectors -> vector of a candidate."""

_AT_ENTRY = {
    "entry": "that of the segment on air when the user entered, if it was known at the request",
    "longest": "that of the segment that the user watched longest, of those known at the request",
}
"""Segment of a live visit -> its vector."""

_SEARCHES = {
    "latest": "the latest ones",
    "author": "the latest ones to the candidate's author",
    "top": "those with the largest dot product with the candidate, by the vectors of `search.pt`; in order of time",
}
"""Search of a history -> visits that it selects."""

_PAST = {
    "any": "all of them",
    "author": "those to the candidate's author",
    "item": "those to the candidate's item",
    "tag": "those to items of the candidate's tag, none if that is 0",
}
"""Value of ``same`` in ``[features.past.NAME]`` -> description of the visits that are counted."""

_ATTENTIONS = {
    "mean": "It is the mean of the visits.",
    "din": "The query q is the item and the author of the candidate, projected to the width of a visit if the widths "
    "differ. The score of a visit k is a small network on `[q, k, q - k, q * k]`, the weights are a softmax over the "
    "visits, and the vector is the weighted sum of the visits.",
    "multi_head": "The query is the columns `query_columns` of the candidate's inputs (embeddings, then numbers). For "
    "each head the score of a visit is the product of the projected query and the visit, plus the products of equal "
    "columns (`alike`), plus the term of its context (`cross`, if there is one), plus a number for its place from the "
    "end. The weights are a softmax over the visits. A head gives its weighted sum, projected by `value`, and the mass "
    "`ln(1 + sum of exp(score))`.",
}
"""Kind of attention -> description."""

_NETWORKS = {
    "logistic": "One linear layer gives the logits.",
    "shared_bottom": "One network with a ReLU after each layer is shared by all behaviours; a tower for each behaviour "
    "gives its logit.",
    "dcn": "A cross layer turns the input `x` and the output `c` of the layer below (at first `x` itself) into "
    "`x * (W c + b) + c`, where `*` is element by element; with a rank, W is the product of U and V transposed. On top "
    "of the cross layers one network with a ReLU after each layer is shared by all behaviours; a tower for each "
    "behaviour gives its logit.",
    "experts": "In each layer experts read the input, and the gate of each behaviour mixes its own experts and the "
    "shared ones by a softmax; in all layers but the last, a shared gate mixes all experts for the next layer's shared "
    "experts. A tower for each behaviour gives its logit.",
}
"""Network -> description."""


def _context(tags: Sequence[str], author_side: Sequence[str], has_domain: bool) -> list[str]:
    """Return the names of the ids of a visit's context, in order."""
    domains = [PAST_DOMAIN_RANGE] * has_domain
    return [ACTIONS_RANGE, AGE_RANGE, *domains, *(f"feature {name}" for name in (*tags, *author_side))]


def _render(name: str, details: Mapping[str, Any]) -> str:
    """Return a file of the guide, from its template."""
    template = resources.files(__package__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(details)
