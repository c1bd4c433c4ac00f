"""Which samples form which sequence and which step: a function of lengths, seed and epoch alone.

Samples are shuffled, cut into windows and packed inside each by best-fit decreasing, so that the order of training
stays random beyond a window. The number of ranks has no part in it: ranks share the sequences of a step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

WINDOW = 1024
"""Samples among which the fullest sequences are looked for."""

Packs = list[np.ndarray]
"""Sequences in order, each as the int64 positions of its samples."""


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray) -> Packs:
    """Put samples into sequences of at most ``capacity`` tokens, each into the fullest that it still fits.

    Args:
        lengths: ``[samples]`` tokens of each, none more than ``capacity``.
        capacity: tokens of a sequence.
        order: positions of the samples to pack, the longest first for the fullest sequences.

    Returns:
        Sequences in the order in which they were begun; every position of ``order`` is in exactly one.
    """
    members: list[list[int]] = []
    # (tokens left, sequence), ascending: the first with room enough is the fullest one.
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
    """The sequences of an epoch, every sample once; without ``packing`` each sample is one of its own."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if not packing:
        return list(order[:, None])
    packs: Packs = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        found = pack(lengths, capacity, window[np.argsort(-lengths[window], kind="stable")])
        packs += [found[place] for place in generator.permutation(len(found))]
    return packs


@dataclass(frozen=True)
class Schedule:
    """The steps of a training: which sequences each has.

    Attributes:
        epochs: sequences of each epoch.
        batch_size: sequences of a step of all ranks; the last step of an epoch may have fewer.
    """

    epochs: list[Packs]
    batch_size: int

    @staticmethod
    def of(lengths: np.ndarray, capacity: int, *, seed: int, epochs: int, batch_size: int, packing: bool) -> Schedule:
        """Pack all epochs."""
        every = [epoch_packs(lengths, capacity, seed=seed, epoch=epoch, packing=packing) for epoch in range(epochs)]
        return Schedule(every, batch_size)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return sum(-(-len(packs) // self.batch_size) for packs in self.epochs)

    def step(self, step: int) -> Packs:
        """The sequences of the step after ``step`` others.

        Raises:
            IndexError: there are not so many.
        """
        for packs in self.epochs:
            steps = -(-len(packs) // self.batch_size)
            if step < steps:
                return packs[step * self.batch_size : (step + 1) * self.batch_size]
            step -= steps
        raise IndexError("no such step")


def share_of_rank(packs: Packs, *, batch_size: int, rank: int, world: int, parts: int) -> list[Packs]:
    """The micro-batches of a rank in a step, ``parts`` of them; short steps leave the last ones smaller or empty."""
    rows = batch_size // world // parts
    starts = [(rank * parts + part) * rows for part in range(parts)]
    return [packs[start : start + rows] for start in starts]
