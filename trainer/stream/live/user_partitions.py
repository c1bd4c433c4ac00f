"""Count of the users of a stream that have events in two partitions, in bounded memory.

The events of a user must be in one partition, because a visit is assembled from one partition. A producer that writes
messages without keys, or with another key than the user, spreads the events of a user over partitions. Then labels are
lost: a like in another partition than its exposure is an event of no open visit.

Up to ``LIMIT`` users the count is exact. Of more users those with the smallest hashes are kept, which is a random
sample: the numbers are then estimates, and ``counted_share`` is the share of the hashes that is kept. The sample
depends only on the users that were seen, so neither a restart nor the number of ranks changes it.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np

from trainer.data.format.schema import partition_of
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

LIMIT = 65_536
"""Maximum number of users in memory."""

_HASHES = 1 << 62
_SALT = 0x5851F42D4C957F2D
_NONE = -1
_GROWTH = 10
"""Growth of the number of users in two partitions, after which it is logged again."""


class UserPartitions:
    """Users of a stream with their partitions: the same on all ranks after :meth:`exchange`.

    Args:
        limit: maximum number of users in memory.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._bound = limit, _HASHES
        self._first: dict[int, int] = {}
        self._second: dict[int, int] = {}
        self._largest: list[tuple[int, int]] = []
        self._new: set[tuple[int, int]] = set()
        self._logged = 0

    def add(self, user: np.ndarray, partition: np.ndarray) -> None:
        """Add the users ``[n]`` of events in partitions ``[n]``, which are those of this rank."""
        for p in np.unique(partition).tolist():
            seen = np.unique(user[partition == p])
            for each in seen[_hash(seen) < self._bound].tolist():
                if self._first.get(each) != p and each not in self._second:
                    self._new.add((each, p))

    @property
    def unexchanged(self) -> int:
        """Number of users that the other ranks do not know yet."""
        return len(self._new)

    def exchange(self, world: World) -> None:
        """Exchange new users with all ranks, and log the first one in two partitions. Collective."""
        self.merge(world.agree(world.gather(self._new) or []))
        if world.rank == 0 and len(self._second) >= max(1, _GROWTH * self._logged):
            self._logged = len(self._second)
            logger.info(f"stream: {self.message()}")

    def merge(self, everyone: Iterable[set[tuple[int, int]]]) -> None:
        """Add the new users of every rank with their partitions."""
        self._new = set()
        pairs = sorted(set(chain.from_iterable(everyone)))
        hashes = _hash(np.array([user for user, _ in pairs], np.int64)).tolist()
        for (user, partition), place in zip(pairs, hashes, strict=True):
            if place >= self._bound:
                continue
            if user not in self._first:
                self._first[user] = partition
                heapq.heappush(self._largest, (-place, user))
            elif self._first[user] != partition:
                self._second.setdefault(user, partition)
            if len(self._first) > self._limit:
                self._drop_largest()

    def message(self) -> str:
        """Return a sentence about the users in two partitions, of which there is at least one."""
        user = min(self._second)
        places = sorted((self._first[user], self._second[user]))
        counts = self.summary()
        about = "" if counts["counted_share"] == 1 else "about "
        twice = f"{about}{counts['in_two_partitions']:,} of {counts['seen']:,} users have events in two partitions"
        return (
            f"{twice} (such as user {user} in {places[0]} and {places[1]}), so labels are lost; the producer must keep "
            f"every user in one partition, such as by the user's id as the key of each message"
        )

    def summary(self) -> dict[str, Any]:
        """Return ``seen`` and ``in_two_partitions``, numbers of users, and ``counted_share``, at most 1."""
        share = self._bound / _HASHES
        return {
            "seen": round(len(self._first) / share),
            "in_two_partitions": round(len(self._second) / share),
            "counted_share": share,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the users as ``[n, 3]`` int64: user, partition, and another partition or -1."""
        assert not self._new, "state_dict before exchange"
        rows = [(user, first, self._second.get(user, _NONE)) for user, first in self._first.items()]
        return {"users": np.array(rows, np.int64).reshape(-1, 3), "bound": self._bound, "logged": self._logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state."""
        rows = np.asarray(state["users"])
        self._bound, self._logged = int(state["bound"]), int(state["logged"])
        self._first = dict(rows[:, :2].tolist())
        self._second = {user: second for user, _, second in rows.tolist() if second != _NONE}
        self._largest = [(-place, user) for place, user in zip(_hash(rows[:, 0]).tolist(), self._first, strict=True)]
        heapq.heapify(self._largest)

    def _drop_largest(self) -> None:
        """Drop the users with the largest hash, and from now on all others with such hashes."""
        self._bound = -self._largest[0][0]
        while self._largest and -self._largest[0][0] >= self._bound:
            _, user = heapq.heappop(self._largest)
            del self._first[user]
            self._second.pop(user, None)


def _hash(user: np.ndarray) -> np.ndarray:
    """Return a hash of each user below ``_HASHES``, independent of Limelight's own partitions."""
    return partition_of(user ^ _SALT, _HASHES)
