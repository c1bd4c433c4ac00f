"""Assemblers of the partitions of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trainer.data.format.schema import DatasetSpec
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import END_OF_TIME, AssembledRows
from trainer.stream.labels.policy import EventTimeouts, Policy
from trainer.stream.labels.streaming_assembler import State, StreamAssembler


class PartitionAssemblers:
    """One ``StreamAssembler`` for each partition, each with its own watermark.

    The rows of a partition depend on its own events only, not on the rank that reads it or on the rank's other
    partitions. The state maps each partition to plain arrays, so that another number of ranks can load it.

    Args:
        spec: description of the dataset, or of the data in the stream.
        policy: report policy.
        timeouts: limits for late events and for idle visits.
        partitions: partitions of this rank.
        domains: domains whose visits become rows, ``spec.candidates`` by default.
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

    def push(self, partition: int, events: Columns) -> AssembledRows:
        """Call ``StreamAssembler.push`` of a partition."""
        return self._assemblers[partition].push(events)

    def advance(self, partition: int, until_ms: int = END_OF_TIME) -> AssembledRows:
        """Call ``StreamAssembler.advance`` of a partition."""
        return self._assemblers[partition].advance(until_ms)

    def state_dict(self) -> dict[int, State]:
        """Return the state of each partition of this rank."""
        return {partition: assembler.state_dict() for partition, assembler in self._assemblers.items()}

    def load_state_dict(self, states: Iterable[Mapping[int, State]]) -> None:
        """Load the partitions of this rank from the states of any number of ranks.

        Args:
            states: ``state_dict`` of every rank that saved; partitions of other ranks are ignored.

        Raises:
            ValueError: a partition of this rank is in none of the states, or a partition is in two.
            UserError: a state was saved under another policy or other timeouts.
        """
        found: dict[int, State] = {}
        for state in states:
            for partition, arrays in state.items():
                if partition in found:
                    raise ValueError(f"two ranks have saved open visits of partition {partition}")
                found[partition] = arrays
        # All states are read before any is loaded, so that a duplicate is found wherever it is.
        for partition, assembler in self._assemblers.items():
            if partition not in found:
                raise ValueError(f"no rank has saved open visits of partition {partition}")
            assembler.load_state_dict(found[partition])
