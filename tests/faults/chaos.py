"""Puts a hundred random faults into real jobs of two ranks, and checks that the same command always recovers.

    make chaos
    python -m tests.faults.chaos --faults 20 --seed 7

A job is started and disturbed repeatedly until it finishes. Its state must then equal that of an undisturbed job, bit
for bit. Writes ``benchmarks/results/chaos.json``, and the table that it prints to ``chaos.log`` beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import kinds
from tests.faults.harness import LIMIT_SECONDS, Ending, Job, differences, small_world
from tests.nursery import Nursery
from tests.paths import ROOT
from trainer.console.progress import Progress
from trainer.runtime.environment import environment

RESULTS = ROOT / "benchmarks" / "results"
MOST_FAULTS = 4
"""Maximum number of faults in one job."""

WEIGHTS = {"kill_rank": 3, "kill_launcher": 2, "kill_all": 2, "terminate": 3, "stop_in_save": 5, "damage_newest": 3}
"""Kinds that occur more than once per round, and how often."""


@dataclass
class Entry:
    """Result of one fault that happened.

    Attributes:
        job: number of the job.
        kind: kind of the fault.
        where: place of the fault, as the rank recorded it.
        status: exit status of the launcher.
        message: line of the output that describes the fault.
        seconds: from the start of the job to its end.
        resumed_from: checkpoint from which the next start continued.
        equal: True if the final state of the job equals that of the undisturbed job.
        problems: defects of the reaction, such as a missing message; empty if there are none.
    """

    job: int
    kind: str
    where: str
    status: int
    message: str
    seconds: float
    resumed_from: str = ""
    equal: bool = False
    problems: list[str] = field(default_factory=list)


class Deck:
    """Kinds of faults in random order, each as often as its weight. A fault that did not happen is put back."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._cards: list[kinds.Draw] = []

    def draw(self, job: Job) -> kinds.Draw:
        """Return the next kind that is possible with the checkpoints that the job has."""
        damageable = len(job.checkpoints()) > 1
        while True:
            for card in self._cards:
                if card not in kinds.NEED_TWO or damageable:
                    self._cards.remove(card)
                    return card
            more = [draw for draw in kinds.KINDS.values() for _ in range(WEIGHTS.get(draw.__name__, 1))]
            self._cards += self._rng.sample(more, len(more))

    def put_back(self, card: kinds.Draw) -> None:
        """Make a kind the next one."""
        self._cards.insert(0, card)


def disturb(job: Job, number: int, rng: random.Random, deck: Deck, faults: int) -> list[Entry]:
    """Start a job until it has finished, with at most ``faults`` faults."""
    entries: list[Entry] = []
    while True:
        card = deck.draw(job) if len(entries) < faults else None
        attack = kinds.Attack("nothing", None, (0,)) if card is None else card(rng, job)
        attack.prepare(job)
        try:
            ending = job.start(attack.fault)
        except AssertionError as error:
            entries.append(Entry(number, attack.name, "", -1, "", LIMIT_SECONDS, problems=[str(error)]))
            return entries
        attack.repair(job)
        begun = ending.resumed_from or "the beginning"
        if entries and not entries[-1].resumed_from:
            entries[-1].resumed_from = begun
        between_starts = card is kinds.damage_newest
        if ending.struck or ending.status != 0 or between_starts:
            entries.append(
                Entry(
                    number,
                    attack.name,
                    "; ".join(ending.struck) or ("between two starts" if between_starts else "from the start"),
                    ending.status,
                    _last_word(ending, attack).replace(str(job.directory), "JOB"),
                    round(ending.seconds, 1),
                    resumed_from=begun if between_starts else "",
                    problems=attack.problems(ending),
                )
            )
        elif card is not None:
            deck.put_back(card)
        if ending.status == 0 or card is None:
            return entries


def _last_word(ending: Ending, attack: kinds.Attack) -> str:
    """Return the line of the output that describes the fault."""
    pattern = attack.message or "^stopped by SIGTERM"
    lines = [line for line in ending.output.splitlines() if re.search(pattern, line)]
    return [*lines[-1:], *ending.errors[-1:], ""][0]


def table(entries: list[Entry]) -> str:
    """Return a line per fault, and the counts by kind."""
    rows = [("job", "fault", "where", "status", "seconds", "resumed from", "equal", "message")]
    rows += [
        (
            str(e.job),
            e.kind,
            e.where,
            str(e.status),
            str(e.seconds),
            e.resumed_from,
            "yes" if e.equal else "NO",
            e.message,
        )
        for e in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[7]]) for row in rows
    ]
    counts = Counter(entry.kind for entry in entries)
    good = Counter(entry.kind for entry in entries if entry.equal and not entry.problems)
    lines += ["", f"{'fault':<50}  count  clear message, and equal at the end"]
    lines += [f"{kind:<50}  {count:>5}  {good[kind]:>5}" for kind, count in sorted(counts.items())]
    lines.append(f"{'all':<50}  {counts.total():>5}  {good.total():>5}")
    return "\n".join(lines)


def main() -> int:
    """Entry point. Returns 1 if a job did not recover from a fault, or reported it badly."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.chaos",
        description="Put random faults into real jobs of two ranks, and compare their end with an undisturbed job.",
        epilog="example:\n  make chaos\n  python -m tests.faults.chaos --faults 20 --seed 7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="number of faults (default: 100)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of all random choices (default: 1)")
    parser.add_argument("--keep", metavar="DIR", help="keep the jobs in this directory (default: remove them)")
    options = parser.parse_args()

    started = time.time()
    directory = Path(options.keep or tempfile.mkdtemp(prefix="limelight-chaos-"))
    entries: list[Entry] = []
    try:
        with Nursery() as nursery, Progress("chaos", options.faults, "faults") as progress:
            world = small_world(directory / "world")
            undisturbed = Job(nursery, directory / "undisturbed", world)
            ending = undisturbed.start()
            assert ending.status == 0, ending.output
            number, deck = 0, Deck(random.Random(options.seed))
            while len(entries) < options.faults:
                number += 1
                rng = random.Random(f"{options.seed} {number}")
                job = Job(nursery, directory / f"job-{number}", world)
                most = min(rng.randint(1, MOST_FAULTS), options.faults - len(entries))
                found = disturb(job, number, rng, deck, most)
                ended = bool(job.checkpoints()) and (job.run / "metrics.json").exists()
                different = differences(job, undisturbed) if ended else ["the job has not finished"]
                for entry in found:
                    entry.equal = not different
                    entry.problems += different[:10]
                entries += found
                progress.advance(len(found), f"job {number}: {', '.join(e.kind for e in found) or 'undisturbed'}")
                if not options.keep and not any(entry.problems for entry in found):
                    shutil.rmtree(job.directory)
    finally:
        if not options.keep and not any(entry.problems for entry in entries):
            shutil.rmtree(directory, ignore_errors=True)
    report(entries, options.seed, number, time.time() - started)
    bad = [entry for entry in entries if entry.problems or not entry.equal]
    for entry in bad:
        print(f"job {entry.job}, {entry.kind}: {'; '.join(entry.problems)}", file=sys.stderr)
    if bad:
        print(f"limelight: error: jobs did not recover from {len(bad)} faults; see {directory}", file=sys.stderr)
    return 1 if bad else 0


def report(entries: list[Entry], seed: int, jobs: int, seconds: float) -> None:
    """Print the table, and write it and the results as JSON."""
    text = table(entries)
    document: dict[str, Any] = {
        "seed": seed,
        "faults": len(entries),
        "jobs": jobs,
        "endured": sum(entry.equal and not entry.problems for entry in entries),
        "seconds": round(seconds),
        "environment": environment(2),
        "entries": [asdict(entry) for entry in entries],
    }
    print(text, flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "chaos.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "chaos.log").write_text(
        f"{len(entries)} faults in {jobs} jobs of two ranks, seed {seed}, {seconds:.0f} s; written by `make chaos`.\n"
        "JOB is the directory of a job; a killed launcher prints nothing.\n\n"
        f"{text}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
