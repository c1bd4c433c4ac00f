"""Headers of safetensors files against the safetensors library."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "content", [b"", b"nothing", b"nothing more", b"\x02\0\0\0\0\0\0\0[]", b"\x08" + b"\0" * 7 + b'{"a": 1}']
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        read_header(file)
