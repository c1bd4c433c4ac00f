"""State of a live stream on one rank: open visits, predictions, features, freshness and unused events."""
