"""Two ranks: the second fails by an error, a mistake of the user or a signal, while the first waits for it.

torchrun --nproc-per-node 2 -m tests.distributed.failing_ranks error DIRECTORY
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from trainer.console.errors import UserError
from trainer.console.run_log import open_log, set_step
from trainer.runtime.distributed import World, run_rank


def lookup() -> None:
    raise KeyError("the reason")


def main(how: str, directory: str) -> None:
    with World.join("cpu", timeout_seconds=60) as world:
        open_log(Path(directory), world.rank)
        set_step(7)
        world.barrier()
        if world.rank == 1 and how == "error":
            lookup()
        if world.rank == 1 and how == "mistake":
            raise UserError("id 12 is beyond table item")
        if world.rank == 1 and how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        world.sum(1)


if __name__ == "__main__":
    sys.exit(run_rank(lambda: main(*sys.argv[1:])))
