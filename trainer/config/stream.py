"""Where a stream comes from and what is made of it: the ``[stream]`` and ``[labels]`` sections of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.config.sections import MAY_CHANGE

MessageFormat = Literal["json", "arrow"]


class StreamConfig(BaseModel):
    """A stream of events: a stored dataset replayed in event time, or a Kafka topic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["files", "kafka"] = Field(
        "files", description="`files` replays the events of a dataset; `kafka` reads a topic."
    )
    path: str = Field(
        "",
        description="Dataset to replay, a directory or any fsspec URL. Empty: `data.path`.",
        json_schema_extra=MAY_CHANGE,
    )
    speed: float = Field(
        0.0,
        description="Of a replay: 60 plays an hour in a minute, 1 is real time; 0 is as fast as possible.",
        ge=0,
        allow_inf_nan=False,
        json_schema_extra=MAY_CHANGE,
    )
    brokers: str = Field(
        "", description="Kafka brokers to begin with, `host:port,host:port`.", json_schema_extra=MAY_CHANGE
    )
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
        json_schema_extra=MAY_CHANGE,
    )
    dead_letter: str = Field(
        "",
        description="Topic for messages that are no events. Empty: the topic's name and `-dead-letters`.",
        json_schema_extra=MAY_CHANGE,
    )
    begin: Literal["earliest", "latest"] = Field(
        "earliest", description="Where a new run begins to read a topic; a run that goes on has its position."
    )
    on_gap: Literal["error", "earliest"] = Field(
        "error",
        description="If the topic no longer holds the messages at the position: refuse (`error`), or leave them out "
        "and go on with the first that it holds (`earliest`).",
        json_schema_extra=MAY_CHANGE,
    )
    until_end: bool = Field(
        False,
        description="Stop at the messages that the topic had when reading began; a replay always ends.",
        json_schema_extra=MAY_CHANGE,
    )
    retry_seconds: float = Field(
        60.0,
        description="Give up on brokers that do not answer, or a topic that is not there, after so long.",
        gt=0,
        json_schema_extra=MAY_CHANGE,
    )
    future_hours: float = Field(
        24.0,
        description="An event may be ahead of this machine's clock by so much; clocks differ.",
        ge=0,
        json_schema_extra=MAY_CHANGE,
    )
    batch_events: int = Field(8192, description="Most events of a batch.", ge=1, json_schema_extra=MAY_CHANGE)
    linger_seconds: float = Field(
        0.2,
        description="A live stream hands out a batch that is not full after so long.",
        gt=0,
        json_schema_extra=MAY_CHANGE,
    )
    idle_seconds: float = Field(
        1.0,
        description="A partition of a live stream that is silent for so long holds up the others no more.",
        gt=0,
        json_schema_extra=MAY_CHANGE,
    )
    queue_batches: int = Field(
        4, description="Batches that a rank reads ahead of training.", ge=1, json_schema_extra=MAY_CHANGE
    )
    buffer_events: int = Field(
        1_000_000,
        description="Most events that a rank holds while its partitions wait for each other.",
        ge=1,
        json_schema_extra=MAY_CHANGE,
    )
    since: str = Field(
        "", description="Events before this time are left out: an ISO time in the dataset's zone. Empty: `train_until`."
    )
    until: str = Field(
        "",
        description="A replay ends before the first event of this time. Empty: `eval_from`.",
        json_schema_extra=MAY_CHANGE,
    )
    slice_seconds: float = Field(
        30.0,
        description="All ranks go through event time together, so much at a time; it adds to the delay of labels.",
        ge=0.001,
        allow_inf_nan=False,
    )
    flush_seconds: float = Field(
        60.0,
        description="Rows that do not fill `train.batch_size` are trained on after so much event time at the latest.",
        ge=0,
        allow_inf_nan=False,
    )
    publish_minutes: float = Field(
        0.0,
        description="Minutes between two models in `RUN/published`, exported from checkpoints for scoring; 0: none.",
        ge=0,
        json_schema_extra=MAY_CHANGE,
    )
    keep_published: int = Field(2, description="Newest published models to keep.", ge=1, json_schema_extra=MAY_CHANGE)

    @property
    def endless(self) -> bool:
        """The stream may be silent for a while, and goes on later."""
        return self.source == "kafka" and not self.until_end

    @model_validator(mode="after")
    def _names_a_topic(self) -> StreamConfig:
        if self.source == "kafka" and not (self.brokers and self.topic):
            raise ValueError('source = "kafka" needs `brokers` and `topic`')
        return self


class LabelConfig(BaseModel):
    """When a behaviour in a stream becomes a label: the report policy, and how long to wait for events."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["full", "fast_slow", "realtime", "realtime_naive"] = Field(
        "realtime",
        description="`full`: all labels at the end of the visit; `fast_slow`: after minutes, and what was missed after "
        "an hour; `realtime`: first positives at once, the rest at the end; `realtime_naive`: for comparison.",
    )
    fast_minutes: float = Field(5.0, description="`fast_slow`: when the first row comes.", gt=0)
    slow_minutes: float = Field(60.0, description="`fast_slow`: when the second row comes.", gt=0)
    tick_seconds: float = Field(30.0, description="`realtime` and `realtime_naive`: time between two reports.", gt=0)
    idle_minutes: float = Field(
        120.0, description="A visit without an exit has ended so long after its last event.", gt=0
    )
    max_out_of_orderness_seconds: float = Field(
        10.0,
        description="Longest time by which an event of a partition may arrive after later ones; the watermark, and "
        "with it the rows, follow the newest event at this distance.",
        ge=0,
        json_schema_extra={"formerly": "disorder_seconds"},
    )

    @property
    def fast_ms(self) -> int:
        """``fast_minutes`` in milliseconds."""
        return round(self.fast_minutes * 60_000)

    @property
    def slow_ms(self) -> int:
        """``slow_minutes`` in milliseconds."""
        return round(self.slow_minutes * 60_000)

    @property
    def tick_ms(self) -> int:
        """``tick_seconds`` in milliseconds."""
        return round(self.tick_seconds * 1000)

    @property
    def idle_ms(self) -> int:
        """``idle_minutes`` in milliseconds."""
        return round(self.idle_minutes * 60_000)

    @property
    def max_out_of_orderness_ms(self) -> int:
        """``max_out_of_orderness_seconds`` in milliseconds."""
        return round(self.max_out_of_orderness_seconds * 1000)

    @model_validator(mode="after")
    def _windows_are_ordered(self) -> LabelConfig:
        if self.policy == "fast_slow" and not 0 < self.fast_ms < self.slow_ms:
            raise ValueError(
                f"fast_minutes = {self.fast_minutes:g} must be shorter than slow_minutes = {self.slow_minutes:g}, "
                "by a millisecond or more"
            )
        for name in ("tick", "idle"):
            if getattr(self, f"{name}_ms") == 0:
                raise ValueError(f"the {name} time must be a millisecond or more")
        return self
