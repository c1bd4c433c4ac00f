"""k-means and residual k-means over vectors on disk: any number of ranks, any shares, the same bits.

A pass reads the vectors of each rank's share in chunks, finds their codes, and adds vectors and weights to the sums of
their codes. Sums are integers (``trainer/semantic_ids/fixed_point.py``), codes have a definition that does not depend
on batches (``modules/codebook.py``), and draws depend on the numbers of vectors and the seed alone. So the centroids
are bit for bit the same for any chunks and any ranks. The residuals of later levels are computed again in each pass.

After every pass the first rank writes the centroids to a state file; a fit that was killed goes on from there with the
same result.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from modules.codebook import Codebook, Nearest, NearestWithin, nearest, row_sums
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.runtime.distributed import World
from trainer.runtime.host_copy import HostCopy, one_behind, to_device
from trainer.runtime.tracking import record_scalars
from trainer.semantic_ids.fixed_point import FixedPoint, magnitude_of
from trainer.semantic_ids.kmeans_start import draw_numbers, mixed, plus_plus
from trainer.semantic_ids.kmeans_state import FitState, read_state, write_state
from trainer.semantic_ids.vector_source import (
    LARGEST_MAGNITUDE,
    VectorSource,
    check_dim,
    check_vectors,
    chunks,
    hash_rows,
)

Start = Literal["random", "k-means++", "warm"]

LEAST_MAGNITUDE = 1e-12
"""Smallest value of the largest element of all vectors: squared distances stay above zero in float32."""

BLOCK = 256
"""Neighbouring vectors of a mini-batch that are read together."""

FIRST_ROOM = 4
"""Centroids for each vector that are compared exactly at first; a chunk that needs more makes room for later ones."""

LEAST_SAMPLE = 1 << 16
"""Vectors of the sample of k-means++ at least; fewer vectors are taken whole."""


@dataclass(frozen=True)
class KMeansSettings:
    """Settings of a fit.

    Attributes:
        codes: number of codes of each level, such as ``(20000,)`` or ``(256, 256, 256)``.
        iterations: largest number of passes over the vectors, for each level.
        tolerance: a level ends when a pass lowers the distortion by less than this share, and no code was revived.
        start: ``random`` vectors, ``k-means++`` on a sample, or ``warm``: the centroids of another codebook.
        sample_per_code: vectors of the sample of k-means++ for each code.
        batch: vectors of a mini-batch, rounded up to whole blocks; 0 updates the centroids once a pass.
        revive: give codes without vectors the worst-served vectors.
        normalize: scale residuals to unit length before every level but the first.
        seed: seed of all draws.
    """

    codes: tuple[int, ...]
    iterations: int = 25
    tolerance: float = 1e-4
    start: Start = "k-means++"
    sample_per_code: int = 8
    batch: int = 0
    revive: bool = True
    normalize: bool = False
    seed: int = 0


class Iteration(NamedTuple):
    """One pass: mean squared distance of the vectors to the centroids before it; codes without vectors; revived."""

    distortion: float
    empty: int
    revived: int


class Fit(NamedTuple):
    """Result of a fit: the codebook, on the CPU, and the passes of each level."""

    codebook: Codebook
    history: tuple[tuple[Iteration, ...], ...]


class _Part(NamedTuple):
    """A chunk: numbers of its vectors, the vectors on the device, and their weights on the host."""

    numbers: np.ndarray
    vectors: Tensor
    weights: Tensor


class _Pass(NamedTuple):
    """Sums over vectors of all ranks: ``[k, d]``, ``[k]`` weights, squared distance; worst-served vectors of a rank."""

    sums: Tensor
    weights: Tensor
    distance: int
    worst: tuple[np.ndarray, np.ndarray]


def fit(
    source: VectorSource,
    settings: KMeansSettings,
    world: World,
    *,
    warm: Codebook | None = None,
    state: Path | None = None,
) -> Fit:
    """Fit a codebook. Collective: every rank calls it and gets the same result.

    Args:
        source: vectors.
        settings: settings.
        world: ranks, and the device of each.
        warm: codebook whose centroids are the start, for ``start = "warm"``.
        state: file for the state after each pass; a fit of the same vectors and settings continues from it. It stays
            after the end, and a fit that finds the state of a finished one returns its result.

    Raises:
        UserError: there are vectors that are not finite, zero or too large; fewer distinct vectors than codes; ``warm``
            has other sizes; the state file is damaged or belongs to another fit.
    """
    return _Fitting(source, settings, world, warm, state).run()


def settings_hash(source: VectorSource, settings: KMeansSettings, warm: Codebook | None = None) -> str:
    """Return a hash of all that a fit's result depends on."""
    digest = hashlib.blake2b(json.dumps(asdict(settings), sort_keys=True).encode(), digest_size=16)
    digest.update(source.digest.encode())
    for level in warm.levels if warm is not None else ():
        digest.update(level.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Fitting:
    """One call of :func:`fit`."""

    def __init__(
        self, source: VectorSource, settings: KMeansSettings, world: World, warm: Codebook | None, state: Path | None
    ) -> None:
        self.source, self.settings, self.world, self.warm, self.state_file = source, settings, world, warm, state
        if warm is not None:
            check_dim(source.name, source.dim, warm.dim)
            if warm.sizes != settings.codes or warm.normalize != settings.normalize:
                raise UserError(
                    f"the warm start has levels of {list(warm.sizes)} codes (normalize = {warm.normalize}), the "
                    f"settings {list(settings.codes)} (normalize = {settings.normalize}); both must be equal"
                )
        if (settings.start == "warm") != (warm is not None):
            raise UserError(f"start = {settings.start}: start = warm and a codebook to start from belong together")
        self.first, self.stop = source.share(world.rank, world.size)
        self.hash = settings_hash(source, settings, warm)
        self.magnitude, self.total_weight = self._check()
        self._room = FIRST_ROOM

    def run(self) -> Fit:
        """Fit the levels one after the other."""
        state = self._resume()
        while len(state.levels) < len(self.settings.codes):
            state = self._level(state)
        scales = state.scales if self.settings.normalize else ()
        history = tuple(tuple(Iteration(*one) for one in level) for level in state.history)
        return Fit(Codebook(state.levels, self.settings.normalize, scales), history)

    def _check(self) -> tuple[int, int]:
        """Check all vectors; return the exponent of their largest magnitude, and the sum of their weights."""
        found = check_vectors(self.source, self.first, self.stop)
        not_finite, zero = self.world.sum(found.not_finite), self.world.sum(found.zero)
        if not_finite or zero:
            raise UserError(
                f"{self.source.name}: {not_finite:,} of {self.source.count:,} vectors are not finite and {zero:,} are "
                "zero; every vector must be finite and not zero"
            )
        if self.world.max(int(found.largest > LARGEST_MAGNITUDE)):
            raise UserError(f"{self.source.name}: a vector has an element above {LARGEST_MAGNITUDE:g}; scale them down")
        magnitude = self.world.max(magnitude_of(found.largest))
        if magnitude < magnitude_of(LEAST_MAGNITUDE):
            raise UserError(f"{self.source.name}: all vectors have elements below {LEAST_MAGNITUDE:g}; scale them up")
        return magnitude, self.world.sum(found.weight)

    def _resume(self) -> FitState:
        file, state = self.state_file, None
        if file is not None:
            state = self.world.on_first_rank(lambda: read_state(file, self.hash))
        return FitState((), (), (), None, None) if state is None else state

    def _level(self, state: FitState) -> FitState:
        """Fit the next level."""
        place = len(state.levels)
        codes, quiet = self.settings.codes[place], self.world.rank > 0
        before = Codebook(
            tuple(level.to(self.world.device) for level in state.levels),
            self.settings.normalize,
            state.scales[:place] if self.settings.normalize else (),
        )
        if state.centroids is None:
            self._check_distinct(before, codes)
            centroids = self._start(before, codes)
            state = replace(state, centroids=centroids, seen=torch.zeros(codes, dtype=torch.int64))
            state = replace(state, scales=(*state.scales, self._scale(before)), history=(*state.history, ()))
            self._save(state)
        assert state.centroids is not None
        magnitude = self._magnitude(before)
        # Only a warm start may lie outside of the vectors' range; the start decides, so that a resumed fit does too.
        outer = magnitude if self.warm is None else max(magnitude, _magnitude_of_level(self.warm.levels[place]))
        vectors = FixedPoint.of(self.total_weight, magnitude)
        squares = 2 * (outer + 1) + math.ceil(math.log2(max(1, self.source.dim)))
        distances = FixedPoint.of(self.total_weight, squares)
        done = len(state.history[-1])
        # The first rank shows its progress, which goes through its own share of the vectors.
        share = self.stop - self.first
        label, total = f"level {place + 1}", self.settings.iterations * share
        with Progress(label, total, "vectors", done=done * share, quiet=quiet) as progress:
            while not self._ended(state.history[-1]):
                state = self._iterate(state, before, vectors, distances, progress)
                self._save(state)
                latest = Iteration(*state.history[-1][-1])._asdict()
                record_scalars({f"{label}/{name}": value for name, value in latest.items()}, len(state.history[-1]))
        assert state.centroids is not None
        state = replace(state, levels=(*state.levels, state.centroids), centroids=None, seen=None)
        self._save(state)
        return state

    def _ended(self, history: tuple[tuple[float, int, int], ...]) -> bool:
        """True if a level has had all its iterations, or the latest one gained too little."""
        if len(history) >= self.settings.iterations:
            return True
        if len(history) < 2 or history[-1][2]:
            return False
        earlier, latest = history[-2][0], history[-1][0]
        return earlier - latest < self.settings.tolerance * earlier or latest == 0

    def _iterate(
        self, state: FitState, before: Codebook, vectors: FixedPoint, distances: FixedPoint, progress: Progress
    ) -> FitState:
        """Make one pass, and move the centroids once, or once a mini-batch."""
        assert state.centroids is not None and state.seen is not None
        centroids, seen = state.centroids, state.seen
        found_in_pass = torch.zeros(len(centroids), dtype=torch.int64)
        distance = 0
        worst: tuple[np.ndarray, np.ndarray] = (np.empty(0), np.empty(0, np.int64))
        for batch in self._batches(len(state.history), len(state.history[-1])):
            found = self._sums(batch, before, centroids, vectors, distances, worst, progress)
            worst, distance = found.worst, distance + found.distance
            found_in_pass += found.weights
            if self.settings.batch:
                seen = seen + found.weights
                centroids = _moved(centroids, found.sums, found.weights, seen, vectors)
            else:
                centroids = _moved(centroids, found.sums, found.weights, found.weights, vectors)
        empty = (found_in_pass == 0).nonzero()[:, 0]
        revived = 0
        if self.settings.revive and len(empty):
            values = self._worst_served(before, worst, len(empty))
            revived = len(values)
            centroids = centroids.clone()
            centroids[empty[:revived]] = values
            seen = seen.clone()
            seen[empty[:revived]] = 1
        iteration = (distances.value(distance) / self.total_weight, len(empty), revived)
        history = (*state.history[:-1], (*state.history[-1], iteration))
        return replace(state, centroids=centroids, seen=seen, history=history)

    def _batches(self, level: int, iteration: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the ranges of numbers of each batch that lie in this rank's share."""
        if not self.settings.batch:
            yield [(self.first, self.stop)]
            return
        block = BLOCK
        blocks = -(-self.source.count // block)
        order = np.argsort(mixed(np.arange(blocks), self.settings.seed, level, iteration), kind="stable")
        per_batch = -(-self.settings.batch // block)
        for begin in range(0, blocks, per_batch):
            ranges = []
            for number in np.sort(order[begin : begin + per_batch]):
                first, stop = max(self.first, int(number) * block), min(self.stop, (int(number) + 1) * block)
                if first < stop:
                    ranges.append((first, stop))
            yield ranges

    def _parts(self, ranges: list[tuple[int, int]]) -> Iterator[_Part]:
        for first, stop in ranges:
            for chunk in chunks(self.source, first, stop):
                numbers = np.arange(chunk.first, chunk.first + len(chunk.vectors))
                yield _Part(numbers, self._on_device(chunk.vectors), torch.from_numpy(chunk.weights))

    def _on_device(self, vectors: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(vectors), self.world.device)

    def _sums(
        self,
        ranges: list[tuple[int, int]],
        before: Codebook,
        centroids: Tensor,
        vectors: FixedPoint,
        distances: FixedPoint,
        worst: tuple[np.ndarray, np.ndarray],
        progress: Progress,
    ) -> _Pass:
        device = self.world.device
        centroids = to_device(centroids, device)
        sums = torch.zeros(centroids.shape, dtype=torch.int64, device=device)
        totals = torch.zeros(len(centroids) + 1, dtype=torch.int64, device=device)

        def add(part: _Part, find: Nearest) -> list[Tensor]:
            """Add a chunk to the sums, or nothing if there was no room; return the weighted distances if they count."""
            values = before.residuals(part.vectors, find)
            codes, squared = find(values, centroids)
            index, weights = codes.long(), to_device(part.weights, device)
            if isinstance(find, NearestWithin):
                weights, squared = weights * find.fits, torch.where(find.fits, squared, 0)
            vectors.add_rows(sums, codes, values, weights)
            totals.index_add_(0, index, weights)
            totals[-1] += (distances.integers(squared) * weights).sum()
            return [squared.double() * weights] if self.settings.revive else []

        def parts() -> Iterator[tuple[tuple[_Part, int], HostCopy]]:
            for part in self._parts(ranges):
                find = NearestWithin(self._room, device)
                weighted = add(part, find)
                yield (part, self._room), HostCopy([find.needed, *weighted])

        for (part, room), (needed, *weighted) in one_behind(parts()):
            (more,) = needed.reshape(1).tolist()
            if more > room:
                # Sums are integers, so a chunk may be added later. This time the host waits for the device.
                weighted = HostCopy(add(part, nearest)).read()
                self._room = max(self._room, 2 * more)
            for of_part in weighted:
                worst = _larger(worst, of_part.numpy(), part.numbers, len(centroids))
            progress.advance(len(part.numbers))
        if self.world.size > 1:
            dist.all_reduce(sums, group=dist.group.WORLD)
            dist.all_reduce(totals, group=dist.group.WORLD)
        return _Pass(sums.cpu(), totals[:-1].cpu(), int(totals[-1]), worst)

    def _worst_served(self, before: Codebook, worst: tuple[np.ndarray, np.ndarray], count: int) -> Tensor:
        """Return up to ``count`` distinct residuals with the largest distances of all ranks."""
        gathered = self.world.gather(worst)
        chosen = None
        if gathered is not None:
            distance, number = (np.concatenate(part) for part in zip(*gathered, strict=True))
            order = np.lexsort((number, -distance))
            chosen = number[order[distance[order] > 0]]
        chosen = self.world.agree(chosen)
        assert chosen is not None
        values = self._fetch(chosen, before)
        _, first = np.unique(hash_rows(values.numpy()), return_index=True)
        return values[np.sort(first)[:count]]

    def _fetch(self, numbers: np.ndarray, before: Codebook) -> Tensor:
        """Return the residuals of vectors of any rank, ``[m, d]`` in the order of ``numbers``, on every rank."""
        own = np.flatnonzero((numbers >= self.first) & (numbers < self.stop))
        own = own[np.argsort(numbers[own], kind="stable")]
        result = torch.zeros((len(numbers), self.source.dim))
        if len(own):
            # A sum over ranks makes 0.0 of -0.0; adding 0.0 does so on one rank, too.
            vectors = self._on_device(self.source.read(numbers[own])[0])
            result[own] = before.residuals(vectors).cpu() + 0.0
        if self.world.size > 1:
            # Every row comes from one rank and is zero elsewhere, so the sum is exact.
            dist.all_reduce(result, group=self.world.control)
        return result

    def _weights(self, numbers: np.ndarray) -> np.ndarray:
        own = np.flatnonzero((numbers >= self.first) & (numbers < self.stop))
        result = torch.zeros(len(numbers), dtype=torch.int64)
        if len(own):
            result[own] = torch.from_numpy(self.source.read(numbers[own])[1])
        if self.world.size > 1:
            dist.all_reduce(result, group=self.world.control)
        return result.numpy()

    def _start(self, before: Codebook, codes: int) -> Tensor:
        """Return the centroids before the first pass."""
        level = len(before.levels)
        if self.warm is not None:
            return self.warm.levels[level].float().cpu()
        if self.settings.start == "random":
            numbers = draw_numbers(self.source, self.world, codes, self.settings.seed, level)
            return self._fetch(numbers, before)
        sample = max(self.settings.sample_per_code * codes, LEAST_SAMPLE)
        numbers = np.sort(draw_numbers(self.source, self.world, sample, self.settings.seed, level))
        values, weights = self._fetch(numbers, before), self._weights(numbers)
        seed = [self.settings.seed, level]
        return self.world.on_first_rank(lambda: plus_plus(values.to(self.world.device), weights, codes, seed))

    def _check_distinct(self, before: Codebook, codes: int) -> None:
        """Check that there are as many distinct vectors as codes."""
        found = np.empty(0, np.uint64)
        for part in self._parts([(self.first, self.stop)]):
            found = np.union1d(found, hash_rows(before.residuals(part.vectors).cpu().numpy()))
            if len(found) >= codes:
                break
        gathered = self.world.gather(found[:codes])
        distinct = self.world.agree(0 if gathered is None else len(np.unique(np.concatenate(gathered))))
        if distinct < codes:
            level = len(before.levels)
            what = f"level {level + 1}: {distinct:,} distinct residuals" if level else f"{distinct:,} distinct vectors"
            raise UserError(
                f"{self.source.name}: {what} for {codes:,} centroids; at most as many centroids as vectors are possible"
            )

    def _magnitude(self, before: Codebook) -> int:
        """Return the exponent of the largest magnitude of a residual."""
        if self.settings.normalize and before.levels:
            return 1
        largest = math.ldexp(1.0, self.magnitude)
        for level in before.levels:
            largest += float(level.abs().max())
        return magnitude_of(largest)

    def _scale(self, before: Codebook) -> float:
        """Return the mean length of the residuals before this level; 1 without normalisation and for the first one."""
        if not (self.settings.normalize and before.levels):
            return 1.0
        last = before.levels[-1]
        earlier = Codebook(before.levels[:-1], True, before.scales[:-1])
        largest = math.ldexp(1.0, self._magnitude(earlier)) + float(last.abs().max())
        lengths = FixedPoint.of(self.total_weight, magnitude_of(largest * math.sqrt(self.source.dim) * 1.01))
        total = torch.zeros((), dtype=torch.int64, device=self.world.device)
        for part in self._parts([(self.first, self.stop)]):
            values = earlier.residuals(part.vectors)
            left = values - last[nearest(values, last)[0].long()]
            integers = lengths.integers(row_sums(left.double() ** 2).sqrt())
            total += (integers * to_device(part.weights, integers.device)).sum()
        return lengths.value(self.world.sum(int(total))) / self.total_weight

    def _save(self, state: FitState) -> None:
        file = self.state_file
        if file is not None:
            self.world.on_first_rank(lambda: write_state(file, self.hash, state))


def _moved(centroids: Tensor, sums: Tensor, weights: Tensor, seen: Tensor, scale: FixedPoint) -> Tensor:
    """Return the centroids after an update: the mean of what each has seen, the latest ``weights`` among it."""
    old, added = centroids.double(), scale.values(sums)
    # seen - weights vectors have made the old centroid; it is 0 of them if an update takes all vectors.
    means = (old * (seen - weights)[:, None] + added) / seen.clamp(min=1)[:, None]
    return torch.where((weights > 0)[:, None], means, old).float()


def _magnitude_of_level(centroids: Tensor) -> int:
    return magnitude_of(float(centroids.abs().max()))


def _larger(
    kept: tuple[np.ndarray, np.ndarray], distances: np.ndarray, numbers: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the ``count`` largest distances and their numbers; of equal ones the lower numbers."""
    # Mini-batches come in any order, so a lower number with the smallest distance may come later.
    new = distances >= kept[0].min() if len(kept[0]) >= count else distances > 0
    distance, number = np.concatenate((kept[0], distances[new])), np.concatenate((kept[1], numbers[new]))
    if len(distance) > count:
        order = np.lexsort((number, -distance))[:count]
        distance, number = distance[order], number[order]
    return distance, number
