"""Codes as inputs: batches against a row-by-row reference, blind to later segments; versions and changed files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.code_files import LEVELS, codes_around, write_codes
from tests.data.features.test_feature_map import fitted_by_hand, unpack_ids
from trainer.config.features import CodesConfig, FeatureConfig, HistoryConfig
from trainer.console.errors import UserError
from trainer.data.features.code_inputs import CodeFileReader, check_codes, open_codes
from trainer.data.features.code_sets import CodeSet, code_set_of
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures, fit_features
from trainer.data.features.fitted_codes import FittedCodes
from trainer.data.features.id_map import hash_rows, hash_salt
from trainer.data.features.missing_inputs import MissingCounts
from trainer.data.format.schema import DOMAINS
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.text_schema import SEGMENT_MS
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import unpack

HISTORY = {"rooms": HistoryConfig(domain="live", length=4), "all": HistoryConfig(domain="both", length=6)}


def codes_of(dataset, seed: int = 0) -> CodeFile:
    return replace(codes_around(dataset.visits, seed), path=dataset.path / "codes.parquet")


def config_of(**keys: Any) -> FeatureConfig:
    return FeatureConfig(history=HISTORY, codes={"raw": CodesConfig(file="codes.parquet", dim=8, **keys)})


def features_of(dataset, config: FeatureConfig, codes: CodeFile) -> FeatureMap:
    fitted = replace(fitted_by_hand(dataset, config, 14), codes={"raw": FittedCodes.of(codes)})
    (code_set,) = (CodeSet(name, own, codes.levels) for name, own in config.codes.items())
    return FeatureMap(dataset.spec, config, fitted, (), {"raw": CodeFileReader(code_set, codes)})


def plain_rows(table: str, rows: int, place: int | None, codes: CodeFile) -> int:
    """Return the row of a segment in a table, by the definition."""
    if place is None:
        return 0
    code = codes.codes[place].tolist()
    depth = int(table[-1])
    if "-level" in table:
        return code[depth - 1] + 1
    number = 0
    for level in range(depth):
        number = number * LEVELS[level] + code[level]
    if rows >= math.prod(LEVELS[:depth]) + 1:
        return number + 1
    out = np.empty(1, np.int64)
    hash_rows(np.array([number]), hash_salt(table), rows, out)
    return int(out[0])


def plain_latest(codes: CodeFile, author: int, as_of: int) -> int | None:
    known = [
        (int(codes.known_ms[place]), place)
        for place in range(len(codes))
        if codes.author_id[place] == author and codes.known_ms[place] <= as_of
    ]
    return max(known)[1] if known else None


def plain_on_air(codes: CodeFile, visit: dict[str, int], as_of: int, choice: str) -> int | None:
    assert codes.start_ms is not None
    if visit["domain"] != DOMAINS.index("live"):
        return None
    best: tuple[int, int, int] | None = None
    begin, end = visit["request_ms"], visit["request_ms"] + visit["play_ms"]
    for place in range(len(codes)):
        start = int(codes.start_ms[place])
        if codes.item_id[place] != visit["item_id"] or codes.known_ms[place] > as_of:
            continue
        overlap = min(start + SEGMENT_MS, end) - max(start, begin)
        if choice == "entry" and start <= begin < start + SEGMENT_MS:
            best = max(best or (0, 0, -1), (start, place, place))
        if choice == "longest" and overlap > 0:
            best = max(best or (0, 0, -1), (overlap, -start, -place))
    return None if best is None else abs(best[2])


@pytest.mark.parametrize(
    ("keys", "tables"),
    [
        ({"history": "entry"}, ["level1", "level2", "level3", "prefix2", "prefix3"]),
        ({"history": "longest", "tables": "prefixes", "prefix_rows": 20}, ["prefix1", "prefix2", "prefix3"]),
        ({"history": "none", "tables": "levels", "levels": 2}, ["level1", "level2"]),
        ({"history": "entry", "levels": 1}, ["level1"]),
    ],
)
def test_a_batch_equals_the_row_by_row_reference(write_dataset, keys, tables):
    dataset = write_dataset(rows=80, users=20)
    codes, config = codes_of(dataset), config_of(**keys)
    features = features_of(dataset, config, codes)
    as_of, histories = dataset.rows["request_ms"], dataset.histories()
    packed = features.pack(dataset.rows, histories, as_of)
    found = unpack_ids(unpack(packed, features.layout, {}))
    names = [f"codes-raw-{table}" for table in tables]
    sizes = {table.name: table.rows for table in features.tables}
    assert [name for name in sizes if name.startswith("codes-")] == names
    assert {table.dim for table in features.tables if table.name in names} == {8}
    latest = [
        plain_latest(codes, int(author), int(at)) for author, at in zip(dataset.rows["author_id"], as_of, strict=True)
    ]
    for name in names:
        assert found[name] == [[plain_rows(name, sizes[name], place, codes)] for place in latest], name
    counts = {"candidates": sum(place is None for place in latest), "all_candidates": 80}
    assert 0 < counts["candidates"] < 60
    slices = features.read_histories(dataset.rows, histories, as_of)
    missing = lives = 0
    for history, visits in slices.items():
        if keys["history"] == "none":
            assert not any(name.startswith(f"{history}_codes") for name in found)
            continue
        entries = []
        of_entry = np.repeat(as_of, visits.lengths)
        for place in range(len(visits.item_id)):
            columns = ("item_id", "request_ms", "play_ms", "domain")
            visit = {column: int(getattr(visits, column)[place]) for column in columns}
            entries.append(plain_on_air(codes, visit, int(of_entry[place]), keys["history"]))
            lives += visit["domain"] == DOMAINS.index("live")
            missing += visit["domain"] == DOMAINS.index("live") and entries[-1] is None
        for name in names:
            rows = [plain_rows(name, sizes[name], place, codes) for place in entries]
            assert [row for of_row in found[f"{history}_{name}"] for row in of_row] == rows
        assert 20 < sum(place is not None for place in entries) < len(entries) - 5
    assert packed.missing == {"no_code/raw": MissingCounts(**counts, entries=missing, all_entries=lives)}


def test_histories_have_the_codes_before_their_context_and_compare_them_with_the_candidate(write_dataset):
    dataset = write_dataset(rows=50)
    codes, config = codes_of(dataset), config_of(levels=2)
    rooms, _ = features_of(dataset, config, codes).sequences
    names = ("codes-raw-level1", "codes-raw-level2", "codes-raw-prefix2")
    assert rooms.keys == ("rooms_item", "rooms_author", *(f"rooms_{name}" for name in names), "rooms_context")
    assert rooms.query == ("item", "author", *names)
    alone = features_of(dataset, config_of(levels=2, history="none"), codes)
    assert alone.sequences[0].query == ("item", "author") and alone.codes.lookups == list(names)


def test_visits_with_the_code_of_the_candidate_are_those_with_an_equal_first_level(write_dataset):
    dataset = write_dataset(rows=80, users=20)
    codes, config = codes_of(dataset), config_of(history="entry")
    features, histories = features_of(dataset, config, codes), dataset.histories()
    equal = other = absent = 0
    for place in range(80):
        rows = {name: column[place : place + 1] for name, column in dataset.rows.items()}
        as_of = rows["request_ms"]
        own = plain_latest(codes, int(rows["author_id"][0]), int(as_of[0]))
        for visits in features.read_histories(rows, histories, as_of).values():
            found = features.codes.same_code(rows, visits)["raw"].tolist()
            assert len(found) == len(visits.item_id)
            for entry, same in enumerate(found):
                columns = ("item_id", "request_ms", "play_ms", "domain")
                visit = {column: int(getattr(visits, column)[entry]) for column in columns}
                past = plain_on_air(codes, visit, int(as_of[0]), "entry")
                known = own is not None and past is not None
                assert same == (known and codes.codes[own, 0] == codes.codes[past, 0])
                equal, other, absent = equal + same, other + (known and not same), absent + (own is past is None)
    assert min(equal, other, absent) > 5
    assert features_of(dataset, config_of(history="none"), codes).codes.same_code(rows, visits) == {}


@pytest.mark.parametrize("choice", ["entry", "longest"])
@pytest.mark.parametrize("seed", range(4))
def test_no_segment_that_becomes_known_later_changes_a_batch(write_dataset, choice, seed):
    dataset = write_dataset(rows=100, seed=seed)
    codes, config = codes_of(dataset, seed), config_of(history=choice)
    rng, histories = np.random.default_rng(seed), dataset.histories()
    now = int(np.median(dataset.rows["request_ms"]))

    def batch(changed: CodeFile) -> list[np.ndarray]:
        packed = features_of(dataset, config, changed).pack(dataset.rows, histories, np.full(100, now))
        return [packed.integers.numpy(), packed.floats.numpy()]

    def perturbed(since: int) -> CodeFile:
        """Change everything about the segments from a time on, drop a third of them, and add others."""
        later = np.flatnonzero(codes.known_ms > since)
        assert 50 < len(later) < len(codes) - 50
        columns = {}
        for name in ("item_id", "author_id", "segment", "known_ms", "codes", "start_ms"):
            columns[name] = getattr(codes, name).copy()
            columns[name][later] = columns[name][rng.permutation(later)]
        columns["start_ms"][later] -= rng.integers(0, 2, len(later)) * 90_000
        columns["known_ms"][later] = since + 1 + rng.integers(0, 10_000, len(later))
        kept = np.sort(np.concatenate([np.flatnonzero(codes.known_ms <= since), later[: len(later) * 2 // 3]]))
        order = np.concatenate([kept, later[:40]])
        return replace(codes, **{name: column[order] for name, column in columns.items()})

    before = batch(codes)
    assert all(map(np.array_equal, batch(perturbed(now)), before))
    assert not np.array_equal(batch(perturbed(now - 6 * 3_600_000))[0], before[0])


def test_prefixes_of_very_many_tuples_are_hashed_without_overflow():
    code_set = CodeSet("big", CodesConfig(file="f", prefix_rows=1000), [60_000] * 6)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 60_000, (5000, 6)).astype(np.int32)
    codes[7] = -1
    rows = code_set.rows_of(codes)
    for table, of_table in zip(code_set.tables, rows, strict=True):
        assert 0 == of_table[7] < np.delete(of_table, 7).min() and of_table.max() < table.rows
    assert [table.rows for table in code_set.tables] == [60_001] * 6 + [1000] * 5
    assert len(np.unique(rows[-1])) > 950


@pytest.mark.parametrize(("most", "rows"), [(59, 59), (60, 60), (61, 61), (62, 61)])
def test_a_table_has_a_row_for_each_tuple_and_one_for_no_code_unless_it_is_limited(most: int, rows: int) -> None:
    config = CodesConfig(file="f", tables="prefixes", prefix_rows=most)
    codes = np.stack(np.meshgrid(*map(np.arange, LEVELS), indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    code_set = CodeSet("raw", config, LEVELS)
    assert [table.rows for table in code_set.tables] == [6, 21, rows]
    assert [table.hashed for table in code_set.tables] == [False, False, most < 61]
    found = code_set.rows_of(codes)[2]
    assert found.min() > 0 and found.max() < rows and (len(np.unique(found)) == 60) == (most > 60)


def test_codes_are_fitted_saved_and_read_again(write_dataset, tmp_path):
    dataset = write_dataset(rows=50)
    codes, config = codes_of(dataset), config_of()
    fitted = replace(fitted_by_hand(dataset, config, 14), codes={"raw": FittedCodes.of(codes)})
    fitted.save(tmp_path)
    assert FittedFeatures.load(tmp_path).codes == fitted.codes
    for damage in ({"levels": []}, {"levels": "x"}, {"until_ms": None}):
        document = json.loads((tmp_path / "features.json").read_text())
        document["codes"]["raw"] |= damage
        (tmp_path / "features.json").write_text(json.dumps(document))
        (tmp_path / "checksums.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match="the features are damaged"):
            FittedFeatures.load(tmp_path)


def test_a_file_of_other_authors_is_refused_when_features_are_fitted(write_dataset):
    dataset = write_dataset(rows=300)
    codes = codes_of(dataset)
    config = FeatureConfig(codes={"raw": CodesConfig(file=str(codes.path))})
    write_codes(codes.path, codes)
    fitted = fit_features(dataset.spec, dataset.store(), dataset.histories(), config, Selection())
    assert fitted.codes == {"raw": FittedCodes.of(CodeFile.read(codes.path))}
    write_codes(codes.path, replace(codes, author_id=np.where(codes.author_id < 0, -1, codes.author_id + 1000)))
    with pytest.raises(
        UserError, match=r"^features.codes.raw: .* has segments of no author of the training rows; assign"
    ):
        fit_features(dataset.spec, dataset.store(), dataset.histories(), config, Selection())


def own(path: Path, **keys: Any) -> FeatureConfig:
    return FeatureConfig(codes={"raw": CodesConfig(file=str(path), **keys)})


def test_codes_of_another_version_are_refused_and_later_segments_are_not(write_dataset):
    codes = codes_of(write_dataset(rows=50))
    path = codes.path
    early = codes.known_ms <= np.median(codes.known_ms)
    columns = ("item_id", "author_id", "segment", "known_ms", "codes", "start_ms")
    before = replace(codes, **{name: getattr(codes, name)[early] for name in columns})
    write_codes(path, before)
    fitted = {"raw": FittedCodes.of(CodeFile.read(path))}
    open_codes(own(path), fitted, unchanged=True)
    # A grown file, in another order.
    order = np.random.default_rng(0).permutation(len(codes))
    write_codes(path, replace(codes, **{name: getattr(codes, name)[order] for name in columns}))
    open_codes(own(path), fitted, unchanged=True)
    changed = codes.codes.copy()
    changed[np.flatnonzero(early)[0], 1] ^= 1
    write_codes(path, replace(codes, codes=changed))
    open_codes(own(path), fitted)
    with pytest.raises(
        UserError, match=r"^features.codes.raw: .* has other codes than at the start of the run.*_data=true"
    ):
        open_codes(own(path), fitted, unchanged=True)
    write_codes(path, replace(codes, version="5x4x3-11111111"))
    expected = r"is of the codebook version '5x4x3-11111111', the model was trained with '5x4x3-00000000'"
    with pytest.raises(UserError, match=rf"^features.codes.raw: .*{expected}"):
        open_codes(own(path), fitted)
    with pytest.raises(UserError, match=r"^features.codes.raw: the model was trained without these codes; it has none"):
        open_codes(own(path), {})


def test_a_file_that_cannot_be_used_is_refused_in_one_line(write_dataset):
    codes = codes_of(write_dataset(rows=50))
    path = codes.path
    with pytest.raises(UserError, match=r"codes.parquet: no such file; `limelight quantize assign` makes"):
        check_codes(own(path).codes)
    write_codes(path, replace(codes, start_ms=None))
    assert [code_set.name for code_set in check_codes(own(path).codes)] == ["raw"]
    with pytest.raises(UserError, match=r"^features.codes.raw.levels = 4: .* has 3 levels; 1 to 3 are accepted"):
        check_codes(own(path, levels=4).codes)
    read = CodeFile.read(path)
    assert read.start_ms is None
    fitted = {"raw": FittedCodes.of(read)}
    open_codes(own(path, history="none"), fitted)
    with pytest.raises(
        UserError, match=r"^features.codes.raw.history = 'entry': .* has no start_ms, so .*assign the c"
    ):
        open_codes(own(path), fitted)
    with pytest.raises(ValueError, match=r"a name has letters, digits and hyphens"):
        FeatureConfig(codes={"my_codes": CodesConfig(file="f")})


def test_a_table_has_the_name_of_its_set():
    assert code_set_of(CodeSet("b-c", CodesConfig(file="f"), [3]).tables[0].name) == "b-c"
