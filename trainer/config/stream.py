"""The ``[stream]`` and ``[labels]`` sections of a job: the source of events, and the policy that makes labels."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.config.paths import InputFile
from trainer.config.sections import MAY_CHANGE

MessageFormat = Literal["json", "arrow"]


class StreamConfig(BaseModel):
    """Source of a stream of events: a stored dataset replayed in event time, or a Kafka topic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["files", "kafka"] = Field(
        "files", description="`files` replays the events of a stored dataset; `kafka` reads a topic."
    )
    path: InputFile = Field(
        "",
        description="Dataset to replay, a directory or an fsspec URL. Empty: `data.path`.",
        json_schema_extra=MAY_CHANGE,
    )
    speed: float = Field(
        0.0,
        description="Speed of a replay: 1 is real time, 60 plays an hour in a minute, 0 is as fast as possible.",
        ge=0,
        allow_inf_nan=False,
        json_schema_extra=MAY_CHANGE,
    )
    brokers: str = Field(
        "", description="Kafka bootstrap brokers, `host:port,host:port`.", json_schema_extra=MAY_CHANGE
    )
    topic: str = Field("", description="Kafka topic. Its partitions are divided among the ranks.")
    format: MessageFormat = Field(
        "json",
        description="Format of the messages: `json` has JSON objects, one per line, over several lines or in arrays; "
        "`arrow` has IPC streams of events.",
    )
    partitioner: Literal["limelight", "producer"] = Field(
        "limelight",
        description="Assignment of users to partitions: `limelight` checks that each event is in the partition of this "
        "project's hash of its user; `producer` expects that the producer keeps every user in one partition, and "
        "counts the users in two.",
    )
    properties: InputFile = Field(
        "",
        description="File of librdkafka properties, one `key=value` per line, such as for TLS and SASL. It is read at "
        "every start and not copied to the run.",
        json_schema_extra=MAY_CHANGE,
    )
    dead_letter: str = Field(
        "",
        description="Dead-letter topic for messages with rejected events. Empty: the topic's name and `-dead-letters`.",
        json_schema_extra=MAY_CHANGE,
    )
    begin: Literal["earliest", "latest"] = Field(
        "earliest",
        description="Offset at which a new run starts to read a topic; a resumed run continues at its saved position.",
    )
    on_gap: Literal["error", "earliest"] = Field(
        "error",
        description="Action if the topic no longer has the messages at the saved position: `error` stops the run, "
        "`earliest` skips them and continues at the first message that the topic has.",
        json_schema_extra=MAY_CHANGE,
    )
    until_end: bool = Field(
        False,
        description="Stop after the last message that the topic had at the start; a replay always ends.",
        json_schema_extra=MAY_CHANGE,
    )
    retry_seconds: float = Field(
        60.0,
        description="Total time of retries while brokers do not answer or the topic does not exist.",
        gt=0,
        json_schema_extra=MAY_CHANGE,
    )
    future_hours: float = Field(
        24.0,
        description="Maximum time of an event ahead of this machine's clock; later events are rejected.",
        ge=0,
        json_schema_extra=MAY_CHANGE,
    )
    batch_events: int = Field(
        8192, description="Maximum number of events in a batch.", ge=1, json_schema_extra=MAY_CHANGE
    )
    linger_seconds: float = Field(
        0.2,
        description="Maximum time that a live stream waits for a batch to fill.",
        gt=0,
        json_schema_extra=MAY_CHANGE,
    )
    idle_seconds: float = Field(
        1.0,
        description="A live stream stops waiting for a partition after this much silence.",
        gt=0,
        json_schema_extra=MAY_CHANGE,
    )
    queue_batches: int = Field(
        4, description="Number of batches that a rank reads ahead of training.", ge=1, json_schema_extra=MAY_CHANGE
    )
    buffer_events: int = Field(
        1_000_000,
        description="Maximum number of events that a rank buffers while its partitions wait for each other.",
        ge=1,
        json_schema_extra=MAY_CHANGE,
    )
    since: str = Field(
        "", description="Skip events before this time, an ISO time in the dataset's zone. Empty: `train_until`."
    )
    until: str = Field(
        "",
        description="End a replay before the first event at this time or later. Empty: `eval_from`.",
        json_schema_extra=MAY_CHANGE,
    )
    slice_seconds: float = Field(
        30.0,
        description="Length of a slice of event time, which all ranks process together; it adds to the label delay.",
        ge=0.001,
        allow_inf_nan=False,
    )
    flush_seconds: float = Field(
        60.0,
        description="Maximum event time that rows wait for a full batch of `train.batch_size` before training.",
        ge=0,
        allow_inf_nan=False,
    )
    average_hours: float = Field(
        0.0,
        description="Hours of event time over which the dense network's weights are averaged, older ones counting "
        "exponentially less. Evaluation, exports and published models use the mean; training and the predictions of "
        "the stream itself do not. 0: the weights of the last step.",
        ge=0,
        allow_inf_nan=False,
    )
    publish_minutes: float = Field(
        0.0,
        description="Minutes between two exports of a checkpoint to `RUN/published` for scoring; 0: no exports.",
        ge=0,
        json_schema_extra=MAY_CHANGE,
    )
    keep_published: int = Field(
        2, description="Number of the newest published models to keep.", ge=1, json_schema_extra=MAY_CHANGE
    )

    @property
    def endless(self) -> bool:
        """True if the stream has no end: it may be silent for a while and continue later."""
        return self.source == "kafka" and not self.until_end

    @model_validator(mode="after")
    def _has_brokers_and_topic(self) -> StreamConfig:
        if self.source == "kafka" and not (self.brokers and self.topic):
            raise ValueError('source = "kafka" needs `brokers` and `topic`')
        return self


class LabelConfig(BaseModel):
    """Report policy, which decides when a behaviour becomes a label, and waiting times for events."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["full", "fast_slow", "realtime", "realtime_naive"] = Field(
        "realtime",
        description="Report policy. `full`: all labels at the end of a visit; `fast_slow`: all labels in minutes, and "
        "missed positives after an hour; `realtime`: first positives at the next tick, other labels at the end; "
        "`realtime_naive`: all labels at every tick, for comparison.",
    )
    fast_minutes: float = Field(5.0, description="`fast_slow`: time from the request to the fast row.", gt=0)
    slow_minutes: float = Field(60.0, description="`fast_slow`: time from the request to the slow row.", gt=0)
    retraction_limit: float = Field(
        0.0,
        description="`fast_slow`: largest importance weight of a slow row, which retracts an earlier negative. 1: the "
        "row is a positive like any other. 2: exact up to a probability of 0.5, and weaker above it. 0: no limit, as "
        "in equation 3 of Moment&Cross.",
        ge=0,
        le=1e6,
        allow_inf_nan=False,
    )
    tick_seconds: float = Field(
        30.0,
        description="`realtime` and `realtime_naive`: length of a tick; a visit reports at most once per tick.",
        gt=0,
    )
    idle_minutes: float = Field(
        120.0, description="Idle timeout: a visit without an exit ends this long after its last event.", gt=0
    )
    max_out_of_orderness_seconds: float = Field(
        10.0,
        description="Distance of the watermark behind the latest event of a partition: an event may arrive this much "
        "after a later one, and rows are delayed by it.",
        ge=0,
        json_schema_extra={"formerly": "disorder_seconds"},
    )

    @property
    def fast_ms(self) -> int:
        """``fast_minutes`` as integer milliseconds."""
        return round(self.fast_minutes * 60_000)

    @property
    def slow_ms(self) -> int:
        """``slow_minutes`` as integer milliseconds."""
        return round(self.slow_minutes * 60_000)

    @property
    def tick_ms(self) -> int:
        """``tick_seconds`` as integer milliseconds."""
        return round(self.tick_seconds * 1000)

    @property
    def idle_ms(self) -> int:
        """``idle_minutes`` as integer milliseconds."""
        return round(self.idle_minutes * 60_000)

    @property
    def max_out_of_orderness_ms(self) -> int:
        """``max_out_of_orderness_seconds`` as integer milliseconds."""
        return round(self.max_out_of_orderness_seconds * 1000)

    @model_validator(mode="after")
    def _windows_are_ordered(self) -> LabelConfig:
        if self.policy == "fast_slow" and not 0 < self.fast_ms < self.slow_ms:
            raise ValueError(
                f"fast_minutes = {self.fast_minutes:g} must be at least a millisecond shorter than "
                f"slow_minutes = {self.slow_minutes:g}"
            )
        for name in ("tick", "idle"):
            if getattr(self, f"{name}_ms") == 0:
                unit = "seconds" if name == "tick" else "minutes"
                raise ValueError(f"{name}_{unit} must be a millisecond or more")
        return self
