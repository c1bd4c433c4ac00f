"""Sources of events: replays of stored datasets, and Kafka topics."""
