"""Codebooks of vectors: the nearest centroid of each vector, and residual levels of centroids.

A code is defined without reference to how it is found: it is the centroid with the smallest squared distance
``sum_j (x_j - c_j)^2``, computed in float64 with the elements added in a fixed order (:func:`row_sums`); of equal
distances the lower code wins. So a vector has the same code in any batch, for any number of threads, and on any device.

The search itself is a product in low precision. Its rounding error is bounded, and every centroid whose score lies
within twice the bound of the best one is compared again by the definition. On a CPU, ``modules/codebook_kernel.py``
does all of this at once; here is the same with PyTorch's operations, for a GPU and for few vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.codebook_kernel import nearest_on_cpu

SCORES_AT_ONCE = 1 << 24
"""Scores of vectors and centroids that are held at the same time; 64 MiB."""


FEW_PRODUCTS = 1 << 24
"""Multiplications up to which a CPU uses PyTorch's product: the kernel takes a second to compile."""


Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function that finds nearest centroids, see :func:`nearest`."""


def row_sums(values: Tensor) -> Tensor:
    """Return the sum of each row, ``[n, d] -> [n]``, with additions in an order that depends on ``d`` alone.

    The right half is added to the left half until one column is left; with an odd number of columns the middle one is
    left out of the step. Every step is elementwise, so the result has the same bits on every device.
    """
    if values.shape[1] == 0:
        return values.new_zeros(len(values))
    while (width := values.shape[1]) > 1:
        half = width // 2
        values = torch.cat([values[:, :half] + values[:, width - half :], values[:, half : width - half]], 1)
    return values[:, 0]


def nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest centroid of each vector.

    Args:
        vectors: ``[n, d]``, float32 or float16, finite and with norms below 1e18.
        centroids: ``[k, d] float32``, on the same device.

    Returns:
        Codes ``[n] int32``, and the squared distances ``[n] float32``, which are computed in float64 and rounded.

    Raises:
        ValueError: there are no centroids, or vectors and centroids have another number of elements.
    """
    if vectors.ndim != 2 or centroids.ndim != 2 or vectors.shape[1] != centroids.shape[1] or not len(centroids):
        raise ValueError(
            f"vectors of shape {list(vectors.shape)} and centroids of shape {list(centroids.shape)}; [n, d] and "
            "[k, d] with k > 0 are accepted"
        )
    if _has_kernel(vectors, centroids):
        return nearest_on_cpu(vectors, centroids.float())
    return nearest_by_product(vectors, centroids)


class NearestWithin:
    """Finds nearest centroids as :func:`nearest` does, without a wait of the host for the device.

    The number of centroids that must be compared exactly is known to the device only. So there is room for a number of
    them, and the results hold if it was enough; the host learns that later.

    Args:
        room: centroids for each vector, on average over the vectors that are compared together.
        device: device of the vectors.

    Attributes:
        needed: scalar int64 on the device, the room that all calls so far needed.
    """

    def __init__(self, room: int, device: torch.device) -> None:
        self._room = room
        self.needed = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and distances as :func:`nearest` does; if the room was too small, any codes and distances."""
        if _has_kernel(vectors, centroids):
            return nearest_on_cpu(vectors, centroids.float())
        codes, distances, needed = _by_product(vectors, centroids, self._room)
        self.needed = torch.maximum(self.needed, needed)
        return codes, distances

    @property
    def fits(self) -> Tensor:
        """Bool scalar on the device, True if the room was enough."""
        return self.needed <= self._room


def _has_kernel(vectors: Tensor, centroids: Tensor) -> bool:
    """True if a CPU's kernel finds the centroids."""
    return vectors.device.type == "cpu" and vectors.numel() * len(centroids) > FEW_PRODUCTS


def nearest_by_product(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find nearest centroids as :func:`nearest` does, with PyTorch's operations, on any device.

    The host waits for the device, to learn how many centroids must be compared exactly.
    """
    codes, distances, _ = _by_product(vectors, centroids, None)
    return codes, distances


def _by_product(vectors: Tensor, centroids: Tensor, room: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, distances and, with ``room``, the room that they needed; see :class:`NearestWithin`."""
    vectors, centroids = vectors.float(), centroids.float()
    needed = torch.zeros((), dtype=torch.int64, device=vectors.device)
    # Near the mean of the centroids, norms are small, and so is the error of a product.
    centre = centroids.mean(0)
    moved = centroids - centre
    half_norms = row_sums(moved.double() ** 2).float() / 2
    largest = half_norms.max().mul(2).sqrt()
    codes = torch.empty(len(vectors), dtype=torch.int32, device=vectors.device)
    distances = torch.empty(len(vectors), device=vectors.device)
    step = max(1, SCORES_AT_ONCE // len(centroids))
    for first in range(0, len(vectors), step):
        part = vectors[first : first + step]
        moved_part = part - centre
        scores = torch.addmm(half_norms, moved_part, moved.T, alpha=-1)
        error = score_error(moved_part.norm(dim=1), largest, vectors.shape[1], vectors.device)
        near = scores <= (scores.amin(1) + 2 * error)[:, None]
        if room is None:
            row, candidate = near.nonzero().T
        else:
            row, candidate, count = _first_places(near, room * len(part))
            needed = torch.maximum(needed, (count + len(part) - 1) // len(part))
        code, distance = _nearest_of(part, centroids, row, candidate)
        codes[first : first + step], distances[first : first + step] = code.int(), distance.float()
    return codes, distances, needed


def _first_places(mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row and column of the first ``size`` true places of a mask, ``[size]`` int64, and the number of all.

    With fewer places, the first one is repeated: no size depends on the mask, so the host waits for nothing.
    """
    counts = mask.reshape(-1).cumsum(0, dtype=torch.int32)
    places = torch.searchsorted(counts, torch.arange(1, size + 1, dtype=torch.int32, device=mask.device))
    places = torch.where(places < mask.numel(), places, places[0])
    return places // mask.shape[1], places % mask.shape[1], counts[-1].long()


def squared_distances(vectors: Tensor, centroids: Tensor, codes: Tensor) -> Tensor:
    """Return the squared distance of each vector to the centroid of its code, ``[n] float32``."""
    return _squared_distances(vectors, centroids, torch.arange(len(vectors), device=vectors.device), codes).float()


def score_error(norms: Tensor, largest: Tensor, dim: int, device: torch.device) -> Tensor:
    """Return a bound of the error of a score ``|c|^2 / 2 - x c`` of moved vectors, in float32 and in any order.

    * A GPU may round the inputs of its product to TF32, whose unit roundoff is 2^-11. The two errors of a product add
      up to at most ``2^-10 |x| |c|``, by Cauchy and Schwarz, however many elements there are.
    * x and c were moved in float32: each has a relative error of 2^-24.
    * Each of the ``dim`` products and additions has a relative error of at most the unit roundoff u, 2^-24; a GPU may
      add with fewer bits, so it has 2^-22. So the error is at most ``(dim + 3) u (|c|^2 / 2 + |x| |c|)``, and
      ``dim 2^-126`` for products that are too small for float32.
    * The definition itself rounds in float64.

    Args:
        norms: norms of the moved vectors, ``[n]``.
        largest: largest norm of a moved centroid.
        dim: elements of a vector.
        device: device of the product.
    """
    on_gpu = device.type == "cuda"
    of_inputs, roundoff = (2.0**-10 if on_gpu else 0.0) + 2.0**-22, 2.0**-22 if on_gpu else 2.0**-24
    size = largest * largest / 2 + norms * largest
    of_definition = 2.0**-52 * (norms + largest) ** 2
    return 1.01 * ((of_inputs + (dim + 3) * roundoff) * size + (dim + 3) * (2.0**-126 + of_definition))


def _nearest_of(vectors: Tensor, centroids: Tensor, row: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest candidate of each vector by the definition, ``[n] int64``, and its distance, ``float64``.

    The candidates are pairs of a row and a code, ``[m] int64`` each. A row without a pair has any code.
    """
    exact = _squared_distances(vectors, centroids, row, code)
    best = exact.new_full((len(vectors),), torch.inf).scatter_reduce(0, row, exact, "amin")
    # Not an index by a mask, for whose number of places the host would wait.
    tied = torch.where(exact == best[row], code, len(centroids))
    least = torch.zeros_like(best, dtype=torch.int64)
    return least.scatter_reduce(0, row, tied, "amin", include_self=False), best


def _squared_distances(vectors: Tensor, centroids: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """Return the squared distance of each pair of a vector and a centroid, ``[m] float64``."""
    distances = torch.empty(len(row), dtype=torch.float64, device=vectors.device)
    step = max(1, SCORES_AT_ONCE // max(1, vectors.shape[1]))
    for first in range(0, len(row), step):
        part = slice(first, first + step)
        difference = vectors[row[part]].double() - centroids[code[part].long()].double()
        distances[part] = row_sums(difference**2)
    return distances


@dataclass(frozen=True)
class Codebook:
    """Levels of centroids: each level quantises what the levels before it left over.

    The residual of a vector before the first level is the vector itself; after a level it is the residual minus its
    nearest centroid. With ``normalize``, the residual is scaled to unit length before every level but the first, and a
    centroid of such a level stands for a direction.

    Attributes:
        levels: centroids of each level, ``[k_l, d] float32``.
        normalize: residuals are scaled to unit length.
        scales: mean length of the residual before each level, 1 for the first level; needed with ``normalize`` to turn
            codes into vectors, and empty without it.
    """

    levels: tuple[Tensor, ...]
    normalize: bool = False
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.normalize and len(self.scales) != len(self.levels):
            raise ValueError(f"{len(self.levels)} levels with {len(self.scales)} scales; each needs one")

    @property
    def dim(self) -> int:
        """Number of elements of a vector."""
        return self.levels[0].shape[1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return tuple(len(level) for level in self.levels)

    def to(self, device: torch.device | str) -> Codebook:
        """Return the codebook on another device."""
        return Codebook(tuple(level.to(device) for level in self.levels), self.normalize, self.scales)

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of vectors and the squared distances to what :meth:`decode` makes of them.

        Args:
            vectors: ``[n, d]``, float32 or float16, on the device of the levels.

        Returns:
            Codes ``[n, L] int32`` and squared distances ``[n] float32``.
        """
        codes, residuals = [], vectors.float()
        distances = residuals.new_zeros(len(vectors))
        for place, centroids in enumerate(self.levels):
            residuals = self._before(place, residuals)
            code, distances = nearest(residuals, centroids)
            codes.append(code)
            residuals = residuals - centroids[code.long()]
        result = torch.stack(codes, 1)
        if self.normalize:
            difference = vectors.double() - self.decode(result).double()
            distances = row_sums(difference**2).float()
        return result, distances

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors that codes stand for, ``[n, L] int32 -> [n, d] float32``."""
        total = torch.zeros(len(codes), self.dim, device=codes.device)
        for place in reversed(range(len(self.levels))):
            total = self.levels[place][codes[:, place].long()] + total
            if self.normalize:
                total = total * self.scales[place]
        return total

    def residuals(self, vectors: Tensor, find: Nearest = nearest) -> Tensor:
        """Return what all levels leave of vectors, as a next level would quantise it, ``[n, d] float32``.

        Args:
            vectors: ``[n, d]``, float32 or float16, on the device of the levels.
            find: finds the nearest centroids, as :func:`nearest` does.
        """
        residuals = vectors.float()
        for place, centroids in enumerate(self.levels):
            residuals = self._before(place, residuals)
            code, _ = find(residuals, centroids)
            residuals = residuals - centroids[code.long()]
        return self._before(len(self.levels), residuals)

    def _before(self, place: int, residuals: Tensor) -> Tensor:
        return unit_length(residuals) if self.normalize and place else residuals


def unit_length(vectors: Tensor) -> Tensor:
    """Scale each vector to length 1, ``[n, d] float32``; a zero vector stays. Same bits in any batch and device."""
    exact = vectors.double()
    norms = row_sums(exact**2).sqrt()[:, None]
    return torch.where(norms > 0, exact / norms, exact).float()


def check_codes(codes: Tensor, sizes: Sequence[int]) -> None:
    """Check that codes ``[n, L]`` lie within the sizes of their levels.

    Raises:
        ValueError: there are more or fewer levels, or a code is not within its level.
    """
    if codes.ndim != 2 or codes.shape[1] != len(sizes):
        raise ValueError(f"codes of shape {list(codes.shape)}; [n, {len(sizes)}] is accepted")
    wrong = (codes < 0) | (codes >= torch.tensor(sizes, device=codes.device))
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(f"code {int(codes[row, place])} at level {place}; 0 to {sizes[place] - 1} is accepted")
