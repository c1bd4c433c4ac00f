"""Files of compiled loops, which a damaged or missing place can only make slower to start.

numba's own files have no checksum: a file that was cut, or is of something else, ends in an error of pickle or in wrong
machine code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

logger = logging.getLogger(__name__)

_DIGEST = hashlib.sha256().digest_size


class LoopCache(FunctionCache):
    """numba's cache of one function, with a file for each signature that is checked before it is used.

    A file that cannot be used is compiled again and replaced. Where no file can be written, the function is compiled in
    each process. Both are logged.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        own: Any = vars(self)["_cache_file"]
        self._cache_file: Any = _LoopFiles(own)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return the compiled function for a signature; None if there is no file that can be used."""
        try:
            return super().load_overload(signature, context)
        except Exception as error:
            # Broad, because pickle, numba and LLVM raise many types. The function is compiled then.
            logger.warning(f"a compiled loop cannot be used, and is compiled again: {error}")
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Write the compiled function of a signature, if possible."""
        try:
            super().save_overload(signature, compiled)
        except OSError as error:
            logger.warning(f"a compiled loop cannot be kept for the next start: {error}")


class _LoopFiles:
    """Files of one function.

    Args:
        file: numba's own; it says where the files are, and the state of the function's source.
    """

    def __init__(self, file: Any) -> None:
        self._base = Path(file._cache_path, file._index_name).with_suffix("")
        self._state = (numba.__version__, file._source_stamp)

    def load(self, key: Any) -> Any:
        """Return what was saved for a key; None if there is no file, or one of another state of the source.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, stored = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(stored).digest() != digest:
            raise ValueError(f"{path}: damaged")
        state, found, data = pickle.loads(stored)
        return data if (state, found) == (self._state, key) else None

    def save(self, key: Any, data: Any) -> None:
        """Write what is to be loaded for a key, as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        path, stored = self._path(key), dumps((self._state, key, data))
        tmp_path = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.partial")
        try:
            tmp_path.write_bytes(hashlib.sha256(stored).digest() + stored)
            os.replace(tmp_path, path)
        finally:
            tmp_path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove all files of the function."""
        for path in self._base.parent.glob(f"{self._base.name}.*.loop"):
            path.unlink(missing_ok=True)

    def _path(self, key: Any) -> Path:
        return self._base.with_name(f"{self._base.name}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.loop")
