"""One rank of some fits: prints a hash of centroids and history of each. Killed by SIGKILL where the test says so.

Arguments: file of vectors, a JSON list of pairs of settings and borders of the shares, state file or ``-``, and the
number of saves after which the process dies, in the middle of the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trainer.runtime.distributed import World
from trainer.runtime.files import whole_file
from trainer.semantic_ids import kmeans_state, vector_source
from trainer.semantic_ids.kmeans import Fit, KMeansSettings, fit
from trainer.semantic_ids.vector_source import StoredVectors


def hash_of(result: Fit) -> str:
    digest = hashlib.sha256(repr((result.codebook.scales, result.history)).encode())
    for level in result.codebook.levels:
        digest.update(level.numpy().tobytes())
    return digest.hexdigest()


def main(vectors: str, fits: str, state: str, saves: str) -> None:
    left = int(saves)

    @contextmanager
    def dying_file(file: Path) -> Iterator[Path]:
        nonlocal left
        left -= 1
        with whole_file(file) as tmp_path:
            yield tmp_path
            if left < 0:
                tmp_path.write_bytes(tmp_path.read_bytes()[:100])
                os.kill(os.getpid(), signal.SIGKILL)

    if left >= 0:
        kmeans_state.whole_file = dying_file
    vector_source.CHUNK_VALUES = 700
    with World.join("cpu") as world:
        file = None if state == "-" else Path(state)
        for options, borders in json.loads(fits):
            source = StoredVectors("v", np.load(vectors, mmap_mode="r"), "hash", borders=borders)
            result = fit(source, KMeansSettings(tuple(options.pop("codes")), **options), world, state=file)
            hashes = world.gather(hash_of(result))
            if hashes is not None:
                assert len(set(hashes)) == 1
                print("HASH", hashes[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
