"""Measure the events a second of the label assemblers, and the rows that each policy makes of them.

    python -m benchmarks.speed.assembler --out benchmarks/results/assembler.json
    python -m benchmarks.speed.assembler --kuairand downloads/KuaiRand-Pure --users 5000

Worlds: the simulated one with its live rooms as candidates; the same with short videos as candidates too, so that every
event counts; and KuaiRand, if its folder is given. Rates are per second of CPU time on one thread, which other work on
the machine hardly disturbs. Events are in memory; ``read_events_per_second`` is the rate of reading and checking them
before that. They arrive out of order, and reach the streaming assembler in portions of ``--portion`` events. Both
assemblers must make equal rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import best_of, fastest, make_parser, spread_of, write_result
from trainer.console.text_table import text_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.validation import Columns
from trainer.data.importers.kuairand import import_kuairand
from trainer.data.simulator.write_dataset import simulate
from trainer.stream.labels.assembled_rows import AssembledRows, concatenate
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import POLICIES, EventTimeouts, Policy
from trainer.stream.labels.streaming_assembler import StreamAssembler
from trainer.stream.labels.visit_grouping import in_domains

SHORT = ("--users", "500", "--days", "2", "--repeats", "1")

TARGETS = {"batch": 500_000, "incremental": 100_000}
"""Least events per second and core that each assembler aims at."""

Domains = tuple[str, ...]


def in_portions(
    spec: DatasetSpec, policy: Policy, timeouts: EventTimeouts, events: Columns, domains: Domains, portion: int
) -> Iterator[AssembledRows]:
    """Yield the answers of the streaming assembler, portion by portion."""
    assembler = StreamAssembler(spec, policy, timeouts, domains)
    for first in range(0, len(events["time_ms"]), portion):
        yield assembler.push({name: column[first : first + portion] for name, column in events.items()})
    yield assembler.advance()


def arriving(events: Columns, max_out_of_orderness_ms: int) -> Columns:
    """Return the events in the order of arrival if each is late by up to ``max_out_of_orderness_ms``."""
    delay = np.random.default_rng(0).integers(0, max_out_of_orderness_ms + 1, len(events["time_ms"]))
    order = np.argsort(events["time_ms"] + delay, kind="stable")
    return {name: column[order] for name, column in events.items()}


def measure(
    log: EventLog, world: str, domains: Domains, max_out_of_orderness_ms: int, portion: int, repeats: int
) -> dict[str, Any]:
    """Return the rates and numbers of rows of a log, every partition by itself."""
    timeouts = EventTimeouts()
    begin = time.process_time()
    partitions = [log.read(partition) for partition in range(log.spec.partitions)]
    reading = time.process_time() - begin
    partitions = [arriving(part, max_out_of_orderness_ms) for part in partitions]
    events = sum(len(part["time_ms"]) for part in partitions)
    counted = sum(int(in_domains(log.spec, part["domain"], domains).sum()) for part in partitions)
    policies: dict[str, Any] = {}
    for name, make in POLICIES.items():
        policy = make()

        def batch(policy: Policy = policy) -> list[AssembledRows]:
            return [assemble_batch(log.spec, policy, timeouts, part, domains) for part in partitions]

        def incremental(policy: Policy = policy) -> list[AssembledRows]:
            return [
                answer
                for part in partitions
                for answer in in_portions(log.spec, policy, timeouts, part, domains, portion)
            ]

        whole, pieces = (concatenate([made.rows for made in work()]) for work in (batch, incremental))
        if not all(np.array_equal(whole[column], pieces[column]) for column in whole):
            raise AssertionError(f"{world}, {name}: the two assemblers differ")
        # By turns, as all that is compared.
        rates = [{work.__name__: events / fastest(work, 1) for work in (batch, incremental)} for _ in range(repeats)]
        policies[name] = {
            "rows": len(whole["kind"]),
            "events_per_second": best_of(rates),
            "spread": spread_of(rates),
        }
    return {
        "world": world,
        "candidates": list(domains),
        "events": events,
        "candidate_events": counted,
        "read_events_per_second": events / reading,
        "policies": policies,
    }


def report(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table."""
    lines = []
    for result in results:
        fast_slow = result["policies"]["fast_slow"]["rows"]
        for name, found in result["policies"].items():
            rates = found["events_per_second"]
            lines.append(
                [
                    result["world"],
                    name,
                    f"{rates['batch'] / 1e6:.1f} M",
                    f"{rates['incremental'] / 1e3:,.0f} k",
                    f"{found['rows']:,}",
                    f"{found['rows'] / fast_slow:.2f}",
                ]
            )
    header = ["events", "policy", "batch events/s", "incremental events/s", "rows", "to fast_slow"]
    return text_table(header, lines, texts=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.assembler", __doc__)
    parser.add_argument("--users", type=int, default=2_000, help="users of the simulated world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=5, help="days of the simulated world (default: %(default)s)")
    parser.add_argument("--kuairand", metavar="FOLDER", help="published KuaiRand-Pure, -1K or -27K")
    parser.add_argument(
        "--max-out-of-orderness-seconds",
        type=int,
        default=10,
        metavar="S",
        help="largest delay of an event (default: %(default)s)",
    )
    parser.add_argument("--portion", type=int, default=4096, help="events pushed at once (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="interleaved runs; the fastest counts (default: %(default)s)"
    )
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        simulate(world, options.users, options.days, partitions=2, seed=1)
        logs = [(EventLog(world), "simulated, live", ("live",)), (EventLog(world), "simulated, all", ("video", "live"))]
        if options.kuairand:
            imported = Path(scratch) / "kuairand"
            import_kuairand(options.kuairand, imported, 2)
            logs.append((EventLog(imported), "KuaiRand", ("video",)))
        max_out_of_orderness_ms = options.max_out_of_orderness_seconds * 1000
        results = [
            measure(log, name, domains, max_out_of_orderness_ms, options.portion, options.repeats)
            for log, name, domains in logs
        ]

    print(report(results))
    slowest = {
        work: min(found["events_per_second"][work] for result in results for found in result["policies"].values())
        for work in TARGETS
    }
    for work, target in TARGETS.items():
        print(f"{work}: slowest {slowest[work]:,.0f} events/s a core, aim {target:,}")
    settings = {"max_out_of_orderness_ms": max_out_of_orderness_ms}
    settings |= {"portion": options.portion, "repeats": options.repeats}
    write_result(options.out, {"targets": TARGETS, "slowest": slowest, **settings, "results": results})


if __name__ == "__main__":
    main()
