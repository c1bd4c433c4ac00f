"""One rank of a Foresight job that kills itself: ``python -m tests.semantic_ids.killed_foresight SAVE ARGUMENT...``.

With the argument ``--follow`` it is a job of ``trainer.foresight_follow``.

The process dies by SIGKILL in the save with the number ``SAVE``, when its files are written and it has no manifest yet.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from trainer import foresight, foresight_follow
from trainer.checkpoint import writer
from trainer.checkpoint.manifest import Manifest


def main(save: int, arguments: list[str]) -> int:
    write = writer.write_manifest

    def killed(directory: Path, manifest: Manifest) -> None:
        if manifest.number == save:
            os.kill(os.getpid(), signal.SIGKILL)
        write(directory, manifest)

    writer.write_manifest = killed
    if "--follow" in arguments:
        return foresight_follow.main([argument for argument in arguments if argument != "--follow"])
    return foresight.main(arguments)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
