"""The index of a ``torch.distributed.checkpoint`` and its tensors, read so that no file can run code.

The index ``.metadata`` is a pickle, and the library's own reader unpickles whatever it holds. Here it is unpickled with
a list of allowed types, and its storage entries may only point into regular files of the directory. Tensors are loaded
with ``weights_only``. Everything that opens such a checkpoint uses this module.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from trainer.console.errors import UserError, one_line
from trainer.runtime.stored_files import file_inside, open_regular, read_limited

INDEX = ".metadata"

MAX_INDEX_BYTES = 1 << 30
"""Largest index that is read; one of a model of 100 TB, in blocks of 64 MB, has about 300 MB."""

_INDEX_TYPES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}

DAMAGED = (
    RuntimeError,
    ValueError,
    TypeError,
    EOFError,
    AttributeError,
    LookupError,
    MemoryError,
    OverflowError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""Errors of :func:`load_tensors` for a damaged file."""


def read_index(directory: Path) -> Metadata:
    """Read the index of ``CHECKPOINT/model``, and check that its tensors lie in files of the directory.

    Raises:
        UserError: there is no index, or it is damaged, names another type or leads out of the directory.
    """
    file = directory / INDEX
    try:
        content = read_limited(file, MAX_INDEX_BYTES)
        index = _IndexUnpickler(io.BytesIO(content)).load()
        if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
            raise ValueError("not an index of tensors")
        sizes = _file_sizes(directory, index.storage_data)
        _check_tensors(index, sizes)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{directory}: no model here ({INDEX} is missing)") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except Exception as error:
        # Unpickling a damaged file can raise any exception.
        raise UserError(f"{file}: damaged ({one_line(error):.160} while reading it)") from None
    return index


class SafeReader(FileSystemReader):
    """The library's reader of a checkpoint, with :func:`read_index` and a check of every stored tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index, see :func:`read_index`."""
        index = read_index(Path(self.path))
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        # In memory, because the library's view of a part of a file cannot be searched for the end of an archive.
        content = io.BytesIO(super()._slice_file(file, sinfo).read(-1))
        _check_archive(content, sinfo.length)
        return content


def load_tensors(file: Path) -> Any:
    """Load what ``torch.save`` wrote: tensors, numbers, strings and containers of them, onto the CPU.

    Raises:
        UserError: the file is missing, damaged or not a regular one, or it holds objects of another type.
    """
    try:
        with open_regular(file) as opened:
            return load_archive(opened, os.fstat(opened.fileno()).st_size)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except DAMAGED:
        raise UserError(f"{file}: damaged, or it holds more than tensors, numbers and strings") from None


def load_archive(file: BinaryIO, size: int) -> Any:
    """Load what ``torch.save`` wrote from an open file of ``size`` bytes; any of ``DAMAGED`` if it is damaged."""
    _check_archive(file, size)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file: IO[bytes], size: int) -> None:
    """Check that an archive unpacks to no more than its own size. ``torch.save`` compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a compressed archive")
    if sum(member.file_size for member in members) > size:
        raise ValueError("an archive that is larger than its file")
    file.seek(0)


class _IndexUnpickler(pickle._Unpickler):
    """Unpickles only the types of which an index consists.

    It is Python's own implementation and not the one in C, which allocates memory for any number of remembered objects
    that a file claims to have.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _INDEX_TYPES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an index")

    def _load_build(self) -> None:
        # A pickle may set attributes of an object, but not of a class, which all later checkpoints would share.
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it changes a class")
        self.load_build()  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = _load_build


def _file_sizes(directory: Path, storage: dict[Any, Any]) -> dict[str, int]:
    """Return the size of each file that the index names."""
    sizes: dict[str, int] = {}
    for key, place in storage.items():
        if not isinstance(key, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise ValueError("an entry is not the place of a tensor")
        name = place.relative_path
        if name not in sizes:
            try:
                with open_regular(file_inside(directory, name)) as opened:
                    sizes[name] = os.fstat(opened.fileno()).st_size
            except FileNotFoundError:
                raise UserError(f"{directory / name}: missing, but {INDEX} has tensors in it") from None
        if not (_is_count(place.offset) and _is_count(place.length) and place.offset + place.length <= sizes[name]):
            raise UserError(f"{directory / name}: damaged, it ends before a tensor that {INDEX} places in it")
        if getattr(place, "transform_descriptors", None):
            raise ValueError("compressed tensors")
    return sizes


def _check_tensors(index: Metadata, sizes: dict[str, int]) -> None:
    """Check shapes, and that each stored piece is no larger than its place in a file."""
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError("an entry is not a tensor")
        dtype, shape = entry.properties.dtype, entry.size
        if not isinstance(dtype, torch.dtype) or not all(map(_is_count, shape)):
            raise ValueError(f"tensor {name} has no shape or type")
        elements = 0
        for chunk in entry.chunks:
            place = index.storage_data[MetadataIndex(name, chunk.offsets)]
            corner = [(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if not all(0 <= low <= high <= end for (low, high), end in zip(corner, shape, strict=True)):
                raise ValueError(f"a piece of tensor {name} lies outside of it")
            if prod(chunk.sizes) * dtype.itemsize > place.length:
                raise ValueError(f"a piece of tensor {name} is larger than its place")
            elements += prod(chunk.sizes)
        if elements != prod(shape):
            raise ValueError(f"the pieces of tensor {name} do not cover it")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
