"""The assemblers of the partitions that a rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trainer.data.format.schema import DatasetSpec
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import END_OF_TIME, Assembled
from trainer.stream.labels.policy import EventTimeouts, Policy
from trainer.stream.labels.streaming_assembler import State, StreamAssembler


class PartitionAssemblers:
    """One ``StreamAssembler`` a partition, each with its own watermark.

    What a partition gives depends on its own events alone: not on which rank holds it, nor on what else that rank
    holds. The state is a map from partition to plain arrays, so a change of ranks is a change of who loads what.

    Args:
        spec: of the dataset, or of what the stream carries.
        policy: which rows.
        timeouts: what is late, and when a visit without an exit has ended.
        partitions: those of this rank.
        domains: those whose visits become rows, ``spec.candidates`` by default.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        policy: Policy,
        timeouts: EventTimeouts,
        partitions: Iterable[int],
        domains: Sequence[str] | None = None,
    ) -> None:
        self._assemblers = {
            partition: StreamAssembler(spec, policy, timeouts, domains) for partition in sorted(partitions)
        }

    def __getitem__(self, partition: int) -> StreamAssembler:
        return self._assemblers[partition]

    def push(self, partition: int, events: Columns) -> Assembled:
        """``StreamAssembler.push`` of a partition."""
        return self._assemblers[partition].push(events)

    def advance(self, partition: int, until_ms: int = END_OF_TIME) -> Assembled:
        """``StreamAssembler.advance`` of a partition."""
        return self._assemblers[partition].advance(until_ms)

    def state_dict(self) -> dict[int, State]:
        """State of each partition of this rank."""
        return {partition: assembler.state_dict() for partition, assembler in self._assemblers.items()}

    def load_state_dict(self, states: Iterable[Mapping[int, State]]) -> None:
        """Take over the partitions of this rank from what any number of ranks have saved.

        Args:
            states: ``state_dict`` of every rank that saved; partitions of other ranks are passed over.

        Raises:
            ValueError: a partition of this rank is in none of them, or in two.
            UserError: a state was made under another policy or timeouts.
        """
        found: dict[int, State] = {}
        for state in states:
            for partition, arrays in state.items():
                if partition in found:
                    raise ValueError(f"two ranks have saved open visits of partition {partition}")
                found[partition] = arrays
        for partition, assembler in self._assemblers.items():
            if partition not in found:
                raise ValueError(f"no rank has saved open visits of partition {partition}")
            assembler.load_state_dict(found[partition])
