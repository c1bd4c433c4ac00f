"""The source that a job's ``[stream]`` section names."""

from __future__ import annotations

from trainer.data.schema import DatasetSpec
from trainer.errors import UserError
from trainer.stream.config import StreamConfig
from trainer.stream.files import FilesSource
from trainer.stream.kafka import KafkaSource
from trainer.stream.source import Source


def connect(config: StreamConfig, spec: DatasetSpec, path: str) -> Source:
    """Open a source.

    Args:
        config: of the stream.
        spec: of the dataset that the job is made for; its behaviours are the events of the stream.
        path: of that dataset, replayed where ``config.path`` names no other.

    Raises:
        UserError: it cannot be opened, or a dataset to replay has other behaviours.
    """
    if config.source == "kafka":
        return KafkaSource(config, spec.behaviours)
    source = FilesSource(config.path or path, config)
    if source.spec.behaviours != spec.behaviours:
        raise UserError(
            f"{config.path}: its behaviours are {', '.join(source.spec.behaviours)}, those of {path} are "
            f"{', '.join(spec.behaviours)}; a replay needs the same in the same order"
        )
    return source
