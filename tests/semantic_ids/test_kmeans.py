"""k-means: the same centroids for any chunks, ranks and kills; what a fit reaches; what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modules import codebook
from modules.codebook import Codebook
from tests.conftest import RunRanks
from tests.device_waits import HOST_ONLY, Waits
from tests.semantic_ids.fit_rank import hash_of
from trainer.console.errors import UserError
from trainer.runtime.distributed import World
from trainer.semantic_ids import kmeans, kmeans_start, vector_source
from trainer.semantic_ids.fixed_point import FixedPoint
from trainer.semantic_ids.kmeans import Fit, KMeansSettings, fit
from trainer.semantic_ids.vector_source import StoredVectors, merge_equal


def fitted(vectors: np.ndarray | StoredVectors, settings: KMeansSettings, **options: Any) -> Fit:
    source = vectors if isinstance(vectors, StoredVectors) else StoredVectors("table", vectors, "hash")
    with World.join("cpu") as world:
        return fit(source, settings, world, **options)


def blobs(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((20, dim)) * 3
    return (centres[random.integers(0, 20, count)] + random.standard_normal((count, dim))).astype(np.float32)


def lloyd(
    vectors: np.ndarray, weights: np.ndarray, centroids: np.ndarray, passes: int
) -> tuple[np.ndarray, list[float]]:
    """Return the centroids after some passes of plain k-means in float64, and the distortion before each pass."""
    vectors, centroids, distortions = vectors.astype(np.float64), centroids.astype(np.float64), []
    for _ in range(passes):
        distances = ((vectors[:, None] - centroids[None]) ** 2).sum(2)
        codes = distances.argmin(1)
        distortions.append(float((distances.min(1) * weights).sum() / weights.sum()))
        for code in np.unique(codes):
            of_code = codes == code
            centroids[code] = np.average(vectors[of_code], 0, weights[of_code])
    return centroids, distortions


@pytest.mark.parametrize("seed", range(3))
def test_a_warm_fit_equals_plain_k_means(seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors, weights = blobs(400, seed=seed), random.integers(1, 5, 400)
    start = torch.from_numpy(vectors[random.permutation(400)[:15]].copy())
    source = StoredVectors("v", vectors, "hash", weights=weights)
    settings = KMeansSettings((15,), iterations=4, tolerance=0, start="warm", revive=False)
    result = fitted(source, settings, warm=Codebook((start,)))
    centroids, distortions = lloyd(vectors, weights, start.numpy(), 4)
    np.testing.assert_allclose(result.codebook.levels[0].numpy(), centroids, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([one.distortion for one in result.history[0]], distortions, rtol=1e-6)


@pytest.mark.parametrize("codes", [(12,), (6, 5)])
def test_the_host_waits_once_in_a_pass(codes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of a GPU. The results of a chunk are read when the next one is queued."""
    per_chunk = 100
    monkeypatch.setattr(vector_source, "CHUNK_VALUES", 8 * per_chunk)
    monkeypatch.setattr("tests.device_waits.HOST_ONLY", HOST_ONLY | {("vector_source.py", "")})
    monkeypatch.setattr(FixedPoint, "add_rows", FixedPoint.add_rows_by_index)
    sums, waits, of_passes = kmeans._Fitting._sums, Waits(), list[list[str]]()

    def counted_sums(*arguments: Any) -> Any:
        before = len(waits.calls)
        found = sums(*arguments)
        of_passes.append(waits.calls[before:])
        return found

    monkeypatch.setattr(kmeans._Fitting, "_sums", counted_sums)
    with waits:
        fitted(blobs(5 * per_chunk), KMeansSettings(codes, iterations=3, tolerance=0, start="random"))
    assert len(of_passes) == 3 * len(codes)
    for calls in of_passes:
        names = Counter(call.partition(" in ")[0] for call in calls)
        # A copy of a chunk is read, and two of its tensors. The end of a pass brings three results to the host.
        assert names == {"values of a step": 5, "tolist": 5, "numpy": 5, "cpu": 2, "_local_scalar_dense": 1}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("revive", [False, True])
def test_a_chunk_without_room_is_added_again(normalize: bool, revive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_source, "CHUNK_VALUES", 8 * 100)
    # A bound of the error as wide as the distances of centroids: many of them must be compared exactly.
    monkeypatch.setattr(codebook, "score_error", lambda norms, largest, dim, device: 2 * norms)
    settings = KMeansSettings((12, 9), iterations=4, tolerance=0, revive=revive, normalize=normalize)
    enough = fitted(blobs(500), settings)
    monkeypatch.setattr(kmeans, "FIRST_ROOM", 1)
    again, exact = [], codebook.nearest

    def counted(vectors: torch.Tensor, centroids: torch.Tensor) -> Any:
        again.append(len(vectors))
        return exact(vectors, centroids)

    monkeypatch.setattr(kmeans, "nearest", counted)
    result = fitted(blobs(500), settings)
    assert result.history == enough.history
    for ours, theirs in zip(result.codebook.levels, enough.codebook.levels, strict=True):
        assert torch.equal(ours, theirs)
    # The first chunks only: they make room for the others.
    assert 1 <= len([count for count in again if count == 100]) < 20


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_distortion_is_that_of_scikit_learn(start: str) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    vectors = blobs(1500, dim=6, seed=3)
    peers = [cluster.KMeans(40, init=start, n_init=1, random_state=seed).fit(vectors) for seed in range(4)]
    own = []
    for seed in range(4):
        codebook = fitted(vectors, KMeansSettings((40,), iterations=40, start=start, seed=seed)).codebook
        own.append(float(codebook.encode(torch.from_numpy(vectors))[1].mean()))
    assert np.mean(own) < np.mean([peer.inertia_ / 1500 for peer in peers]) * 1.03


def test_distortion_is_that_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    vectors, later = blobs(3000, dim=16, seed=5), torch.from_numpy(blobs(4000, dim=16, seed=5)[3000:])
    peer = faiss.Kmeans(16, 50, niter=10, seed=1, min_points_per_centroid=1, max_points_per_centroid=10**6)
    peer.train(vectors)
    theirs = Codebook((torch.from_numpy(peer.centroids.copy()),)).encode(later)[1].mean()
    own = fitted(vectors, KMeansSettings((50,), iterations=10, tolerance=0)).codebook.encode(later)[1].mean()
    assert own < theirs * 1.02


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_of_a_level_holds_every_residual(seed: int) -> None:
    """Every vector minus any centroids of the levels before it, nearest or not."""
    random = torch.Generator().manual_seed(seed)
    vectors = 2 * torch.rand(30, 4, generator=random) - 1
    levels = tuple(float(scale) * torch.randn(5, 4, generator=random) for scale in (1, 3, 0.01))
    settings = KMeansSettings((5, 5, 5), start="warm")
    source = StoredVectors("v", vectors.numpy(), "hash")
    with World.join("cpu") as world:
        fitting = kmeans._Fitting(source, settings, world, Codebook(levels), None)
        for count in range(4):
            exponent = fitting._magnitude(Codebook(levels[:count]))
            largest = float(vectors.abs().max()) + sum(float(level.abs().max()) for level in levels[:count])
            assert largest <= 2.0**exponent < 4 * largest


def test_each_level_lowers_the_error_and_history_belongs_to_it() -> None:
    vectors = blobs(1200, seed=1)
    for normalize in (False, True):
        settings = KMeansSettings((16, 16, 16), iterations=5, normalize=normalize)
        result = fitted(vectors, settings)
        errors = []
        for levels in (1, 2, 3):
            scales = result.codebook.scales[:levels]
            part = Codebook(result.codebook.levels[:levels], normalize, scales)
            errors.append(float(part.encode(torch.from_numpy(vectors))[1].mean()))
        assert errors[0] > 1.4 * errors[1] and errors[1] > 1.2 * errors[2]
        assert [len(level) for level in result.history] == [5, 5, 5]
    residuals = Codebook(result.codebook.levels[:1]).residuals(torch.from_numpy(vectors)).double()
    assert result.codebook.scales[0] == 1.0
    assert result.codebook.scales[1] == pytest.approx(float(residuals.norm(dim=1).mean()), rel=1e-6)


@pytest.mark.parametrize("batch", [0, 300])
def test_chunks_do_not_change_a_bit(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = KMeansSettings((16, 8), iterations=3, batch=batch, normalize=True)
    whole = hash_of(fitted(blobs(1000), settings))
    monkeypatch.setattr(vector_source, "CHUNK_VALUES", 100)
    monkeypatch.setattr(vector_source, "SCATTERED_ROWS", 3)
    monkeypatch.setattr(kmeans_start, "_NUMBERS_AT_ONCE", 64)
    assert hash_of(fitted(blobs(1000), settings)) == whole


def test_mini_batches_come_near_full_passes() -> None:
    vectors = blobs(3000, seed=2)
    full, batches = (
        fitted(vectors, KMeansSettings((40,), iterations=8, tolerance=0, batch=batch)).codebook for batch in (0, 512)
    )
    errors = [float(codebook.encode(torch.from_numpy(vectors))[1].mean()) for codebook in (full, batches)]
    assert not torch.equal(full.levels[0], batches.levels[0]) and errors[1] < 1.1 * errors[0]


SETTINGS: tuple[dict[str, Any], ...] = (
    {"codes": [24, 8], "iterations": 4, "normalize": True},
    {"codes": [400], "iterations": 4, "start": "random"},
    {"codes": [24], "iterations": 3, "batch": 300},
)


def printed_hashes(printed: str) -> list[str]:
    return [line.removeprefix("HASH ") for line in printed.splitlines() if line.startswith("HASH ")]


def test_two_ranks_with_any_shares_give_the_bits_of_one(run_ranks: RunRanks, tmp_path: Path) -> None:
    # Half of the vectors are there twice, so that codes are without vectors and revived.
    vectors = np.concatenate([blobs(500, seed=4)] * 2)
    vectors[::3, 2] = -0.0
    np.save(tmp_path / "v.npy", vectors)
    alone = [hash_of(fitted(vectors, KMeansSettings(**{**one, "codes": tuple(one["codes"])}))) for one in SETTINGS]
    fits = [(one, borders) for borders in ([0, 137, 1000], [0, 1000, 1000]) for one in SETTINGS]
    printed = run_ranks("tests.semantic_ids.fit_rank", tmp_path / "v.npy", json.dumps(fits), "-", -1)
    assert printed_hashes(printed) == alone * 2


def test_a_fit_that_is_killed_while_it_saves_goes_on_with_the_same_bits(run_ranks: RunRanks, tmp_path: Path) -> None:
    vectors, state = blobs(600, seed=6), tmp_path / "state"
    np.save(tmp_path / "v.npy", vectors)
    options = {"codes": [24, 8], "iterations": 4, "normalize": True, "batch": 300, "tolerance": 0}
    whole = hash_of(fitted(vectors, KMeansSettings((24, 8), 4, 0, batch=300, normalize=True)))
    sizes = []

    def run(borders: list[int], saves: int, expect: int) -> str:
        fits = json.dumps([(options, borders)])
        rank = ("tests.semantic_ids.fit_rank", tmp_path / "v.npy", fits, state, saves)
        return run_ranks(*rank, ranks=len(borders) - 1, expect=expect)

    for borders in ([0, 600], [0, 200, 600]):
        run(borders, 3, 137)
        sizes.append(state.stat().st_size)
    assert printed_hashes(run([0, 600], -1, 0)) == [whole]
    assert state.stat().st_size > sizes[1]
    # The state of a fit that has ended gives its result.
    assert hash_of(fitted(vectors, KMeansSettings((24, 8), 4, 0, batch=300, normalize=True), state=state)) == whole


def test_a_state_of_another_fit_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    vectors, state = blobs(300), tmp_path / "state"
    fitted(vectors, KMeansSettings((8,), iterations=2), state=state)
    for other, settings in (
        (StoredVectors("table", vectors, "other"), KMeansSettings((8,), iterations=2)),
        (StoredVectors("table", vectors, "hash"), KMeansSettings((8,), iterations=2, seed=1)),
    ):
        with pytest.raises(UserError, match=r"state: the state of a fit of other vectors or other settings; remove it"):
            fitted(other, settings, state=state)
    content = state.read_bytes()
    for damaged in (content[:200], b"", content.replace(b"about", b"abaut"), b"text"):
        state.write_bytes(damaged)
        with pytest.raises(UserError, match=r"state: damaged.*remove it to begin again"):
            fitted(vectors, KMeansSettings((8,), iterations=2), state=state)


def test_a_state_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing/state: cannot be written"):
        fitted(blobs(100), KMeansSettings((8,)), state=tmp_path / "missing" / "state")


def draws(count: int, distinct: int, dim: int) -> np.ndarray:
    random = np.random.default_rng(7)
    return random.standard_normal((distinct, dim)).astype(np.float16)[random.integers(0, distinct, count)]


def test_duplicates_leave_codes_unused_from_a_random_start_only() -> None:
    vectors = draws(3000, 353, 8)
    settings = KMeansSettings((300,), iterations=3, start="random", revive=False)
    unused = fitted(vectors, settings).history[0]
    assert unused[-1].empty > 30
    assert fitted(vectors, KMeansSettings((300,), iterations=3, revive=False)).history[0][-1].empty == 0
    merged = merge_equal(StoredVectors("v", vectors, "hash"))
    assert fitted(merged, settings).history[0][-1].empty == 0


@pytest.mark.slow
def test_thirty_thousand_draws_of_few_texts() -> None:
    vectors = draws(30_000, 3533, 128)
    at_random = KMeansSettings((3000,), iterations=4, start="random", revive=False)
    unused = fitted(vectors, at_random)
    assert unused.history[0][-1].empty > 300
    plus_plus = fitted(vectors, KMeansSettings((3000,), iterations=4, revive=False))
    assert plus_plus.history[0][-1].empty == 0
    assert plus_plus.history[0][-1].distortion < unused.history[0][-1].distortion / 2


def test_codes_without_vectors_are_revived_from_the_worst_served_vectors() -> None:
    vectors = np.concatenate([blobs(300), np.full((1, 8), 100, np.float32), np.full((1, 8), -90, np.float32)])
    start = torch.from_numpy(np.repeat(vectors[:1], 5, 0))
    warm = KMeansSettings((5,), iterations=1, start="warm")
    result = fitted(vectors, warm, warm=Codebook((start,)))
    assert result.history[0][0][1:] == (4, 4)
    levels = result.codebook.levels[0].numpy()
    np.testing.assert_array_equal(levels[1:3], [[100.0] * 8, [-90.0] * 8])
    np.testing.assert_allclose(levels[0], vectors.mean(0, dtype=np.float64), rtol=1e-5)
    # Vectors that are served exactly revive nothing.
    few = np.eye(3, dtype=np.float32)
    same = fitted(few, KMeansSettings((3,), iterations=3, start="warm"), warm=Codebook((torch.from_numpy(few),)))
    assert same.history[0][-1] == (0.0, 0, 0)


def test_the_worst_served_vectors_do_not_depend_on_the_order() -> None:
    distances, numbers = np.array([2.0, 3.0, 0.0, 2.0, 2.0, 1.0]), np.array([7, 6, 5, 2, 4, 1])
    kept = (np.empty(0), np.empty(0, np.int64))
    for part in np.split(np.arange(6), 6):
        kept = kmeans._larger(kept, distances[part], numbers[part], 3)
    assert kept[0].tolist() == [3.0, 2.0, 2.0] and kept[1].tolist() == [6, 2, 4]


def test_a_start_has_no_negative_zeros() -> None:
    vectors = blobs(50)
    vectors[:, 3] = -0.0
    for start in ("random", "k-means++"):
        level = fitted(vectors, KMeansSettings((40,), iterations=0, start=start)).codebook.levels[0]
        assert not level[:, 3].signbit().any()


def test_fewer_distinct_vectors_than_centroids_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="table: 10 distinct vectors for 11 centroids"):
        fitted(np.repeat(blobs(10), 3, 0), KMeansSettings((11,)))
    with pytest.raises(UserError, match="table: level 2: 1 distinct residuals for 2 centroids"):
        fitted(blobs(10), KMeansSettings((10, 2)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_that_are_not_finite_or_zero_are_counted_and_refused(dtype: str) -> None:
    vectors = blobs(50).astype(dtype)
    vectors[3, 2], vectors[7, 1], vectors[9, 0], vectors[20] = np.nan, np.inf, -np.inf, 0
    vectors[21] = -0.0
    with pytest.raises(UserError, match="table: 3 of 50 vectors are not finite and 2 are zero"):
        fitted(vectors, KMeansSettings((4,)))


def test_vectors_that_are_too_large_or_too_small_are_refused() -> None:
    with pytest.raises(UserError, match="an element above 1e"):
        fitted(blobs(50) * np.float32(1e20), KMeansSettings((4,)))
    with pytest.raises(UserError, match="all vectors have elements below 1e-12"):
        fitted(blobs(50) * np.float32(1e-15), KMeansSettings((4,)))


def test_a_warm_start_of_another_shape_is_refused() -> None:
    settings = KMeansSettings((4,), start="warm")
    with pytest.raises(UserError, match="vectors of 8 elements, but the codebook's centroids have 5"):
        fitted(blobs(50), settings, warm=Codebook((torch.ones(4, 5),)))
    with pytest.raises(UserError, match=r"levels of \[3\] codes"):
        fitted(blobs(50), settings, warm=Codebook((torch.ones(3, 8),)))
    for options, wrong in (({}, settings), ({"warm": Codebook((torch.ones(4, 8),))}, KMeansSettings((4,)))):
        with pytest.raises(UserError, match="start = warm and a codebook to start from belong together"):
            fitted(blobs(50), wrong, **options)


def test_the_sample_of_k_means_plus_plus_is_drawn_where_there_are_many_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "LEAST_SAMPLE", 10)
    result = fitted(blobs(2000), KMeansSettings((20,), iterations=10, sample_per_code=4))
    assert result.history[0][-1].distortion < 12


def test_k_means_plus_plus_draws_in_proportion_to_weight_and_distance() -> None:
    # The second centroid is drawn among three vectors with chances 1 * 1, 3 * 4 and 1 * 16 of 29, given the first one.
    sample = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    weights = np.array([10**9, 1, 3, 1])
    found = [kmeans_start.plus_plus(sample, weights, 2, [seed])[1, 0].item() for seed in range(1000)]
    shares = [found.count(value) / 1000 for value in (1.0, 2.0, 4.0)]
    np.testing.assert_allclose(shares, np.array([1, 12, 16]) / 29, atol=0.06)
    # Of all chosen vectors, the third is drawn by the distances to both; here the only one left.
    three = kmeans_start.plus_plus(sample[:3], weights[:3], 3, [1])
    assert sorted(three[:, 0].tolist()) == [0.0, 1.0, 2.0]
