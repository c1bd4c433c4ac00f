"""Where the ranks of a job first meet.

torchrun keeps one store for all its restarts, and in torch 2.13 whatever the ranks of an earlier start have left there
is taken for this one's: gloo then connects to processes that have gone ("Connection refused" of ``connectFullMesh``).
Neither the number of restarts, which agents count each for themselves, nor anything else that a rank is told says which
start it belongs to. So the ranks agree on a name for it.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.02


def shared_store(timeout: timedelta) -> dist.Store | None:
    """A client of the store that torchrun keeps; None under another launcher, whose ranks have one of their own.

    Raises:
        RuntimeError: nothing answers at MASTER_ADDR:MASTER_PORT.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def fresh_part(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of a store that only the ranks of this start use. Collective.

    A rank calls by a random word and waits until that word is answered. The first rank answers calls with its own word
    until every rank has confirmed it: a call that a rank of an earlier start has left is never confirmed.

    Args:
        store: that all ranks reach.
        rank: of this process.
        size: number of ranks.
        timeout: for which the ranks wait for each other.

    Raises:
        RuntimeError: not all ranks have come in time.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"limelight/call/{rank}", word)
        store.wait([f"limelight/answer/{word}"], timeout)
        name = store.get(f"limelight/answer/{word}").decode()
        store.set(f"limelight/confirmed/{name}/{rank}", "")
        return dist.PrefixStore(f"limelight/start/{name}", store)

    missing = set(range(1, size))
    until = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"limelight/confirmed/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"limelight/call/{other}"]):
                store.set(f"limelight/answer/{store.get(f'limelight/call/{other}').decode()}", word)
        if missing and time.monotonic() > until:
            raise RuntimeError(f"no word from rank {', '.join(map(str, sorted(missing)))} in {timeout.seconds} s")
        time.sleep(POLL_SECONDS)
    return dist.PrefixStore(f"limelight/start/{word}", store)
