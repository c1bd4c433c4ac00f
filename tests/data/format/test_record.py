"""Records against the reader and writer of the safetensors library."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainer.data.format import record

DTYPES = (np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32))


@st.composite
def columns(draw):
    rows = draw(st.integers(0, 5))
    names = draw(st.lists(st.text("abc_é", min_size=1, max_size=4), min_size=1, max_size=5, unique=True))
    shapes = st.sampled_from([(rows,), (rows, 0), (rows, 1), (rows, 3)])
    return {name: draw(arrays.arrays(draw(st.sampled_from(DTYPES)), draw(shapes))) for name in names}


def same(left, right) -> None:
    assert set(left) == set(right)
    for name, column in left.items():
        assert (column.dtype, column.shape) == (right[name].dtype, right[name].shape)
        assert column.tobytes() == right[name].tobytes()


@given(columns())
def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(rows):
    data = record.encode(rows)
    same(safetensors.numpy.load(data), rows)
    same(record.decode(data), rows)
    same(record.decode(safetensors.numpy.save(rows)), rows)


def test_reading_is_a_view_and_may_pick_columns():
    rows = {"label": np.ones((3, 2), np.uint8), "user_id": np.arange(3), "side": np.ones((3, 1), np.int32)}
    data = record.encode(rows)
    read = record.decode(data, ["user_id"])
    assert list(read) == ["user_id"]
    assert not read["user_id"].flags.writeable and read["user_id"].base is not None
    assert record.decode(data)["user_id"].flags.aligned


def test_columns_need_not_be_contiguous():
    matrix = np.arange(12).reshape(3, 4)
    same(record.decode(record.encode({"a": matrix[:, ::2], "b": matrix.T})), {"a": matrix[:, ::2], "b": matrix.T})


@pytest.mark.parametrize("data", [b"", b"\x05\0\0\0\0\0\0\0{", b"\0" * 20])
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError):
        record.decode(data)
