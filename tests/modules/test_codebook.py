"""Nearest centroids and codebooks against their definition in float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modules import codebook, codebook_kernel
from modules.codebook import Codebook, NearestWithin, nearest, nearest_by_product, row_sums
from modules.codebook_kernel import nearest_on_cpu
from tests.paths import ROOT


def definition(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and distances by the definition: float64, the fixed order of :func:`row_sums`, the lower code."""
    codes, distances = [], []
    for vector in vectors.astype(np.float64):
        values = [one_by_one((vector - centroid) ** 2) for centroid in centroids.astype(np.float64)]
        codes.append(int(np.argmin(values)))
        distances.append(values[codes[-1]])
    return np.array(codes, np.int32), np.array(distances).astype(np.float32)


def one_by_one(values: np.ndarray) -> float:
    """Return the sum of some numbers, the right half added to the left half until one is left."""
    numbers = [float(value) for value in values]
    while len(numbers) > 1:
        half = len(numbers) // 2
        added = [one + other for one, other in zip(numbers[:half], numbers[len(numbers) - half :], strict=True)]
        numbers = added + numbers[half : len(numbers) - half]
    return numbers[0] if numbers else 0.0


def check(vectors: np.ndarray, centroids: np.ndarray) -> None:
    expected, expected_distances = definition(vectors, centroids)
    for search in SEARCHES:
        codes, distances = search(torch.from_numpy(vectors), torch.from_numpy(centroids))
        assert codes.dtype == torch.int32 and distances.dtype == torch.float32
        np.testing.assert_array_equal(codes.numpy(), expected)
        np.testing.assert_array_equal(distances.numpy(), expected_distances)


def on_cpu_in_floats(vectors: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with patch.object(codebook_kernel, "PAIRS", False):
        return nearest_on_cpu(vectors, centroids)


def within_room(vectors: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    find = NearestWithin(len(centroids), vectors.device)
    with patch.object(codebook, "FEW_PRODUCTS", 1 << 60):
        found = find(vectors, centroids)
    assert find.fits and 0 <= find.needed <= len(centroids)
    return found


Search = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
SEARCHES = (nearest, nearest_by_product, within_room, nearest_on_cpu, on_cpu_in_floats)


@pytest.mark.parametrize("seed", range(3))
def test_the_room_that_is_needed_is_told_and_enough(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(70, 4, generator=random)
    # Each centroid is there three times, and some again at a distance that float32 cannot tell.
    centroids = torch.randn(9, 4, generator=random).repeat(3, 1)
    centroids = torch.cat([centroids, centroids[:5] * (1 + 2**-22)])
    expected = nearest_by_product(vectors, centroids)
    with patch.object(codebook, "SCORES_AT_ONCE", 20 * len(centroids)):
        small = NearestWithin(1, vectors.device)
        small(vectors, centroids)
        assert not small.fits and small.needed >= 3
        enough = NearestWithin(int(small.needed), vectors.device)
        found = enough(vectors, centroids)
    assert enough.fits and enough.needed == small.needed
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(50, 70, 16), (33, 65, 1), (7, 1, 5), (1, 130, 128), (0, 4, 3), (40, 100, 33)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_codes_and_distances_are_those_of_the_definition(seed: int, shape: tuple[int, int, int], dtype: str) -> None:
    random, (n, k, d) = np.random.default_rng(seed), shape
    check(random.standard_normal((n, d)).astype(dtype), random.standard_normal((k, d)).astype(np.float32))


values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1 + 2**-10, 3e-8, 1e-20, 60000.0])


@given(st.data())
def test_ties_and_near_ties_are_decided_by_the_definition(data: st.DataObject) -> None:
    n, k, d = (data.draw(st.integers(1, most)) for most in (6, 20, 5))
    draw = lambda rows: np.array([[data.draw(values) for _ in range(d)] for _ in range(rows)])  # noqa: E731
    vectors, centroids = draw(n).astype(data.draw(st.sampled_from(["float16", "float32"]))), draw(k).astype(np.float32)
    check(vectors, centroids)


def test_rounding_of_the_product_does_not_decide() -> None:
    # All centroids lie at nearly the same distance: float32 scores cannot tell them apart, float64 distances can.
    random = np.random.default_rng(0)
    centroids = (1000 + 1e-3 * random.standard_normal((200, 64))).astype(np.float32)
    check((1000 + 1e-3 * random.standard_normal((20, 64))).astype(np.float32), centroids)


def test_rounding_of_the_definition_decides_where_centroids_are_nearly_equal() -> None:
    # In float64, the distances to all of these centroids are the same, so the lowest code counts; scores differ.
    random = np.random.default_rng(7)
    for length, width in ((1.0, 1e-17), (3000.0, 1e-14), (1e6, 1e-12)):
        centroids = (width * random.standard_normal((70, 8))).astype(np.float32)
        check((length * random.standard_normal((9, 8))).astype(np.float32), centroids)


def test_a_product_that_is_wrong_by_its_bound_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of the nearest centroid is too large by the bound, and all others are too small by it."""
    random = np.random.default_rng(8)
    vectors, centroids = (torch.from_numpy(random.standard_normal((n, 6)).astype(np.float32)) for n in (40, 30))
    expected, bound = nearest_by_product(vectors, centroids), 0.3

    def wrong(half_norms: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: int) -> torch.Tensor:
        error = torch.full((len(left), right.shape[1]), -0.999 * bound)
        error.scatter_(1, expected[0].long()[:, None], 0.999 * bound)
        return half_norms + alpha * left @ right + error

    monkeypatch.setattr(codebook, "score_error", lambda norms, *_: torch.full_like(norms, bound))
    monkeypatch.setattr(torch, "addmm", wrong)
    found = nearest_by_product(vectors, centroids)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_the_errors_of_prepared_centroids_are_bounded_closely(offset: float, pairs: bool) -> None:
    random = np.random.default_rng(9)
    centroids = torch.from_numpy((offset + random.standard_normal((90, 13))).astype(np.float32))
    prepared = codebook_kernel._Panels.of(centroids, pairs)
    words = torch.from_numpy(prepared.words).mT.reshape(-1, prepared.words.shape[1]).contiguous()
    values = (words.view(torch.bfloat16) if pairs else words.view(torch.float32))[: len(centroids), :13].double()
    errors = (centroids.double() - torch.from_numpy(prepared.centre).double() + values).norm(dim=1)
    norms = values.norm(dim=1)
    assert errors.max() <= prepared.largest_error <= 1.01 * errors.max() + 2.0**-23 * norms.max() * 1.01
    torch.testing.assert_close(prepared.largest, float(norms.max()), rtol=1e-6, atol=0)


def test_the_bound_of_a_gpu_covers_tf32_and_leaves_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(6)
    vectors, centroids = (torch.from_numpy(random.standard_normal((n, 128)).astype(np.float32)) for n in (60, 4000))

    def in_tf32(values: torch.Tensor) -> torch.Tensor:
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    scores = [x.double() @ y.double().T for x, y in ((vectors, centroids), (in_tf32(vectors), in_tf32(centroids)))]
    largest, gpu = centroids.norm(dim=1).max(), torch.device("cuda")
    bound = codebook.score_error(vectors.norm(dim=1), largest, 128, gpu)
    assert ((scores[0] - scores[1]).abs().amax(1) < bound).all()
    # A bound that is too wide gives the right codes, but compares most of the centroids again.
    error, compare, pairs = codebook.score_error, codebook._nearest_of, []
    monkeypatch.setattr(codebook, "score_error", lambda norms, most, dim, device: error(norms, most, dim, gpu))
    monkeypatch.setattr(codebook, "_nearest_of", lambda *inputs: (pairs.append(len(inputs[2])), compare(*inputs))[1])
    for offset in (0, 50):
        pairs.clear()
        found = nearest_by_product(vectors + offset, centroids + offset)
        assert 60 <= sum(pairs) < 2 * 60
        assert torch.equal(found[0], nearest_on_cpu(vectors + offset, centroids + offset)[0])


@pytest.mark.parametrize("search", SEARCHES)
def test_a_code_does_not_depend_on_the_batch(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    vectors, centroids = (torch.from_numpy(random.integers(-2, 3, (n, 6)).astype(np.float32)) for n in (300, 90))
    codes, distances = search(vectors, centroids)
    monkeypatch.setattr(codebook, "SCORES_AT_ONCE", 3)
    monkeypatch.setattr(codebook_kernel, "VECTORS_AT_ONCE", 70)
    monkeypatch.setattr(codebook_kernel, "LEAST_BYTES", 1)
    for first, stop in ((0, 1), (1, 20), (20, 300), (7, 7)):
        part = search(vectors[first:stop], centroids)
        assert torch.equal(part[0], codes[first:stop]) and torch.equal(part[1], distances[first:stop])


def test_threads_and_a_second_screen_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(4)
    vectors, centroids = (torch.from_numpy(random.standard_normal((n, 5)).astype(np.float32)) for n in (500, 200))
    expected = nearest_by_product(vectors, centroids)
    monkeypatch.setattr(codebook_kernel, "CANDIDATES", 0.0)
    monkeypatch.setattr(codebook_kernel, "VECTORS_AT_ONCE", 200)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = nearest_on_cpu(vectors, centroids)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_large_searches_on_a_cpu_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "nearest_on_cpu", lambda vectors, centroids: "kernel")
    monkeypatch.setattr(codebook, "FEW_PRODUCTS", 24)
    assert nearest(torch.ones(4, 3), torch.ones(2, 3)) != "kernel"
    assert nearest(torch.ones(5, 3), torch.ones(2, 3)) == "kernel"


def test_other_shapes_are_refused() -> None:
    for vectors, centroids in (((3, 2), (4, 3)), ((3,), (4, 3)), ((3, 2), (0, 2))):
        with pytest.raises(ValueError, match="k > 0 are accepted"):
            nearest(torch.zeros(vectors), torch.zeros(centroids))


def test_row_sums_have_a_fixed_order() -> None:
    random = np.random.default_rng(2)
    for width in (0, 1, 2, 3, 7, 128, 129):
        rows = random.standard_normal((4, width)) * 10.0 ** random.integers(-9, 9, (4, width))
        assert row_sums(torch.from_numpy(rows)).tolist() == [one_by_one(row) for row in rows]


@pytest.mark.parametrize("normalize", [False, True])
def test_levels_quantise_what_earlier_levels_left(normalize: bool) -> None:
    random = np.random.default_rng(3)
    levels = [random.standard_normal((size, 8)).astype(np.float32) for size in (5, 7, 3)]
    scales = (1.0, 1.5, 0.75) if normalize else ()
    book = Codebook(tuple(map(torch.from_numpy, levels)), normalize, scales)
    vectors = random.standard_normal((40, 8)).astype(np.float32)
    codes, errors = book.encode(torch.from_numpy(vectors))
    for row, vector in enumerate(vectors):
        residual, decoded, scale = vector, np.zeros(8), 1.0
        for place, centroids in enumerate(levels):
            if normalize and place:
                residual = (residual / np.linalg.norm(residual.astype(np.float64))).astype(np.float32)
            code = definition(residual[None], centroids)[0][0]
            assert codes[row, place] == code
            residual = residual - centroids[code]
            scale *= scales[place] if normalize else 1.0
            decoded += scale * centroids[code]
        np.testing.assert_allclose(book.decode(codes[row : row + 1])[0].numpy(), decoded, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(errors[row], ((vector - decoded) ** 2).sum(), rtol=1e-4)
    assert book.sizes == (5, 7, 3) and book.dim == 8


def test_a_vector_that_nothing_is_left_of_has_codes() -> None:
    book = Codebook((torch.eye(3), torch.eye(3)), True, (1.0, 0.5))
    codes, errors = book.encode(torch.eye(3))
    assert codes.tolist() == [[0, 0], [1, 0], [2, 0]] and errors.tolist() == [0.25, 0.25, 0.25]


def test_codes_of_another_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match="code 7 at level 1; 0 to 6 is accepted"):
        codebook.check_codes(torch.tensor([[0, 0], [4, 7]]), (5, 7))
    with pytest.raises(ValueError, match=r"\[n, 2\] is accepted"):
        codebook.check_codes(torch.zeros(3, 1), (5, 7))


@pytest.mark.gpu
def test_a_gpu_finds_the_codes_of_a_cpu() -> None:
    random = np.random.default_rng(5)
    levels = tuple(torch.from_numpy(random.standard_normal((size, 48)).astype(np.float32)) for size in (300, 70))
    vectors = torch.from_numpy(random.standard_normal((2000, 48)).astype(np.float16))
    for normalize in (False, True):
        book = Codebook(levels, normalize, (1.0, 0.7) if normalize else ())
        codes, errors = book.encode(vectors)
        found, found_errors = book.to("cuda").encode(vectors.cuda())
        assert torch.equal(found.cpu(), codes) and torch.equal(found_errors.cpu(), errors)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for a processor with AVX2")
def test_a_processor_with_short_registers_finds_the_same_codes() -> None:
    program = """if True:
        import torch
        from modules import codebook_kernel
        from modules.codebook import nearest_by_product

        assert not codebook_kernel.PAIRS and codebook_kernel.LANES == 8
        vectors, centroids = torch.randn(300, 33), torch.randn(257, 33)
        found, expected = codebook_kernel.nearest_on_cpu(vectors, centroids), nearest_by_product(vectors, centroids)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    """
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+sse4.2,+popcnt"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env={**os.environ, **older})
