"""Opens the source that a job's ``[stream]`` section names."""

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
    """Return the source of a stream, connected to its brokers if it is a topic.

    Args:
        config: config of the stream.
        spec: description of the job's dataset, which names the behaviours and the logged features of the stream.
        path: path of that dataset, which is replayed if ``config.path`` is empty.
        since_ms: start of a replay.
        until_ms: end of a replay; events from this time on are left out.

    Raises:
        UserError: the source cannot be opened, or a dataset to replay has other behaviours or features.
    """
    if config.source == "kafka":
        return KafkaSource(config, spec).connect()
    source = ReplaySource(config.path or path, config, since_ms, until_ms)
    # A replay of other columns would train the model on the wrong features without an error.
    expected = _stream_columns(spec)
    for what, replayed in _stream_columns(source.spec).items():
        if replayed != expected[what]:
            raise UserError(
                f"{config.path}: its {what} are {', '.join(replayed) or 'none'}, those of {path} are "
                f"{', '.join(expected[what]) or 'none'}; a replay needs the same in the same order"
            )
    return source


def _stream_columns(spec: DatasetSpec) -> dict[str, list[str]]:
    """Return the names of the behaviours and features in a stream of the dataset."""
    return {
        "behaviours": list(spec.behaviours),
        "side features": [f"{side.name} of {side.rows} rows" for side in spec.side],
        "dense features": [dense.name for dense in spec.dense],
        "statistics": [" x ".join(key) for key in spec.statistics],
    }
