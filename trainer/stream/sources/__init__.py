"""Where events come from: replays and Kafka."""
