"""A directory of checkpoints, whatever model they are of: when one is due, written in the background, found whole.

The threads of the ranks that write agree over a process group of their own, so that training and its collectives go on
meanwhile (``trainer.checkpoint.writer``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from trainer.checkpoint.manifest import Manifest, NewerSchema, check_files, list_checkpoints, read_manifest
from trainer.checkpoint.writer import Save, clear
from trainer.config.sections import CheckpointConfig
from trainer.console.errors import UserError, is_lost_peer, one_line
from trainer.console.text_table import size_text
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one model. Construction and all methods but :meth:`ask` and :meth:`check` are collective.

    Args:
        directory: that holds them, on a file system that all ranks share; made if it is not there.
        settings: when they are saved and which are kept.
        world: the ranks.
        after_save: called on the first rank with each checkpoint that is whole, by the thread that has written it.

    Attributes:
        stalls: seconds for which training stood still, of each save.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointConfig,
        world: World,
        after_save: Callable[[Path], None] = lambda directory: None,
    ) -> None:
        self._directory, self._settings, self._world, self._after_save = directory, settings, world, after_save
        group = dist.new_group(backend="gloo")
        assert group is not None
        self._group: dist.ProcessGroup = group
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self._number = 0
        self._asked = time.monotonic()
        self.stalls: list[float] = []
        agreed(world, lambda: clear(directory))

    def ask(self, step: int) -> bool:
        """Whether this rank would have a checkpoint saved after a step; the first rank decides for all."""
        if self._world.rank:
            return False
        seconds, steps = 60 * self._settings.every_minutes, self._settings.every_steps
        due = bool(steps and step % steps == 0) or bool(seconds and time.monotonic() - self._asked >= seconds)
        if due:
            self._asked = time.monotonic()
        return due

    def wait(self) -> None:
        """Wait for the save that is being written.

        Raises:
            UserError: it could not be.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def check(self) -> None:
        """End the run if a save in the background could not be written; not collective.

        Raises:
            UserError: why.
        """
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Let go of the process group."""
        self.wait()
        dist.destroy_process_group(self._group)

    def _put(self, take: Callable[[bool], Save], wait: bool) -> None:
        """Save what ``take`` gives, in the background if the job says so and nothing waits for it.

        Args:
            take: of a copy in memory of its own (true), or of what training goes on with.
            wait: return when it is on disk.
        """
        started = time.monotonic()
        self.wait()
        self._number += 1
        background = self._settings.background and not wait
        save = take(background)
        if background:
            stood = f", training stood still for {time.monotonic() - started:.2f} s"
            self._writer = threading.Thread(
                target=self._write, args=(save, started, stood), name="checkpoint", daemon=True
            )
            self._writer.start()
        else:
            self._write(save, started, "")
            self.check()
        self.stalls.append(time.monotonic() - started)

    def _newest_whole(self) -> tuple[Path, Manifest] | None:
        candidates = agreed(self._world, lambda: list(reversed(list_checkpoints(self._directory))))
        for directory in candidates:
            problem, manifest = agreed(self._world, partial(_try_manifest, directory))
            if manifest is not None:
                mine = sorted(manifest.files)[self._world.rank :: self._world.size]
                found = self._world.agree(self._world.gather(check_files(directory, manifest, mine))) or []
                problem = next((problems[0] for problems in found if problems), None)
                if problem is None:
                    return directory, manifest
            logger.info(f"{directory}: damaged, going back to the one before it ({problem})")
        if candidates:
            raise UserError(
                f"{self._directory}: none of {len(candidates)} checkpoints is whole; remove them to train from the "
                "beginning"
            )
        return None

    def _write(self, save: Save, started: float, remark: str) -> None:
        try:
            directory, size = save.write()
        except UserError as error:
            self._failure = error
        except Exception as error:
            # That another rank has gone is for that rank to explain.
            lost = is_lost_peer(f"{type(error).__name__}: {error}")
            self._failure = (
                error if lost else UserError(f"{self._directory}: a checkpoint could not be written: {one_line(error)}")
            )
        else:
            logger.info(f"saved {directory}: {size_text(size)} in {time.monotonic() - started:.1f} s{remark}")
            if self._world.rank == 0:
                self._after_save(directory)


def agreed(world: World, look: Callable[[], T]) -> T:
    """What the first rank sees, on every rank: file systems do not show all machines the same at once."""
    result: T | UserError | None = None
    if world.rank == 0:
        try:
            result = look()
        except UserError as error:
            result = error
    result = world.agree(result)
    if isinstance(result, UserError):
        raise result
    return result  # type: ignore[return-value]


def _try_manifest(directory: Path) -> tuple[str | None, Manifest | None]:
    """The manifest of a checkpoint, or why it is no whole one.

    Raises:
        NewerSchema: a later version has written it: going back behind it would undo what that one has trained.
    """
    try:
        return None, read_manifest(directory)
    except NewerSchema:
        raise
    except UserError as error:
        return str(error), None
