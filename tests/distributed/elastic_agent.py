"""Agent of torchrun that waits for other machines by no clock: until there are all of them, or until a file exists.

An agent of torchrun gives other machines a number of seconds to join, its last call, and takes a machine that is silent
for some seconds for dead. On a busy machine no number is right: a second agent may get no processor for longer, and the
first one would begin alone. Here the last call has no end, and no machine is taken for dead, while the file that
``ALONE`` names is missing. When it is there, the last call ends at once, and silent machines are left out.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from tests.nursery import SpareProcess

ALONE = "LIMELIGHT_TEST_ALONE"
"""Variable of the environment: path of the file whose existence ends the wait for other machines."""


def main() -> None:
    """Run the agent."""
    alone = Path(os.environ[ALONE])
    states: Any = dynamic_rendezvous._BackendRendezvousStateHolder
    remove_silent = states._sanitize

    def remove_silent_if_alone(holder: Any) -> None:
        if alone.exists():
            remove_silent(holder)

    states._sanitize = remove_silent_if_alone
    timeouts: Any = dynamic_rendezvous.RendezvousTimeout
    timeouts.last_call = property(lambda timeout: timedelta(0) if alone.exists() else timedelta(days=1))
    SpareProcess.fork_spares()
    run.main()


if __name__ == "__main__":
    main()
