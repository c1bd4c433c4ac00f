"""Measure codebooks: assignment to the nearest centroid, an iteration of k-means, and memory, beside faiss.

    python -m benchmarks.speed.codebook --out benchmarks/results/codebook.json

Everything runs in one process on the same number of threads, several rounds in turn, and the best round counts: other
work on the machine makes a run slower, never faster. With one thread seconds are processor time, else elapsed time.

* **Assignment** of vectors of 128 elements to 20,000 centroids: our search as it chooses (pairs of bfloat16 where the
  processor multiplies them), our search in float32, PyTorch's float32 and bfloat16 products alone, faiss's
  ``IndexFlatL2`` with its default block sizes and with each of several others. Two kinds of vectors: from one normal
  distribution, and around topics, at unit length.
* **Iteration**: whole fits from random starts, ours and faiss's, divided by their iterations; distortion of later
  vectors.
* **Memory** of a child process that merges, starts by k-means++ and makes one pass over 10 million float16 vectors in a
  memory-mapped file (2.6 GB below ``--scratch``): largest resident memory beyond that after the imports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.measure import best_of, fastest, make_parser, spread_of, write_result
from launch.python_path import safe_environment
from modules import codebook_kernel
from modules.codebook import Codebook
from modules.codebook_kernel import nearest_on_cpu
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.runtime.distributed import World
from trainer.runtime.stored_files import load_array
from trainer.semantic_ids.kmeans import KMeansSettings, fit
from trainer.semantic_ids.vector_source import StoredVectors, merge_equal

SHORT = ("--scale", "10")

DIM, CODES = 128, 20_000
ASSIGNED, FITTED, HELD_OUT, STORED = 16_384, 200_000, 20_000, 10_000_000
ITERATIONS, ROUNDS = 10, 3
BLOCKS = ((256, 1024), (256, 4096), (1024, 1024), (1024, 4096), (4096, 4096))
"""Vectors and centroids of faiss's blocks; its defaults are 4,096 and 1,024."""
TARGETS = {"of_product": 0.7, "of_faiss_iteration": 0.9, "distortion": 1.01, "gigabytes": 1.0}


def topic_vectors(count: int, seed: int, topics: int = 500) -> np.ndarray:
    """Return vectors around topics at unit length, ``[count, DIM] float32``; the topics are the same for any seed."""
    centres = np.random.default_rng(0).standard_normal((topics, DIM), np.float32)
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, topics, count)] + 0.6 * random.standard_normal((count, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def normal_vectors(count: int, seed: int) -> np.ndarray:
    """Return vectors of a normal distribution, ``[count, DIM] float32``."""
    return np.random.default_rng(seed).standard_normal((count, DIM), np.float32)


def measure_assignment(
    make: Callable[[int, int], np.ndarray], scale: int, clock: Callable[[], float], threads: int
) -> dict[str, Any]:
    """Return GFLOP/s of each way to find the nearest centroids, and the share of vectors with faiss's code."""
    import faiss

    n, k = max(64, ASSIGNED // scale), max(16, CODES // scale)
    vectors, centroids = make(n, 1), make(k, 2)
    ours, theirs = torch.from_numpy(vectors), torch.from_numpy(centroids)
    half, half_centroids = ours.bfloat16(), theirs.bfloat16()
    product = torch.empty(n, k)
    half_product = torch.empty(n, k, dtype=torch.bfloat16)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(DIM)
    index.add(centroids)
    defaults = faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs

    def search_in_blocks(blocks: tuple[int, int]) -> None:
        faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs = blocks
        index.search(vectors, 1)

    def search_in_floats() -> None:
        with patch.object(codebook_kernel, "PAIRS", False):
            nearest_on_cpu(ours, theirs)

    ways: dict[str, Callable[[], object]] = {
        "nearest": lambda: nearest_on_cpu(ours, theirs),
        "nearest in float32": search_in_floats,
        "product": lambda: torch.mm(ours, theirs.T, out=product),
        "product in bfloat16": lambda: torch.mm(half, half_centroids.T, out=half_product),
        "faiss": lambda: search_in_blocks(defaults),
    }
    ways |= {f"faiss {a} x {b}": lambda blocks=(a, b): search_in_blocks(blocks) for a, b in BLOCKS}  # type: ignore[misc]
    for work in ways.values():
        work()
    operations = 2 * n * k * DIM / 1e9
    rounds = [{name: operations / fastest(work, 1, clock) for name, work in ways.items()} for _ in range(ROUNDS)]
    search_in_blocks(defaults)
    best = best_of(rounds)
    faiss_best = max(value for name, value in best.items() if name.startswith("faiss"))
    same = float((nearest_on_cpu(ours, theirs)[0].numpy() == index.search(vectors, 1)[1][:, 0]).mean())
    return {
        "vectors": n,
        "codes": k,
        "gflops": best,
        "spread": spread_of(rounds),
        "of_product": best["nearest"] / best["product"],
        "of_faiss": best["nearest"] / best["faiss"],
        "of_best_faiss": best["nearest"] / faiss_best,
        "same_code_as_faiss": same,
    }


def measure_iterations(scale: int, clock: Callable[[], float], threads: int) -> dict[str, Any]:
    """Return seconds for each iteration and distortion of later vectors, ours and faiss's."""
    import faiss

    n, k = max(256, FITTED // scale), max(16, CODES // scale)
    vectors, later = topic_vectors(n, 3), torch.from_numpy(topic_vectors(max(64, HELD_OUT // scale), 4))
    faiss.omp_set_num_threads(threads)
    settings = KMeansSettings((k,), iterations=ITERATIONS, tolerance=0.0, start="random")
    source = StoredVectors("vectors", vectors, "benchmark")
    begin = clock()
    with World.join("cpu") as world:
        own = fit(source, settings, world).codebook
    seconds = clock() - begin
    peer = faiss.Kmeans(DIM, k, niter=ITERATIONS, seed=1, min_points_per_centroid=1, max_points_per_centroid=n)
    begin = clock()
    peer.train(vectors)
    peer_seconds = clock() - begin
    theirs = Codebook((torch.from_numpy(np.array(peer.centroids)),))
    own_distortion, distortion = (float(book.encode(later)[1].double().mean()) for book in (own, theirs))
    return {
        "vectors": n,
        "codes": k,
        "iterations": ITERATIONS,
        "seconds": seconds / ITERATIONS,
        "faiss_seconds": peer_seconds / ITERATIONS,
        "of_faiss": seconds / peer_seconds,
        "distortion": own_distortion,
        "faiss_distortion": distortion,
        "distortion_of_faiss": own_distortion / distortion,
    }


def measure_memory(scale: int, scratch: Path, threads: int) -> dict[str, Any]:
    """Write a file of vectors, fit it in a child process, and return the child's figures."""
    n, k = max(256, STORED // scale), max(16, CODES // scale)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder) / "vectors.npy"
        array = np.lib.format.open_memmap(file, "w+", np.float16, (n, DIM))
        for first in range(0, n, 100_000):
            array[first : first + 100_000] = topic_vectors(min(100_000, n - first), first)
        array.flush()
        del array
        size = file.stat().st_size
        command = [sys.executable, "-m", "benchmarks.speed.codebook", "--child", str(file), str(k), str(threads)]
        ended = subprocess.run(command, check=True, env=safe_environment(os.environ), stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return {"vectors": n, "codes": k, "file_gigabytes": size / 1e9, **found}


def fit_file(file: str, codes: str, threads: str) -> None:
    """Fit the vectors of a file, and print the memory that it took as JSON."""
    torch.set_num_threads(int(threads))
    before = _status_bytes("VmRSS")
    begin = time.perf_counter()
    source = merge_equal(StoredVectors(file, load_array(Path(file), 2), "benchmark"))
    with World.join("cpu") as world:
        fit(source, KMeansSettings((int(codes),), iterations=1), world)
    # Not ru_maxrss, which a child takes over from the process that started it.
    peak = _status_bytes("VmHWM")
    seconds = time.perf_counter() - begin
    print(json.dumps({"before_gigabytes": before / 1e9, "gigabytes": (peak - before) / 1e9, "seconds": seconds}))


def _status_bytes(name: str) -> int:
    """Return one of the kernel's sizes of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["--child"]:
        fit_file(*arguments[1:])
        return
    parser = make_parser("speed.codebook", __doc__)
    parser.add_argument("--scale", type=int, default=1, help="divide vectors and codes by this (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and faiss (default: %(default)s)")
    parser.add_argument("--scratch", type=local_argument, default=tempfile.gettempdir(), help="folder for a large file")
    options = parser.parse_args(arguments)
    import faiss

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    try:
        load = os.getloadavg()
        kinds = {"normal": normal_vectors, "topics": topic_vectors}
        assignment = {
            name: measure_assignment(make, options.scale, clock, options.threads) for name, make in kinds.items()
        }
        iteration = measure_iterations(options.scale, clock, options.threads)
        memory = measure_memory(options.scale, options.scratch, options.threads)
    finally:
        torch.set_num_threads(before)
    names = list(assignment["normal"]["gflops"])
    rows = [[name, *(f"{assignment[kind]['gflops'][name]:.1f}" for kind in kinds)] for name in names]
    print(text_table(["GFLOP/s", *kinds], rows))
    print(
        f"an iteration: {iteration['seconds']:.2f} s, faiss {iteration['faiss_seconds']:.2f} s, later distortion "
        f"{iteration['distortion_of_faiss']:.4f} of faiss's; memory: {memory['gigabytes']:.2f} GB beyond the imports"
    )
    document = {
        "dim": DIM,
        "scale": options.scale,
        "threads": options.threads,
        "load": load,
        "pairs": codebook_kernel.PAIRS,
        "faiss": faiss.__version__,
        "targets": TARGETS,
        "assignment": assignment,
        "iteration": iteration,
        "memory": memory,
    }
    write_result(options.out, document)


if __name__ == "__main__":
    main()
