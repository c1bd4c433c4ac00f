"""Headers of safetensors files against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from trainer.data.format.safetensors_header import TensorEntry, decode_header, encode_header, header_bytes, read_header

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(5, dtype=np.uint8), "c": np.zeros((0, 4))}
NAMES = {"float32": "F32", "uint8": "U8", "float64": "F64"}


def test_the_library_reads_values_behind_our_header() -> None:
    header, size = encode_header((name, NAMES[array.dtype.name], array.shape) for name, array in ARRAYS.items())
    assert len(header) % 8 == 0 and size == sum(array.nbytes for array in ARRAYS.values())
    read = safetensors.numpy.load(header + b"".join(array.tobytes() for array in ARRAYS.values()))
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
    assert decode_header(header)["a"] == TensorEntry("U8", (5,), 24, 29)


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    file = tmp_path / "arrays.safetensors"
    safetensors.numpy.save_file(ARRAYS, file, metadata={"format": "np"})
    content, tensors = file.read_bytes(), read_header(file)
    assert tensors.keys() == ARRAYS.keys()
    values = content[header_bytes(content) :]
    for name, array in ARRAYS.items():
        entry = tensors[name]
        assert (entry.dtype, entry.shape) == (NAMES[array.dtype.name], array.shape)
        assert values[entry.start : entry.stop] == array.tobytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"should have {len(content)} bytes, it has {len(content) - 1}"):
        read_header(file)


def packed(header: object, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, "bytes 0 to 4, not 0 to 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "bytes 0 to 4, not 4 to 8"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "no type, shape and place for 'a'"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "no type, shape and place"),
        ({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, "no type, shape and place"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, "8"]}}, "no type, shape and place"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "not the header"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "'b' should have the bytes 8 to 12, not 4 to 8",
        ),
    ],
)
def test_places_that_do_not_fit_are_refused(tmp_path: Path, header: object, told: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(packed(header, bytes(8)))
    with pytest.raises(ValueError, match=told):
        read_header(file)


def test_types_of_other_programs_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(packed({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)))
    assert read_header(file)["a"].shape == (8,)


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:
        opened.write((1 << 40).to_bytes(8, "little"))
        opened.truncate(1 << 41)
    with pytest.raises(ValueError, match="a header has at most 100000000"):
        read_header(file)


@pytest.mark.parametrize(
    "content", [b"", b"nothing", b"nothing more", b"\x02\0\0\0\0\0\0\0[]", b"\x08" + b"\0" * 7 + b'{"a": 1}']
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        read_header(file)
