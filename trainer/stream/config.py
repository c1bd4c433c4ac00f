"""Where a stream comes from: the ``[stream]`` section of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MessageFormat = Literal["json", "arrow"]


class StreamConfig(BaseModel):
    """A stream of events: a stored dataset replayed in event time, or a Kafka topic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["files", "kafka"] = Field(
        "files", description="`files` replays the events of a dataset; `kafka` reads a topic."
    )
    path: str = Field("", description="Dataset to replay, a directory or any fsspec URL. Empty: `data.path`.")
    speed: float = Field(
        0.0,
        description="Of a replay: 60 plays an hour in a minute, 1 is real time; 0 is as fast as possible.",
        ge=0,
        allow_inf_nan=False,
    )
    brokers: str = Field("", description="Kafka brokers to begin with, `host:port,host:port`.")
    topic: str = Field("", description="Kafka topic; its partitions are those of the job.")
    format: MessageFormat = Field(
        "json", description="Of the messages: `json`, one event a line, or `arrow`, IPC streams of events."
    )
    partitioner: Literal["limelight", "producer"] = Field(
        "limelight",
        description="Who says which partition a user's messages are in: `limelight` checks that it is its own hash of "
        "the user; `producer` trusts the topic to keep every user in one partition.",
    )
    properties: str = Field(
        "",
        description="File of librdkafka properties, `key=value` lines, such as for TLS and SASL; it stays where it is.",
    )
    dead_letter: str = Field(
        "", description="Topic for messages that are no events. Empty: the topic's name and `-dead-letters`."
    )
    begin: Literal["earliest", "latest"] = Field(
        "earliest", description="Where a new run begins to read a topic; a run that goes on has its position."
    )
    on_gap: Literal["error", "earliest"] = Field(
        "error",
        description="If the topic no longer holds the messages at the position: refuse (`error`), or leave them out "
        "and go on with the first that it holds (`earliest`).",
    )
    until_end: bool = Field(
        False, description="Stop at the messages that the topic had when reading began; a replay always ends."
    )
    retry_seconds: float = Field(
        60.0, description="Give up on brokers that do not answer, or a topic that is not there, after so long.", gt=0
    )
    future_hours: float = Field(
        24.0, description="An event may be ahead of this machine's clock by so much; clocks differ.", ge=0
    )
    batch_events: int = Field(8192, description="Most events of a batch.", ge=1)
    linger_seconds: float = Field(
        0.2, description="A live stream hands out a batch that is not full after so long.", gt=0
    )
    idle_seconds: float = Field(
        1.0, description="A partition of a live stream that is silent for so long holds up the others no more.", gt=0
    )
    queue_batches: int = Field(4, description="Batches that a rank reads ahead of training.", ge=1)
    buffer_events: int = Field(
        1_000_000, description="Most events that a rank holds while its partitions wait for each other.", ge=1
    )

    @model_validator(mode="after")
    def _names_a_topic(self) -> StreamConfig:
        if self.source == "kafka" and not (self.brokers and self.topic):
            raise ValueError('source = "kafka" needs `brokers` and `topic`')
        return self
