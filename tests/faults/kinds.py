"""Kinds of faults: the random draw of one, the reaction that a job must show, and the repair before the next start."""

from __future__ import annotations

import errno
import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.faulty_rank import Fault, damage
from tests.faults.harness import RANKS, Ending, Job
from trainer.checkpoint.manifest import read_manifest
from trainer.console.exit_status import HUNG_STATUS, PREEMPTED_STATUS, USER_ERROR_STATUS

KILLED = 128 + signal.SIGKILL
SAVE_FILES = {
    rank: (
        f"__{rank}_0.distcp",
        f"rank-{rank:05d}.pt",
        *([".metadata", "job.json", "manifest.json"] if not rank else ()),
    )
    for rank in range(RANKS)
}
"""Rank -> files that it writes in a save."""

ROOM_BYTES = 64 << 20
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Attack:
    """One fault with the expected reaction.

    Attributes:
        name: name of the kind.
        fault: fault for ``faulty_rank``; None if it is made outside of the ranks.
        statuses: exit statuses of the launcher that are accepted.
        message: pattern of a line that the job must print.
        prepare: called before the start.
        repair: called before the next start.
    """

    name: str
    fault: Fault | None
    statuses: tuple[int, ...]
    message: str = ""
    prepare: Callable[[Job], None] = field(default=lambda job: None)
    repair: Callable[[Job], None] = field(default=lambda job: None)

    def problems(self, ending: Ending) -> list[str]:
        """List the defects of the reaction: a user must get the right exit status and one clear line."""
        found = []
        if ending.status not in self.statuses:
            found.append(f"exit status {ending.status} instead of {self.statuses}")
        if not re.search(self.message, ending.output, re.MULTILINE):
            found.append(f"no line matches {self.message!r}")
        if "Traceback" in ending.output:
            found.append("a traceback is shown")
        errors = {line for line in ending.errors if line.startswith("limelight: error:")}
        if len(errors) > bool({USER_ERROR_STATUS, HUNG_STATUS} & {*self.statuses}):
            found.append("more than one error is printed")
        return found


Draw = Callable[[random.Random, Job], Attack]


def kill_rank(rng: random.Random, job: Job) -> Attack:
    """Kill one rank."""
    fault = _signal(rng, signal.SIGKILL, "rank")
    return Attack("kill -9 of a rank", fault, (KILLED,), _ended(fault))


def kill_launcher(rng: random.Random, job: Job) -> Attack:
    """Kill the launcher."""
    return Attack("kill -9 of the launcher", _signal(rng, signal.SIGKILL, "launcher"), (-signal.SIGKILL,))


def kill_all(rng: random.Random, job: Job) -> Attack:
    """Kill the launcher and all ranks."""
    return Attack("kill -9 of all", _signal(rng, signal.SIGKILL, "all"), (-signal.SIGKILL,))


def kill_in_start(rng: random.Random, job: Job) -> Attack:
    """Kill a rank while the job starts."""
    fault = {**_signal(rng, signal.SIGKILL, "rank"), "phase": "start", "delay": rng.uniform(0.05, 0.9)}
    return Attack("kill -9 of a rank at the start", fault, (KILLED,), _ended(fault))


def kill_in_evaluation(rng: random.Random, job: Job) -> Attack:
    """Kill a rank while it predicts the held-out rows."""
    fault = {**_signal(rng, signal.SIGKILL, "rank"), "phase": "evaluation", "delay": rng.uniform(0, 0.15)}
    return Attack("kill -9 of a rank in evaluation", fault, (KILLED,), _ended(fault))


def terminate(rng: random.Random, job: Job) -> Attack:
    """Send SIGTERM to the launcher, to one rank, or to every process with the loader workers."""
    to = rng.choice(["launcher", "rank", "all"])
    fault = _signal(rng, signal.SIGTERM, to)
    return Attack(f"SIGTERM to {'a rank' if to == 'rank' else to}", fault, (PREEMPTED_STATUS,), "^stopped by SIGTERM")


def terminate_in_start(rng: random.Random, job: Job) -> Attack:
    """Send SIGTERM to the launcher while the job starts."""
    fault = {**_signal(rng, signal.SIGTERM, "launcher"), "phase": "start", "delay": rng.uniform(0.05, 0.9)}
    return Attack("SIGTERM at the start", fault, (PREEMPTED_STATUS, 128 + signal.SIGTERM))


def stop_in_save(rng: random.Random, job: Job, file: str | None = None) -> Attack:
    """End a rank when half of a file is on disk, or before or after the rename that makes a checkpoint valid."""
    if file is None:
        file = rng.choice([*SAVE_FILES[0], *SAVE_FILES[1], "rename-before", "rename-after"])
    rank = next((rank for rank, files in SAVE_FILES.items() if file in files), 0)
    fault = {"kind": "stop in save", "rank": rank, "file": file, "save": rng.randint(1, 2)}
    return Attack(f"stop in a save, {file}", fault, (KILLED,), _ended(fault))


def stop_in_removal(rng: random.Random, job: Job) -> Attack:
    """End a rank when the oldest checkpoint is renamed but not removed yet."""
    fault = {"kind": "stop in save", "rank": 0, "file": "removal", "save": 1}
    return Attack("stop while an old checkpoint is removed", fault, (KILLED,), _ended(fault))


def stop_in_replacement(rng: random.Random, job: Job) -> Attack:
    """Damage the newest checkpoint, and end a rank while another one of the same step replaces it.

    The job must have two checkpoints.
    """
    attack = damage_newest(rng, job)
    fault = {"kind": "stop in save", "rank": 0, "file": "replacement", "save": 1}
    return Attack("stop while a damaged one is replaced", fault, (KILLED,), attack.message)


def write_error(rng: random.Random, job: Job) -> Attack:
    """Make the write of a file of a save fail."""
    rank, code = rng.randrange(RANKS), rng.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT])
    fault = {
        "kind": "write error",
        "rank": rank,
        "file": rng.choice(SAVE_FILES[rank]),
        "save": rng.randint(1, 2),
        "errno": code,
    }
    reasons = {errno.EIO: "Input/output error", errno.ENOSPC: "No space left on device", errno.EDQUOT: "quota exceeded"}
    return Attack(
        f"{errno.errorcode[code]} in a save", fault, (USER_ERROR_STATUS,), f"^limelight: error: .*{reasons[code]}"
    )


def full_disk(rng: random.Random, job: Job) -> Attack:
    """Leave no space for the next save on the file system of the checkpoints.

    Where no file system can be mounted, the size of files is limited instead.
    """
    pattern = "^limelight: error: .*(No space left on device|is the disk full|File too large)"
    if not job.nursery.can_mount:
        fault = {"kind": "file limit", "rank": rng.randrange(RANKS), "step": rng.randint(1, 6), "bytes": 200_000}
        return Attack("full disk, as a largest size", fault, (USER_ERROR_STATUS,), pattern)
    size = _size_of(job) + rng.randrange(200_000, 1_800_000)
    return Attack(
        "full disk",
        None,
        (USER_ERROR_STATUS,),
        pattern,
        prepare=lambda job: job.limit_disk(size),
        repair=lambda job: job.limit_disk(ROOM_BYTES),
    )


def kill_worker(rng: random.Random, job: Job) -> Attack:
    """Kill a loader worker, as the kernel does when memory runs out."""
    rank, number = rng.randrange(RANKS), rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGBUS])
    fault = {
        "kind": "worker",
        "rank": rank,
        "step": rng.randint(1, 8),
        "delay": rng.uniform(0, 0.05),
        "signal": int(number),
    }
    pattern = rf"^limelight: error: rank {rank}: loader worker, process \d+, was ended by {number.name}"
    return Attack(f"loader worker gets {number.name}", fault, (USER_ERROR_STATUS,), pattern)


def break_shard(rng: random.Random, job: Job) -> Attack:
    """Make a file of training rows unreadable."""
    harm = rng.choice(["missing", "truncated", "zeroed", "directory"])
    fault = {
        "kind": "shard",
        "rank": rng.randrange(RANKS),
        "step": rng.randint(1, 4),
        "shard": str(rng.choice(job.shards())),
        "harm": harm,
    }
    pattern = r"^limelight: error: .*\.tar: record \d+ .* cannot be read"
    return Attack(f"shard {harm}", fault, (USER_ERROR_STATUS,), pattern, repair=Job.restore_data)


def hang(rng: random.Random, job: Job, stopped: bool | None = None) -> Attack:
    """Let a rank sleep for ever, or stop it by SIGSTOP; the watchdog ends the job."""
    rank = rng.randrange(RANKS)
    stopped = rng.random() < 0.5 if stopped is None else stopped
    # From step 2: the watchdog allows the first step two minutes.
    fault = {"kind": "hang", "rank": rank, "step": rng.randint(2, 8), "stopped": stopped}
    what = "does not answer at all" if stopped else "is not in a collective: at trainer/ranking/train_loop.py"
    pattern = rf"limelight: error: no step for \d+ s after step \d+: rank {rank} {what}.*rank {1 - rank} waits in "
    return Attack("stopped rank" if stopped else "rank that hangs", fault, (HUNG_STATUS,), pattern)


def not_a_number(rng: random.Random, job: Job) -> Attack:
    """Make the loss of a step NaN."""
    fault = {"kind": "not a number", "rank": rng.randrange(RANKS), "step": rng.randint(1, 8)}
    return Attack(
        "loss that is not a number", fault, (USER_ERROR_STATUS,), r"^limelight: error: the loss of step \d+ is nan"
    )


def damage_newest(rng: random.Random, job: Job, file: str | None = None, harm: str | None = None) -> Attack:
    """Damage a file of the newest checkpoint between two starts.

    The damage is done by this call. The job must have two checkpoints.
    """
    newest = job.checkpoints()[-1]
    names = ["manifest.json", *read_manifest(newest).files]
    name = file or rng.choice(names)
    harm = harm or rng.choice(["missing", "truncated", "zeroed", "altered"])
    damage(newest / name, harm)
    return Attack(
        f"{harm} {Path(name).name} in the newest checkpoint", None, (0,), "damaged, trying the checkpoint before"
    )


NEED_TWO = (damage_newest, stop_in_replacement)
"""Kinds for which the job must have two checkpoints."""

KINDS: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        kill_rank,
        kill_launcher,
        kill_all,
        kill_in_start,
        kill_in_evaluation,
        terminate,
        terminate_in_start,
        stop_in_save,
        stop_in_removal,
        stop_in_replacement,
        write_error,
        full_disk,
        kill_worker,
        break_shard,
        hang,
        not_a_number,
        damage_newest,
    )
}


def _signal(rng: random.Random, number: signal.Signals, to: str) -> Fault:
    return {
        "kind": "signal",
        "signal": int(number),
        "to": to,
        "rank": rng.randrange(RANKS),
        "step": rng.randint(1, 9),
        "delay": rng.uniform(0, 0.08),
    }


def _ended(fault: Fault) -> str:
    return rf"^limelight: rank {fault['rank']} was ended by SIGKILL \(out of memory\?\)"


def _size_of(job: Job) -> int:
    """Return the bytes, in whole pages, of all checkpoints and of remains of killed saves."""
    entries = job.nursery.path(job.run / "checkpoints").rglob("*")
    return sum(-(-entry.stat().st_size // PAGE_BYTES) * PAGE_BYTES for entry in entries)
