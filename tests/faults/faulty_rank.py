"""``trainer.rank`` with one fault at a chosen moment, and a record of the rows that every step trained on.

The harness starts this module in place of ``trainer.rank``. Environment variables give the directory of the record and
the fault. Steps are counted from the start of the process.
"""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import trainer.engine.step_loss
import trainer.rank
from trainer.ranking import model_training
from trainer.ranking.training_state import TrainingState

DIRECTORY_VARIABLE = "LIMELIGHT_FAULT_DIRECTORY"
"""Environment variable with the directory of the record."""

FAULT_VARIABLE = "LIMELIGHT_FAULT"
"""Environment variable with the fault as JSON, ``{"kind": ..., "rank": ..., ...}``; see ``FAULTS``."""

Fault = dict[str, Any]
StepHook = Callable[[int], None]

_hooks: list[StepHook] = []
_steps = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank of a job."""
    rank, directory = int(os.environ["RANK"]), Path(os.environ[DIRECTORY_VARIABLE])
    (directory / f"process-{rank}").write_text(str(os.getpid()))
    _record_rows(directory / f"rows-{rank}")
    fault = json.loads(os.environ.get(FAULT_VARIABLE) or "null")
    if fault is not None:
        FAULTS[fault["kind"]](fault, fault.get("rank", 0) == rank)
    # The report takes longer than all the rest of this small job.
    trainer.rank.write_last_report = lambda directory: None
    return trainer.rank.main(arguments)


def strike(what: str) -> None:
    """Record that a fault happens now."""
    with (Path(os.environ[DIRECTORY_VARIABLE]) / "struck").open("a") as file:
        file.write(f"{what}\n")


def _record_rows(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    advance = TrainingState.advance

    def recorded(self: TrainingState, result: Any) -> None:
        global _steps
        advance(self, result)
        _steps += 1
        os.write(descriptor, json.dumps([self.step, result.batch.visit_id.tolist()]).encode() + b"\n")
        for hook in _hooks:
            hook(_steps)

    TrainingState.advance = recorded  # type: ignore[method-assign]


def _at_step(step: int, act: Callable[[], None], delay: float = 0.0) -> None:
    """Call ``act`` when ``step`` steps are done, ``delay`` seconds later."""

    def hook(done: int) -> None:
        if done == step:
            _later(delay, act) if delay else act()

    _hooks.append(hook)


def _later(delay: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(delay, act)
    timer.daemon = True
    timer.start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _ranks() -> list[int]:
    directory = Path(os.environ[DIRECTORY_VARIABLE])
    return [int((directory / f"process-{rank}").read_text()) for rank in range(int(os.environ["WORLD_SIZE"]))]


def _send(fault: Fault) -> Callable[[], None]:
    """Return a function that sends a signal to the launcher, to this rank, or to all processes of the job."""

    def act() -> None:
        number, to = signal.Signals(fault["signal"]), fault["to"]
        strike(f"{number.name} to {to}")
        processes = {"rank": [os.getpid()], "launcher": [os.getppid()]}.get(to)
        # Every rank leads a process group, with its loader workers in it.
        processes = processes or [os.getppid(), *(-rank for rank in _ranks())]
        # Another process sends the signal, because a loader worker obeys a SIGTERM of its own rank.
        subprocess.Popen(["kill", "-s", number.name[3:], "--", *map(str, processes)], start_new_session=True)

    return act


def arm_signal(fault: Fault, this_rank: bool) -> None:
    """Send ``signal`` to ``to`` (launcher, rank or all) after ``step`` steps or in ``phase`` (start or evaluation).

    The signal is sent ``delay`` seconds later.
    """
    if not this_rank:
        return
    if fault.get("phase") == "start":
        _later(fault["delay"], _send(fault))
    elif fault.get("phase") == "evaluation":
        predict = model_training.predict

        def interrupted(*arguments: Any, **options: Any) -> Any:
            _later(fault["delay"], _send(fault))
            return predict(*arguments, **options)

        model_training.predict = interrupted  # type: ignore[assignment]
    else:
        _at_step(fault["step"], _send(fault), fault["delay"])


def arm_stop_in_save(fault: Fault, this_rank: bool) -> None:
    """End the process in save number ``save``, when half of a file is written whose name contains ``file``.

    If ``file`` is one of ``RENAMES``, the process ends at the ``save``-th rename of that kind.
    """
    if not this_rank:
        return
    if fault["file"] in RENAMES:
        _at_rename(fault)
        return

    def torn(descriptor: int, path: Path) -> None:
        strike(f"in {path.name}")
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        _die()

    _at_sync(fault, torn)


RENAMES = {
    "rename-before": lambda source, target: ".partial-" in source,
    "rename-after": lambda source, target: ".partial-" in source,
    "removal": lambda source, target: ".old-" in target,
    "replacement": lambda source, target: target.endswith(".replaced"),
}
"""Kind of a rename -> test of source and target name: a checkpoint becomes valid, an old one is removed, or a damaged
one makes room for another one of the same step."""


def _at_rename(fault: Fault) -> None:
    rename, file, seen = os.rename, fault["file"], itertools.count(1)

    def renamed(source: Any, target: Any, **options: Any) -> None:
        last = RENAMES[file](Path(source).name, Path(target).name) and next(seen) == fault["save"]
        if not last or file != "rename-before":
            rename(source, target, **options)
        if last:
            strike(f"{file}, {Path(target).name.partition('.old-')[0]}")
            _die()

    os.rename = renamed


def arm_write_error(fault: Fault, this_rank: bool) -> None:
    """Make the write of ``file`` in save number ``save`` fail with ``errno``; the process survives."""
    if not this_rank:
        return

    def fail(descriptor: int, path: Path) -> None:
        strike(f"{errno.errorcode[fault['errno']]} in {path.name}")
        raise OSError(fault["errno"], os.strerror(fault["errno"]), str(path))

    _at_sync(fault, fail)


def _at_sync(fault: Fault, act: Callable[[int, Path], None]) -> None:
    """Call ``act`` when the ``save``-th checkpoint syncs ``file``, whose content is not on disk before that."""
    sync, directories = os.fsync, []

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        partial = next((part for part in path.parts if part.startswith(".step-")), None)
        if partial is not None and fault["file"] in path.name:
            if partial not in directories:
                directories.append(partial)
            if len(directories) == fault["save"]:
                act(descriptor, path)
        sync(descriptor)

    os.fsync = synced


def arm_file_limit(fault: Fault, this_rank: bool) -> None:
    """Limit the size of files to ``bytes`` after ``step`` steps."""
    if this_rank:

        def limit() -> None:
            strike(f"no file beyond {fault['bytes']} bytes")
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))

        _at_step(fault["step"], limit)


def arm_worker(fault: Fault, this_rank: bool) -> None:
    """Send ``signal`` to a loader worker of the rank, ``delay`` seconds after ``step`` steps."""
    if this_rank:

        def kill() -> None:
            (worker, *_) = multiprocessing.active_children()
            strike(f"loader worker {worker.pid}")
            assert worker.pid is not None
            os.kill(worker.pid, fault["signal"])

        _at_step(fault["step"], kill, fault["delay"])


def arm_hang(fault: Fault, this_rank: bool) -> None:
    """Let the rank sleep for ever, or stop it by SIGSTOP (``stopped``), after ``step`` steps."""
    if this_rank:

        def hang() -> None:
            strike("stops" if fault["stopped"] else "sleeps")
            if fault["stopped"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)

        _at_step(fault["step"], hang)


def arm_not_a_number(fault: Fault, this_rank: bool) -> None:
    """Make the loss NaN in the step after ``step`` steps."""
    if this_rank:
        masked_bce = trainer.engine.step_loss.masked_bce

        def poisoned(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            loss, counted = masked_bce(*arguments)
            if _steps == fault["step"]:
                strike("a loss that is not a number")
                loss = loss * float("nan")
            return loss, counted

        trainer.engine.step_loss.masked_bce = poisoned


def arm_shard(fault: Fault, this_rank: bool) -> None:
    """Damage the file ``shard`` after ``step`` steps; ``harm`` is missing, truncated, zeroed or directory."""
    if this_rank:

        def harm() -> None:
            strike(f"{Path(fault['shard']).name} {fault['harm']}")
            damage(Path(fault["shard"]), fault["harm"])

        _at_step(fault["step"], harm)


def damage(file: Path, harm: str) -> None:
    """Make a file ``missing``, ``truncated``, ``zeroed``, a ``directory``, or one byte of it ``altered``.

    Other hard links of the file keep their content.
    """
    content = file.read_bytes()
    file.unlink()
    if harm == "directory":
        file.mkdir()
    elif harm == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif harm == "altered":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])


FAULTS: dict[str, Callable[[Fault, bool], None]] = {
    "signal": arm_signal,
    "stop in save": arm_stop_in_save,
    "write error": arm_write_error,
    "file limit": arm_file_limit,
    "worker": arm_worker,
    "hang": arm_hang,
    "not a number": arm_not_a_number,
    "shard": arm_shard,
}


if __name__ == "__main__":
    sys.exit(main())
