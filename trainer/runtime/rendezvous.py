"""Rendezvous of the ranks of one start of a job.

``limelight train`` opens the store's socket before it starts the ranks, and the first rank serves the store on it.

torchrun keeps one store over all restarts. In torch 2.13 the ranks read entries that an earlier start left there, and
gloo connects to processes that no longer exist ("Connection refused" in ``connectFullMesh``). No variable of a rank
identifies the start: each agent counts restarts for itself. So the ranks agree on a name for their start.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from trainer.runtime.store_socket import STORE_SOCKET_VARIABLE

POLL_SECONDS = 0.02


def launcher_store(rank: int, size: int, timeout: timedelta) -> dist.Store | None:
    """Return the store on the socket that ``limelight`` opened for its ranks; ``None`` under other launchers.

    Raises:
        RuntimeError: the first rank does not answer within the timeout.
    """
    number = os.environ.get(STORE_SOCKET_VARIABLE)
    if number is None:
        return None
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=int(number) if rank == 0 else None,
    )


def shared_store(timeout: timedelta) -> dist.Store | None:
    """Connect to the store of torchrun's agent; ``None`` under other launchers, whose ranks make their own store.

    Raises:
        RuntimeError: nothing answers at MASTER_ADDR:MASTER_PORT.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def fresh_part(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return a part of a store that only the ranks of this start use. Collective.

    Each rank writes a call with a random word and waits for its answer. The first rank answers every call with its own
    word until each rank has confirmed it. A call left by a rank of an earlier start is never confirmed.

    Args:
        store: that all ranks reach.
        rank: of this process.
        size: number of ranks.
        timeout: longest wait for the other ranks.

    Raises:
        RuntimeError: a rank is missing after the timeout.
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
