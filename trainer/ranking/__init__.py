"""What trains, streams and evaluates a ranker."""
