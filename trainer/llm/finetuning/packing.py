"""Assignment of samples to sequences and of sequences to steps, as a function of lengths, seed and epoch only.

Samples are shuffled, split into windows, and packed inside each window by best-fit decreasing, so that the order of
training is random beyond a window. It does not depend on the number of ranks: the ranks share the sequences of a step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

WINDOW = 1024
"""Number of consecutive samples that are packed together."""

Packs = list[np.ndarray]
"""Sequences in order; each is an int64 array of sample indices."""


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray) -> Packs:
    """Pack samples into sequences of at most ``capacity`` tokens: each goes into the fullest one with room for it.

    Args:
        lengths: ``[samples]`` tokens of each sample, at most ``capacity``.
        capacity: maximum tokens of a sequence.
        order: indices of the samples to pack. Longest first gives the fullest sequences (best-fit decreasing).

    Returns:
        Sequences in the order in which they were opened; every index of ``order`` is in exactly one of them.
    """
    members: list[list[int]] = []
    # (free tokens, sequence) in ascending order: the first entry with enough room is the fullest such sequence.
    room: list[tuple[int, int]] = []
    for sample in order.tolist():
        length = int(lengths[sample])
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, sequence = room.pop(at)
        else:
            left, sequence = capacity, len(members)
            members.append([])
        members[sequence].append(sample)
        if left > length:
            insort(room, (left - length, sequence))
    return [np.array(samples, dtype=np.int64) for samples in members]


def epoch_packs(lengths: np.ndarray, capacity: int, *, seed: int, epoch: int, packing: bool) -> Packs:
    """Return the sequences of an epoch, with every sample once; without ``packing``, one sample per sequence."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if not packing:
        return list(order[:, None])
    packs: Packs = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packed = pack(lengths, capacity, window[np.argsort(-lengths[window], kind="stable")])
        # Best-fit decreasing puts the longest samples first; shuffle, or every window would start with them.
        packs += [packed[place] for place in generator.permutation(len(packed))]
    return packs


@dataclass(frozen=True)
class Schedule:
    """Sequences of every optimizer step.

    Attributes:
        epochs: sequences of each epoch.
        batch_size: sequences of a step, over all ranks; the last step of an epoch may have fewer.
    """

    epochs: list[Packs]
    batch_size: int

    @staticmethod
    def of(lengths: np.ndarray, capacity: int, *, seed: int, epochs: int, batch_size: int, packing: bool) -> Schedule:
        """Pack the samples of all epochs; arguments as of :func:`epoch_packs`."""
        return Schedule(
            [epoch_packs(lengths, capacity, seed=seed, epoch=epoch, packing=packing) for epoch in range(epochs)],
            batch_size,
        )

    @property
    def steps(self) -> int:
        """Number of steps in all epochs."""
        return sum(-(-len(packs) // self.batch_size) for packs in self.epochs)

    def step(self, step: int) -> Packs:
        """Return the sequences of step number ``step``, counted from 0.

        Raises:
            IndexError: there are fewer steps.
        """
        for packs in self.epochs:
            steps = -(-len(packs) // self.batch_size)
            if step < steps:
                return packs[step * self.batch_size : (step + 1) * self.batch_size]
            step -= steps
        raise IndexError("no such step")


def share_of_rank(packs: Packs, *, batch_size: int, rank: int, world: int, parts: int) -> list[Packs]:
    """Return the ``parts`` micro-batches of a rank in a step; in a short step the last ones are smaller or empty."""
    # By position in the step, so that the samples of a step are the same for any number of ranks and parts.
    rows = batch_size // world // parts
    starts = [(rank * parts + part) * rows for part in range(parts)]
    return [packs[start : start + rows] for start in starts]
