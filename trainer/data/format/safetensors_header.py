"""Header of a safetensors file: names, element types, shapes and places of its tensors.

A file is 8 bytes with the length of the header (little endian), the header as JSON, and the values of all tensors.
Records of a dataset, exported models and adapters are such files; https://github.com/huggingface/safetensors describes
the format. The safetensors library reads and writes whole files only from memory: here a header is made before the
values exist, and read without them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from trainer.runtime.stored_files import open_regular

_LENGTH_BYTES = 8

# The values begin at a multiple of this, so that a reader can map them as aligned arrays.
_ALIGNMENT = 8

_MAX_HEADER_BYTES = 100_000_000
"""Largest header that is read from a file, as in the safetensors library."""

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class TensorEntry(NamedTuple):
    """One tensor of the file.

    Attributes:
        dtype: element type by the name that safetensors gives it, such as ``F32``.
        shape: sizes of its dimensions.
        start: first byte, counted from the end of the header.
        stop: the byte after its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Return the first bytes of a file whose tensors follow one another, and the number of bytes of their values.

    Args:
        tensors: name, element type (such as ``F32``) and shape of each tensor, in the order of their values.
    """
    entries, start = {}, 0
    for name, dtype, shape in tensors:
        stop = start + prod(shape) * _ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, start


def header_bytes(first: bytes) -> int:
    """Return where the values begin in a file: the size of the length and of the header, from the file's first bytes.

    Raises:
        ValueError: fewer than 8 bytes.
    """
    if len(first) < _LENGTH_BYTES:
        raise ValueError("a safetensors file begins with 8 bytes that give the length of its header")
    return _LENGTH_BYTES + int.from_bytes(first[:_LENGTH_BYTES], "little")


def decode_header(header: bytes) -> dict[str, TensorEntry]:
    """Return the tensors of a file by name, in the order of the header.

    Args:
        header: the first bytes of the file up to its values, with the 8 bytes of the length.

    Raises:
        ValueError: the bytes are not the header of a safetensors file.
    """
    if len(header) < _LENGTH_BYTES or len(header) != header_bytes(header):
        raise ValueError("the header of a safetensors file is cut short")
    try:
        return {
            name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in json.loads(header[_LENGTH_BYTES:]).items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not the header of a safetensors file ({error!r})") from None


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Read the header of a file, and check that the file is as long as its tensors need.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a regular file.
        ValueError: it is not a safetensors file, it is cut short, or its tensors overlap or leave gaps.
    """
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        start = header_bytes(opened.read(_LENGTH_BYTES))
        if start > size:
            raise ValueError(f"its header should end at byte {start}, the file has {size} bytes")
        if start > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {start} bytes; a header has at most {_MAX_HEADER_BYTES}")
        opened.seek(0)
        tensors = decode_header(opened.read(start))
    expected = start + _check_places(tensors)
    if size != expected:
        raise ValueError(f"it should have {expected} bytes, it has {size}")
    return tensors


def _check_places(tensors: Mapping[str, TensorEntry]) -> int:
    """Check that the tensors follow one another without a gap and have the bytes of their shapes.

    Returns:
        The number of bytes of all values.

    Raises:
        ValueError: they do not.
    """
    for name, tensor in tensors.items():
        numbers = (*tensor.shape, tensor.start, tensor.stop)
        if not isinstance(tensor.dtype, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"its header has no type, shape and place for {name!a:.80}")
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: entry[1].start):
        size = tensor.stop - tensor.start
        # Types of other programs, such as 8-bit floats, have no size here.
        needed = prod(tensor.shape) * _ITEM_BYTES[tensor.dtype] if tensor.dtype in _ITEM_BYTES else size
        if tensor.start != end or size != needed:
            raise ValueError(
                f"{name!a:.80} should have the bytes {end} to {end + needed}, not {tensor.start} to {tensor.stop}"
            )
        end = tensor.stop
    return end
