"""Damages of a dataset's files, and a reader of all that jobs read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.dataset import Dataset
from trainer.data.format.dataset_files import DatasetFiles, list_files
from trainer.data.format.history import ENTRY_COLUMNS
from trainer.data.format.parquet_files import read_table
from trainer.data.format.shards import read_rows

HOUR_MS = 3_600_000

Damage = Callable[[Path], None]
"""Changes a file in place."""


def content(path: Path) -> str:
    """Return a digest of all that jobs read from a dataset: rows, histories and tables.

    Raises:
        UserError: something is damaged.
    """
    digest = hashlib.blake2b()
    data = Dataset.open(str(path))
    data.verify()
    digest.update(data.spec.to_json().encode())
    for name, column in sorted(read_rows(path, data.spec).items()):
        digest.update(name.encode() + column.tobytes())
    for name in ENTRY_COLUMNS:
        digest.update(data.histories.column(name).tobytes())
    for values in data.histories.lengths():
        digest.update(values.tobytes())
    files = DatasetFiles(path)
    for name in list_files(path):
        if name.endswith(".parquet"):
            table, stream = read_table(files, name), pa.BufferOutputStream()
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            digest.update(name.encode() + stream.getvalue())
    return digest.hexdigest()


def zeros(file: Path) -> None:
    """Overwrite 512 bytes in the middle with zeros, or all of a shorter file."""
    data = bytearray(file.read_bytes())
    first = max(0, len(data) // 2 - 256)
    data[first : first + 512] = bytes(len(data[first : first + 512]))
    file.write_bytes(data)


def flipped(file: Path, place: float = 0.5, bit: int = 2) -> None:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    file.write_bytes(data)


def emptied(file: Path) -> None:
    """Leave nothing."""
    file.write_bytes(b"")


def shortened(file: Path) -> None:
    """Cut a tenth off."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 9 // 10])


def lengthened(file: Path) -> None:
    """Append a byte."""
    file.write_bytes(file.read_bytes() + b"x")


def removed(file: Path) -> None:
    """Remove the file."""
    file.unlink()


def directory(file: Path) -> None:
    """Put a directory in its place."""
    file.unlink()
    file.mkdir()


def fifo(file: Path) -> None:
    """Put a FIFO in its place, to which nobody writes."""
    file.unlink()
    os.mkfifo(file)


def elsewhere(file: Path) -> None:
    """Replace the file by a link to the same content outside of the dataset."""
    other = file.parents[len(file.parts) - 1 - file.parts.index("dataset")] / file.name
    other.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(other)


ANY_FILE: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (zeros, flipped, emptied, shortened, lengthened, removed, directory, fifo, elsewhere)
}
"""Damages that any file can have."""


def _entries(change: Callable[[list[dict]], object]) -> Damage:
    def damage(file: Path) -> None:
        entries = json.loads(file.read_text())
        change(entries)
        file.write_text(json.dumps(entries))

    return damage


def _shift(entries: list[dict], by_ms: int) -> None:
    for entry in entries:
        for name in ("request_ms", "emit_ms"):
            entry[name] = [time + by_ms for time in entry[name]]


def _array(change: Callable[[np.ndarray], np.ndarray | None]) -> Damage:
    def damage(file: Path) -> None:
        array = np.load(file)
        changed = change(array)
        np.save(file, array if changed is None else changed)

    return damage


def _put(place: tuple[int, ...], value: int) -> Damage:
    def change(array: np.ndarray) -> None:
        array[place] = value

    return _array(change)


def _swap_rows(array: np.ndarray) -> np.ndarray:
    return array[::-1].copy()


def _huge(file: Path) -> None:
    """Let the header claim 10^12 entries."""
    dtype = np.load(file, mmap_mode="r").dtype
    with file.open("r+b") as opened:
        description = {"descr": dtype.str, "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(opened, description)


INDEX: dict[str, Damage] = {
    "no records": _entries(list.clear),
    "first record lost": _entries(lambda entries: entries.pop(0)),
    "record in the middle lost": _entries(lambda entries: entries.pop(len(entries) // 2)),
    "last record lost": _entries(lambda entries: entries.pop()),
    "record twice": _entries(lambda entries: entries.append(entries[-1])),
    "a day later": _entries(lambda entries: _shift(entries, 24 * HOUR_MS)),
    "a day earlier": _entries(lambda entries: _shift(entries, -24 * HOUR_MS)),
    "a second later": _entries(lambda entries: _shift(entries, 1000)),
    "one record a day earlier": _entries(lambda entries: _shift(entries[-1:], -24 * HOUR_MS)),
    "fewer rows": _entries(lambda entries: entries[0].update(rows=entries[0]["rows"] - 1)),
    "no rows": _entries(lambda entries: entries[0].update(rows=0)),
    "half a row": _entries(lambda entries: entries[0].update(rows=0.5)),
    "more rows than a number holds": _entries(lambda entries: entries[0].update(rows=1 << 70)),
    "another place": _entries(lambda entries: entries[0].update(offset=entries[0]["offset"] + 512)),
    "a record of gigabytes": _entries(lambda entries: entries[0].update(size=1 << 50)),
    "shard of another partition": _entries(lambda entries: entries[0].update(shard="part-00007-000000.tar")),
    "deeply nested": lambda file: file.write_text("[" * 100_000),
}
"""Damages of ``rows/part-*.index.json`` that leave it a list of records, which the structure shows."""

HISTORY: dict[str, tuple[str, Damage]] = {
    "offset beyond the end": ("offsets", _put((0, 2), 1 << 40)),
    "offset before the beginning": ("offsets", _put((0, 0), -5)),
    "one entry of another user": ("offsets", _put((0, 2), 1)),
    "runs of other users": ("offsets", _array(_swap_rows)),
    "one user fewer": ("offsets", _array(lambda array: array[:-1])),
    "other domains": ("offsets", _array(lambda array: array[:, :-1])),
    "offsets as floats": ("offsets", _array(lambda array: array.astype(np.float64))),
    "users in another order": ("user_id", _array(_swap_rows)),
    "a user twice": ("user_id", _array(lambda array: np.concatenate([array[:1], array[:-1]]))),
    "users of 10^12 entries": ("user_id", _huge),
    "a time of zero": ("known_ms", lambda file: _put((len(np.load(file)) // 2,), 0)(file)),
    "times reversed": ("known_ms", _array(_swap_rows)),
    "fewer items": ("item_id", _array(lambda array: array[:-1])),
    "items of 32 bits": ("item_id", _array(lambda array: array.astype(np.int32))),
    "items of 10^12 entries": ("item_id", _huge),
    "items as objects": ("item_id", _array(lambda array: array.astype(object))),
    "authors in the other byte order": ("author_id", _array(lambda array: array.astype(">i8"))),
    "behaviours as a table": ("bits", _array(lambda array: array.reshape(1, -1))),
}
"""Damages of a column of the histories that its structure shows."""
