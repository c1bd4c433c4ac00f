"""Part files of the cache of segment vectors: whole records after a crash, and damage that is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.semantic_ids.cached_segments import append, content, open_cache
from trainer.console.errors import UserError
from trainer.semantic_ids.vector_cache_parts import part_files
from trainer.semantic_ids.vector_cache_reader import CachedVectors


def test_a_record_that_is_cut_short_at_any_byte_is_removed_and_written_again(tmp_path: Path) -> None:
    with open_cache(tmp_path / "whole") as cache:
        append(cache, [(1, 10, 0, 1000)], {"a": [1]})
        whole = part_files(tmp_path / "whole")[0][1].stat().st_size
        append(cache, [(1, 10, 1, 31_000)], {"a": [2]})
        expected = content(cache)
    data = part_files(tmp_path / "whole")[0][1].read_bytes()
    for end in range(whole, len(data)):
        for zeros in (0, len(data) - end) if end % 5 == 0 else (0,):
            torn = data[:end] + bytes(zeros)
            folder = tmp_path / "torn"
            folder.mkdir(exist_ok=True)
            (folder / "cache.json").write_bytes((tmp_path / "whole" / "cache.json").read_bytes())
            part = folder / "part-000000000000001.bin"
            part.write_bytes(torn)
            # Zeros at the end may be the right bytes of a whole record.
            if torn == data:
                continue
            with CachedVectors(folder) as reader:
                assert len(reader) == 1
            with open_cache(folder) as cache:
                assert (cache.sequence, cache.position) == (1, {"a": [1]})
                append(cache, [(1, 10, 1, 31_000)], {"a": [2]})
                assert content(cache) == expected
            assert part.read_bytes() == data


def test_damage_before_the_last_record_is_named_and_not_repaired(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        append(cache, [(1, 10, 0, 1000)])
        first = part_files(tmp_path)[0][1].stat().st_size
        append(cache, [(1, 10, 1, 31_000)])
    part = part_files(tmp_path)[0][1]
    data = part.read_bytes()
    for place in range(first):
        part.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        for opened in (lambda: open_cache(tmp_path), lambda: CachedVectors(tmp_path)):
            with pytest.raises(UserError, match=r"part-000000000000001\.bin: damaged at byte 0"):
                opened()
        assert part.stat().st_size == len(data)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with open_cache(tmp_path, keep_ms=24_000) as cache:
        for number in range(6):
            append(cache, [(1, 10, number, 1_000 * number)])
    files = part_files(tmp_path)
    assert len(files) > 2
    files[1][1].unlink()
    with pytest.raises(UserError, match="are missing before it"):
        open_cache(tmp_path, keep_ms=24_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a JSON object is expected"),
        ('{"format": 9}', "format is 9"),
        ('{"format": 1, "dim": 3}', "'dtype' should be a str"),
        ('{"format": 1, "dim": 99999999, "dtype": "float32", "origin": {}}', "vectors of 99999999 elements"),
        ('{"format": 1, "dim": 3, "dtype": "object", "origin": {}}', "of type 'object'"),
        ('{"format": 1, "dim": 3, "dtype": "float32", "origin": {"x": 1}}', "damaged"),
    ],
)
def test_settings_from_elsewhere_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(UserError, match=message):
        CachedVectors(tmp_path)
    with pytest.raises(UserError, match="no cache of segment vectors here"):
        CachedVectors(tmp_path / "nowhere")


@given(st.data())
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    with open_cache(folder) as cache:
        append(cache, [(1, 10, 0, 1000), (2, 11, 0, 2000)])
        append(cache, [(1, 10, 1, 31_000)])
    part = part_files(folder)[0][1]
    whole = part.read_bytes()
    begin, end = sorted((data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))))
    part.write_bytes(whole[:begin] + data.draw(st.binary(max_size=80)) + whole[end:])
    for opened in (CachedVectors, open_cache):
        try:
            opened(folder).close()  # type: ignore[operator]
        except UserError as error:
            assert str(folder) in str(error)
