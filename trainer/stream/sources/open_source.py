"""The source that a job's ``[stream]`` section names."""

from __future__ import annotations

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.stream.sources.kafka_source import KafkaSource
from trainer.stream.sources.replay import ReplaySource
from trainer.stream.sources.source import Source


def open_source(
    config: StreamConfig, spec: DatasetSpec, path: str, since_ms: int | None = None, until_ms: int | None = None
) -> Source:
    """Open a source.

    Args:
        config: of the stream.
        spec: of the dataset that the job is made for; its behaviours are the events of the stream, and its features
            are logged with them.
        path: of that dataset, replayed where ``config.path`` names no other.
        since_ms: a replay begins here.
        until_ms: and ends before this.

    Raises:
        UserError: it cannot be opened, or a dataset to replay has other behaviours or features.
    """
    if config.source == "kafka":
        return KafkaSource(config, spec)
    source = ReplaySource(config.path or path, config, since_ms, until_ms)
    expected = _carried(spec)
    for what, replayed in _carried(source.spec).items():
        if replayed != expected[what]:
            raise UserError(
                f"{config.path}: its {what} are {', '.join(replayed) or 'none'}, those of {path} are "
                f"{', '.join(expected[what]) or 'none'}; a replay needs the same in the same order"
            )
    return source


def _carried(spec: DatasetSpec) -> dict[str, list[str]]:
    """What events and their features are made of, by name."""
    return {
        "behaviours": list(spec.behaviours),
        "side features": [f"{side.name} of {side.rows} rows" for side in spec.side],
        "dense features": [dense.name for dense in spec.dense],
        "statistics": [" x ".join(key) for key in spec.statistics],
    }
